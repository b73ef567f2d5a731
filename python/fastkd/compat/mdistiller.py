"""Compute mdistiller's kd_loss and dkd_loss, the soft terms of its KD and DKD distillers."""

from __future__ import annotations

from torch import Tensor

from fastkd import losses
from fastkd.compat.convention import check_positive, check_weight


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """Compute T^2 times the mean over rows of KL(teacher || student), for logits ``(N, C)``.

    Example:
        >>> import torch
        >>> from fastkd.compat.mdistiller import kd_loss
        >>> kd_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), temperature=1)
        tensor(0.4621)
    """
    return losses.loss(logits_student, logits_teacher, temperature=temperature)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Compute T^2 times the mean over rows of alpha * TCKD + beta * NCKD.

    The loss comes from Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022). TCKD is the KL
    of the target class against all other classes; NCKD is the KL among the other classes.
    The default configuration of mdistiller has alpha 1, beta 8 and temperature 4.

    Args:
        logits_student, logits_teacher: ``(N, C)``, with C classes.
        target: ``(N,)`` class indices.
        alpha: weight of TCKD, positive.
        beta: weight of NCKD, at least 0.
        temperature: T > 0.

    Example:
        >>> import torch
        >>> from fastkd.compat.mdistiller import dkd_loss
        >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=4)
        tensor(5.0100)
    """
    alpha, beta = check_positive("alpha", alpha), check_weight("beta", beta)
    return losses.loss(
        logits_student, logits_teacher, target, temperature=temperature,
        hard_weight=0.0, soft_weight=alpha, divergence="dkd", mix=beta / alpha,
    )  # fmt: skip
