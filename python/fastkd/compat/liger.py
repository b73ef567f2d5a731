"""Liger's KL, JSD and TVD modules: no temperature, no hard term, (log-)probabilities come in.

Log-probabilities are valid logits, since softmax(log q) is q, so these adapters are fastkd on what
they are given. Passing the logits themselves to :func:`fastkd.loss` saves the log_softmax before,
its backward pass, and a tensor of the logits' size for each.

>>> import torch
>>> from fastkd.compat.liger import LigerJSD
>>> student, teacher = torch.zeros(2, 4).log_softmax(-1), torch.zeros(2, 4).log_softmax(-1)
>>> LigerJSD(beta=0.1)(student, teacher)
tensor(0.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd._core import checks, shapes
from fastkd.compat.convention import Convention, generalized_jsd, kl_div_reduction

CONVENTION = Convention(
    peer="Liger-Kernel",
    before="from liger_kernel.transformers import LigerJSD",
    after="from fastkd.compat.liger import LigerJSD",
    weighs="no hard term; `beta` weighs the teacher in the mixture",
    t_squared="no temperature",
    denominator="JSD: rows not ignored; TVD: those (`batchmean`), or those and the classes "
    "(`mean`); KL as `torch.nn.KLDivLoss`, whose default `mean` divides by all elements",
    mask="JSD and TVD: rows whose label is `ignore_index`; KL: none",
    differences=(
        "What comes in is normalised (softmax of log-probabilities), so the gradient for the "
        "log-probabilities differs by what the log_softmax before them drops; the gradient for "
        "the logits is the same.",
        "`LigerKLDIVLoss` clamps the target at `eps` before its logarithm, which changes the value "
        "where p < eps; here p log p is exact, 0 at 0, and another `eps` is refused.",
        "Older releases of `LigerTVDLoss` had the subgradient -1/2 where p = q; here it is 0.",
        "`reduction='none'`, one loss for each class, is refused.",
        "With every row ignored Liger divides by zero; here the loss is 0 with a zero gradient.",
        "These run on CPUs too, and need no Triton.",
    ),
)


class LigerKLDIVLoss(nn.Module):
    """Forward KL of log-probabilities and a target, as :class:`torch.nn.KLDivLoss` reduces it.

    Args:
        eps: only for the signature's sake: there is nothing to clamp. 1e-10.
        reduction: ``"mean"`` (over all elements), ``"batchmean"`` or ``"sum"``. Default ``"mean"``.
        log_target: whether the target holds log-probabilities. Default False: probabilities.

    Example:
        >>> import torch
        >>> target = torch.tensor([[0.5, 0.5]])
        >>> LigerKLDIVLoss(reduction="batchmean")(torch.tensor([[0.25, 0.75]]).log(), target)
        tensor(0.1438)
    """

    def __init__(
        self, eps: float = 1e-10, *, reduction: str = "mean", log_target: bool = False
    ) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        if eps != 1e-10:
            raise ValueError(f"eps has no use here and must be left at 1e-10; got {eps!r}")
        checks.one_of("reduction", reduction, ("mean", "batchmean", "sum"))
        self.reduction = reduction
        self.log_target = log_target

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """The loss of student log-probabilities ``(..., C)`` and a teacher's ``(..., C)``."""
        reduction, factor = kl_div_reduction(self.reduction, y_pred)
        return losses.loss(
            y_pred,
            y_true,
            temperature=1.0,
            soft_weight=factor,
            reduction=reduction,
            teacher_form="log_probs" if self.log_target else "probs",
        )


class LigerJSD(nn.Module):
    """Generalised Jensen-Shannon divergence of log-probabilities, mean over rows.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]; 0 is forward KL, 1 reverse KL.
            Default 0.5.
        ignore_index: rows with this label are left out. Default -100.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> LigerJSD(beta=0.0)(student, teacher)
        tensor(0.1438)
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        self.options = generalized_jsd(beta)
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss of student and teacher log-probabilities ``(..., C)``, labels ``(...)``."""
        return losses.loss(
            log_q,
            log_p,
            shift_labels,
            temperature=1.0,
            teacher_form="log_probs",
            **_masked(shift_labels, self.ignore_index),
            **self.options,
        )


class LigerTVDLoss(nn.Module):
    """Total variation distance, half the sum of \\|p - q\\|, of probabilities.

    Args:
        reduction: ``"batchmean"`` (over rows not ignored), ``"mean"`` (over classes too) or
            ``"sum"``. Default ``"batchmean"``.
        ignore_index: rows with this label are left out. Default -100.

    Example:
        >>> import torch
        >>> LigerTVDLoss()(torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.2500)
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        checks.one_of("reduction", reduction, ("batchmean", "mean", "sum"))
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """The loss of ``p``, the student's probabilities ``(..., C)``, and ``q``, the teacher's."""
        wide = p.to(shapes.accumulator(p))
        # A probability that is 0 has no logarithm whose gradient is finite; the least one has.
        log_p = wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
        reduction, factor = kl_div_reduction(self.reduction, log_p)
        return losses.loss(
            log_p,
            q,
            shift_labels,
            temperature=1.0,
            soft_weight=1.0 if self.reduction == "batchmean" else factor,
            reduction=reduction,
            divergence="total_variation",
            teacher_form="probs",
            **_masked(shift_labels, self.ignore_index),
        )


def _masked(labels: Tensor | None, ignore_index: int) -> dict[str, Any]:
    """Labels that mask and weigh nothing."""
    return {} if labels is None else {"hard_weight": 0.0, "ignore_index": ignore_index}
