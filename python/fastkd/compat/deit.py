"""DeiT's DistillationLoss: a base criterion on one head, the teacher on the other.

>>> import torch
>>> from fastkd.compat.deit import DistillationLoss
>>> teacher = torch.nn.Linear(2, 4)
>>> criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), teacher, "hard", alpha=0.5, tau=1.0)
>>> heads = torch.zeros(3, 4), torch.zeros(3, 4)
>>> criterion(torch.zeros(3, 2), heads, torch.tensor([0, 1, 2]))
tensor(1.3863)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd._core import checks
from fastkd.compat.convention import Convention, kl_div_reduction, positive

CONVENTION = Convention(
    peer="DeiT",
    before="from losses import DistillationLoss  # of the DeiT repository",
    after="from fastkd.compat.deit import DistillationLoss",
    weighs="`alpha` the **teacher's** term; the base criterion weighs 1 - alpha",
    t_squared="`soft`: yes; `hard` has no temperature",
    denominator="`soft`: all elements, classes too; `hard`: rows",
    mask="none",
    differences=(),
)


class DistillationLoss(nn.Module):
    """(1 - alpha) * base_criterion + alpha * the teacher's term.

    Touvron et al., "Training data-efficient image transformers & distillation through attention"
    (2021). The two terms read different logits, so the base criterion stays what it is.

    Args:
        base_criterion: called with the class head's logits and the labels.
        teacher_model: called with the inputs, without gradient; gives logits ``(N, C)``. It is in
            the mode that it is put in, which ``.train()`` of this module does too, as in DeiT.
        distillation_type: ``"none"``; ``"soft"``, T^2 KL(teacher || student) over all elements; or
            ``"hard"``, the cross entropy with the teacher's most probable class.
        alpha: weight of the **teacher's** term, in [0, 1].
        tau: temperature of ``"soft"``.

    Example:
        >>> import torch
        >>> teacher = torch.nn.Linear(2, 4)
        >>> base = torch.nn.CrossEntropyLoss()
        >>> criterion = DistillationLoss(base, teacher, "soft", alpha=0.5, tau=3.0)
        >>> heads = torch.zeros(3, 4), torch.zeros(3, 4)
        >>> criterion(torch.zeros(3, 2), heads, torch.tensor([0, 1, 2])).shape
        torch.Size([])
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        teacher_model: nn.Module,
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        checks.one_of("distillation_type", distillation_type, ("none", "soft", "hard"))
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = checks.number("alpha", alpha, 0.0, 1.0)
        self.tau = positive("tau", tau)

    def forward(
        self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor
    ) -> Tensor:
        """The loss of the model's outputs, a pair of class logits and distillation logits."""
        logits, distilled = (outputs, None) if isinstance(outputs, Tensor) else outputs
        base = self.base_criterion(logits, labels)
        if self.distillation_type == "none":
            return base
        if distilled is None:
            raise ValueError(
                "outputs must be a pair (class logits, distillation logits) with "
                f"distillation_type={self.distillation_type!r}; got one tensor"
            )
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        return base * (1 - self.alpha) + self._teachers_term(distilled, teacher)

    def _teachers_term(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.distillation_type == "hard":
            return losses.loss(
                student, teacher, teacher.argmax(1), hard_weight=self.alpha, soft_weight=0.0
            )
        _, factor = kl_div_reduction("mean", student)
        return losses.loss(student, teacher, temperature=self.tau, soft_weight=self.alpha * factor)
