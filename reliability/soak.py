"""Repeat calls of several kinds, also failing calls, and check that memory does not grow.

``python -m reliability.soak [CALLS]`` repeats each kind of call CALLS times. ``MARGIN`` allows for
pages that an allocator takes late. 100,000 leaked tensors of 3,200 bytes would take 320 MB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastkd
from fastkd._core import autograd

MARGIN = 2 * 2**20
ROWS, CLASSES = 16, 50  # 3,200 bytes of logits


def measure_resident() -> int:
    """Return the resident bytes of the process after it has returned free memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_calls() -> dict[str, Callable[[], object]]:
    """Return each kind of call, on small tensors, by name."""
    student = torch.randn(ROWS, CLASSES, requires_grad=True)
    teacher, labels = torch.randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,))
    wrong = torch.full((ROWS,), CLASSES)

    def refused() -> None:
        try:
            fastkd.loss(student, teacher, wrong)
        except ValueError:
            return
        raise AssertionError("a label out of range was accepted")

    def backward(logits: Tensor | list[Tensor] = teacher, **options: object) -> None:
        fastkd.loss(student, logits, labels, **options).sum().backward()  # type: ignore[arg-type]
        student.grad = None

    def in_python() -> None:
        with autograd.without_cpp():
            backward()

    top = fastkd.TopK(*torch.log_softmax(teacher, -1).topk(8))
    hidden, weight = torch.randn(ROWS, 12, requires_grad=True), torch.randn(CLASSES, 12)

    def sparse() -> None:
        fastkd.loss(student, top, labels).backward()
        student.grad = None

    def heads() -> None:
        fastkd.loss(fastkd.Head(hidden, weight), teacher, labels).backward()
        hidden.grad = None

    return {
        "loss and backward": backward,
        "the slow path in Python": in_python,
        "a loss for each row": lambda: backward(reduction="none"),
        "another divergence": lambda: backward(divergence="jsd"),
        "in place": lambda: fastkd.loss(student * 1, teacher, labels, inplace=True).backward(),
        "several teachers": lambda: backward([teacher, teacher]),
        "a sparse teacher": sparse,
        "linear heads": heads,
        "terms": lambda: fastkd.terms(student, teacher, labels),
        "terms of a sparse teacher": lambda: fastkd.terms(student, top, labels),
        "refused": refused,
    }


def main() -> int:
    """Print the growth of memory for each kind of call; return 1 if a growth exceeds the margin."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    torch.set_num_threads(1)  # on busy processors, several threads would mostly wait for each other
    grown = {}
    for name, call in make_calls().items():
        for _ in range(max(500, count // 50)):
            call()
        before = measure_resident()
        for _ in range(count):
            call()
        grown[name] = measure_resident() - before
        print(f"{name}: {grown[name] / 1024:.0f} KiB after {count} calls", flush=True)
    leaking = [name for name, growth in grown.items() if growth > MARGIN]
    figures = {"calls": count, "largest growth, KiB": max(grown.values()) // 1024}
    print(
        "figures: "
        + json.dumps({**figures, "kinds of calls": len(grown), "failures": len(leaking)})
    )
    return int(bool(leaking))


if __name__ == "__main__":
    sys.exit(main())
