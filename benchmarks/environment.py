"""Describe the environment of a measurement: device, versions, commit, clocks and load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastkd.__main__ import info

PACKAGES = ("torch", "fastkd", "triton", "liger-kernel", "torchdistill", "torchtune", "numpy")


def get_cpu_model() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(
                    re.sub(r"\(R\)|\(TM\)|CPU|Processor", " ", line.split(":", 1)[1]).split()
                )
    except OSError:
        pass
    return platform.processor() or platform.machine()


def get_device_name(device: str) -> str:
    """Return the GPU's name, or the processor's name and the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return f"{get_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def make_slug(device: str) -> str:
    """Return the name of the results folder: the device and, for a CPU, the instruction set."""
    name = get_device_name(device)
    if device == "cpu":
        name += " " + info()["CPU kernels"].partition(" ")[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def get_commit() -> str:
    """Return the Git commit, or FASTKD_COMMIT outside a repository.

    The text ends in "with changes" if files other than README.md and benchmarks/ have changed.
    """
    if not (head := _run("git", "rev-parse", "--short", "HEAD")):
        return os.environ.get("FASTKD_COMMIT", "unknown")
    changed = _run("git", "status", "--porcelain", "--", "..", ":!../benchmarks", ":!../README.md")
    return head + (" with changes" if changed else "")


def get_versions() -> dict[str, str]:
    """Return the version of each package of ``PACKAGES``, or "not installed"."""
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not installed"
    packages["torch"] = torch.__version__
    return packages


def read_clocks(device: str) -> dict[str, str]:
    """Return the current clock rates; of a GPU also the power, temperature and driver."""
    if device == "cuda":
        fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
        line = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0")
        return dict(
            zip(fields.split(","), (part.strip() for part in line.split(",")), strict=False)
        )
    speeds = re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"))
    return {"cpu MHz": ", ".join(speeds[:4])} if speeds else {}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def read_cpu_ticks() -> tuple[int, int]:
    """Return the ticks that a virtual machine's host took from the processors, and all ticks."""
    first = _read("/proc/stat").partition("\n")[0].split()[1:]
    ticks = [int(value) for value in first]
    return (ticks[7] if len(ticks) > 7 else 0), sum(ticks[:8])


def describe(device: str) -> dict[str, Any]:
    """Return facts about the device, the software and the current load."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "device": get_device_name(device),
        "kind": device,
        "slug": make_slug(device),
        "cpu": get_cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": get_commit(),
        "versions": get_versions(),
        "fastkd": info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "clocks at the start": read_clocks(device),
        "load at the start": round(load, 2),
    }
