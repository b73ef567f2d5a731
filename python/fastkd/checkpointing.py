"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step-00000042``. It is written under another name, synchronised to the
disk and renamed, so that whatever kills the process leaves the one before. One of the same step is
``step-00000042.replaced`` until the new one has its name. It holds numbers and no code: reading one
made by somebody else executes nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch

KEPT = 2
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_INCOMPLETE, _DISCARDED, _REPLACED = ".incomplete", ".discarded", ".replaced"


def all_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The whole checkpoints in a folder, oldest first; what has another name is somebody else's."""
    found = []
    for path in folder.glob("step-*"):
        name = _NAME.fullmatch(path.name)
        if name is not None and path.is_dir():
            found.append((int(name[1]), name[2] is None, path))
    return [path for *_, path in sorted(found)]


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
        replaced = target.with_name(target.name + _REPLACED)
        if target.exists():  # of this very step, as at the end of an epoch
            _discard(replaced)
            target.replace(replaced)
        incomplete.replace(target)
        _synchronise(folder)
        _discard(replaced)
        for old in all_of(folder)[:-KEPT]:
            _discard(old)
    barrier()
    return target


def _discard(checkpoint: pathlib.Path) -> None:
    """Renames before it deletes, so that no half of a checkpoint is taken for one."""
    if checkpoint.exists():
        discarded = checkpoint.with_name(_DISCARDED)
        checkpoint.replace(discarded)
        shutil.rmtree(discarded)


def put(value: Any, file: pathlib.Path) -> None:
    """Writes tensors, numbers, text, and containers of them, having made sure that they come back.

    Raises:
        TypeError: if there is anything else in it, such as a function.
    """
    torch.save(value, file)
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if foreign:
        raise TypeError(
            f"{file.name} would hold {', '.join(foreign)}, but a checkpoint may hold numbers, text "
            "and tensors alone"
        )


def get(file: pathlib.Path) -> Any:
    """What :func:`put` wrote; no code of the file's is executed.

    Raises:
        pickle.UnpicklingError: if there is some in it.
    """
    return torch.load(file, map_location="cpu", weights_only=True)


def about(folder: pathlib.Path, **ours: int) -> dict[str, Any]:
    """What a checkpoint's ``trainer.json`` says.

    Raises:
        ValueError: if it cannot be read, or does not agree with what is ``ours``.
    """
    file = folder / "trainer.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}. Delete {folder.name} to resume from the one before"
        ) from error
    for name, own in ours.items():
        if found.get(name) != own:
            raise ValueError(f"{folder} has {name} {found.get(name)}, and this run {own}")
    return found


def refuse_code(folder: pathlib.Path) -> None:
    """Refuses a checkpoint with files that Accelerate would read in a way that executes code.

    They are those of objects registered with it, and the index of what FSDP saved in shards.
    """
    for file in itertools.chain(folder.glob("custom_checkpoint_*.pkl"), folder.rglob(".metadata")):
        raise ValueError(
            f"{folder.name} has {file.relative_to(folder)}, which Accelerate reads by unpickling, "
            "and that may execute any code. Register no objects with the accelerator, and give "
            'FSDP state_dict_type="FULL_STATE_DICT"'
        )


def _synchronise(path: pathlib.Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
