"""Wrap student and loss in one module for Accelerate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd import batches, losses, validation
from fastkd._core.arguments import shift_rows
from fastkd.reference import Terms
from fastkd.training.hints import Features, Hint, HintLoss
from fastkd.training.teacher import Forward, TeacherOutputs

Labels = Callable[[Any], "Tensor | None"]
"""A function of a batch that returns a label for each row of the logits, or None."""


def get_labels(batch: Any) -> Tensor | None:
    """Return the labels of a batch in one of the forms of :mod:`fastkd.batches`, or None."""
    return batches.split(batch).labels


class StepTerms(NamedTuple):
    """Hold the terms of a forward pass as 0-d tensors; only the loss has a gradient."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    agreement: Tensor
    hint: Tensor


@dataclasses.dataclass(frozen=True)
class Denominators:
    """Hold the 0-d divisors of a step's sums: means over processes of each process's counts.

    With mixed precision, FSDP casts tensors in a tuple to 16 bits, but not tensors in a dataclass.
    """

    rows: Tensor
    """Number of rows that are not ignored; without labels, the number of samples."""
    samples: Tensor


class StudentLoss(nn.Module):
    """Run the student and compute the loss in one forward call.

    The module does not return the logits, because Accelerate would convert the logits to float32.
    The module contains the projections of hints, so that DistributedDataParallel synchronizes their
    gradients.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: losses.KDLoss,
        hints: Sequence[Hint],
        forward: Forward,
        labels: Labels,
    ) -> None:
        """Register student, loss and projections."""
        super().__init__()
        self.student, self.loss, self.hint_loss = student, loss, HintLoss(hints)
        self.features = Features(student, [hint.student for hint in hints], "student")
        self._forward, self._labels = forward, labels

    def forward(self, batch: Any, teacher: TeacherOutputs, denominators: Denominators) -> StepTerms:
        """Return the sums of the loss and its terms over the batch, divided by ``denominators``."""
        logits = self._forward(self.student, batch)
        targets = self.get_targets(batch)
        rows = denominators.rows
        if targets is None and len(logits):  # without labels, denominators.rows counts samples
            rows = rows * self.count_rows(logits) / len(logits)
        terms = self._compute(logits, teacher.logits, targets, normalizer=rows)
        hint = torch.zeros_like(terms.loss)
        for distances in self.hint_loss(self.features.pop(), teacher.features):
            hint = hint + distances.sum() / denominators.samples
        return StepTerms(terms.loss + hint, terms.hard, terms.soft, terms.agreement, hint.detach())

    def sum_terms(self, model: nn.Module, batch: Any, teacher_logits: Any) -> Tensor:
        """Return sums over the rows that are not ignored, in float64.

        The sums are loss, hard, soft, agreement, the number of correct rows (NaN without labels),
        and the number of rows.
        """
        logits = self._forward(model, batch)
        targets = self.get_targets(batch)
        terms = self._compute(logits, teacher_logits, targets, reduction="sum", normalizer=None)
        correct, rows = torch.tensor(math.nan), self.count_rows(logits)
        if targets is not None:
            rows = self.count_rows(targets)
            counted = targets != self.loss.ignore_index
            if targets.is_floating_point():
                targets, counted = targets.argmax(self.loss.dim), torch.tensor(True)
            predicted = logits.movedim(self.loss.dim, -1).argmax(-1)
            correct = ((predicted == targets) & counted).sum()
        values = (terms.loss, terms.hard, terms.soft, terms.agreement, correct, rows)
        return torch.stack([value.to(logits.device, torch.float64) for value in values])

    def get_targets(self, batch: Any) -> Tensor | None:
        """Return the label of each row of logits, with class indices as int64, or None.

        The option ``shift`` moves labels, but not the teacher's outputs, which are aligned with the
        student's logits.
        """
        targets = self._labels(batch)
        remedy = ", or Trainer(labels=...) for labels in another place of the batch"
        losses.check_has_labels(self.loss, targets, remedy)
        if targets is not None and not isinstance(targets, Tensor):
            raise TypeError(
                f"labels must be a tensor; got {type(targets).__name__}. For batches of another "
                "form use Trainer(forward=..., labels=...)"
            )
        shift = self.loss.shift
        if shift and (targets is None or targets.is_floating_point()):
            got = None if targets is None else targets.dtype
            raise TypeError(f"labels must be class indices with shift={shift}; got {got}")
        if targets is None:
            return None
        targets = validation.to_int64(targets)
        return shift_rows(targets, shift, self.loss.ignore_index) if shift else targets

    def count_rows(self, values: Tensor) -> Tensor:
        """Return, as a 0-d tensor, the number of rows, or of labels that are not ignored.

        ``values``: logits, probabilities or labels.
        """
        if values.is_floating_point():
            rows = values.numel() // int(values.shape[self.loss.dim])
            return torch.tensor(rows, device=values.device)
        valid: Tensor = values != self.loss.ignore_index
        return valid.sum()

    def _compute(
        self, logits: Tensor, teacher: Any, targets: Tensor | None, **options: Any
    ) -> Terms:
        if callable(teacher):
            teacher = teacher(logits)
        options = {**self.loss.options, "shift": 0, **options}
        return losses.terms(logits, teacher, targets, **options)
