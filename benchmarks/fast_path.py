"""Measure how much longer calls take without autograd in C++; ``--write`` updates docs/install.md.

Loss and backward pass run on one thread, in turns with autograd in C++ and with autograd in Python.
Each figure is the ratio of the shortest processor times, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import baselines, cases, environment, measure
from fastkd._core import autograd, native

PAGE = Path(__file__).parents[1] / "docs" / "install.md"
BEGIN, END = "<!-- fast path:begin -->", "<!-- fast path:end -->"
SHAPES = ((8, 10), (128, 100), (1024, 1000))
ROUNDS, CALLS = 60, 200


def measure_time(step: measure.Step, calls: int) -> float:
    """Return the mean processor seconds of a call, after one warm-up call."""
    step()
    start = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - start) / calls


def compare(rows: int, classes: int) -> float:
    """Return the time with autograd in Python divided by the time with autograd in C++."""
    case = cases.Case("", rows, classes)
    step = measure.Step(case, baselines.fused(case), [measure.make_inputs(case, "cpu", 0)])
    calls = max(5, CALLS * 80 // (rows * classes))
    cpp, python = [], []
    for _ in range(ROUNDS):
        cpp.append(measure_time(step, calls))
        with autograd.without_cpp():
            python.append(measure_time(step, calls))
    return min(python) / min(cpp)


def main() -> None:
    """Print a sentence with the ratios; with ``--write``, put the sentence into docs/install.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="rewrite the sentence in docs/install.md"
    )
    write = parser.parse_args().write
    if native.EAGER is None:
        raise SystemExit(f"fast path: {native.FAST_PATH}")
    torch.set_num_threads(1)
    ratios = {shape: compare(*shape) for shape in SHAPES}
    listed = ", ".join(
        f"{ratio:.1f}x the time for {rows} x {n}" for (rows, n), ratio in ratios.items()
    )
    sentence = (
        f"Without the fast path, loss and backward pass take longer: {listed} logits "
        f"(rows x classes; {environment.get_device_name('cpu')}, "
        f"torch {torch.__version__}, processor time)."
    )
    print(sentence)
    if write:
        head, rest = PAGE.read_text().split(BEGIN)
        tail = rest.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{sentence}\n{END}{tail}")


if __name__ == "__main__":
    main()
