"""One file of a teacher's cache: what it holds, how it is written whole, how it is read warily.

A shard is a safetensors file with these tensors, for n samples of together R rows:

- ``ids`` int64 [n], ``lengths`` int64 [n] (rows of each sample, adding up to R) and ``inputs``
  int64 [n] (a digest of what the teacher was shown);
- ``log_probs`` [R, classes], or the k largest of each row, [R, k], and then
- ``indices`` int32 [R, k], the classes that they belong to;

and with the fields of :class:`Header` and :class:`Loss` as text in its header.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import secrets
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import extras

FORMAT = "fastkd teacher cache"
VERSION = 1
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PATTERN = "shard-*.safetensors"


class Header(NamedTuple):
    """What all shards of a cache have in common."""

    classes: int
    top_k: int | None
    """None: all classes are kept."""
    temperature: float
    dtype: torch.dtype
    positions: tuple[int, ...]
    """Shape of a sample's rows: () for one row, (-1,) for a sequence, (64, 64) for an image."""
    teacher: str


class Loss(NamedTuple):
    """What keeping less than everything cost, in the mean over a shard's rows."""

    kl: float
    """KL divergence of what can be read from what the teacher said, in nats."""
    tail: float
    """Probability of the classes that were not kept."""


class Shard(NamedTuple):
    """A shard's content; once read, ``log_probs`` and ``indices`` are mapped from the file."""

    header: Header
    lost: Loss
    ids: Tensor
    lengths: Tensor
    inputs: Tensor
    log_probs: Tensor
    indices: Tensor | None


def write(folder: pathlib.Path, shard: Shard) -> pathlib.Path:
    """Writes a shard under the next free name. It appears under that name whole, or not at all."""
    header, lost = shard.header, shard.lost
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "classes": str(header.classes),
        "top_k": "" if header.top_k is None else str(header.top_k),
        "temperature": repr(header.temperature),
        "positions": json.dumps(header.positions),
        "teacher": header.teacher,
        "kl": repr(lost.kl),
        "tail": repr(lost.tail),
    }
    tensors = {"ids": shard.ids, "lengths": shard.lengths, "inputs": shard.inputs}
    tensors["log_probs"] = shard.log_probs
    if shard.indices is not None:
        tensors["indices"] = shard.indices
    # Not the process's number, which two containers may share.
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        extras.load("safetensors.torch", "train").save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        number = len(list(folder.glob(PATTERN)))
        while True:
            name = folder / f"shard-{number:05d}.safetensors"
            with contextlib.suppress(FileExistsError):  # another process writes here, too
                os.link(part, name)
                break
            number += 1
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(folder)
    return name


def _sync_folder(folder: pathlib.Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: pathlib.Path) -> Shard:
    """Opens a shard; nothing of its rows is read yet.

    Raises:
        ValueError: if it is not a whole, consistent shard; the message names the file and the flaw.
    """
    safetensors = extras.load("safetensors", "train")
    if not path.is_file():  # opening a named pipe would wait for a writer
        raise ValueError(f"{path} is no whole shard of a teacher's cache: it is no regular file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header, lost = _header(file.metadata() or {}, file)
            names = ["ids", "lengths", "inputs", "log_probs"]
            tensors = {name: file.get_tensor(name) for name in names}
            indices = file.get_tensor("indices") if header.top_k is not None else None
    except (ValueError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no whole shard of a teacher's cache: {error}") from None
    shard = Shard(header, lost, **tensors, indices=indices)
    flaw = _flaw(shard)
    if flaw:
        raise ValueError(f"{path} is no whole shard of a teacher's cache: {flaw}")
    return shard


def _header(metadata: dict[str, str], file: Any) -> tuple[Header, Loss]:
    """The header's text as numbers, and the tensors' shapes and dtypes held against it."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its header does not say format: {FORMAT}")
    version = _int(metadata, "version", 1, 2**31)
    if version != VERSION:
        raise ValueError(
            f"it has version {version} of the format, and this fastkd reads version {VERSION}: "
            "update fastkd, or compute the cache anew"
        )
    classes = _int(metadata, "classes", 1, 2**31)
    top_k = _int(metadata, "top_k", 1, classes + 1) if metadata.get("top_k") else None
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    expected = {"ids", "lengths", "inputs", "log_probs"} | ({"indices"} if top_k else set())
    if set(slices) != expected:
        raise ValueError(f"it holds the tensors {sorted(slices)}, not {sorted(expected)}")
    dtype = slices["log_probs"].get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"log_probs have dtype {dtype}, not one of {', '.join(DTYPES)}")
    samples = math.prod(slices["ids"].get_shape())
    rows = ([*slices["log_probs"].get_shape(), 0])[0]
    shapes = {"ids": [samples], "lengths": [samples], "inputs": [samples]}
    shapes["log_probs"] = [rows, top_k or classes]
    if top_k:
        shapes["indices"] = [rows, top_k]
    for name, shape in shapes.items():
        wanted = {"log_probs": dtype, "indices": "I32"}.get(name, "I64")
        found = slices[name]
        if found.get_shape() != shape or found.get_dtype() != wanted:
            raise ValueError(
                f"{name} is {found.get_dtype()} {found.get_shape()}, not {wanted} {shape}"
            )
    header = Header(
        classes,
        top_k,
        _float(metadata, "temperature"),
        DTYPES[dtype],
        _positions(metadata.get("positions", "")),
        metadata.get("teacher", ""),
    )
    if header.temperature == 0.0:
        raise ValueError("its temperature is 0")
    return header, Loss(_float(metadata, "kl"), _float(metadata, "tail"))


def _int(metadata: dict[str, str], key: str, low: int, high: int) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) < high):
        raise ValueError(f"its {key} is {text[:40]!r}")
    return int(text)


def _float(metadata: dict[str, str], key: str) -> float:
    text = metadata.get(key, "")
    value = float(text) if len(text) < 40 else math.nan
    if not 0.0 <= value < math.inf:
        raise ValueError(f"its {key} is {text[:40]!r}")
    return value


def _positions(text: str) -> tuple[int, ...]:
    """() or (-1,) or sizes."""
    sizes = json.loads(text) if len(text) < 200 else None
    if sizes in ([], [-1]):
        return tuple(sizes)
    if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < 2**31 for n in sizes):
        raise ValueError(f"its positions are {text[:40]!r}")
    return tuple(sizes)


def _flaw(shard: Shard) -> str | None:
    """What is wrong with the samples' lengths, or None."""
    rows, lengths, positions = len(shard.log_probs), shard.lengths, shard.header.positions
    if len(lengths) == 0:
        return "it holds no sample"
    if int(lengths.min()) < 0 or int(lengths.max()) > rows or int(lengths.sum()) != rows:
        return f"the samples' lengths do not add up to its {rows} rows"
    if positions != (-1,) and {int(lengths.min()), int(lengths.max())} != {math.prod(positions)}:
        return f"a sample's length is not that of its positions {positions}"
    return None
