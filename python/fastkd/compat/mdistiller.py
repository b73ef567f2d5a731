"""mdistiller's kd_loss and dkd_loss, the soft terms of its KD and DKD distillers.

>>> import torch
>>> from fastkd.compat.mdistiller import dkd_loss, kd_loss
>>> kd_loss(torch.zeros(2, 4), torch.zeros(2, 4), temperature=4)
tensor(0.)
"""

from __future__ import annotations

import math

from torch import Tensor

from fastkd import losses
from fastkd._core import checks
from fastkd.compat.convention import Convention, positive

CONVENTION = Convention(
    peer="mdistiller",
    before="from mdistiller.distillers.DKD import dkd_loss",
    after="from fastkd.compat.mdistiller import dkd_loss",
    weighs="`dkd_loss`: `alpha` the target class's KL, `beta` the other classes' KL; hard terms "
    "have weights of their own",
    t_squared="yes",
    denominator="rows",
    mask="none",
    differences=(
        "The target class is left out of the other classes' softmax exactly; mdistiller lowers its "
        "logit by 1000, which is the same unless logits differ by hundreds.",
        "`dkd_loss` needs `alpha` > 0.",
        "mdistiller's log(softmax) is infinite where a probability underflows; here it is not.",
    ),
)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the mean over rows of KL(teacher || student); logits ``(N, C)``.

    Example:
        >>> import torch
        >>> kd_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), temperature=1)
        tensor(0.4621)
    """
    return losses.loss(
        logits_student, logits_teacher, temperature=positive("temperature", temperature)
    )


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T^2 times the mean over rows of alpha * TCKD + beta * NCKD.

    Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022): TCKD is the KL of target against
    all other classes, NCKD the KL among the others.

    Args:
        logits_student: ``(N, C)``.
        logits_teacher: ``(N, C)``.
        target: ``(N,)`` class indices.
        alpha: weight of TCKD, positive. mdistiller's default configuration has 1.
        beta: weight of NCKD. mdistiller's default configuration has 8.
        temperature: T > 0. mdistiller's default configuration has 4.

    Raises:
        TypeError, ValueError: for options that are not as above, and from :func:`fastkd.loss`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=4)
        tensor(5.0100)
    """
    alpha = checks.number("alpha", alpha, 0.0, math.inf, open_low=True)
    beta = checks.number("beta", beta, 0.0, math.inf)
    return losses.loss(
        logits_student,
        logits_teacher,
        target,
        temperature=positive("temperature", temperature),
        hard_weight=0.0,
        soft_weight=alpha,
        divergence="dkd",
        mix=beta / alpha,
    )
