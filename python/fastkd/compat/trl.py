"""TRL's generalised Jensen-Shannon divergence, of GKDTrainer and the trainers built like it.

>>> import torch
>>> from fastkd.compat.trl import generalized_jsd_loss
>>> generalized_jsd_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), beta=0.1)
tensor(0.)
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastkd import losses
from fastkd._core import checks
from fastkd.compat.convention import (
    Convention,
    generalized_jsd,
    kl_div_reduction,
    positive,
)

CONVENTION = Convention(
    peer="TRL",
    before="from trl.experimental.gkd import GKDTrainer  # its generalized_jsd_loss",
    after="from fastkd.compat.trl import generalized_jsd_loss",
    weighs="no hard term; `beta` weighs the teacher in the mixture",
    t_squared="no",
    denominator="`batchmean`: rows not ignored with labels, the first dimension without; `mean`: "
    "that and the classes; or `num_items_in_batch`",
    mask="rows whose label is -100",
    differences=(
        "`reduction='none'`, one loss for each class, is refused: fastkd never writes rows x "
        "classes of losses.",
        "With every row ignored, `reduction='mean'` and `num_items_in_batch=0` give 0, not NaN.",
        "`num_items_in_batch` with several elements, which repeat it for every GPU, gives one "
        "loss.",
    ),
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
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; p the teacher.

    Agarwal et al., "On-Policy Distillation of Language Models" (2023), equation 1. No T^2, no
    shift: pass logits and labels that belong together, as GKDTrainer does.

    Args:
        student_logits: ``(..., C)``.
        teacher_logits: ``(..., C)``.
        labels: ``(...)``; rows with -100 are left out.
        beta: in [0, 1]; 0 is forward KL, 1 reverse KL. Default 0.5.
        temperature: of both. Default 1.
        reduction: ``"batchmean"``, ``"mean"`` (over classes too) or ``"sum"``. Default
            ``"batchmean"``.
        num_items_in_batch: divides the sum, for any ``reduction``. A number, or a tensor of any
            shape with equal elements. 0 is accepted if every label is -100.

    Raises:
        TypeError, ValueError: for options that are not as above, and from :func:`fastkd.loss`.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> generalized_jsd_loss(student, teacher, beta=0.0)
        tensor(0.4621)
    """
    reduced, factor = kl_div_reduction(reduction, student_logits)
    if reduction == "batchmean" and labels is not None:
        factor = 1.0
    options: dict[str, Any] = {"reduction": reduced}
    if num_items_in_batch is not None:
        factor = 1.0
        count: float | Tensor = num_items_in_batch
        if isinstance(count, Tensor):
            count = checks.check_normalizer(count.reshape(-1)[:1], "num_items_in_batch")
        else:
            count = checks.number("num_items_in_batch", count, 0.0, math.inf)
        count = checks.check_nonzero(count, labels, -100, "num_items_in_batch")
        options = {"reduction": "mean", "normalizer": count}
    if labels is not None:
        options["hard_weight"] = 0.0
    return losses.loss(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        soft_weight=factor / positive("temperature", temperature) ** 2,
        **generalized_jsd(beta),
        **options,
    )
