"""Write and read shards, the files of a teacher cache.

A shard is a safetensors file with these tensors, for n samples with R rows in total:

- ``ids`` int64 [n], ``lengths`` int64 [n] (rows of each sample, adding up to R) and ``inputs``
  int64 [n] (a digest of the teacher's inputs);
- ``log_probs`` [R, classes], or the k largest of each row, [R, k], and then
- ``indices`` int32 [R, k], the classes of these k;
- ``checksums`` int64 [G], one CRC-32 for each ``group`` rows of ``log_probs`` and ``indices``.

The file's header holds the fields of :class:`Header` and :class:`Distortion`, ``group`` and
``crc32`` as text. ``crc32`` covers everything but ``log_probs`` and ``indices`` (:func:`_crc32`).
:func:`read` checks ``crc32``; :meth:`Checksums.check` checks a group of rows when one of them is
first read. A CRC-32 detects damage, such as a flipped bit. It does not detect forgery: a forger can
compute it, too.
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
VERSION = 2
GROUP_BYTES = 2**16
"""Size of a group of rows, which has one checksum: a group is read to check one of its rows."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PATTERN = "shard-*.safetensors"


class Header(NamedTuple):
    """The options that all shards of a cache have in common."""

    classes: int
    top_k: int | None
    """None: all classes are stored."""
    temperature: float
    dtype: torch.dtype
    positions: tuple[int, ...]
    """Shape of a sample's rows: () for one row, (-1,) for a sequence, (64, 64) for an image."""
    teacher: str


class Distortion(NamedTuple):
    """The error of dropping classes and rounding, mean over a shard's rows."""

    kl: float
    """KL(teacher || distribution that a reader reconstructs), in nats."""
    tail: float
    """Probability of the classes that are not stored."""


class Shard(NamedTuple):
    """A shard's content; :func:`read` maps ``log_probs`` and ``indices`` from the file."""

    header: Header
    distortion: Distortion
    ids: Tensor
    lengths: Tensor
    inputs: Tensor
    log_probs: Tensor
    indices: Tensor | None = None


class Checksums:
    """Check a shard's rows by the CRC-32 of each group of rows, each group once."""

    def __init__(self, path: pathlib.Path, shard: Shard, group: int, expected: Tensor) -> None:
        """Store the ``expected`` checksums, int64 [G], of groups of ``group`` rows."""
        self._path, self._shard, self._group, self._expected = path, shard, group, expected
        self._unchecked = torch.ones(len(expected), dtype=torch.bool)

    def check(self, rows: Tensor) -> None:
        """Check the groups that contain ``rows``, int64 [n], unless they were checked before.

        Raises:
            ValueError: if rows of the file have changed since its checksums were computed.
        """
        groups = torch.div(rows, self._group, rounding_mode="floor")
        new = torch.unique(groups[self._unchecked[groups]])
        if not len(new):
            return
        differs = _compute_checksums(self._shard, self._group, new) != self._expected[new]
        if bool(differs.any()):
            first = int(new[differs][0]) * self._group
            last = min(first + self._group, len(self._shard.log_probs)) - 1
            raise ValueError(
                f"{self._path} is damaged: the checksum of its rows {first} to {last} is wrong. "
                "Delete the file and run precompute again, which computes the missing samples"
            )
        self._unchecked[new] = False


def _compute_checksums(shard: Shard, group: int, numbers: Tensor) -> Tensor:
    """Compute the CRC-32 of the groups with these indices, as int64 [len(numbers)]."""
    tensors = [part for part in (shard.log_probs, shard.indices) if part is not None]
    sizes = [group * part.shape[1] * part.element_size() for part in tensors]
    parts = [view_bytes(part) for part in tensors]
    sums = []
    for number in numbers.tolist():
        crc = 0
        for data, size in zip(parts, sizes, strict=True):
            crc = zlib.crc32(data[number * size : (number + 1) * size], crc)
        sums.append(crc)
    return torch.tensor(sums, dtype=torch.int64)


def _crc32(texts: Mapping[str, str], shard: Shard, checksums: Tensor) -> str:
    """Compute the CRC-32 of the header's texts, the log_probs' dtype and the small tensors."""
    named = sorted((key, text) for key, text in texts.items() if key != "crc32")
    crc = zlib.crc32(json.dumps([named, str(shard.header.dtype)]).encode())
    for tensor in (shard.ids, shard.lengths, shard.inputs, checksums):
        crc = zlib.crc32(view_bytes(tensor), crc)
    return f"{crc:08x}"


