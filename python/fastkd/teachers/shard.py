"""Write and read shards, the files of a teacher's cache.

A shard is a safetensors file with these tensors, for n samples of together R rows:

- ``ids`` int64 [n], ``lengths`` int64 [n] (rows of each sample, adding up to R) and ``inputs``
  int64 [n] (a digest of what the teacher was shown);
- ``log_probs`` [R, classes], or the k largest of each row, [R, k], and then
- ``indices`` int32 [R, k], the classes that they belong to;
- ``checksums`` int64 [G], one CRC-32 for each ``group`` rows of ``log_probs`` and ``indices``;

and with the fields of :class:`Header` and :class:`Loss`, ``group`` and ``crc32`` as text in its
header. ``crc32`` covers everything but ``log_probs`` and ``indices`` (:func:`_crc32`).
:func:`read` checks ``crc32``; :meth:`Checksums.check` checks a group of rows when one of them is
first read. A CRC-32 detects damage, such as a flipped bit. It does not detect forgery: a forger can
compute it, too.
"""

from __future__ import annotations

import contextlib
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
from fastkd.teachers.digests import raw_bytes

FORMAT = "fastkd teacher cache"
VERSION = 2
GROUP_BYTES = 2**16
"""Size of a group of rows, which has one checksum: a group is read to check one of its rows."""
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


class Checksums:
    """Check a shard's rows by the CRC-32 of each group of rows, each group once."""

    def __init__(self, path: pathlib.Path, shard: Shard, group: int, expected: Tensor) -> None:
        """Keep the ``expected`` checksums, int64 [G], of groups of ``group`` rows."""
        self._path, self._shard, self._group, self._expected = path, shard, group, expected
        self._unchecked = torch.ones(len(expected), dtype=torch.bool)

    def check(self, rows: Tensor) -> None:
        """Check the groups that contain ``rows``, int64 [n], unless they were checked before.

        Raises:
            ValueError: if rows of the file have changed since its checksums were computed.
        """
        groups = torch.div(rows, self._group, rounding_mode="floor")
        new = groups[self._unchecked[groups]]
        if not len(new):
            return
        new = torch.unique(new)
        differs = _checksums(self._shard, self._group, new) != self._expected[new]
        if bool(differs.any()):
            first = int(new[differs][0]) * self._group
            last = min(first + self._group, len(self._shard.log_probs)) - 1
            raise ValueError(
                f"{self._path} is damaged: the checksum of its rows {first} to {last} is wrong. "
                "Delete the file and run precompute again, which computes the missing samples"
            )
        self._unchecked[new] = False


def _checksums(shard: Shard, group: int, numbers: Tensor) -> Tensor:
    """Compute the CRC-32 of the groups with these indices, as int64 [len(numbers)]."""
    tensors = [part for part in (shard.log_probs, shard.indices) if part is not None]
    sizes = [group * part.shape[1] * part.element_size() for part in tensors]
    parts = [raw_bytes(part) for part in tensors]
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
        crc = zlib.crc32(raw_bytes(tensor), crc)
    return f"{crc:08x}"


def write(folder: pathlib.Path, shard: Shard) -> pathlib.Path:
    """Write a shard under the next free name, completely or not at all."""
    header, lost = shard.header, shard.lost
    rows, columns = shard.log_probs.shape
    size = shard.log_probs.element_size() + (0 if shard.indices is None else 4)
    group = max(1, GROUP_BYTES // (columns * size))
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
        "group": str(group),
    }
    checksums = _checksums(shard, group, torch.arange(_count_groups(rows, group)))
    metadata["crc32"] = _crc32(metadata, shard, checksums)
    tensors = {"ids": shard.ids, "lengths": shard.lengths, "inputs": shard.inputs}
    tensors |= {"checksums": checksums, "log_probs": shard.log_probs}
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


def _count_groups(rows: int, group: int) -> int:
    return -(-rows // group)  # the last group may have fewer rows


def _sync_folder(folder: pathlib.Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: pathlib.Path) -> tuple[Shard, Checksums]:
    """Open a shard without reading its rows; call :meth:`Checksums.check` before you read some.

    Raises:
        ValueError: if ``path`` is not a complete, consistent shard; the message names the file and
            the flaw.
    """
    safetensors = extras.load("safetensors", "train")
    if not path.is_file():  # opening a named pipe would wait for a writer
        raise ValueError(f"{path} is no whole shard of a teacher's cache: it is not a regular file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            header, lost, group = _header(texts, file)
            names = ["ids", "lengths", "inputs", "log_probs"]
            tensors = {name: file.get_tensor(name) for name in names}
            indices = file.get_tensor("indices") if header.top_k is not None else None
            checksums = file.get_tensor("checksums")
    except (ValueError, OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is no whole shard of a teacher's cache: {error}") from None
    shard = Shard(header, lost, **tensors, indices=indices)
    flaw = _flaw(shard)
    if flaw is None and _crc32(texts, shard, checksums) != texts.get("crc32"):
        flaw = "its crc32 does not match its header, ids, lengths, inputs and checksums"
    if flaw:
        raise ValueError(f"{path} is no whole shard of a teacher's cache: {flaw}")
    return shard, Checksums(path, shard, group, checksums)


def _header(metadata: dict[str, str], file: Any) -> tuple[Header, Loss, int]:
    """Parse the header's texts, and check the tensors' shapes and dtypes against them."""
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
    expected = {"ids", "lengths", "inputs", "log_probs", "checksums"}
    expected |= {"indices"} if top_k else set()
    if set(slices) != expected:
        raise ValueError(f"it holds the tensors {sorted(slices)}, not {sorted(expected)}")
    dtype = slices["log_probs"].get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"log_probs have dtype {dtype}, not one of {', '.join(DTYPES)}")
    samples = math.prod(slices["ids"].get_shape())
    rows = ([*slices["log_probs"].get_shape(), 0])[0]
    shapes = {"ids": [samples], "lengths": [samples], "inputs": [samples]}
    group = _int(metadata, "group", 1, 2**31)
    shapes["checksums"] = [_count_groups(rows, group)]
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
    return header, Loss(_float(metadata, "kl"), _float(metadata, "tail")), group


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
