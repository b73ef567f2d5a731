"""A row's statistics and loss, from those of its classes in parts.

The kernels give, for some classes as if there were no others, the sums of exponentials and the
divergence. Sums of parts add up once they are relative to the same maximum. Divergences of parts
do by the chain rule (docs/maths.md, section 14): between all classes it is the mean of those within
the parts, weighted by what each part has of the teacher, and the divergence between the parts,
which is formed such that nothing cancels. All in float64: a few numbers for each row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd._core.objective import Objective

DIVERGENCES = ("forward_kl", "reverse_kl", "soft_cross_entropy")
"""Those that are sums of what their parts say."""

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)
_LARGEST_REFERENCE = 2.0**22  # kLargestReference of csrc/cuda


class References:
    """What a kernel's sums of exponentials are relative to, as powers of 2, given the maximum.

    That is the maximum times log2(e) / t; on CUDA (kLargestReference) as its type rounds it.
    """

    def __init__(self, temperature: float | Tensor, objective: Objective, like: Tensor) -> None:
        """Of the dtype of the kernel's statistics, and where they are: as ``like``."""
        self.rounds = like.is_cuda
        self.t = _on_device(temperature, like)
        hard = _on_device(objective.hard_weight, like)
        soft = _on_device(objective.soft_weight, like)
        self.precise = (hard <= soft * self.t) | (self.t == 1)
        self.one = torch.full_like(self.t, _LOG2E)
        self.slope = self.one / self.t  # a number / tensor would round twice
        self.limit = _LARGEST_REFERENCE / self.slope.clamp(min=_LOG2E)

    def tempered(self, top: Tensor) -> Tensor:
        """Of exp(z / t)."""
        return self._rounded(top, self.slope)

    def plain(self, top: Tensor) -> Tensor:
        """Of exp(z), which is a power of exp(z / t) where t is 1, 2, 3 or 4, and that is precise
        enough."""
        own = self._rounded(top, self.one)
        if not self.rounds:
            return own
        whole = (self.t == self.t.round()) & (self.t <= 4)
        return torch.where(whole & self.precise, self.t * self.tempered(top), own)

    def _rounded(self, top: Tensor, factor: Tensor) -> Tensor:
        exact = top.double() * factor
        if not self.rounds:
            return exact
        return torch.where(top.abs() <= self.limit, (top * factor).double(), exact)


class RowStatistics:
    """What is known of each row once some of its classes have been added."""

    def __init__(self, rows: int, objective: Objective, like: Tensor) -> None:
        """``like``: of the dtype of losses and statistics, on the rows' device."""
        o = self.objective = objective
        self.like = like
        self.student = References(o.temperature, o, like)
        self.teacher = self.student
        if o.teacher_temperature is not o.temperature:
            self.teacher = References(o.teacher_temperature, o, like)
        nothing = like.new_full((rows,), -math.inf)
        self.student_top, self.teacher_top = nothing, nothing
        # log2 of the sums of exp(z / t), exp(z) and exp(w / t).
        self.student_mass = self.hard_mass = self.teacher_mass = nothing.double()
        self.divergence = torch.zeros_like(self.student_mass)
        self.label_logit = nothing.double()

    def add(self, within: Tensor, stats: Tensor, label_logits: Tensor | None) -> None:
        """Adds some classes. ``within``: their divergence as if there were no others;
        ``label_logits``: the student's, of rows whose label is among them, else -inf."""
        stats = stats[:-1].view(-1, len(self.student_top))
        student_top, student_scale, hard_scale, teacher_top, teacher_scale, *_ = stats
        student = self.student.tempered(student_top) - student_scale.double().log2()
        teacher = self.teacher.tempered(teacher_top) - teacher_scale.double().log2()
        if label_logits is not None:
            hard = self.student.plain(student_top) - hard_scale.double().log2()
            self.hard_mass = torch.logaddexp2(self.hard_mass, hard)
            self.label_logit = torch.maximum(self.label_logit, label_logits.double())
        students = torch.stack([self.student_mass, student])
        teachers = torch.stack([self.teacher_mass, teacher])
        # Of a part that one of them masks there is no divergence yet, only between the parts.
        known = (students > -math.inf) & (teachers > -math.inf)
        parts = torch.stack([self.divergence, within.double()]).where(known, 0.0)
        self.student_mass = torch.logaddexp2(self.student_mass, student)
        self.teacher_mass = torch.logaddexp2(self.teacher_mass, teacher)
        self.divergence = _joined(
            self.objective.divergence,
            students - self.student_mass,
            teachers - self.teacher_mass,
            parts,
        )
        self.student_top = torch.maximum(self.student_top, student_top)
        self.teacher_top = torch.maximum(self.teacher_top, teacher_top)

    def loss(self, labels: Tensor | None) -> Tensor:
        """Of each row."""
        o = self.objective
        # A logit that is NaN or +inf, or a row that is masked throughout.
        valid = self.student_mass.isfinite() & self.teacher_mass.isfinite()
        soft_weight = o.soft_weight * o.temperature * o.temperature
        loss = _weighted(soft_weight, self.divergence.where(valid, math.nan))
        if labels is not None:
            loss = loss + _weighted(o.hard_weight, _LN2 * self.hard_mass - self.label_logit)
            loss = loss.masked_fill(labels == o.ignore_index, 0.0)
        return loss.to(self.like.dtype)

    def stats(self, scale: Tensor, has_labels: bool) -> Tensor:
        """Of whole rows, for ``ops.gradient_``; ``scale`` multiplies the gradient."""
        zeros = torch.zeros_like(self.student_mass)
        student = self.student.tempered(self.student_top) - self.student_mass
        hard = self.student.plain(self.student_top) - self.hard_mass
        teacher = self.teacher.tempered(self.teacher_top) - self.teacher_mass
        # The sum of its slopes is the reverse KL itself; that of the others is 0.
        slopes = self.divergence if self.objective.divergence == "reverse_kl" else zeros
        rows = [
            self.student_top,
            student.exp2(),
            hard.exp2() if has_labels else zeros,
            self.teacher_top,
            teacher.exp2(),
            slopes,
            zeros,  # of classes that count for a mean, which is none of these
            scale.reshape(1),
        ]
        return torch.cat([row.to(self.like.dtype) for row in rows])


def _joined(divergence: str, student: Tensor, teacher: Tensor, within: Tensor) -> Tensor:
    """The divergence of two parts, ``(2, rows)``, taken together. ``student`` and ``teacher``:
    log2 of their shares."""
    q, p = student.exp2().nan_to_num(0.0), teacher.exp2().nan_to_num(0.0)
    gap = _LN2 * (teacher - student)
    if divergence == "reverse_kl":
        p, q, gap = q, p, -gap
    if divergence == "soft_cross_entropy":
        between = -_LN2 * p * student
    else:
        between = torch.where(gap.abs() < 0.25, p * (gap + torch.expm1(-gap)), p * gap + (q - p))
    weighted = torch.where(p > 0, p * within + between, q if divergence != DIVERGENCES[2] else 0.0)
    return weighted.sum(0).clamp(min=0)  # rounding may make it less


def _weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value, where nothing is 0 even times infinity."""
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, weight * value)
    return weight * value if weight != 0 else torch.zeros_like(value)


def _on_device(number: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(like)
    return torch.full((), number, dtype=like.dtype, device=like.device)  # does not wait for it
