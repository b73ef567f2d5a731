"""Define the loss and every option in PyTorch operations.

Tests and benchmarks compare the kernels with this module in float64. fastkd calls this module where
no kernel can run: options without a kernel, gradients of options, second derivatives, batches of
gradients, function transforms, unsupported devices. The code follows the definitions in the papers,
not the kernels, so that this module does not repeat a mistake of a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.reference.divergences import DIVERGENCES, divide, log_ratio_sum, standardized, weighted

Reduction = Literal["none", "sum", "mean"]
TeacherForm = Literal["logits", "log_probs", "probs"]
Ensemble = Literal["probs", "logits"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
TEACHER_FORMS: tuple[TeacherForm, ...] = get_args(TeacherForm)
ENSEMBLES: tuple[Ensemble, ...] = get_args(Ensemble)


class Terms(NamedTuple):
    """Hold the loss and its terms, all reduced like the loss; ``loss`` alone has a gradient."""

    loss: Tensor
    """``hard_weight * hard + soft_weight * T^2 * soft``."""
    hard: Tensor
    """Cross entropy of the student (at temperature 1) with the labels; 0 without labels."""
    soft: Tensor
    """The divergence of the softened teacher and student, without weight and T^2."""
    student_entropy: Tensor
    """Entropy of the softened student, in nats."""
    teacher_entropy: Tensor
    """Entropy of the softened teacher, in nats."""
    agreement: Tensor
    """1 where teacher and student have a most probable class in common, else 0."""
    student_mass: Tensor = None  # type: ignore[assignment]
    """The student's probability of the classes that the teacher lists; 1 for a dense teacher.

    ``fastkd.reference.terms`` leaves ``student_mass`` and ``teacher_mass`` None.
    """
    teacher_mass: Tensor = None  # type: ignore[assignment]
    """The teacher's probability of the classes that it lists; 1 for a dense teacher."""

    def stacked(self) -> Tensor:
        """Stack the fields that are not None."""
        return torch.stack([field for field in self if field is not None])


# ---- the teacher, the temperatures, the labels


def column(value: float | Tensor) -> float | Tensor:
    """Return a tensor with one number for each row as (..., 1), to broadcast with (..., C)."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def _mix_log_probs(log_probs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the log of the weighted sum of several teachers' probabilities."""
    stack = torch.stack([x + math.log(w) for x, w in zip(log_probs, weights, strict=True)])
    absent = (stack == -math.inf).all(0)
    return stack.masked_fill(absent, 0).logsumexp(0).masked_fill(absent, -math.inf)


