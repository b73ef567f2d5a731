"""fastkd's loss in plain PyTorch: the definition of every option, written to be read.

Tests and benchmarks hold the kernels against it in float64, and fastkd itself uses it where no
kernel can run (function transforms, second derivatives, devices without kernels). It imports torch
alone, and it is written from the definitions, not from the kernels' formulas, so that a mistake in
those cannot hide here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Terms(NamedTuple):
    """What one call computes, each reduced like the loss. Only ``loss`` carries a gradient."""

    loss: Tensor
    """``hard_weight * hard + soft_weight * T^2 * soft``."""
    hard: Tensor
    """Cross entropy of the student (at temperature 1) with the labels; 0 without labels."""
    soft: Tensor
    """The divergence of the softened teacher and student, before its weight and T^2."""
    student_entropy: Tensor
    """Entropy of softmax(student / T), in nats."""
    teacher_entropy: Tensor
    """Entropy of softmax(teacher / T), in nats."""
    agreement: Tensor
    """1 where some class is the most probable one for the teacher and for the student, else 0."""


def _log_ratio_sum(p: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of p (log_a - log_b) over classes, where classes with p = 0 count nothing."""
    absent = p == 0
    return (p * (log_a.masked_fill(absent, 0) - log_b.masked_fill(absent, 0))).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q), p the teacher, q the student (Hinton et al. 2015)."""
    return _log_ratio_sum(log_p.exp(), log_p, log_q)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward_kl": forward_kl}
"""Name of each divergence, and the function of (teacher, student) log-probabilities that defines
it."""


def _entropy(log_p: Tensor) -> Tensor:
    return -_log_ratio_sum(log_p.exp(), log_p, torch.zeros_like(log_p))


def _cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor, label_smoothing: float) -> Tensor:
    """``F.cross_entropy`` of each row, but NaN for a label out of range."""
    log_q = F.log_softmax(logits, -1)
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    index = labels.where(in_range, torch.zeros_like(labels)).unsqueeze(-1)
    hard = -log_q.gather(-1, index).squeeze(-1)
    if label_smoothing:
        hard = (1 - label_smoothing) * hard - label_smoothing * log_q.mean(-1)
    return hard * torch.where(in_range | ~valid, 1.0, float("nan"))


def _weighted(weight: float | Tensor, value: Tensor, zero: bool) -> Tensor:
    """weight * value, where a term that weighs nothing is left out even when it is infinite."""
    return (value.masked_fill(value.isinf(), 0) if zero else value) * weight


def terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
) -> Terms:
    """The loss and its terms, by differentiable PyTorch operations. See :func:`fastkd.loss` for the
    options.

    Args:
        student_logits: ``(..., C)``, any floating dtype; computed in float32 or better.
        teacher_logits: ``(..., C)``.
        labels: ``(...)`` class indices, or None for the soft term alone.
        temperature: one number, or a tensor with the shape of the rows, ``(...)``.
        hard_weight: weight of the cross entropy.
        soft_weight: weight of the divergence, which is multiplied by temperature squared as well.
        label_smoothing: as in :func:`torch.nn.functional.cross_entropy`.
        ignore_index: rows with this label count nothing in either term, and get no gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        normalizer: what ``"mean"`` divides by, instead of the number of rows that are not ignored.
        divergence: a key of :data:`DIVERGENCES`.
    """
    acc = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    acc = torch.promote_types(acc, torch.float32)
    student, teacher = student_logits.to(acc), teacher_logits.to(acc)
    valid = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if labels is not None:
        # Masked rows are taken out before anything is computed, so that a NaN in them stays out.
        valid = labels != ignore_index
        student = student.where(valid.unsqueeze(-1), torch.zeros_like(student))
        teacher = teacher.where(valid.unsqueeze(-1), torch.zeros_like(teacher))

    t = temperature.to(acc).unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    log_q = F.log_softmax(student / t, -1)
    log_p = F.log_softmax(teacher / t, -1)
    soft = DIVERGENCES[divergence](log_p, log_q)
    squared = temperature.to(acc).square() if isinstance(temperature, Tensor) else temperature**2
    total = _weighted(soft_weight * squared, soft, soft_weight == 0)
    hard = torch.zeros_like(soft)
    if labels is not None:
        hard = _cross_entropy(student, labels, valid, label_smoothing)
        total = total + _weighted(hard_weight, hard, hard_weight == 0)
    with torch.no_grad():
        both = (student == student.amax(-1, keepdim=True)) & (
            teacher == teacher.amax(-1, keepdim=True)
        )
        fields = (hard, soft, _entropy(log_q), _entropy(log_p), both.any(-1).to(acc))
        zero = torch.zeros_like(soft)
        logged = [term.detach().where(valid, zero) for term in fields]
    rows = Terms(total.where(valid, torch.zeros_like(total)), *logged)

    if reduction == "none":
        return rows
    divisor: float | Tensor = 1.0
    if reduction == "mean":
        count = valid.sum().clamp(min=1)
        divisor = count if normalizer is None else normalizer
    return Terms(*(field.sum() / divisor for field in rows))


def loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **options: object
) -> Tensor:
    """The loss of :func:`terms`, with the same arguments."""
    return terms(student_logits, teacher_logits, labels, **options).loss  # type: ignore[arg-type]
