"""Combine the statistics of parts of a row's classes into the row's statistics and loss.

For a part of the classes, the kernels return the sums of exponentials and the divergence, as if
there were no other classes. The chain rule (docs/maths.md, section 14) combines divergences: the
divergence of all classes is the divergence between the parts, plus the mean of the divergences
within the parts. The mean weighs each part by the teacher's probability of the part, or, for the
reverse KL, by the student's probability. The statistics are combined in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd._core.objective import Objective

DIVERGENCES = ("forward_kl", "reverse_kl", "soft_cross_entropy")
"""The divergences that have a chain rule."""

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


class RowStatistics:
    """Accumulate the statistics of rows over parts of the classes."""

    def __init__(self, rows: int, objective: Objective, like: Tensor) -> None:
        """Start without classes; ``like`` has the dtype and device of the kernels' statistics."""
        o = self.objective = objective
        self.like = like
        # The exponents have the factors log2(e) / temperature. Each quotient is rounded once, as in
        # the kernels; the quotient of a Python number and a tensor would be rounded twice.
        self.hard_slope = torch.full_like(like, _LOG2E)
        self.student_slope, self.teacher_slope = (
            self.hard_slope / (t.to(like) if isinstance(t, Tensor) else torch.full_like(like, t))
            for t in (o.temperature, o.teacher_temperature)
        )
        lowest = like.new_full((rows,), -math.inf)
        self.student_top, self.teacher_top = lowest, lowest
        # The masses are log2 of the sums of exp(z / t), exp(z) and exp(w / u). Here z are the
        # student's logits, t the student's temperature, w the teacher's logits, and u the teacher's
        # temperature.
        self.student_mass = self.hard_mass = self.teacher_mass = lowest.double()
        self.divergence = torch.zeros_like(self.student_mass)
        self.label_logit = lowest.double()

    def add(self, within: Tensor, stats: Tensor, label_logits: Tensor | None) -> None:
        """Add a part of the classes, from the kernels' divergence (``within``) and statistics.

        ``label_logits``: the student's logits of the labels; -inf for labels outside the part.
        """
        stats = stats[:-1].view(-1, len(self.student_top))
        student_top, student_scale, hard_scale, teacher_top, teacher_scale, *_ = stats
        student = student_top.double() * self.student_slope - student_scale.double().log2()
        teacher = teacher_top.double() * self.teacher_slope - teacher_scale.double().log2()
        if label_logits is not None:
            hard = student_top.double() * self.hard_slope - hard_scale.double().log2()
            self.hard_mass = torch.logaddexp2(self.hard_mass, hard)
            self.label_logit = torch.maximum(self.label_logit, label_logits.double())
        students = torch.stack([self.student_mass, student])
        teachers = torch.stack([self.teacher_mass, teacher])
        # A part that student or teacher masks contributes no divergence within the part.
        has_both = (students > -math.inf) & (teachers > -math.inf)
        parts = torch.stack([self.divergence, within.double()]).where(has_both, 0.0)
        self.student_mass = torch.logaddexp2(self.student_mass, student)
        self.teacher_mass = torch.logaddexp2(self.teacher_mass, teacher)
        self.divergence = _combine(
            self.objective.divergence,
            students - self.student_mass,
            teachers - self.teacher_mass,
            parts,
        )
        self.student_top = torch.maximum(self.student_top, student_top)
        self.teacher_top = torch.maximum(self.teacher_top, teacher_top)

    def invalidate(self, rows: Tensor) -> None:
        """Make the loss and the gradient NaN where ``rows`` is True."""
        self.student_mass = self.student_mass.masked_fill(rows, math.nan)
        self.hard_mass = self.hard_mass.masked_fill(rows, math.nan)

    def loss(self, labels: Tensor | None) -> Tensor:
        """Return the loss of each row."""
        o = self.objective
        # A row is not valid if a logit is NaN or +inf, or if all classes of the row are masked.
        valid = self.student_mass.isfinite() & self.teacher_mass.isfinite()
        soft_weight = o.soft_weight * o.temperature * o.temperature
        loss = _apply_weight(soft_weight, self.divergence.where(valid, math.nan))
        if labels is not None:
            loss = loss + _apply_weight(o.hard_weight, _LN2 * self.hard_mass - self.label_logit)
            loss = loss.masked_fill(labels == o.ignore_index, 0.0)
        return loss.to(self.like.dtype)

    def stats(self, scale: Tensor, has_labels: bool) -> Tensor:
        """Return the statistics that the gradient's kernel takes (Stat in csrc/kernels.h).

        ``scale``: a factor of the gradient.
        """
        zeros = torch.zeros_like(self.student_mass)
        student = (self.student_top.double() * self.student_slope - self.student_mass).exp2()
        hard = (self.student_top.double() * self.hard_slope - self.hard_mass).exp2()
        teacher = (self.teacher_top.double() * self.teacher_slope - self.teacher_mass).exp2()
        # kSlopeSum of csrc/kernels.h is the divergence for the reverse KL, else 0.
        slopes = self.divergence if self.objective.divergence == "reverse_kl" else zeros
        students = [self.student_top, student, hard if has_labels else zeros]
        # The last zeros are kClassCount or kMeanLogRatio: no row counts as well separated.
        rows = [*students, self.teacher_top, teacher, slopes, zeros, scale.reshape(1)]
        return torch.cat([row.to(self.like.dtype) for row in rows])


def _combine(divergence: str, student: Tensor, teacher: Tensor, within: Tensor) -> Tensor:
    """Return the divergence of the union of two parts of the classes.

    ``student``, ``teacher``: log2 of the probability of each part, ``(2, rows)``. ``within``: the
    divergence within each part, ``(2, rows)``.
    """
    q, p = student.exp2().nan_to_num(0.0), teacher.exp2().nan_to_num(0.0)
    log_ratio = _LN2 * (teacher - student)
    if divergence == "reverse_kl":
        p, q, log_ratio = q, p, -log_ratio
    if divergence == "soft_cross_entropy":
        between = -_LN2 * p * student
    else:
        near = p * (log_ratio + torch.expm1(-log_ratio))
        between = torch.where(log_ratio.abs() < 0.25, near, p * log_ratio + (q - p))
    weighted = torch.where(p > 0, p * within + between, q if divergence != DIVERGENCES[2] else 0.0)
    return weighted.sum(0).clamp(min=0)  # rounding may make the sum negative


def _apply_weight(weight: float | Tensor, value: Tensor) -> Tensor:
    """Return weight * value, and 0 for a weight of 0 even if the value is infinite."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * value)
    return weight * value if weight != 0 else torch.zeros_like(value)
