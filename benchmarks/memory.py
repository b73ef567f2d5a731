"""Measure the peak memory of a call on a CPU, in a child process.

Linux stores the peak resident memory of a process (VmHWM), and resets the peak on request
(clear_refs). Each baseline runs once, to load and compile its code. Then the child returns free
memory to the system, resets the peak, and runs the baseline again. The result is the new peak minus
the memory before the second run. The first run's gradient stays alive, because fastkd would recycle
the gradient's memory. MALLOC_MMAP_THRESHOLD_ makes glibc return the memory of a large tensor when
the tensor is freed. Otherwise free memory between tensors would count.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import baselines, measure
from benchmarks.cases import Case


def read_status(field: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def release_free_memory() -> None:
    """Return free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure_peaks(case: Case, names: list[str]) -> dict[str, float | None]:
    """Return each baseline's peak memory in tensors of logits, or None if the baseline fails."""
    result: dict[str, float | None] = {}
    for name in names:
        baseline = baselines.find_baseline(name)
        try:
            inputs = measure.make_inputs(case, "cpu", 0)
            step = measure.Step(case, baseline.make(case), [inputs], baseline.non_leaf)
            held = step.run(inputs)
            step.sets = [measure.make_inputs(case, "cpu", 1)]
            del inputs
            release_free_memory()
            before = read_status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            step()
            result[name] = max(0, read_status("VmHWM") - before) / case.tensor_bytes
            del held
        except Exception:
            result[name] = None
    return result


def measure_peaks_in_child(case: Case, names: list[str], threads: int) -> dict[str, float | None]:
    """Return ``measure_peaks`` of a child process, or None for each baseline if the child fails."""
    arguments = [json.dumps(case.asdict()), str(threads), *names]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    folder = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder,
            check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return dict.fromkeys(names)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(measure_peaks(Case(**json.loads(sys.argv[1])), sys.argv[3:])))
