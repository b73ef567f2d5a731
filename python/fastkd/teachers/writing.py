"""Write a teacher cache in one pass over the data; an interrupted pass can be resumed."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import batches, extras, validation
from fastkd._core import checks
from fastkd.teachers import shard
from fastkd.teachers.cache import TeacherCache
from fastkd.teachers.digests import digest_inputs, fingerprint

# Number of float32 logits that are encoded at a time. About five tensors of this size then exist.
_CHUNK = 2**20


class TopKError(ValueError):
    """Report a ``top_k`` that is larger than the teacher's number of classes."""


def precompute(
    teacher: nn.Module,
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    dtype: torch.dtype = torch.float16,
    temperature: float = 2.0,
    ignore_index: int = -100,
    shard_bytes: int = 2**26,
    progress: bool = True,
) -> TeacherCache:
    """Write a teacher's log-probabilities for every sample of a loader to disk.

    The function writes the rows of log softmax(teacher(x) / T), or the ``top_k`` largest entries of
    each row. Each file appears complete or not at all. If the process is killed, the completed
    files are a valid cache; a later call computes only the missing samples. The teacher runs on its
    device, in evaluation mode and without gradients.

    Args:
        teacher: module that returns logits ``(B, C)``, ``(B, T, C)`` or ``(B, ..., C)``, or an
            output that has them as ``.logits``.
        loader: batches with sample ids: a ``DataLoader`` over a :class:`WithIds`, or an
            iterable of ``(inputs, labels, ids)`` or mappings with ``"ids"``.
        path: a folder; created if it does not exist.
        top_k: how many classes of each row to store, most probable first. Default None: all.
        dtype: float16, bfloat16 or float32. Default float16.
        temperature: T, from 1e-18 to 1e18. A loss may use a cache of all classes at any
            temperature, but a cache of the top k only at this temperature. Default 2, as in
            :func:`fastkd.loss`.
        ignore_index: sequences ``(B, T, C)`` are stored up to the last label that is not
            ``ignore_index``, so that padding is not stored. Without labels, the
            ``attention_mask`` of a mapping is used. Default -100.
        shard_bytes: bytes of log-probabilities and indices at which a file is completed; a killed
            process loses about this number of bytes at most. Default 64 MiB.
        progress: show a progress bar. Default True.

    Returns:
        The opened cache. ``kl`` of the cache is the measured divergence from the teacher, which
        rounding and missing classes cause.

    Raises:
        ImportError: before the teacher is called, if safetensors or numpy is missing, or tqdm with
            ``progress``.
        TypeError: for arguments of a wrong type, such as a ``teacher`` that is not a module.
        ValueError: for other invalid arguments; or if ``path`` holds a cache whose options or
            teacher differ.
        ValueError: if the loader gives no batch, or a batch without ids.
        ValueError: if the teacher's logits have no shape above, or hold NaN or +inf, or a row of
            -inf; if the number of classes or the shape of a sample's rows changes; or if there are
            fewer than ``top_k`` classes.

    Example: see :class:`TeacherCache`.
    """
    if dtype not in shard.DTYPES.values():
        raise ValueError(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    if top_k is not None:
        validation.check_count("top_k", top_k)
    validation.check_count("shard_bytes", shard_bytes)
    temperature = checks.check_scalar_temperature("temperature", temperature)
    validation.check_ignore_index(ignore_index)
    folder = validation.check_folder("path", path)
    extras.check("train", "safetensors.torch", "numpy", *(["tqdm"] if progress else []))
    identity = fingerprint(teacher)
    cache = open_existing(
        folder, top_k=top_k, dtype=dtype, temperature=temperature, teacher=identity
    )
    writer = _Writer(folder, shard_bytes, cache)
    if progress:
        loader = extras.load("tqdm", "train").tqdm(loader, desc="teacher", unit="batch")
    device, teacher_dtype = batches.device_of(teacher), batches.dtype_of(teacher)
    batch = None
    try:
        with batches.evaluating(teacher):
            for batch in loader:
                inputs, labels, ids = batches.split(batch)
                if ids is None:
                    raise ValueError(
                        "loader: its batches carry no sample ids; wrap its dataset in "
                        "fastkd.teachers.WithIds, or yield (inputs, labels, ids)"
                    )
                ids = ids.cpu()
                new = writer.select_new(ids)
                if not bool(new.any()):
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                logits = batches.logits(teacher, batches.to(inputs, device, teacher_dtype))
                if logits.dim() < 2 or len(logits) != len(ids) or logits.shape[-1] == 0:
                    raise ValueError(
                        f"teacher must return logits (B, ..., C) with B = {len(ids)}, one for each "
                        f"sample id; got {tuple(logits.shape)}"
                    )
                classes = logits.shape[-1]
                if top_k is not None and top_k > classes:
                    raise TopKError(
                        f"top_k must be at most the number of classes, {classes}; got {top_k}"
                    )
                positions = (-1,) if logits.dim() == 3 else tuple(logits.shape[1:-1])
                header = shard.Header(classes, top_k, temperature, dtype, positions, identity)
                lengths = _count_rows(logits, inputs, labels, ignore_index)
                prefixes = lengths.tolist() if positions == (-1,) else None
                digests = digest_inputs(inputs, len(ids), prefixes)
                tensors = {"ids": ids[new], "lengths": lengths[new], "inputs": digests[new]}
                tensors |= _encode(_select_rows(logits, lengths * new), header)
                writer.add(header, tensors)
        writer.flush()
    finally:
        writer.flush()  # after an error or an interrupt, write the samples collected so far
    if batch is None:
        raise ValueError(batches.NO_BATCH)
    return TeacherCache(folder)


def open_existing(folder: pathlib.Path, **options: Any) -> TeacherCache | None:
    """Open the cache in ``folder`` if there is one; raise ValueError if its options differ."""
    if not any(folder.glob(shard.PATTERN)):
        return None
    cache = TeacherCache(folder)
    for name, value in options.items():
        if value != (cached := getattr(cache, name)):
            raise ValueError(
                f"{name}: {folder} holds a cache with {name} {cached}, which cannot be continued "
                f"with {name} {value}. Choose another path, or delete the cache"
            )
    return cache


def _count_rows(logits: Tensor, inputs: Any, labels: Any, ignore_index: int) -> Tensor:
    """Return how many rows of each sample to store, ``(B,)`` int64 on the CPU."""
    mask = None
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        mask = validation.to_int64(labels) != ignore_index
    elif isinstance(inputs, Mapping) and isinstance(inputs.get("attention_mask"), Tensor):
        mask = inputs["attention_mask"] != 0
    if logits.dim() == 3 and mask is not None and mask.shape == logits.shape[:2] and mask.numel():
        return (torch.arange(1, mask.shape[1] + 1) * mask.cpu()).amax(1)
    return torch.full((len(logits),), math.prod(logits.shape[1:-1]))


def _select_rows(logits: Tensor, lengths: Tensor) -> Tensor:
    """Return the first rows of each sample, concatenated: ``[sum of lengths, C]``."""
    flat = logits.reshape(len(logits), -1, logits.shape[-1])
    mask = torch.arange(flat.shape[1]) < lengths[:, None]
    return flat.reshape(-1, flat.shape[-1]) if bool(mask.all()) else flat[mask.to(logits.device)]


def _encode(rows: Tensor, header: shard.Header) -> dict[str, Tensor]:
    """Compute the log-probabilities of logits ``[R, C]``, truncated to ``top_k`` and rounded.

    The results are CPU tensors: ``log_probs`` and, with ``top_k``, ``indices``, as in a shard;
    ``kl`` and ``tail`` ``[R]``, as :func:`_measure_distortion` returns them.
    """
    parts = []
    for part in torch.split(rows, max(1, _CHUNK // rows.shape[-1])):
        logits = part.float() / header.temperature
        if not bool(logits.amax(-1).isfinite().all()):  # amax is NaN if an entry is NaN
            raise ValueError("teacher: its logits hold NaN or +inf, or a row of -inf")
        log_p = logits.log_softmax(-1)
        stored, indices = (log_p, None) if header.top_k is None else log_p.topk(header.top_k)
        stored = stored.to(header.dtype)
        kl, tail = _measure_distortion(log_p, stored, indices)
        tensors = {"log_probs": stored, "kl": kl, "tail": tail}
        if indices is not None:
            tensors["indices"] = indices.int()
        parts.append({name: tensor.cpu() for name, tensor in tensors.items()})
    return _concatenate(parts)


def _concatenate(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _measure_distortion(
    log_p: Tensor, stored: Tensor, indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return KL(p || the reader's reconstruction of p) and the tail's probability, both ``[R]``.

    The tail is the probability of all classes that are not stored. A reader spreads the tail evenly
    over these classes. The reader's values q, rounded when stored, sum to 1 + z, so
    KL = sum p log(p / q) + log(1 + z). With d = log(p / q), the stored classes contribute the sum
    of p (d + exp(-d) - 1), minus z. This sum does not cancel where q is near p.
    """
    p = log_p.exp()
    if indices is None:
        tail = tail_kl = torch.zeros_like(p[:, 0])
    else:
        others = p.scatter(-1, indices, 0.0)
        tail = others.sum(-1)
        spread = math.log(max(1, p.shape[-1] - indices.shape[-1]))
        # tail / exp(spread) may underflow: 1e-44 / 1000 is 0 in float32.
        even = tail * spread - torch.special.xlogy(tail, tail)
        tail_kl = even - torch.special.entr(others).sum(-1)
        log_p, p = log_p.gather(-1, indices), p.gather(-1, indices)
    d = torch.where(p > 0, log_p - stored.float(), 0.0)
    excess = torch.expm1(-d)
    z = (p * excess).sum(-1)
    kl = (p * (d + excess)).sum(-1) + torch.log1p(z) - z + tail_kl.clamp(min=0)
    return kl.clamp(min=0), tail  # rounding may give -1e-11


class _Writer:
    """Collect samples, and write shards of about ``shard_bytes``."""

    def __init__(self, folder: pathlib.Path, shard_bytes: int, cache: TeacherCache | None) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._header = None if cache is None else cache.header
        self._seen: set[int] = set() if cache is None else set(cache.ids.tolist())
        self._parts: list[dict[str, Tensor]] = []
        self._bytes = 0

    def select_new(self, ids: Tensor) -> Tensor:
        """Return a mask, bool ``(B,)``, of the ids that are neither cached nor selected before."""
        new = torch.zeros_like(ids, dtype=torch.bool)
        for row, number in enumerate(ids.tolist()):
            new[row] = number not in self._seen
            self._seen.add(number)
        return new

    def add(self, header: shard.Header, tensors: dict[str, Tensor]) -> None:
        """Add samples, and write a shard once the collected samples have ``shard_bytes``."""
        self._header = self._header or header
        for name, old, new in zip(header._fields, self._header, header, strict=True):
            if old != new:
                raise ValueError(f"teacher: its logits changed from {name} {old} to {new}")
        self._parts.append(tensors)
        self._bytes += sum(tensors[k].nbytes for k in ("log_probs", "indices") if k in tensors)
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the collected samples as one shard."""
        if not self._parts or self._header is None:
            return
        tensors = _concatenate(self._parts)
        rows = max(1, len(tensors["log_probs"]))
        kl, tail = (float(tensors.pop(name).double().sum()) / rows for name in ("kl", "tail"))
        shard.write(self._folder, shard.Shard(self._header, kl, tail, **tensors))
        # Drop the samples only after the write, so that precompute() repeats an interrupted write.
        self._parts, self._bytes = [], 0
