"""Write and read shards, the files of a teacher cache.

A shard is a safetensors file with these tensors, for n samples with R rows in total:

- ``ids`` int64 [n];
- ``lengths`` int64 [n], the rows of each sample, which add up to R;
- ``inputs`` int64 [n], a digest of the teacher's inputs;
- ``checksums`` int64 [n], the CRC-32 of the sample's rows of ``log_probs``, then of ``indices``;
- ``log_probs`` [R, classes], or [R, k] for the k largest of each row;
- ``indices`` int32 [R, k], the classes of these k log-probabilities; absent for all classes.

The file's header holds as text ``format``, ``version``, ``kl``, ``tail``, ``crc32``, and the fields
of :class:`Header` except ``dtype``, which is the dtype of ``log_probs``.
``crc32`` covers everything but ``log_probs`` and ``indices`` (:func:`_compute_crc32`), and
:func:`read` checks it. A :class:`fastkd.teachers.TeacherCache` checks a sample when it first reads
the sample. A CRC-32 detects damage, such as a flipped bit, but not forgery, because a forger can
compute the CRC-32 of the forged data.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import secrets
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import extras
from fastkd.teachers.digests import view_bytes

FORMAT = "fastkd teacher cache"
VERSION = 3
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PATTERN = "shard-*.safetensors"


class Header(NamedTuple):
    """Hold the options that all shards of a cache have in common."""

    classes: int
    top_k: int | None
    """Number of stored classes of each row; None if all classes are stored."""
    temperature: float
    dtype: torch.dtype
    positions: tuple[int, ...]
    """Shape of a sample's rows: () for one row, (-1,) for a sequence, (64, 64) for an image."""
    teacher: str


class Shard(NamedTuple):
    """Hold a shard's content; :func:`read` memory-maps ``log_probs`` and ``indices``."""

    header: Header
    kl: float
    """KL(teacher || distribution that a reader reconstructs), mean over rows, in nats."""
    tail: float
    """Probability of the classes that are not stored, mean over rows."""
    ids: Tensor
    lengths: Tensor
    inputs: Tensor
    log_probs: Tensor
    indices: Tensor | None = None


def compute_checksums(shard: Shard, starts: Tensor, lengths: Tensor) -> Tensor:
    """Compute the CRC-32 of each sample's ``log_probs`` and, if any, ``indices``.

    Sample i has ``lengths[i]`` rows from row ``starts[i]`` on.
    """
    sums = [0] * len(starts)
    for tensor in (shard.log_probs, shard.indices):
        if tensor is not None:
            data, size = view_bytes(tensor), tensor.shape[1] * tensor.element_size()
            for i, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
                sums[i] = zlib.crc32(data[start * size : (start + n) * size], sums[i])
    return torch.tensor(sums, dtype=torch.int64)


def _compute_crc32(texts: Mapping[str, str], shard: Shard, checksums: Tensor) -> str:
    """Compute the CRC-32 of the header and of all tensors but ``log_probs`` and ``indices``."""
    named = sorted((key, text) for key, text in texts.items() if key != "crc32")
    crc = zlib.crc32(json.dumps([named, str(shard.header.dtype)]).encode())
    for tensor in (shard.ids, shard.lengths, shard.inputs, checksums):
        crc = zlib.crc32(view_bytes(tensor), crc)
    return f"{crc:08x}"


def write(folder: pathlib.Path, shard: Shard) -> None:
    """Write a shard to a file with the next free name, completely or not at all."""
    header = shard.header
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "classes": str(header.classes),
        "top_k": str(header.top_k or ""),
        "temperature": str(header.temperature),
        "positions": json.dumps(header.positions),
        "teacher": header.teacher,
        "kl": str(shard.kl),
        "tail": str(shard.tail),
    }
    starts = shard.lengths.cumsum(0) - shard.lengths
    checksums = compute_checksums(shard, starts, shard.lengths)
    metadata["crc32"] = _compute_crc32(metadata, shard, checksums)
    fields = {**shard._asdict(), "checksums": checksums}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    # The name is random, not the process id, which two containers may share.
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        extras.load("safetensors.torch", "train").save_file(tensors, part, metadata)
        synchronize(part)
        for number in itertools.count(len(list(folder.glob(PATTERN)))):
            with contextlib.suppress(FileExistsError):  # another process took the name
                os.link(part, folder / f"shard-{number:05d}.safetensors")
                break
    finally:
        part.unlink(missing_ok=True)
    synchronize(folder)


