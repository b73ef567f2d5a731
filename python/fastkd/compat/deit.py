"""Compute DeiT's DistillationLoss: a base criterion and the teacher's term, on two heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import losses, validation
from fastkd.compat.convention import check_positive, convert_reduction


class DistillationLoss(nn.Module):
    """Compute DeiT's loss: (1 - alpha) * base_criterion + alpha * the teacher's term.

    The loss comes from Touvron et al., "Training data-efficient image transformers & distillation
    through attention" (2021). fastkd computes the teacher's term only, because the two terms have
    different logits.

    Args:
        base_criterion: called with the class head's logits and the labels.
        teacher_model: called with the inputs, without gradient; returns logits ``(N, C)`` of C
            classes. As in DeiT, the teacher's mode is not set here, and ``train()`` of this module
            also sets the teacher's mode.
        distillation_type: ``"none"``: the loss is the base criterion alone. ``"soft"``: the
            teacher's term is tau^2 times the mean over rows and classes of p log(p / q), with the
            teacher's p and the student's q. ``"hard"``: the teacher's term is the cross entropy
            with the teacher's most probable class.
        alpha: weight of the **teacher's** term, in [0, 1].
        tau: temperature of ``"soft"``.

    Example:
        >>> import torch
        >>> from fastkd.compat.deit import DistillationLoss
        >>> teacher, base = torch.nn.Linear(2, 4), torch.nn.CrossEntropyLoss()
        >>> criterion = DistillationLoss(base, teacher, "hard", alpha=0.5, tau=1.0)
        >>> heads = torch.zeros(3, 4), torch.zeros(3, 4)
        >>> criterion(torch.zeros(3, 2), heads, torch.tensor([0, 1, 2]))
        tensor(1.3863)
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        teacher_model: nn.Module,
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        validation.check_one_of("distillation_type", distillation_type, ("none", "soft", "hard"))
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = validation.check_number("alpha", alpha, 0.0, 1.0)
        self.tau = check_positive("tau", tau)

    def forward(
        self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor
    ) -> Tensor:
        """Compute the loss of the student's outputs.

        ``outputs``: (class logits, distillation logits), or class logits alone for ``"none"``.
        """
        student, distilled = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base = self.base_criterion(student, labels)
        if self.distillation_type == "none":
            return base
        if distilled is None:
            raise ValueError(
                "outputs must be a pair (class logits, distillation logits) with "
                f"distillation_type={self.distillation_type!r}; got one tensor"
            )
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        if self.distillation_type == "hard":
            hard = teacher.argmax(1)
            term = losses.loss(distilled, teacher, hard, hard_weight=self.alpha, soft_weight=0.0)
        else:
            weight = self.alpha * convert_reduction("mean", distilled)[1]
            term = losses.loss(distilled, teacher, temperature=self.tau, soft_weight=weight)
        return base * (1 - self.alpha) + term
