"""Reading a teacher's cache by sample id."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import batches
from fastkd._core import checks
from fastkd._core.values import TopK
from fastkd.teachers import shard
from fastkd.teachers.digests import fingerprint, inputs_digests


class TeacherCache:
    """The log-probabilities that :func:`precompute` wrote, read by sample id, in any order.

    Files are mapped into memory and read where a sample lies, so a cache may be larger than memory,
    and processes share what they read. It may be used in ``DataLoader`` workers, forked or spawned:
    no open file is pickled, a worker opens the path anew. Each group of rows, of about 64 KiB, has
    a checksum. Each process checks a group when it first reads one of the group's rows.

    Args:
        path: the folder that :func:`precompute` wrote, finished or not.
        classes: refuse a cache of another number of classes.
        teacher: refuse a cache of a teacher with other weights.

    Attributes:
        classes: number of classes of the teacher.
        top_k: how many of them are kept in each row; None: all.
        temperature: T; what is kept is log softmax(logits / T). Times T, dense log-probabilities
            are the teacher's logits up to a constant, so they serve any temperature; top-k ones
            serve this one.
        dtype: in which it is kept.
        positions: shape of a sample's rows: () for a class each, (-1,) for sequences, or sizes.
        teacher: :func:`fingerprint` of the teacher.
        ids: int64, the ids of all samples, ascending.
        kl: KL(teacher || what can be read of it), mean over rows, nats, at that temperature, where
            the classes that are not kept share the rest evenly.
        tail: mean probability of the classes that are not kept.

    Raises:
        TypeError: if ``path`` is no path.
        FileNotFoundError: if there is no cache.
        ValueError: if ``path`` cannot be a folder; if a file is damaged, is not a regular file, or
            has another format or another teacher than the first file; or if ``classes`` or
            ``teacher`` differ.

    Example:
        >>> import tempfile, torch, fastkd
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> images, teacher = torch.randn(100, 64), torch.nn.Linear(64, 10)
        >>> data = fastkd.teachers.WithIds(TensorDataset(images))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = fastkd.teachers.precompute(
        ...         teacher, DataLoader(data, 32), folder, dtype=torch.float32, progress=False
        ...     )
        ...     log_probs = cache.lookup(torch.tensor([7, 3]))
        >>> torch.allclose(log_probs, (teacher(images[[7, 3]]) / 2).log_softmax(-1), atol=1e-6)
        True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        classes: int | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        """Open and check every shard, and read the ids."""
        self.path = checks.folder("path", path)
        files = sorted(self.path.glob(shard.PATTERN))
        if not files:
            raise FileNotFoundError(f"{self.path} holds no teacher's cache (no {shard.PATTERN})")
        opened = [shard.read(file) for file in files]
        self._shards = [part for part, _ in opened]
        self._checksums = [checksums for _, checksums in opened]
        self.header = header = self._shards[0].header
        for file, other in zip(files, self._shards, strict=True):
            for name, ours, theirs in zip(header._fields, header, other.header, strict=True):
                if ours != theirs:
                    raise ValueError(
                        f"{file} does not belong to {files[0].name}: its {name} is {theirs}, "
                        f"there it is {ours}. Delete one of them"
                    )
        self.classes, self.top_k, self.temperature, self.dtype, self.positions, self.teacher = (
            header
        )
        rows = [len(part.log_probs) for part in self._shards]
        total = max(1, sum(rows))
        lost = [part.lost for part in self._shards]
        self.kl = sum(n * part.kl for n, part in zip(rows, lost, strict=True)) / total
        self.tail = sum(n * part.tail for n, part in zip(rows, lost, strict=True)) / total
        self._index()
        self.check(classes=classes, teacher=teacher)

    def _index(self) -> None:
        """Where each id's rows are; of an id that is there twice, the first."""
        counts = torch.tensor([len(part.ids) for part in self._shards])
        lengths = torch.cat([part.lengths for part in self._shards])
        starts = torch.cat([part.lengths.cumsum(0) - part.lengths for part in self._shards])
        ids, order = torch.cat([part.ids for part in self._shards]).sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        self.ids, order = ids[first], order[first]
        self._shard_of = torch.repeat_interleave(torch.arange(len(counts)), counts)[order]
        self._starts, self._lengths = starts[order], lengths[order]
        self._inputs = torch.cat([part.inputs for part in self._shards])[order]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.ids)

    def __repr__(self) -> str:
        """In one line."""
        kept = "all" if self.top_k is None else f"the top {self.top_k}"
        return (
            f"TeacherCache({str(self.path)!r}: {len(self)} samples, {kept} of {self.classes} "
            f"classes, {str(self.dtype).removeprefix('torch.')}, temperature {self.temperature:g}, "
            f"KL lost {self.kl:.2g})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its path: a process that gets it opens the files anew."""
        return (TeacherCache, (self.path,))

    def contains(self, ids: Tensor) -> Tensor:
        """``(B,)`` bool: which of these ``(B,)`` ids are in the cache."""
        ids = _checked(ids)
        return self.ids[self._places(ids)] == ids

    def _places(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)

    def check(
        self,
        *,
        classes: int | None = None,
        teacher: nn.Module | None = None,
        temperature: float | None = None,
        ids: Tensor | None = None,
        batch: Any = None,
    ) -> None:
        """Refuses, with a sentence, a cache that does not fit what is given.

        Args:
            classes: the number of classes of the student.
            teacher: the module whose log-probabilities these should be.
            temperature: the teacher's temperature in the loss. A dense cache fits any.
            ids: samples that must be there.
            batch: a batch of the loader, with ids (:class:`WithIds`), whose inputs must be those
                that the teacher was shown. Leave it out where inputs are augmented at random.

        Raises:
            ValueError: if anything does not fit.
        """
        if classes is not None and classes != self.classes:
            raise ValueError(
                f"classes: {self.path} holds a teacher of {self.classes} classes; got {classes}"
            )
        if teacher is not None and fingerprint(teacher) != self.teacher:
            raise ValueError(
                f"teacher: {self.path} was computed with other weights than this teacher has "
                f"({self.teacher[:15]}..., here {fingerprint(teacher)[:15]}...)"
            )
        if temperature is not None and self.top_k and temperature != self.temperature:
            raise ValueError(
                f"temperature: {self.path} holds the {self.top_k} largest log-probabilities at "
                f"temperature {self.temperature:g}, which cannot be turned into those at "
                f"{temperature:g}. Distil at {self.temperature:g}, or precompute at {temperature:g}"
            )
        if ids is not None:
            self._found(ids)
        if batch is not None:
            self._check_inputs(batch)

    def _check_inputs(self, batch: Any) -> None:
        inputs, _, ids = batches.split(batch)
        if ids is None:
            raise ValueError(
                "batch: its samples carry no ids; wrap the dataset in fastkd.teachers.WithIds"
            )
        at = self._found(ids)
        lengths = self._lengths[at].tolist() if self.positions == (-1,) else None
        differs = inputs_digests(inputs, len(ids), lengths) != self._inputs[at]
        if bool(differs.any()):
            raise ValueError(
                f"batch: the inputs of {int(differs.sum())} of {len(ids)} samples are not those "
                f"that the teacher was shown for {self.path} (such as id "
                f"{int(ids.cpu()[differs][0])}): another dataset, another order, or random "
                "augmentation"
            )

    def _found(self, ids: Tensor) -> Tensor:
        """Where these ids are in the index; they must be there."""
        ids = _checked(ids)
        at = self._places(ids)
        missing = ids[self.ids[at] != ids]
        if len(missing):
            raise ValueError(
                f"ids: {self.path} lacks {len(missing)} of the {len(ids)} samples asked for, such "
                f"as {int(missing[0])}; it holds {len(self)}, ids {int(self.ids[0])} to "
                f"{int(self.ids[-1])}. Run precompute again: it adds what is missing"
            )
        return at

    def lookup(self, ids: Tensor, shape: tuple[int, ...] | None = None) -> Tensor | TopK:
        """Return the teacher's log-probabilities of these samples.

        Args:
            ids: ``(B,)`` integers, on any device, in any order.
            shape: shape of a sample's rows in the batch, ``student_logits.shape[1:-1]``. Sequences
                are filled up to it: with id -1 and log-probability -inf, or, where all classes are
                kept, with equal probabilities; mask these rows by their labels. Default: the
                longest sequence asked for.

        Returns:
            ``(B, *shape, classes)`` log-probabilities; with ``top_k``, a :class:`fastkd.TopK` of
            shape ``(B, *shape, k)``, largest first, with indices in int64. On the CPU, in the
            cache's dtype.

        Raises:
            TypeError: for ids that are no integers, or a shape that is none.
            ValueError: for ids that are not there, a shape that does not fit, or a damaged file.
        """
        at = self._found(ids)
        lengths = self._lengths[at]
        shape = self._shape(shape, lengths)
        width = math.prod(shape)
        sample = torch.repeat_interleave(torch.arange(len(at)), lengths)
        within = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
        source, target = self._starts[at][sample] + within, sample * width + within
        shards = self._shard_of[at][sample]

        columns = self.top_k or self.classes
        fill = -math.inf if self.top_k else -math.log(self.classes)
        log_probs = torch.full((len(at) * width, columns), fill, dtype=self.dtype)
        indices = torch.full((len(at) * width, columns) if self.top_k else (0,), -1)
        for number in torch.unique(shards).tolist():
            here = shards == number
            part = self._shards[number]
            self._checksums[number].check(source[here])
            log_probs[target[here]] = part.log_probs[source[here]]
            if part.indices is not None:
                indices[target[here]] = part.indices[source[here]].long()
        log_probs = log_probs.view(len(at), *shape, columns)
        if self.top_k is None:
            return log_probs
        if len(indices) and not -1 <= int(indices.min()) <= int(indices.max()) < self.classes:
            raise ValueError(f"{self.path} is damaged: it names a class beyond its {self.classes}")
        return TopK(log_probs, indices.view(log_probs.shape))

    def _shape(self, shape: tuple[int, ...] | None, lengths: Tensor) -> tuple[int, ...]:
        """The shape of each sample's rows in the answer."""
        longest = int(lengths.max()) if len(lengths) else 0
        if shape is None:
            return (longest,) if self.positions == (-1,) else self.positions
        if not isinstance(shape, (tuple, list)):
            raise TypeError(
                f"shape must be a tuple, student_logits.shape[1:-1], or None; got {shape!r}"
            )
        shape = tuple(shape)
        if self.positions != (-1,):
            if shape != self.positions:
                raise ValueError(
                    f"shape: a sample's rows are {self.positions} in {self.path}; got {shape}"
                )
        elif len(shape) != 1 or shape[0] < longest:
            raise ValueError(
                f"shape: {self.path} holds sequences, of up to {longest} positions in this batch; "
                f"got {shape}"
            )
        return shape


def _checked(ids: Tensor) -> Tensor:
    """Ids as int64 on the CPU."""
    if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype not in checks.INTEGERS:
        what = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise TypeError(f"ids must be an integer tensor of shape (B,); got {what}")
    return ids.cpu().long()