def synchronize(path: pathlib.Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: pathlib.Path) -> tuple[Shard, Tensor]:
    """Open a shard without reading the rows; return the shard and the checksums of its samples."""
    safetensors = extras.load("safetensors", "train")
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            raise ValueError("it is not a regular file")
        with safetensors.safe_open(path, "pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            header = _read_header(texts, file)
            kl, tail = (_parse(texts, name, float, 0.0, math.inf) for name in ("kl", "tail"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksums = tensors.pop("checksums")
        shard = Shard(header, kl, tail, **tensors)
        rows, lengths, positions = len(shard.log_probs), shard.lengths, header.positions
        if len(lengths) == 0:
            raise ValueError("it holds no sample")
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > rows or int(lengths.sum()) != rows:
            raise ValueError(f"the samples' lengths do not add up to its {rows} rows")
        if positions != (-1,) and {low, high} != {math.prod(positions)}:
            raise ValueError(f"a sample's length is not that of its positions {positions}")
        if _compute_crc32(texts, shard, checksums) != texts.get("crc32"):
            raise ValueError("its crc32 does not match its header, ids, lengths, inputs, checksums")
    except (ValueError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a complete shard of a teacher's cache: {error}") from None
    return shard, checksums


def _read_header(texts: dict[str, str], file: Any) -> Header:
    """Parse the header's texts, and check the tensors' shapes and dtypes against them."""
    if texts.get("format") != FORMAT:
        raise ValueError(f"its header does not say format: {FORMAT}")
    version = _parse(texts, "version", int, 1, 2**31)
    if version != VERSION:
        raise ValueError(
            f"it has version {version} of the format, and this fastkd reads version {VERSION}: "
            "update fastkd, or recompute the cache"
        )
    classes = _parse(texts, "classes", int, 1, 2**31)
    top_k = _parse(texts, "top_k", int, 1, classes + 1) if texts.get("top_k") else None
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    actual = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    dtype = actual["log_probs"][0] if "log_probs" in actual else ""
    samples, rows = (actual.get(name, ("", []))[1][:1] for name in ("ids", "log_probs"))
    expected = {name: ("I64", samples) for name in ("ids", "lengths", "inputs", "checksums")}
    wanted = dtype if dtype in DTYPES else "/".join(DTYPES)
    expected["log_probs"] = (wanted, [*rows, top_k or classes])
    if top_k is not None:
        expected["indices"] = ("I32", [*rows, top_k])
    if actual != expected or not samples:
        shown = (
            ", ".join(f"{name} is {kind} {shape}" for name, (kind, shape) in sorted(each.items()))
            for each in (actual, expected)
        )
        raise ValueError(f"it holds the tensors {'; not '.join(shown)}")
    temperature = _parse(texts, "temperature", float, 0.0, math.inf)
    if temperature == 0.0:
        raise ValueError("its temperature is 0")
    text = texts.get("positions", "")  # [], [-1] or a list of sizes
    sizes: Any = json.loads(text) if len(text) < 200 else None
    is_list = isinstance(sizes, list) and all(type(n) is int and 0 < n < 2**31 for n in sizes)
    if not is_list and sizes != [-1]:
        raise ValueError(f"its positions are {text[:40]!r}")
    teacher = texts.get("teacher", "")
    return Header(classes, top_k, temperature, DTYPES[dtype], tuple(sizes), teacher)


def _parse(texts: dict[str, str], key: str, kind: Any, low: float, high: float) -> Any:
    """Return a text of the header as a number; raise unless low <= number < high."""
    text = texts.get(key, "")[:40]
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value < high:
            return value
    raise ValueError(f"its {key} is {text!r}")