def soften_teacher(
    teachers: Sequence[Tensor],
    t: float | Tensor,
    form: str,
    weights: Sequence[float] | None,
    ensemble: str,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the softened teacher's logits, and the logits that rank classes for ``agreement``.

    ``teachers``: tensors ``(..., C)`` in the form ``form``. ``t``: the teacher's temperature, a
    number or ``(..., 1)``.
    """
    if form == "probs":  # logarithms of probabilities are logits of the same distribution
        teachers = [probs.log() for probs in teachers]
    ranked = teachers[0]
    if standardize:
        teachers = [standardized(logits) for logits in teachers]
    if len(teachers) == 1:
        return divide(teachers[0], t), ranked
    total = sum(weights) if weights else len(teachers)
    shares = [w / total for w in weights or [1.0] * len(teachers)]
    if ensemble == "logits":
        mixed = shares[0] * teachers[0]
        for share, logits in zip(shares[1:], teachers[1:], strict=True):
            mixed = mixed + share * logits
        return divide(mixed, t), mixed
    mixed = _mix_log_probs([F.log_softmax(divide(x, t), -1) for x in teachers], shares)
    return mixed, mixed


def entropy(log_p: Tensor) -> Tensor:
    """Compute the entropy in nats of distributions with log-probabilities ``(..., classes)``."""
    return -log_ratio_sum(log_p.exp(), log_p, torch.zeros_like(log_p))


def _sum_products(weights: Tensor, log_q: Tensor) -> Tensor:
    """Return -sum weights log q over classes; a masked class with weight 0 adds 0."""
    return -(weights * log_q.masked_fill(weights == 0, 0)).sum(-1)


def cross_entropy(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """Compute ``F.cross_entropy`` of each row.

    ``labels``: ``(...)`` class indices in range, or ``(..., C)`` probabilities.
    """
    log_q = F.log_softmax(logits, -1)
    each = log_q.new_ones(log_q.shape[-1]) if class_weight is None else class_weight
    if labels.is_floating_point():
        target = labels.to(log_q.dtype) * each
        hard = _sum_products(target, log_q)
    else:
        hard = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if class_weight is not None:
            hard = weighted(class_weight[labels], hard)
    if label_smoothing:
        smooth = _sum_products(each.expand_as(log_q), log_q) / log_q.shape[-1]
        hard = weighted(1 - label_smoothing, hard) + weighted(label_smoothing, smooth)
    return hard


# ---- the loss


def reduce(
    rows: Tensor,
    valid: Tensor | None,
    reduction: str,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Reduce ``rows``, one number for each row; rows that are not ``valid`` count as 0.

    ``divisor``: the divisor of the mean. Default: the number of valid rows. The mean is 0 if no row
    is valid.
    """
    valid = torch.ones_like(rows, dtype=torch.bool) if valid is None else valid
    rows = rows.where(valid, torch.zeros_like(rows))
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    count = valid.sum()
    if divisor is None:
        return rows.sum() / count.clamp(min=1)
    divisor = torch.as_tensor(divisor, dtype=rows.dtype, device=rows.device)
    return rows.sum() / divisor.where(count > 0, 1)


def terms(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    teacher_temperature: float | Tensor | None = None,
    hard_weight: float | Tensor = 0.5,
    soft_weight: float | Tensor = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
    mix: float | None = None,
    teacher_form: str = "logits",
    teacher_weights: Sequence[float] | None = None,
    ensemble: str = "probs",
    standardize: bool = False,
    dim: int = -1,
) -> Terms:
    """Compute the loss and its terms by differentiable PyTorch operations in float32 or float64.

    Arguments are those of :func:`fastkd.loss`, but unchecked, and without ``alpha``,
    ``shift``, ``inplace`` and ``chunks``. Without labels, the loss is the soft term alone.
    """
    teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
    soft_labels = labels is not None and labels.is_floating_point()
    if dim != -1:
        student_logits = student_logits.movedim(dim, -1)
        teachers = [teacher.movedim(dim, -1) for teacher in teachers]
        labels = labels.movedim(dim, -1) if labels is not None and soft_labels else labels
    acc = torch.promote_types(student_logits.dtype, torch.float32)
    for teacher in teachers:
        acc = torch.promote_types(acc, teacher.dtype)
    student = student_logits.to(acc)
    teachers = [teacher.to(acc) for teacher in teachers]
    if class_weight is not None:
        class_weight = class_weight.detach().to(acc)

    valid: Tensor | None = None
    nan_factor: float | Tensor = 1.0
    if labels is not None and not soft_labels:
        # Ignored rows are replaced before any computation, so that NaN in such a row has no effect.
        labels = labels.long()
        valid = labels != ignore_index
        keep = valid.unsqueeze(-1)
        student = student.where(keep, torch.zeros_like(student))
        neutral = 1 / student.shape[-1] if teacher_form == "probs" else 0.0
        teachers = [teacher.where(keep, torch.full_like(teacher, neutral)) for teacher in teachers]
        # A label out of range makes the loss of its row NaN.
        in_range = (labels >= 0) & (labels < student.shape[-1])
        nan_factor = torch.ones_like(labels, dtype=acc).masked_fill(valid & ~in_range, math.nan)
        labels = labels.where(in_range, torch.zeros_like(labels))

    if teacher_temperature is None:
        teacher_temperature = temperature if teacher_form == "logits" else 1.0
    temperature, teacher_temperature, hard_weight, soft_weight = (
        value.to(acc) if isinstance(value, Tensor) else value
        for value in (temperature, teacher_temperature, hard_weight, soft_weight)
    )
    scaled_teacher, ranked = soften_teacher(
        teachers, column(teacher_temperature), teacher_form, teacher_weights, ensemble, standardize
    )
    log_p = F.log_softmax(scaled_teacher, -1)
    scaled = divide(standardized(student) if standardize else student, column(temperature))
    log_q = F.log_softmax(scaled, -1)
    definition = DIVERGENCES[divergence]
    compared = [scaled_teacher, scaled] if definition.compares == "logits" else [log_p, log_q]
    if isinstance(soft_weight, Tensor) or soft_weight == 0:
        # Rows with soft_weight 0 get no gradient of their divergence, which may be infinite: 0
        # times an infinite gradient is NaN.
        has_weight = torch.as_tensor(soft_weight != 0, device=student.device).unsqueeze(-1)
        compared = [torch.where(has_weight, x, x.detach()) for x in compared]
    arguments: list[object] = [*compared]
    arguments += [labels] if definition.needs_labels else []
    arguments += [] if definition.mix is None else [definition.mix if mix is None else mix]
    soft = definition.compute(*arguments) * (nan_factor if definition.needs_labels else 1)
    soft_part = weighted(soft_weight * temperature**2, soft)
    hard = hard_part = torch.zeros_like(soft)
    hard_divisor = normalizer
    if labels is not None:
        hard = cross_entropy(student, labels, class_weight, label_smoothing) * nan_factor
        hard_part = weighted(hard_weight, hard)
        if normalizer is None and class_weight is not None and valid is not None:
            hard_divisor = reduce(class_weight[labels], valid, "sum")
            hard_divisor = hard_divisor.where(hard_divisor != 0, 1)
    with torch.no_grad():
        is_best = (student == student.amax(-1, keepdim=True)) & (
            ranked == ranked.amax(-1, keepdim=True)
        )
        logged = (
            soft.detach(),
            entropy(log_q),
            entropy(log_p),
            is_best.any(-1).to(acc),
        )
    loss = reduce(hard_part, valid, reduction, hard_divisor)
    return Terms(
        loss + reduce(soft_part, valid, reduction, normalizer),
        reduce(hard.detach(), valid, reduction, hard_divisor),
        *(reduce(field, valid, reduction, normalizer) for field in logged),
    )


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Compute the loss; arguments as in :func:`terms`."""
    return terms(student_logits, teacher_logits, labels, **options).loss  # type: ignore[arg-type]
