"""Measure the peak memory of loading and calling a model on a CPU."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import pathlib
import re
from typing import Any

import torch
from torch import nn

from fastkd import batches, deployment

_PROCESS = pathlib.Path("/proc/self")


def measure_peak_memory(model: nn.Module, inputs: Any) -> int | None:
    """Return the peak growth of resident memory while a copy of ``model`` is made and called.

    To copy a program means to load the program again. The first of two copies warms up libraries
    and caches, and the second copy is measured. Memory is counted in whole pages, some of which the
    process already holds.

    Returns:
        The bytes. None if the system is not Linux, or if the model cannot be copied (such as a
        program in memory) or called on the CPU.
    """
    if isinstance(model, deployment.DeployedModel) and not model.is_file:
        return None
    growth = None
    for _ in range(2):
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # so that the copy reuses no freed memory
        try:
            (_PROCESS / "clear_refs").write_text("5")  # sets VmHWM, the peak, to the current size
            before = _read_status("VmRSS")
            _call_copy(model, inputs)
            growth = max(0, _read_status("VmHWM") - before)
        except Exception:  # a copied or called module may raise any exception
            return None
    return growth


def _call_copy(model: nn.Module, inputs: Any) -> None:
    duplicate = copy.deepcopy(model).to("cpu")
    with batches.evaluating(duplicate):
        moved = batches.to(inputs, torch.device("cpu"), batches.dtype_of(duplicate))
        batches.logits(duplicate, moved)


def _read_status(key: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes."""
    match = re.search(rf"^{key}:\s*(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {key}")
    return 1024 * int(match[1])
