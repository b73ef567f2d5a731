"""Writing a teacher's cache: one pass over the data, resumed wherever it was interrupted."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd import batches, extras
from fastkd._core import checks
from fastkd.teachers import shard
from fastkd.teachers.cache import TeacherCache
from fastkd.teachers.digests import fingerprint, inputs_digests

# Logits handled at a time, in float32: some five tensors of this size are alive at once.
_CHUNK = 2**20


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
    """Writes a teacher's log-probabilities for every sample of a loader, once.

    What is kept is log softmax(teacher(x) / T), whole or its ``top_k`` largest classes, in files of
    which each is whole or absent. Killed at any moment, it leaves a cache of what it had done, up
    to the last file; called again, it computes only what is missing. The teacher is run where it
    is, in evaluation mode and without gradients.

    Args:
        teacher: module that returns logits ``(B, C)``, ``(B, T, C)`` or ``(B, ..., C)``, or an
            output that has them as ``.logits``.
        loader: batches with sample ids: a ``DataLoader`` over a :class:`WithIds`, or anything that
            yields ``(inputs, labels, ids)`` or mappings with ``"ids"``.
        path: a folder; created if need be.
        top_k: how many classes of each row to keep, largest first. None: all of them.
        dtype: float16, bfloat16 or float32. Default float16.
        temperature: T > 0. Dense log-probabilities serve any temperature later; the top k of them
            only this one. Default 2, as in :func:`fastkd.loss`.
        ignore_index: sequences ``(B, T, C)`` are kept up to their last label other than this (or
            their last place in the ``attention_mask``, if the batch is a mapping with one), so that
            padding is not stored. Default -100.
        shard_bytes: size at which a file is closed: what an interruption may cost. Default 64 MiB.
        progress: show a progress bar.

    Returns:
        The cache, opened. Its ``kl`` is the divergence from the teacher that dropping classes and
        rounding cost, measured while writing.

    Raises:
        ImportError: before the teacher is called, if safetensors or numpy is missing, or tqdm with
            ``progress``.
        TypeError: if ``teacher`` is no module.
        ValueError: if ``path`` holds a cache with other options or of other weights; if the loader
            gives no batch, or one without ids; if the teacher's logits hold NaN or +inf, or change
            their shape.

    Example: see :class:`TeacherCache`.
    """
    if dtype not in shard.DTYPES.values():
        raise ValueError(f"dtype must be float16, bfloat16 or float32; got {dtype}")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ValueError(f"top_k must be a positive integer or None; got {top_k!r}")
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise ValueError(f"shard_bytes must be a positive integer; got {shard_bytes!r}")
    temperature = checks.check_scalar_temperature("temperature", temperature)
    checks.check_ignore_index(ignore_index)
    folder = checks.folder("path", path)
    extras.check("train", "safetensors.torch", "numpy", *(["tqdm"] if progress else []))
    identity = fingerprint(teacher)
    done = existing(folder, top_k, dtype, temperature, identity)
    writer = _Writer(folder, shard_bytes, done)
    device, own = batches.device_of(teacher), batches.dtype_of(teacher)
    batch = None
    with batches.evaluating(teacher), writer:
        for batch in _bar(loader, progress):
            inputs, labels, ids = batches.split(batch)
            if ids is None:
                raise ValueError(
                    "loader: its batches carry no sample ids; wrap its dataset in "
                    "fastkd.teachers.WithIds, or yield (inputs, labels, ids)"
                )
            new = writer.lacks(ids.cpu())
            if not bool(new.any()):
                continue
            folder.mkdir(parents=True, exist_ok=True)
            logits = batches.logits(teacher, batches.to(inputs, device, own))
            _check_logits(logits, len(ids), top_k)
            positions = (-1,) if logits.dim() == 3 else tuple(logits.shape[1:-1])
            header = shard.Header(logits.shape[-1], top_k, temperature, dtype, positions, identity)
            lengths = _lengths(logits, inputs, labels, ignore_index)
            writer.add(
                header,
                ids.cpu(),
                lengths,
                inputs_digests(inputs, len(ids), lengths.tolist() if positions == (-1,) else None),
                _kept(_valid_rows(logits, lengths), header),
                new,
            )
        writer.flush()
    if batch is None:
        raise ValueError(batches.NO_BATCH)
    return TeacherCache(folder)


def _check_logits(logits: Tensor, samples: int, top_k: int | None) -> None:
    """One answer for each sample, with enough classes."""
    if logits.dim() < 2 or logits.shape[0] != samples or logits.shape[-1] == 0:
        raise ValueError(
            f"teacher must return logits (B, ..., C) with B = {samples}, one for each sample id; "
            f"got {tuple(logits.shape)}"
        )
    if top_k is not None and top_k > logits.shape[-1]:
        raise ValueError(
            f"top_k must be at most the number of classes, {logits.shape[-1]}; got {top_k}"
        )


def existing(
    folder: pathlib.Path, top_k: int | None, dtype: torch.dtype, temperature: float, teacher: str
) -> TeacherCache | None:
    """The cache that an earlier run left, if it is one to go on with.

    Raises:
        ValueError: if it is another; the message names what differs.
    """
    if not any(folder.glob(shard.PATTERN)):
        return None
    cache = TeacherCache(folder)
    wanted = {"top_k": top_k, "dtype": dtype, "temperature": temperature, "teacher": teacher}
    for name, value in wanted.items():
        there = getattr(cache, name)
        if there != value:
            raise ValueError(
                f"{name}: {folder} holds a cache with {name} {there}, which cannot be gone on with "
                f"at {name} {value}. Choose another path, or delete it"
            )
    return cache


def _bar(loader: Iterable[Any], progress: bool) -> Iterator[Any]:
    """The loader, behind a progress bar if one is wanted."""
    if not progress:
        yield from loader
        return
    tqdm = extras.load("tqdm", "train").tqdm
    yield from tqdm(loader, desc="teacher", unit="batch")


def _lengths(logits: Tensor, inputs: Any, labels: Any, ignore_index: int) -> Tensor:
    """``(B,)`` int64, on the CPU: how many rows of each sample are worth keeping."""
    whole = torch.full((len(logits),), math.prod(logits.shape[1:-1]))
    if logits.dim() != 3:
        return whole
    valid = None
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        valid = checks.to_int64(labels) != ignore_index
    elif isinstance(inputs, dict) and isinstance(inputs.get("attention_mask"), Tensor):
        valid = inputs["attention_mask"] != 0
    if valid is None or valid.shape != logits.shape[:-1]:
        return whole
    places = torch.arange(1, logits.shape[1] + 1) * valid.cpu()
    return places.amax(1) if logits.shape[1] else whole


def _valid_rows(logits: Tensor, lengths: Tensor) -> Tensor:
    """``[R, C]``: the rows that are kept, one sample's after the other's."""
    flat = logits.reshape(len(logits), -1, logits.shape[-1])
    keep = torch.arange(flat.shape[1]) < lengths[:, None]
    return flat.reshape(-1, flat.shape[-1]) if bool(keep.all()) else flat[keep.to(logits.device)]


class _Kept(NamedTuple):
    """What is kept of some rows, on the CPU."""

    log_probs: Tensor  # [R, classes or k]
    indices: Tensor | None  # [R, k]
    kl: Tensor  # [R]
    tail: Tensor  # [R]


def _kept(rows: Tensor, header: shard.Header) -> _Kept:
    """Log-probabilities of logits [R, C], cut and rounded, and what that cost."""
    parts = []
    for part in torch.split(rows, max(1, _CHUNK // rows.shape[-1])):
        logits = part.float() / header.temperature
        if not bool((logits.amax(-1) < math.inf).all()) or not bool(
            (logits.amax(-1) > -math.inf).all()
        ):  # NaN is neither
            raise ValueError("teacher: its logits hold NaN or +inf, or a row of -inf")
        log_p = logits.log_softmax(-1)
        indices = None
        stored = log_p
        if header.top_k is not None:
            stored, indices = log_p.topk(header.top_k, sorted=True)
        stored = stored.to(header.dtype)
        kl, tail = _lost(log_p, stored, indices)
        indices = None if indices is None else indices.int().cpu()
        parts.append(_Kept(stored.cpu(), indices, kl.cpu(), tail.cpu()))
    return _join(parts) if parts else _empty(header)


def _lost(log_p: Tensor, stored: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """``[R]``: KL(p || what a reader reconstructs of p), and the probability of what is not kept.

    A reader knows what is stored, and that the other classes share the rest evenly: q, which adds
    up to 1 + z. Then KL = sum p log(p / q) + log(1 + z). What is kept contributes
    p (d + exp(-d) - 1) with d = log(p / q), which does not cancel where q is near p.
    """
    p = log_p.exp()
    if indices is None:
        tail = lost_in_tail = torch.zeros_like(p[:, 0])
    else:
        others = p.scatter(-1, indices, 0.0)
        tail = others.sum(-1)
        spread = math.log(max(1, p.shape[-1] - indices.shape[-1]))
        # Not xlogy(tail, tail / n): a tail of 1e-44 over a thousand classes is 0 each.
        even = tail * spread - torch.special.xlogy(tail, tail)
        lost_in_tail = even - torch.special.entr(others).sum(-1)
        log_p, p = log_p.gather(-1, indices), p.gather(-1, indices)
    d = torch.where(p > 0, log_p - stored.float(), 0.0)
    excess = torch.expm1(-d)
    z = (p * excess).sum(-1)
    kl = (p * (d + excess)).sum(-1) + torch.log1p(z) - z + lost_in_tail.clamp(min=0)
    return kl.clamp(min=0), tail  # rounding may leave -1e-11


def _join(parts: list[_Kept]) -> _Kept:
    log_probs, indices, kl, tail = zip(*parts, strict=True)
    some = [part for part in indices if part is not None]
    return _Kept(
        torch.cat(log_probs), torch.cat(some) if some else None, torch.cat(kl), torch.cat(tail)
    )


def _empty(header: shard.Header) -> _Kept:
    size = (0, header.top_k or header.classes)
    indices = torch.zeros(size, dtype=torch.int32) if header.top_k else None
    return _Kept(torch.zeros(size, dtype=header.dtype), indices, torch.zeros(0), torch.zeros(0))


class _Batch(NamedTuple):
    ids: Tensor
    lengths: Tensor
    inputs: Tensor
    kept: _Kept


class _Writer(contextlib.AbstractContextManager["_Writer"]):
    """Gathers samples and writes them as shards; on leaving for an error, the rest."""

    def __init__(self, folder: pathlib.Path, shard_bytes: int, done: TeacherCache | None) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.done = done
        self.header = None if done is None else done.header
        self.fresh: set[int] = set()  # ids that this run has added
        self.parts: list[_Batch] = []
        self.bytes = 0

    def lacks(self, ids: Tensor) -> Tensor:
        """``(B,)`` bool: the samples that are in no shard yet, each once."""
        new = (
            torch.ones(len(ids), dtype=torch.bool)
            if self.done is None
            else ~self.done.contains(ids)
        )
        seen: set[int] = set()
        for row, number in enumerate(ids.tolist()):
            if number in self.fresh or number in seen:
                new[row] = False
            seen.add(number)
        return new

    def add(
        self,
        header: shard.Header,
        ids: Tensor,
        lengths: Tensor,
        inputs: Tensor,
        kept: _Kept,
        new: Tensor,
    ) -> None:
        """Takes those samples of a batch that are new."""
        if self.header is None:
            self.header = header
        if header != self.header:
            changed = [
                f"{name} {was} to {now}"
                for name, was, now in zip(header._fields, self.header, header, strict=True)
                if was != now
            ]
            raise ValueError(f"teacher: its logits changed from {', '.join(changed)}")
        rows = torch.repeat_interleave(new, lengths)
        if not bool(new.all()):
            kept = _Kept(*(None if value is None else value[rows] for value in kept))  # type: ignore[arg-type]
        self.parts.append(_Batch(ids[new], lengths[new], inputs[new], kept))
        self.fresh.update(ids[new].tolist())
        size = kept.log_probs.nbytes + (0 if kept.indices is None else kept.indices.nbytes)
        self.bytes += size
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what has gathered as one shard."""
        if not self.parts or self.header is None:
            return
        parts = self.parts
        kept = _join([part.kept for part in parts])
        rows = max(1, len(kept.kl))
        lost = shard.Loss(
            float(kept.kl.double().sum()) / rows, float(kept.tail.double().sum()) / rows
        )
        shard.write(
            self.folder,
            shard.Shard(
                self.header,
                lost,
                torch.cat([part.ids for part in parts]),
                torch.cat([part.lengths for part in parts]),
                torch.cat([part.inputs for part in parts]),
                kept.log_probs,
                kept.indices,
            ),
        )
        self.parts, self.bytes = [], 0  # now, since an interrupted write is begun anew on leaving

    def __exit__(self, *_: object) -> None:
        """Nothing that was computed is lost, not by an error or an interrupt from the keyboard."""
        self.flush()
