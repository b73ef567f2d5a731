"""Checkpoints that are whole or not there, and random states, for exact resumption.

A checkpoint is a folder ``step-00000042``. It is written under another name, synchronised to the
disk and renamed, so that whatever kills the process leaves the one before.
"""

from __future__ import annotations

import os
import pathlib
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

KEPT = 2
_INCOMPLETE, _DISCARDED = ".incomplete", ".discarded"


def all_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def write(
    folder: pathlib.Path,
    step: int,
    fill: Callable[[pathlib.Path], None],
    *,
    main: bool,
    barrier: Callable[[], None],
) -> pathlib.Path:
    """A new checkpoint, which each process fills; the oldest go.

    Args:
        folder: where checkpoints are; shared by all processes.
        step: its number.
        fill: writes this process's files into the folder it is given.
        main: whether this process is the one that renames.
        barrier: waits for all processes.
    """
    target, incomplete = folder / f"step-{step:08d}", folder / _INCOMPLETE
    if target.exists():  # of this very step, as at the end of an epoch
        return target
    if main:
        for rest in (incomplete, folder / _DISCARDED):
            shutil.rmtree(rest, ignore_errors=True)
        incomplete.mkdir(parents=True)
    barrier()
    fill(incomplete)
    for file in incomplete.rglob("*"):
        _synchronise(file)
    barrier()
    if main:
        _synchronise(incomplete)
        incomplete.replace(target)
        _synchronise(folder)
        for old in all_of(folder)[:-KEPT]:
            old.replace(folder / _DISCARDED)
            shutil.rmtree(folder / _DISCARDED)
    barrier()
    return target


def _synchronise(path: pathlib.Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rng_state() -> dict[str, Any]:
    """The states of Python's, torch's and, where it is in use, NumPy's generators."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` gave."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])


def generators(loader: Any) -> Iterator[torch.Generator]:
    """The generators of its own from which a loader draws its order."""
    seen: list[torch.Generator] = []
    for name in ("generator", "synchronized_generator"):
        found = getattr(loader, name, None)
        if isinstance(found, torch.Generator) and not any(found is other for other in seen):
            seen.append(found)
            yield found


def order_state(loader: Any) -> dict[str, Any]:
    """All that decides which batches the next pass over a loader gives."""
    own: list[Tensor] = [generator.get_state() for generator in generators(loader)]
    return {"rng": rng_state(), "own": own}


def set_order_state(loader: Any, state: dict[str, Any]) -> None:
    """Puts back what :func:`order_state` gave."""
    set_rng_state(state["rng"])
    for generator, own in zip(generators(loader), state["own"], strict=True):
        generator.set_state(own)
