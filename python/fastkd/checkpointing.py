"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step-00000042``. It is written under another name, synchronised to the
disk and renamed, so that whatever kills the process leaves the one before.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable

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
