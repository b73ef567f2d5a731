"""Compute Liger's KL, JSD and TVD of (log-)probabilities, without temperature and hard term.

Log-probabilities are valid logits, since softmax(log q) = q. New code should pass logits to
:func:`fastkd.loss`, which saves the time and memory of log_softmax and of its backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import losses, validation
from fastkd._core import shapes
from fastkd.compat.convention import choose_divergence, convert_reduction, mask_rows


class LigerKLDIVLoss(nn.Module):
    """Compute the forward KL of log-probabilities, reduced like :class:`torch.nn.KLDivLoss`.

    Args:
        eps: must be 1e-10, Liger's default; nothing is clamped.
        reduction: ``"mean"`` (over all elements), ``"batchmean"`` or ``"sum"``. Default ``"mean"``.
        log_target: True if the target holds log-probabilities, False for probabilities. Default
            False.

    Example:
        >>> import torch
        >>> from fastkd.compat.liger import LigerKLDIVLoss
        >>> target = torch.tensor([[0.5, 0.5]])
        >>> LigerKLDIVLoss(reduction="batchmean")(torch.tensor([[0.25, 0.75]]).log(), target)
        tensor(0.1438)
    """

    def __init__(
        self, eps: float = 1e-10, *, reduction: str = "mean", log_target: bool = False
    ) -> None:
        """Check and store the options."""
        super().__init__()
        if eps != 1e-10:
            raise ValueError(f"eps has no use here and must be left at 1e-10; got {eps!r}")
        validation.check_one_of("reduction", reduction, ("mean", "batchmean", "sum"))
        self.reduction = reduction
        self.log_target = log_target

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        """Compute the loss of the student's log-probabilities and a target, ``(..., classes)``."""
        reduction, factor = convert_reduction(self.reduction, y_pred)
        return losses.loss(
            y_pred, y_true, temperature=1.0, soft_weight=factor, reduction=reduction,
            teacher_form="log_probs" if self.log_target else "probs",
        )  # fmt: skip


class LigerJSD(nn.Module):
    """Compute the generalized Jensen-Shannon divergence of log-probabilities, averaged over rows.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]. 0 gives the forward KL, and 1 the
            reverse KL. Default 0.5.
        ignore_index: rows with this label are ignored. Default -100.

    Example:
        >>> import torch
        >>> from fastkd.compat.liger import LigerJSD
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> LigerJSD(beta=0.0)(student, teacher)
        tensor(0.1438)
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        """Check and store the options."""
        super().__init__()
        self.options = choose_divergence(beta)
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Compute the loss of student and teacher log-probabilities ``(..., classes)``."""
        return losses.loss(
            log_q, log_p, temperature=1.0, teacher_form="log_probs", **self.options,
            **mask_rows(shift_labels, self.ignore_index),
        )  # fmt: skip


class LigerTVDLoss(nn.Module):
    """Compute the total variation distance of probabilities, half the sum of \\|p - q\\|.

    Args:
        reduction: ``"batchmean"`` (over rows that are not ignored), ``"mean"`` (over
            these rows and all classes) or ``"sum"``. Default ``"batchmean"``.
        ignore_index: rows with this label are ignored. Default -100.

    Example:
        >>> import torch
        >>> from fastkd.compat.liger import LigerTVDLoss
        >>> LigerTVDLoss()(torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]]))
        tensor(0.2500)
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        """Check and store the options."""
        super().__init__()
        validation.check_one_of("reduction", reduction, ("batchmean", "mean", "sum"))
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        """Compute the loss of probabilities ``(..., classes)``, ``p`` of the student first."""
        wide = p.to(shapes.accumulator(p))
        # The gradient of log is infinite at 0, but finite at the smallest normal number.
        log_p = wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
        reduction, factor = convert_reduction(self.reduction, log_p)
        return losses.loss(
            log_p, q, temperature=1.0, divergence="total_variation", teacher_form="probs",
            soft_weight=1.0 if self.reduction == "batchmean" else factor, reduction=reduction,
            **mask_rows(shift_labels, self.ignore_index),
        )  # fmt: skip
