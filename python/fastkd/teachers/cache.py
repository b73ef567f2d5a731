"""Read a teacher cache by sample id."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import batches, validation
from fastkd._core.values import TopK
from fastkd.teachers import shard
from fastkd.teachers.digests import digest_inputs, fingerprint


class TeacherCache:
    """Read the log-probabilities that :func:`precompute` wrote, by sample id, in any order.

    Files are memory-mapped, so a cache may be larger than memory, and processes share pages. Forked
    and spawned workers of a ``DataLoader`` may use the cache: only the path is pickled, and a
    spawned worker opens the files. A process checks the checksum of each sample when the process
    first reads the sample.

    Args:
        path: the folder that :func:`precompute` wrote, completely or in part.

    Attributes:
        classes: number of classes of the teacher.
        top_k: how many classes are stored in each row; None: all classes.
        temperature: T; the cache holds log softmax(logits / T). A loss may use a cache of all
            classes at any temperature: T times the log-probabilities are the teacher's logits up to
            a constant in each row. A loss may use a cache of the top k at T alone.
        dtype: dtype of the log-probabilities.
        positions: shape of a sample's rows: () for one row, (-1,) for sequences, or sizes such as
            (64, 64) for images.
        teacher: :func:`fingerprint` of the teacher.
        ids: int64, the ids of all samples, ascending.
        kl: KL(teacher || distribution reconstructed from the cache) at T, mean over rows, in nats.
            The reconstruction spreads the tail evenly over the classes that are not stored.
        tail: mean probability of the classes that are not stored.

    Raises:
        ImportError: if safetensors is missing.
        TypeError: if ``path`` is not a path.
        FileNotFoundError: if there is no cache.
        ValueError: if ``path`` cannot be a folder.
        ValueError: if a file is damaged, is not a regular file, has another format, or differs
            from the first file in its options or its teacher.

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

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open every shard, check its header, and read the ids."""
        self.path = validation.check_folder("path", path)
        self._files = sorted(self.path.glob(shard.PATTERN))
        if not self._files:
            raise FileNotFoundError(f"{self.path} holds no teacher's cache (no {shard.PATTERN})")
        self._shards, checksums = zip(*map(shard.read, self._files), strict=True)
        self.header: shard.Header = self._shards[0].header
        for file, part in zip(self._files, self._shards, strict=True):
            for name, value in part.header._asdict().items():
                if value != (first := getattr(self.header, name)):
                    raise ValueError(
                        f"{file} does not belong to {self._files[0].name}: their {name} are "
                        f"{value} and {first}. Delete one of them"
                    )
        self.classes, self.top_k, self.temperature, self.dtype, self.positions, self.teacher = (
            self.header
        )
        rows = [len(part.log_probs) for part in self._shards]
        self.kl, self.tail = (
            sum(n * getattr(part, name) for n, part in zip(rows, self._shards, strict=True))
            / max(1, sum(rows))
            for name in ("kl", "tail")
        )
        columns = []
        for i, (part, sums) in enumerate(zip(self._shards, checksums, strict=True)):
            starts = part.lengths.cumsum(0) - part.lengths
            number = torch.full_like(part.ids, i)
            columns.append((part.ids, number, starts, part.lengths, part.inputs, sums))
        table = [torch.cat(parts) for parts in zip(*columns, strict=True)]
        ids, order = table[0].sort(stable=True)
        order = order[ids.diff(prepend=ids[:1] - 1) != 0]  # if an id occurs twice, keep the first
        self.ids, self._shard_of, self._starts, self._lengths, self._inputs, self._checksums = (
            column[order] for column in table
        )
        self._unchecked = torch.ones_like(self.ids, dtype=torch.bool)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Return the path and the main attributes in one line."""
        stored = "all" if self.top_k is None else f"the top {self.top_k}"
        return (
            f"TeacherCache({str(self.path)!r}: {len(self)} samples, {stored} of {self.classes} "
            f"classes, {str(self.dtype).removeprefix('torch.')}, temperature {self.temperature:g}, "
            f"KL {self.kl:.2g})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone, so that unpickling opens the files."""
        return (TeacherCache, (self.path,))

    def contains(self, ids: Tensor) -> Tensor:
        """Return a mask, bool ``(B,)``, of the ``(B,)`` ids that are in the cache."""
        ids = batches.check_ids(ids).cpu()
        return self.ids[self._search(ids)] == ids

    def _search(self, ids: Tensor) -> Tensor:
        """Return the position of each id in the index, or any position for a missing id."""
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
        """Raise if the cache does not fit the arguments.

        Args:
            classes: number of classes of the student.
            teacher: module that must have computed the cache, compared by its :func:`fingerprint`.
            temperature: the teacher's temperature in the loss. A cache of all classes fits every
                temperature.
            ids: samples that must be in the cache.
            batch: a batch of the loader, with ids (:class:`WithIds`), whose inputs must equal the
                teacher's inputs. Omit ``batch`` if inputs are augmented at random.

        Raises:
            TypeError: if ``teacher``, ``ids`` or ``batch`` has the wrong type.
            ValueError: if the cache does not fit an argument.
        """
        if classes is not None and classes != self.classes:
            raise ValueError(
                f"classes: {self.path} holds a teacher of {self.classes} classes; got {classes}"
            )
        if teacher is not None and (identity := fingerprint(teacher)) != self.teacher:
            raise ValueError(
                f"teacher: {self.path} was computed with other weights than this teacher has "
                f"(fingerprints {self.teacher[:15]}... and {identity[:15]}...)"
            )
        if temperature is not None and self.top_k and temperature != self.temperature:
            raise ValueError(
                f"temperature: {self.path} holds the {self.top_k} largest log-probabilities at "
                f"temperature {self.temperature:g}, which cannot be turned into those at "
                f"{temperature:g}. Distill at {self.temperature:g}, or precompute at "
                f"{temperature:g}"
            )
        if ids is not None:
            self._find(ids)
        if batch is None:
            return
        inputs, _, ids = batches.split(batch)
        if ids is None:
            raise ValueError(
                "batch: its samples carry no ids; wrap the dataset in fastkd.teachers.WithIds"
            )
        index = self._find(ids)
        lengths = self._lengths[index].tolist() if self.positions == (-1,) else None
        differs = digest_inputs(inputs, len(ids), lengths) != self._inputs[index]
        if bool(differs.any()):
            raise ValueError(
                f"batch: the inputs of {int(differs.sum())} of {len(ids)} samples differ from "
                f"those in {self.path} (such as id {int(ids.cpu()[differs][0])}): another dataset, "
                "another order, or random augmentation"
            )

    def _find(self, ids: Tensor) -> Tensor:
        """Return the position of each id in the index, or raise if an id is missing."""
        ids = batches.check_ids(ids).cpu()
        index = self._search(ids)
        missing = ids[self.ids[index] != ids]
        if len(missing):
            raise ValueError(
                f"ids: {self.path} lacks {len(missing)} of the {len(ids)} samples, such as "
                f"{int(missing[0])}; it holds {len(self)}, ids {int(self.ids[0])} to "
                f"{int(self.ids[-1])}. Run precompute again: it adds the missing samples"
            )
        return index

    def lookup(self, ids: Tensor, shape: tuple[int, ...] | None = None) -> Tensor | TopK:
        """Return the teacher's log-probabilities of the samples with the given ids.

        Args:
            ids: ``(B,)`` integers, on any device, in any order.
            shape: shape of a sample's rows in the batch, ``student_logits.shape[1:-1]``. Sequences
                are padded to this shape: with index -1 and log-probability -inf, or with equal
                probabilities if the cache holds all classes. Padding needs labels that are ignored.
                Default: the shape in the cache, or the length of the longest sequence.

        Returns:
            ``(B, *shape, classes)`` log-probabilities; with ``top_k``, a :class:`fastkd.TopK` of
            shape ``(B, *shape, k)``, largest first, with int64 indices. The tensors are on the CPU.
            The log-probabilities have the cache's dtype.

        Raises:
            TypeError: for ids that are not integers, or a shape that is not a tuple.
            ValueError: for missing ids, a shape that does not fit, or a damaged file.
        """
        index = self._find(ids)
        lengths = self._lengths[index]
        shape = self._resolve_shape(shape, lengths)
        width = math.prod(shape)
        sample = torch.repeat_interleave(torch.arange(len(index)), lengths)
        within = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
        source, target = self._starts[index][sample] + within, sample * width + within
        shards = self._shard_of[index][sample]

        columns = self.top_k or self.classes
        fill = -math.inf if self.top_k else -math.log(self.classes)
        log_probs = torch.full((len(index) * width, columns), fill, dtype=self.dtype)
        indices = torch.full((len(index) * width, columns) if self.top_k else (0,), -1)
        for number in torch.unique(shards).tolist():
            mask = shards == number
            part = self._shards[number]
            self._check_rows(number, index[self._shard_of[index] == number])
            log_probs[target[mask]] = part.log_probs[source[mask]]
            if part.indices is not None:
                indices[target[mask]] = part.indices[source[mask]].long()
        log_probs = log_probs.view(len(index), *shape, columns)
        if self.top_k is None:
            return log_probs
        if len(indices) and not -1 <= int(indices.min()) <= int(indices.max()) < self.classes:
            raise ValueError(f"{self.path} is damaged: it names a class beyond its {self.classes}")
        return TopK(log_probs, indices.view(log_probs.shape))

    def _check_rows(self, number: int, index: Tensor) -> None:
        """Check the checksums of the samples at ``index``, all in one shard, that are unchecked."""
        new = torch.unique(index[self._unchecked[index]])
        sums = shard.compute_checksums(self._shards[number], self._starts[new], self._lengths[new])
        damaged = new[sums != self._checksums[new]]
        if len(damaged):
            raise ValueError(
                f"{self._files[number]} is damaged: the checksum of sample "
                f"{int(self.ids[damaged[0]])} is wrong. Delete the file and run precompute again, "
                "which computes the missing samples"
            )
        self._unchecked[new] = False

    def _resolve_shape(self, shape: tuple[int, ...] | None, lengths: Tensor) -> tuple[int, ...]:
        """Return the shape of each sample's rows in a result of :meth:`lookup`."""
        is_sequence = self.positions == (-1,)
        longest = max(lengths.tolist(), default=0)
        if shape is None:
            return (longest,) if is_sequence else self.positions
        if not isinstance(shape, (tuple, list)):
            raise TypeError(
                f"shape must be a tuple, student_logits.shape[1:-1], or None; got {shape!r}"
            )
        shape, content = tuple(shape), f"rows of shape {self.positions} per sample"
        fits = shape == self.positions
        if is_sequence:
            fits = len(shape) == 1 and shape[0] >= longest
            content = f"sequences, of up to {longest} positions in this batch"
        if not fits:
            raise ValueError(f"shape: {self.path} holds {content}; got {shape}")
        return shape
