"""Compute the forward KL of verl's on-policy distillation from a teacher's top-k lists."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd import losses
from fastkd._core.values import Tail


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any,
    data_format: str,
    *,
    tail: Tail = "ignore",
) -> dict[str, Tensor]:
    """Compute each token's loss, and the probabilities that student and teacher give its list.

    Args:
        student_logits: ``(1, tokens, C)``, with C classes, divided by the temperature already.
        teacher_topk_log_probs, teacher_topk_ids: nested tensors ``(batch, length, k)``, or
            ``(1, tokens, k)``. A list belongs to the logits at its position.
        config, data_format: have no effect.
        tail: the ``tail`` of a :class:`fastkd.TopK`. ``"ignore"`` gives verl's sum over the list of
            p log(p / q), with the teacher's p and the student's q. verl clamps a negative sum at 0.
            ``"ghost"`` gives a KL, which is at least 0. Default ``"ignore"``.

    Returns:
        ``"distillation_losses"``, ``"student_mass"`` and ``"teacher_mass"``, each ``(1, tokens)``.

    Example:
        >>> import torch
        >>> from fastkd.compat.verl import compute_forward_kl_topk
        >>> log_probs, ids = torch.tensor([[[0.5, 0.3]]]).log(), torch.tensor([[[0, 1]]])
        >>> outputs = compute_forward_kl_topk(torch.zeros(1, 1, 3), log_probs, ids, None, "thd")
        >>> outputs["distillation_losses"]
        tensor([[0.1711]])
    """
    log_probs, ids = (
        lists.values().unsqueeze(0) if lists.is_nested else lists
        for lists in (teacher_topk_log_probs, teacher_topk_ids)
    )
    # verl fills positions without a list with k tokens of probability 1. One such token may be a
    # list.
    is_filled = (log_probs == 0).sum(-1, keepdim=True) > 1
    teacher = losses.TopK(log_probs, ids.masked_fill(is_filled, -1), tail)
    terms = losses.terms(student_logits, teacher, temperature=1.0, reduction="none")
    return {
        "distillation_losses": terms.loss,
        "student_mass": terms.student_mass,
        "teacher_mass": terms.teacher_mass,
    }
