"""Model-Optimizer's LogitsDistillationLoss: forward KL, T squared, reduced as KLDivLoss does.

>>> import torch
>>> from fastkd.compat.modelopt import LogitsDistillationLoss
>>> LogitsDistillationLoss(temperature=2.0)(torch.zeros(2, 4), torch.zeros(2, 4))
tensor(0.)
"""

from __future__ import annotations

from torch import Tensor, nn

from fastkd import losses
from fastkd._core import checks
from fastkd.compat.convention import Convention, kl_div_reduction, positive

CONVENTION = Convention(
    peer="NVIDIA Model-Optimizer",
    before="from modelopt.torch.distill import LogitsDistillationLoss",
    after="from fastkd.compat.modelopt import LogitsDistillationLoss",
    weighs="no weight here; `StaticLossBalancer`'s `kd_loss_weight` weighs the soft term",
    t_squared="yes",
    denominator="`mean`, the default: all elements, classes too; `batchmean`: the first dimension",
    mask="none (`reduction='none'` gives one loss for each row, to be masked)",
    differences=(),
)


class LogitsDistillationLoss(nn.Module):
    """T^2 KL(teacher || student).

    Args:
        temperature: T > 0. Default 1.
        reduction: ``"mean"`` (over classes too), ``"batchmean"``, ``"sum"``, or ``"none"`` for one
            loss for each row. Default ``"mean"``.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> LogitsDistillationLoss()(student, teacher)
        tensor(0.2311)
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        checks.one_of("reduction", reduction, ("mean", "batchmean", "sum", "none"))
        self.temperature = positive("temperature", temperature)
        self.reduction = reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        """The loss of student and teacher logits, both ``(..., C)``."""
        if self.reduction == "none":
            return losses.loss(logits_s, logits_t, temperature=self.temperature, reduction="none")
        reduction, factor = kl_div_reduction(self.reduction, logits_s)
        return losses.loss(
            logits_s,
            logits_t,
            temperature=self.temperature,
            soft_weight=factor,
            reduction=reduction,
        )
