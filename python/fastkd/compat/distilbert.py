"""Compute the terms of DistilBERT's loss that read logits, as its ``Distiller.step`` does."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastkd import losses, validation
from fastkd._core import shapes
from fastkd.compat.convention import check_positive, check_weight


def step_loss(
    s_logits: Tensor,
    t_logits: Tensor,
    attention_mask: Tensor,
    lm_labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha_ce: float = 0.5,
    alpha_mlm: float = 0.0,
    alpha_clm: float = 0.5,
    alpha_mse: float = 0.0,
    restrict_ce_to_mask: bool = False,
) -> Tensor:
    """Compute alpha_ce T^2 KL + (alpha_mlm or alpha_clm) CE + alpha_mse squared error.

    The loss comes from Sanh et al., "DistilBERT, a distilled version of BERT" (2019), and the
    defaults come from DistilBERT's research project. KL and cross entropy mask different rows, but
    take one pass over the logits.

    Args:
        s_logits, t_logits: logits of student and teacher, ``(batch, tokens, C)``, with C classes.
        attention_mask: ``(batch, tokens)``; the soft terms ignore rows with 0.
        lm_labels: ``(batch, tokens)``; the hard term ignores rows with -100.
        temperature: T > 0 of the KL.
        alpha_ce: weight of the **soft** term.
        alpha_mlm: weight of the cross entropy of each token with its own label.
        alpha_clm: weight of the cross entropy of each token with the next token's label.
        alpha_mse: weight of the squared error of the logits, summed over classes.
        restrict_ce_to_mask: if True, soft terms ignore rows without a label, instead of rows with
            ``attention_mask`` 0.

    Example:
        >>> import torch
        >>> from fastkd.compat.distilbert import step_loss
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, -100, 2]])
        >>> step_loss(logits, logits, torch.ones(1, 3), labels, alpha_mlm=2.0, alpha_clm=0.0)
        tensor(2.7726)
    """
    alpha_ce, alpha_mse = check_weight("alpha_ce", alpha_ce), check_weight("alpha_mse", alpha_mse)
    alpha_mlm, alpha_clm = (
        check_weight("alpha_mlm", alpha_mlm),
        check_weight("alpha_clm", alpha_clm),
    )
    if alpha_mlm and alpha_clm:
        raise ValueError(
            "alpha_mlm and alpha_clm must not both be positive; got "
            f"alpha_mlm={alpha_mlm!r}, alpha_clm={alpha_clm!r}"
        )
    lm_labels = validation.to_int64(lm_labels)
    soft = lm_labels >= 0 if restrict_ce_to_mask else attention_mask != 0
    labels = F.pad(lm_labels[:, 1:], (0, 1), value=-100) if alpha_clm else lm_labels
    hard = labels != -100
    # A row of the soft terms without a label gets label 0, which is in range, and hard weight 0.
    labels = labels.masked_fill(~hard, 0).masked_fill(~(hard | soft), -100)
    total = losses.loss(
        s_logits, t_logits, labels, temperature=check_positive("temperature", temperature),
        hard_weight=_make_mean_weights(hard, s_logits) * (alpha_mlm or alpha_clm),
        soft_weight=_make_mean_weights(soft, s_logits) * alpha_ce, reduction="sum",
    )  # fmt: skip
    if alpha_mse:
        labels = lm_labels.new_zeros(soft.shape).masked_fill(~soft, -100)
        total = total + losses.loss(
            s_logits, t_logits, labels, temperature=1.0, hard_weight=0.0,
            soft_weight=alpha_mse * s_logits.shape[-1], divergence="mse",
        )  # fmt: skip
    return total


def _make_mean_weights(mask: Tensor, logits: Tensor) -> Tensor:
    """Return weights of rows that turn a sum over rows into the mean over the rows in ``mask``."""
    weights = mask.to(shapes.accumulator(logits))
    return weights / weights.sum().clamp(min=1)
