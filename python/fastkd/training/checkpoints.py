"""Write checkpoints atomically, and check a checkpoint's files before reading them.

A checkpoint is a folder such as ``step-00000042``. The folder is written as ``.incomplete``,
synchronized to the disk and renamed, so the previous checkpoint survives if the process is killed.
An older checkpoint of the same step is ``step-00000042.replaced`` until the new checkpoint is
renamed. Reading a file executes no code from the file. ``files.json`` has the CRC-32 of every other
file of the checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

from fastkd.teachers.shard import synchronize

KEEP = 2  # number of newest checkpoints that are not deleted
CHECKSUMS, METADATA = "files.json", "trainer.json"
_INCOMPLETE, _DISCARDED = ".incomplete", ".discarded"


def list_complete(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    complete = [
        (int(name[1]), name[2] is None, path)
        for path in folder.glob("step-*")
        if (name := re.fullmatch(r"step-(\d{8,})(\.replaced)?", path.name)) and path.is_dir()
    ]
    return [path for *_, path in sorted(complete)]


def write(
    folder: pathlib.Path, step: int, fill: Callable[[pathlib.Path], None], accelerator: Any
) -> pathlib.Path:
    """Write a checkpoint into ``folder``, delete old checkpoints, and return the checkpoint's path.

    Every process must call this function, which calls ``fill`` with a folder for the files.
    """
    target, incomplete = folder / f"step-{step:08d}", folder / _INCOMPLETE
    if accelerator.is_main_process:
        for leftover in (incomplete, folder / _DISCARDED):
            _delete(leftover)
        incomplete.mkdir(parents=True)
    accelerator.wait_for_everyone()
    fill(incomplete)
    for file in incomplete.rglob("*"):
        synchronize(file)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_checksums(incomplete)
        synchronize(incomplete / CHECKSUMS)
        synchronize(incomplete)
        replaced = target.with_name(f"{target.name}.replaced")
        if os.path.lexists(target):
            _discard(replaced)
            target.replace(replaced)
        incomplete.replace(target)
        synchronize(folder)
        _discard(replaced)
        for old in list_complete(folder)[:-KEEP]:
            _discard(old)
    accelerator.wait_for_everyone()
    return target


def _discard(checkpoint: pathlib.Path) -> None:
    """Rename a checkpoint and then delete it, so that no half-deleted checkpoint is read."""
    if os.path.lexists(checkpoint):
        _delete(checkpoint.replace(checkpoint.with_name(_DISCARDED)))


def _delete(path: pathlib.Path) -> None:
    """Delete a folder if it exists, or a symbolic link without its target."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def save(value: Any, file: pathlib.Path) -> None:
    """Write tensors, numbers and text, also in containers; raise TypeError for other objects."""
    torch.save(value, file)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        raise TypeError(
            f"{file.name} would hold {', '.join(unsafe)}, but a checkpoint may hold only numbers, "
            "text and tensors"
        )


def load(file: pathlib.Path) -> Any:
    """Read a file that :func:`save` wrote; raise pickle.UnpicklingError if the file holds code."""
    return torch.load(file, map_location="cpu", weights_only=True)


def write_checksums(folder: pathlib.Path) -> None:
    """Write ``files.json``, which has the checksum of every other file in ``folder``."""
    checksums = {
        file.relative_to(folder).as_posix(): _checksum(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / CHECKSUMS
    }
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))


def read_metadata(folder: pathlib.Path, expected: Mapping[str, int]) -> dict[str, Any]:
    """Check all files of a checkpoint before anything is loaded; return its ``trainer.json``.

    Raise ValueError if a file is missing or damaged, or if ``trainer.json`` differs from
    ``expected``.
    """
    check_no_code(folder)
    file = folder / CHECKSUMS
    try:
        with _open(file) as stream:
            checksums = json.load(stream)
        if not isinstance(checksums, dict) or METADATA not in checksums:
            raise ValueError(f"it must hold a JSON object that names {METADATA}")
        for name, checksum in checksums.items():
            file = folder / name
            if (actual := _checksum(file)) != checksum:
                raise ValueError(f"its CRC-32 is {actual}, not {checksum}")
        file = folder / METADATA
        content: dict[str, Any] = json.loads(file.read_bytes())
        differing = [name for name, value in expected.items() if content[name] != value]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}. Delete {folder.name} to resume from the previous "
            "checkpoint, or from the start if there is none"
        ) from error
    for name in differing:
        raise ValueError(
            f"{folder} has {name} {content[name]}, and this run {expected[name]}. Make the trainer "
            "as it was when the checkpoint was written, or choose another folder"
        )
    return content


def _checksum(file: pathlib.Path) -> str:
    crc = 0
    with _open(file) as stream:
        while chunk := stream.read(2**20):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _open(file: pathlib.Path) -> BinaryIO:
    """Open a regular file; opening a named pipe would wait for a writer."""
    if not file.is_file():
        raise OSError("it is missing, or is not a regular file")
    return file.open("rb")


def check_no_code(folder: pathlib.Path) -> None:
    """Raise ValueError for files that Accelerate would unpickle without restrictions.

    Accelerate writes registered objects and FSDP's sharded state as pickles.
    """
    for file in itertools.chain(folder.glob("custom_checkpoint_*.pkl"), folder.rglob(".metadata")):
        raise ValueError(
            f"{folder.name} has {file.relative_to(folder)}, which Accelerate reads by unpickling, "
            "and that may execute any code. Register no objects with the accelerator, and give "
            'FSDP state_dict_type="FULL_STATE_DICT"'
        )
