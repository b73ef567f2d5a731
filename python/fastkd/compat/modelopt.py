"""Compute Model-Optimizer's LogitsDistillationLoss: T^2 times the forward KL."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd import losses, validation
from fastkd.compat.convention import check_positive, convert_reduction


class LogitsDistillationLoss(nn.Module):
    """Compute T^2 KL(teacher || student) of logits, reduced like :class:`torch.nn.KLDivLoss`.

    Args:
        temperature: T > 0. Default 1.
        reduction: ``"mean"`` (over rows and classes), ``"batchmean"``, ``"sum"``, or ``"none"``,
            which gives one loss for each row. Default ``"mean"``.

    Example:
        >>> import torch
        >>> from fastkd.compat.modelopt import LogitsDistillationLoss
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> LogitsDistillationLoss()(student, teacher)
        tensor(0.2311)
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        """Check and store the options."""
        super().__init__()
        validation.check_one_of("reduction", reduction, ("mean", "batchmean", "sum", "none"))
        self.temperature = check_positive("temperature", temperature)
        self.reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """Compute the loss of student and teacher logits ``(..., classes)``."""
        reduction, weight = convert_reduction(self.reduction, logits_s)
        return losses.loss(
            logits_s,
            logits_t,
            temperature=self.temperature,
            soft_weight=weight,
            reduction=reduction,
        )
