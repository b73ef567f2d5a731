"""Run core tests on several versions of Python and torch, each pair in its own environment.

A source distribution is built once. Each pair builds a wheel from the source distribution with the
pair's torch, and runs the tests on the installed wheel. A pair also tests the wheel of the previous
pair with the same Python. The stable ABI promises that this wheel works with both pairs' torches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
# The oldest and the newest Python run with the oldest and the newest torch that support the Python.
# The Pythons in between run with one torch each, because a pair takes gigabytes.
PAIRS = ("3.10:2.10.0", "3.10:2.14.1", "3.11:2.13.0", "3.12:2.11.0", "3.13:2.10.0", "3.13:2.15.0")
CORE = [
    *("loss", "autograd", "transforms", "numerics", "terms", "determinism"),
    *("bad_input", "compile", "package", "topk", "linear", "linear_training", "learned"),
]
# Tests of a wheel that was built with a torch other than the installed torch.
FOREIGN = ["loss", "autograd", "terms"]
BUILD = ["scikit-build-core>=0.11", "pybind11>=2.13", "cmake>=3.25", "ninja>=1.11"]
# torch.compile of older torches needs setuptools, and does not say so if setuptools is missing.
TESTS = ["pytest>=8", "hypothesis>=6.100", "numpy>=1.26", "setuptools"]


class Pair(NamedTuple):
    """Name a version of Python and a version of torch."""

    python: str
    torch: str

    def __str__(self) -> str:
        """Return the name of the pair in a report."""
        return f"Python {self.python}, torch {self.torch}"


def run_uv(*arguments: str | Path, log: Path) -> None:
    """Run uv, whose environments share files, because a CUDA build of torch takes 5 GB."""
    run([sys.executable, "-m", "uv", *map(str, arguments)], log)


def run(command: list[str], log: Path, folder: Path = ROOT) -> str:
    """Run a command; append its output to the log, and return the output."""
    # Without these variables, neither Python nor uv uses the caller's packages.
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    environment |= {"UV_NATIVE_TLS": "1", "UV_PYTHON_DOWNLOADS": "never", "OMP_NUM_THREADS": "2"}
    if shutil.which("ccache"):  # the kernels depend on neither Python nor torch: compile them once
        environment["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode:
        last = [line for line in done.stdout.strip().splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{command[0]} gave {done.returncode}: {' '.join(last)}")
    return done.stdout


def find_interpreter(version: str) -> str | None:
    """Return the path of a working Python of this version, or None."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    others = [shutil.which(f"python{version}"), sys.executable]
    candidates = [*map(str, sorted(root.glob(f"{version}.*/bin/python{version}"))), *others]
    for candidate in filter(None, candidates):
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def build_source_distribution() -> Path:
    """Build the source distribution, and return the folder of its unpacked tarball."""
    shutil.rmtree(FOLDER / "source", ignore_errors=True)
    log = FOLDER / "sdist.log"
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(FOLDER / "source"), "."]
    run(command, log)
    (tarball,) = (FOLDER / "source").glob("*.tar.gz")
    with tarfile.open(tarball) as archive:
        archive.extractall(FOLDER / "source", filter="data")
    return tarball.parent / tarball.name.removesuffix(".tar.gz")


def run_tests(python: Path, names: list[str], source: Path, log: Path) -> str:
    """Run test files of the source distribution; return pytest's last line."""
    files = [f"tests/test_{name}.py" for name in names]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    closing = run(command, log, source).strip().splitlines()[-1]
    return re.sub(r" in [\d.]+s.*|=", "", closing).strip()


def test_pair(pair: Pair, source: Path, foreign: Path | None) -> tuple[dict[str, str], Path | None]:
    """Test a pair of Python and torch; return the results, and the wheel that was built."""
    row = {"python": pair.python, "torch": pair.torch}
    row["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    executable = find_interpreter(pair.python)
    if executable is None:
        return {**row, "result": "not tried: this Python is not installed"}, None
    name = f"{pair.python}-{pair.torch}"
    folder, log = FOLDER / name, FOLDER / f"{name}.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    python, wheels = folder / "bin" / "python", FOLDER / "wheels" / name
    shutil.rmtree(wheels, ignore_errors=True)
    wheel = None
    try:
        run_uv("venv", "--quiet", "--python", executable, folder, log=log)
        install = ("pip", "install", "--quiet", "--python", python)
        run_uv(*install, f"torch=={pair.torch}", *BUILD, *TESTS, log=log)
        no_cuda = "--config-setting=cmake.define.FASTKD_CUDA=OFF"  # the tests run on a CPU
        path = f"PATH={folder / 'bin'}:{os.environ['PATH']}"
        build = [sys.executable, "-m", "uv", "build", "--wheel", "--no-build-isolation", no_cuda]
        run(["env", path, *build, "--python", str(python), "-o", str(wheels), str(source)], log)
        (wheel,) = wheels.glob("*.whl")
        run_uv(*install, f"{wheel}[train,report]", log=log)
        row["result"] = run_tests(python, CORE, source, log)
        if foreign is not None:
            run_uv(*install, "--no-deps", "--reinstall", foreign, log=log)
            row["foreign"] = f"built with {foreign.parent.name.split('-')[1]}: "
            row["foreign"] += run_tests(python, FOREIGN, source, log)
    except (RuntimeError, OSError) as error:
        row["result" if "result" not in row else "foreign"] = f"FAILED: {error}"
    shutil.rmtree(folder, ignore_errors=True)
    return row, wheel


def main() -> int:
    """Test the pairs of Python and torch that the command line names, or ``PAIRS``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="PYTHON:TORCH")
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = build_source_distribution()
    rows: list[dict[str, str]] = []
    last: dict[str, Path] = {}
    for text in parser.parse_args().pairs:
        pair = Pair(*text.split(":"))
        row, wheel = test_pair(pair, source, last.get(pair.python))
        if wheel is not None:
            last[pair.python] = wheel
        print(f"{pair}: {row['result']}; {row.get('foreign', '')}", flush=True)
        rows = store_results(row)
    failed = sum("FAILED" in str(row) for row in rows)
    print("figures: " + json.dumps({"pairs": rows, "failed": failed}))
    return int(failed > 0)


def store_results(row: dict[str, str]) -> list[dict[str, str]]:
    """Store a pair's results in place of its older results; return the results of all pairs."""
    path = FOLDER / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    keys = ("python", "torch")
    rows = [old for old in rows if any(old[key] != row[key] for key in keys)] + [row]
    rows.sort(key=lambda row: [[int(n) for n in row[key].split(".")] for key in keys])
    path.write_text(json.dumps(rows))
    return rows


if __name__ == "__main__":
    sys.exit(main())
