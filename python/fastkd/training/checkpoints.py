"""Write checkpoints completely or not at all, and check their files before reading them.

A checkpoint is a folder ``step-00000042``. It is written under another name, synchronised to the
disk and renamed, so that whatever kills the process leaves the one before. One of the same step is
``step-00000042.replaced`` until the new one has its name. It holds numbers and no code: reading one
made by somebody else executes nothing. Its ``files.json`` has the CRC-32 of each other file, by
which :func:`check` finds a damaged file before anything is loaded.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import torch

KEPT = 2
CHECKSUMS = "files.json"
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
            _delete(rest)
        incomplete.mkdir(parents=True)
    barrier()
    fill(incomplete)
    for file in incomplete.rglob("*"):
        _synchronise(file)
    barrier()
    if main:
        write_checksums(incomplete)
        _synchronise(incomplete / CHECKSUMS)
        _synchronise(incomplete)
        replaced = target.with_name(target.name + _REPLACED)
        if os.path.lexists(target):  # of this very step, as at the end of an epoch
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
    """Rename a checkpoint before deleting it, so that a half-deleted one is never read."""
    if os.path.lexists(checkpoint):
        discarded = checkpoint.with_name(_DISCARDED)
        checkpoint.replace(discarded)
        _delete(discarded)


def _delete(path: pathlib.Path) -> None:
    """Delete a folder if it exists. Of a symbolic link, delete the link and not its target."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


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


def write_checksums(folder: pathlib.Path) -> None:
    """Write ``files.json``, the checksums of a checkpoint's other files, for :func:`check`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    checksums = {
        file.relative_to(folder).as_posix(): _checksum(file)
        for file in files
        if file != folder / CHECKSUMS
    }
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))


def check(folder: pathlib.Path) -> None:
    """Compare each file of a checkpoint with its checksum.

    Raises:
        ValueError: if a file is missing, is not a regular file, or has changed.
    """
    for name, expected in _read_object(folder / CHECKSUMS).items():
        file = folder / name
        try:
            actual = _checksum(file)
        except OSError as error:
            raise _unreadable(file, folder, error) from error
        if actual != expected:
            raise _unreadable(file, folder, f"its CRC-32 is {actual}, not {expected}")


def _checksum(file: pathlib.Path) -> str:
    """Compute the CRC-32 of a regular file."""
    if file.exists() and not file.is_file():  # opening a named pipe would wait for a writer
        raise OSError("it is not a regular file")
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _read_object(file: pathlib.Path) -> dict[str, Any]:
    """Read a non-empty JSON object from a checkpoint's file."""
    try:
        if file.exists() and not file.is_file():
            raise OSError("it is not a regular file")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, file.parent, error) from error
    if not isinstance(content, dict) or not content:
        raise _unreadable(file, file.parent, "it must hold a JSON object with at least one entry")
    return content


def _unreadable(file: pathlib.Path, folder: pathlib.Path, reason: object) -> ValueError:
    return ValueError(
        f"{file} cannot be read: {reason}. Delete {folder.name} to resume from the previous "
        "checkpoint, or from the start if there is none"
    )


def about(folder: pathlib.Path, **ours: int) -> dict[str, Any]:
    """Read a checkpoint's ``trainer.json``.

    Raises:
        ValueError: if the file cannot be read, or if one of its values differs from ``ours``.
    """
    file = folder / "trainer.json"
    content = _read_object(file)
    for name, expected in ours.items():
        if name not in content:
            raise _unreadable(file, folder, f"it has no {name}")
        if content[name] != expected:
            raise ValueError(
                f"{folder} has {name} {content[name]}, and this run {expected}. Make the trainer "
                "as it was when the checkpoint was written, or choose another folder"
            )
    return content


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
