"""TextBrewer's kd_ce_loss and kd_mse_loss: no T squared, one temperature or one for each row.

>>> import torch
>>> from fastkd.compat.textbrewer import kd_ce_loss
>>> kd_ce_loss(torch.zeros(2, 4), torch.zeros(2, 4), temperature=8)
tensor(1.3863)
"""

from __future__ import annotations

from torch import Tensor

from fastkd import losses
from fastkd._core import shapes
from fastkd.compat.convention import Convention, positive

CONVENTION = Convention(
    peer="TextBrewer",
    before="from textbrewer.losses import kd_ce_loss, kd_mse_loss",
    after="from fastkd.compat.textbrewer import kd_ce_loss, kd_mse_loss",
    weighs="no weight here; `kd_loss_weight` weighs the soft and `hard_label_weight` the hard term",
    t_squared="no",
    denominator="`kd_ce_loss`: rows; `kd_mse_loss`: all elements, classes too",
    mask="none",
    differences=("A tensor `temperature` has one entry, or one for each row.",),
)


def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Mean over rows of -sum p log q, at ``temperature``.

    Args:
        logits_S: the student's, ``(..., C)``.
        logits_T: the teacher's, ``(..., C)``.
        temperature: T > 0, a number or a tensor with one entry, or ``(...)`` with one for each row.
            Default 1.

    Example:
        >>> import torch
        >>> kd_ce_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1.0, 8.0]))
        tensor(1.3863)
    """
    return _soft("soft_cross_entropy", logits_S, logits_T, temperature)


def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Mean over rows and classes of (S / T - teacher / T)^2; arguments as in :func:`kd_ce_loss`.

    Example:
        >>> import torch
        >>> kd_mse_loss(torch.zeros(2, 4), torch.full((2, 4), 8.0), temperature=8)
        tensor(1.)
    """
    return _soft("mse", logits_S, logits_T, temperature)


def _soft(divergence: str, student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    t: float | Tensor
    if isinstance(temperature, Tensor):
        t = temperature.detach().to(shapes.accumulator(student))
        t = t.reshape(()) if t.numel() == 1 else t
    else:
        t = positive("temperature", temperature)
    # 1 / T^2, so that its product with fastkd's T^2 is 1.
    return losses.loss(student, teacher, temperature=t, soft_weight=t**-2, divergence=divergence)