def write(folder: pathlib.Path, shard: Shard) -> pathlib.Path:
    """Write a shard under the next free name, completely or not at all."""
    header = shard.header
    tensors = {"log_probs": shard.log_probs}
    if shard.indices is not None:
        tensors["indices"] = shard.indices
    size = sum(part.shape[1] * part.element_size() for part in tensors.values())
    group = max(1, GROUP_BYTES // size)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "classes": str(header.classes),
        "top_k": "" if header.top_k is None else str(header.top_k),
        "temperature": repr(header.temperature),
        "positions": json.dumps(header.positions),
        "teacher": header.teacher,
        "kl": repr(shard.distortion.kl),
        "tail": repr(shard.distortion.tail),
        "group": str(group),
    }
    numbers = torch.arange(_count_groups(len(shard.log_probs), group))
    checksums = _compute_checksums(shard, group, numbers)
    metadata["crc32"] = _crc32(metadata, shard, checksums)
    tensors |= {"ids": shard.ids, "lengths": shard.lengths, "inputs": shard.inputs}
    tensors["checksums"] = checksums
    # A random name: processes in two containers may have the same process number.
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        extras.load("safetensors.torch", "train").save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        for number in itertools.count(len(list(folder.glob(PATTERN)))):
            path = folder / f"shard-{number:05d}.safetensors"
            with contextlib.suppress(FileExistsError):  # another process took the name
                os.link(part, path)
                break
    finally:
        part.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def _count_groups(rows: int, group: int) -> int:
    return -(-rows // group)  # the last group may have fewer rows


def read(path: pathlib.Path) -> tuple[Shard, Checksums]:
    """Open a shard without reading its rows; call :meth:`Checksums.check` before you read some.

    Raises:
        ValueError: if ``path`` is not a complete, consistent shard; the message names the file and
            the error.
    """
    safetensors = extras.load("safetensors", "train")
    try:
        if not path.is_file():  # opening a named pipe would wait for a writer
            raise ValueError("it is not a regular file")
        with safetensors.safe_open(path, "pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            header, distortion, group = _read_header(texts, file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksums = tensors.pop("checksums")
        shard = Shard(header, distortion, **tensors)
        _check_lengths(shard)
        if _crc32(texts, shard, checksums) != texts.get("crc32"):
            raise ValueError("its crc32 does not match its header, ids, lengths, inputs, checksums")
    except (ValueError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a complete shard of a teacher's cache: {error}") from None
    return shard, Checksums(path, shard, group, checksums)


def _read_header(metadata: dict[str, str], file: Any) -> tuple[Header, Distortion, int]:
    """Parse the header's texts, and check the tensors' shapes and dtypes against them."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its header does not say format: {FORMAT}")
    version = _parse_int(metadata, "version", 1, 2**31)
    if version != VERSION:
        raise ValueError(
            f"it has version {version} of the format, and this fastkd reads version {VERSION}: "
            "update fastkd, or recompute the cache"
        )
    classes = _parse_int(metadata, "classes", 1, 2**31)
    top_k = _parse_int(metadata, "top_k", 1, classes + 1) if metadata.get("top_k") else None
    group = _parse_int(metadata, "group", 1, 2**31)
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    names = {"ids", "lengths", "inputs", "log_probs", "checksums", *(["indices"] if top_k else [])}
    if set(slices) != names:
        raise ValueError(f"it holds the tensors {sorted(slices)}, not {sorted(names)}")
    dtype = slices["log_probs"].get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"log_probs have dtype {dtype}, not one of {', '.join(DTYPES)}")
    samples = math.prod(slices["ids"].get_shape())
    rows = ([*slices["log_probs"].get_shape(), 0])[0]
    shapes = {
        **{name: [samples] for name in ("ids", "lengths", "inputs")},
        "checksums": [_count_groups(rows, group)],
        "log_probs": [rows, top_k or classes],
        "indices": [rows, top_k],
    }
    for name, part in slices.items():
        expected = {"log_probs": dtype, "indices": "I32"}.get(name, "I64")
        if part.get_shape() != shapes[name] or part.get_dtype() != expected:
            raise ValueError(
                f"{name} is {part.get_dtype()} {part.get_shape()}, not {expected} {shapes[name]}"
            )
    temperature = _parse_float(metadata, "temperature")
    if temperature == 0.0:
        raise ValueError("its temperature is 0")
    positions = _parse_positions(metadata.get("positions", ""))
    teacher = metadata.get("teacher", "")
    header = Header(classes, top_k, temperature, DTYPES[dtype], positions, teacher)
    distortion = Distortion(_parse_float(metadata, "kl"), _parse_float(metadata, "tail"))
    return header, distortion, group


def _parse_int(metadata: dict[str, str], key: str, low: int, high: int) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) < high):
        raise ValueError(f"its {key} is {text[:40]!r}")
    return int(text)


def _parse_float(metadata: dict[str, str], key: str) -> float:
    text = metadata.get(key, "")
    value = float(text) if len(text) < 40 else math.nan
    if not 0.0 <= value < math.inf:
        raise ValueError(f"its {key} is {text[:40]!r}")
    return value


def _parse_positions(text: str) -> tuple[int, ...]:
    """Parse [], [-1] or a list of sizes."""
    sizes: Any = json.loads(text) if len(text) < 200 else None
    is_list = isinstance(sizes, list) and all(type(n) is int and 0 < n < 2**31 for n in sizes)
    if not is_list and sizes != [-1]:
        raise ValueError(f"its positions are {text[:40]!r}")
    return tuple(sizes)


def _check_lengths(shard: Shard) -> None:
    """Raise unless the samples' lengths fit the rows and the header's positions."""
    rows, lengths, positions = len(shard.log_probs), shard.lengths, shard.header.positions
    if len(lengths) == 0:
        raise ValueError("it holds no sample")
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > rows or int(lengths.sum()) != rows:
        raise ValueError(f"the samples' lengths do not add up to its {rows} rows")
    if positions != (-1,) and {low, high} != {math.prod(positions)}:
        raise ValueError(f"a sample's length is not that of its positions {positions}")
