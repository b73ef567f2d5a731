"""Split a checked call into rows of logits, and run the reference on parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkd import reference
from fastkd._core.arguments import Call
from fastkd._core.objective import PER_ROW_OPTIONS, Objective

# The reference keeps about 14 tensors of the logits' size for its backward pass. Larger inputs are
# split, and each part is recomputed in backward.
MAX_LOGITS_PER_PART = 2**24


class Rows(NamedTuple):
    """A call with its rows flattened.

    A mean is rewritten as a sum: the weights include its divisors.
    """

    student: Tensor  # (rows, classes)
    teachers: tuple[Tensor, ...]
    labels: Tensor | None
    objective: Objective  # numbers of rows are (rows,), or 0-d

    def terms(self) -> reference.Terms:
        """Compute the terms by the reference."""
        return reference.terms(self.student, self.teachers, self.labels, **self.objective._asdict())

    def take(self, rows: Tensor | slice) -> Rows:
        """Return some of the rows."""
        return Rows(
            self.student[rows],
            tuple(teacher[rows] for teacher in self.teachers),
            None if self.labels is None else self.labels[rows],
            self._objective({name: value[rows] for name, value in self._numbers().items()}),
        )

    def split(self, step: int) -> Iterator[Rows]:
        """Yield parts of at most ``step`` rows; autograd concatenates their gradients once."""
        students = _split(self.student, step)
        teachers = zip(*(_split(teacher, step) for teacher in self.teachers), strict=True)
        labels: Sequence[Tensor | None] = [None] * len(students)
        if self.labels is not None:
            labels = _split(self.labels, step)
        numbers = {name: _split(value, step) for name, value in self._numbers().items()}
        for i, (student, teacher, label) in enumerate(zip(students, teachers, labels, strict=True)):
            objective = self._objective({name: parts[i] for name, parts in numbers.items()})
            yield Rows(student, teacher, label, objective)

    def double(self) -> Rows:
        """Convert all tensors to float64."""
        return Rows(
            self.student.double(),
            tuple(teacher.double() for teacher in self.teachers),
            self.labels,
            self._objective({name: value.double() for name, value in self._numbers().items()}),
        )

    def _numbers(self) -> dict[str, Tensor]:
        numbers = {name: getattr(self.objective, name) for name in PER_ROW_OPTIONS}
        return {k: v for k, v in numbers.items() if isinstance(v, Tensor) and v.dim()}

    def _objective(self, numbers: dict[str, Tensor]) -> Objective:
        return Objective(**{**self.objective._asdict(), **numbers})


def _split(tensor: Tensor, step: int) -> tuple[Tensor, ...]:
    return tensor.split(step)  # type: ignore[no-untyped-call, no-any-return]


def as_rows(call: Call, dtype: torch.dtype) -> tuple[Rows, tuple[float | Tensor, float | Tensor]]:
    """Return the call as rows, and the divisors of the hard and the soft term, in ``dtype``."""
    student, teachers, labels, objective = call[:4]
    o, classes = objective._asdict(), student.shape[-1]
    if labels is not None:
        labels = labels.reshape(-1, classes) if labels.is_floating_point() else labels.reshape(-1)
    for name in PER_ROW_OPTIONS:
        if isinstance(o[name], Tensor) and o[name].dim():
            o[name] = o[name].reshape(-1).to(dtype)
    divisors: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    if objective.reduction == "mean":
        divisors = mean_divisors(student.numel() // classes, labels, objective, dtype)
        o.update(reduction="sum", normalizer=None)
    o["hard_weight"] = o["hard_weight"] / divisors[0]
    o["soft_weight"] = o["soft_weight"] / divisors[1]
    flat = tuple(teacher.reshape(-1, classes) for teacher in teachers)
    return Rows(student.reshape(-1, classes), flat, labels, Objective(**o)), divisors


def mean_divisors(
    rows: int, labels: Tensor | None, o: Objective, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """Return what the mean divides the hard and the soft term by."""
    if o.normalizer is not None:
        return o.normalizer, o.normalizer
    if labels is None or labels.is_floating_point():
        return max(rows, 1), max(rows, 1)
    valid = labels != o.ignore_index
    count = valid.sum().clamp(min=1).to(dtype)
    if o.class_weight is None:
        return count, count
    # A label out of range makes its row NaN whatever it weighs.
    classes = labels.clamp(0, len(o.class_weight) - 1)
    weight = (o.class_weight[classes] * valid).sum(dtype=dtype)
    return weight.where(weight != 0, torch.ones_like(weight)), count


def label_weights(student: Tensor, labels: Tensor | None, objective: Objective) -> Tensor:
    """Return each row's class weight, times the soft term's divisor over the hard term's.

    The kernels divide both terms by the soft term's divisor.
    """
    o = objective
    assert labels is not None and o.class_weight is not None
    weight = o.class_weight[labels.clamp(0, len(o.class_weight) - 1)]
    if o.reduction != "mean":
        return weight
    rows = student.numel() // student.shape[-1]
    hard_divisor, soft_divisor = mean_divisors(rows, labels, o, weight.dtype)
    return weight * (soft_divisor / hard_divisor)


def label_targets(
    labels: Tensor, classes: int, objective: Objective, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the hard term as a cross entropy with targets: (targets, sums of targets).

    Targets are nonnegative weights of -log q, ``(..., C)``; divided by their sums, ``(...)``, they
    are probabilities. The sums are multiplied by the soft term's divisor over the hard term's (see
    :func:`label_weights`).
    """
    o, by_index = objective, not labels.is_floating_point()
    each = o.class_weight
    if each is None:
        each = torch.ones(classes, dtype=dtype, device=labels.device)
    if by_index:
        label = labels.clamp(0, classes - 1).unsqueeze(-1)
        target = (each * (o.label_smoothing / classes)).expand(*labels.shape, classes).clone()
        target.scatter_add_(-1, label, (1 - o.label_smoothing) * each[label])
    elif o.class_weight is None and not o.label_smoothing:
        target = labels.to(dtype) if torch.float64 in (labels.dtype, dtype) else labels
    else:
        target = (1 - o.label_smoothing) * labels.to(dtype) * each
        target += each * (o.label_smoothing / classes)
    total = target.sum(-1, dtype=dtype)
    if o.reduction == "mean" and by_index:
        hard_divisor, soft_divisor = mean_divisors(labels.numel(), labels, o, dtype)
        return target, total * (soft_divisor / hard_divisor)
    return target, total


def compute_checkpointed(call: Call) -> reference.Terms:
    """Compute :func:`fastkd.reference.terms` in memory that does not grow with the rows."""
    student, teachers, labels, objective = call[:4]
    if student.numel() <= MAX_LOGITS_PER_PART:
        return reference.terms(student, teachers, labels, **objective._asdict())
    rows, (hard_divisor, soft_divisor) = as_rows(call, call.dtype)
    step = max(1, MAX_LOGITS_PER_PART // student.shape[-1])
    parts = [
        checkpoint(Rows.terms, part, use_reentrant=False, preserve_rng_state=False)
        for part in rows.split(step)
    ]
    fields = zip(*parts, strict=True)
    if objective.reduction == "none":
        shape = student.shape[:-1]
        return reference.Terms(*(torch.cat(field).reshape(shape) for field in fields))
    loss, hard, *others = (torch.stack(field).sum() for field in fields)
    return reference.Terms(loss, hard / hard_divisor, *(field / soft_divisor for field in others))
