"""Compute TRL's generalized Jensen-Shannon divergence, the loss of GKDTrainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd import losses, validation
from fastkd.compat.convention import (
    check_normalizer,
    check_positive,
    choose_divergence,
    convert_reduction,
    mask_rows,
)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Compute beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    p is the teacher's distribution, and q the student's distribution. The formula is equation 1 of
    Agarwal et al., "On-Policy Distillation of Language Models" (2023). The loss has no T^2 and no
    shift: label i belongs to row i of the logits, as in GKDTrainer.

    Args:
        student_logits, teacher_logits: ``(..., C)``, with C classes.
        labels: ``(...)``; rows with -100 are ignored.
        beta: in [0, 1]. 0 gives the forward KL, and 1 the reverse KL. Default 0.5.
        temperature: T > 0 of student and teacher. Default 1.
        reduction: ``"batchmean"`` (over rows; without labels, over the first dimension), ``"mean"``
            (over rows and classes) or ``"sum"``. Default ``"batchmean"``.
        num_items_in_batch: the divisor of the sum, in place of ``reduction``. A number, or a tensor
            of any shape with equal elements. 0 is accepted if every label is -100.

    Example:
        >>> import torch
        >>> from fastkd.compat.trl import generalized_jsd_loss
        >>> student, teacher = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> generalized_jsd_loss(student, teacher, beta=0.0)
        tensor(0.4621)
    """
    validation.check_one_of("reduction", reduction, ("mean", "batchmean", "sum"))
    options: dict[str, Any] = {**choose_divergence(beta), **mask_rows(labels, -100)}
    options["reduction"], factor = convert_reduction(reduction, student_logits)
    if reduction == "batchmean" and labels is not None:
        factor = 1.0
    if num_items_in_batch is not None:
        count = num_items_in_batch
        count = count.reshape(-1)[:1] if isinstance(count, Tensor) else count
        options["normalizer"] = check_normalizer("num_items_in_batch", count, labels, -100)
        options["reduction"], factor = "mean", 1.0
    options["soft_weight"] = factor / check_positive("temperature", temperature) ** 2
    return losses.loss(student_logits, teacher_logits, temperature=temperature, **options)
