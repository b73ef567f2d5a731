"""Compute TextBrewer's kd_ce_loss and kd_mse_loss; a row may have its own temperature."""

from __future__ import annotations

from torch import Tensor

from fastkd import losses
from fastkd._core import shapes
from fastkd.compat.convention import check_positive


def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Compute the mean over rows of -sum p log q, without T^2.

    p is the teacher's distribution, and q the student's distribution.

    Args:
        logits_S, logits_T: logits of student and teacher, ``(..., C)``, with C classes.
        temperature: T > 0, a number, a tensor with one entry, or a tensor ``(...)`` with one entry
            for each row. Default 1.

    Example:
        >>> import torch
        >>> from fastkd.compat.textbrewer import kd_ce_loss
        >>> kd_ce_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1.0, 8.0]))
        tensor(1.3863)
    """
    return _compute("soft_cross_entropy", logits_S, logits_T, temperature)


def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1) -> Tensor:
    """Compute the mean over rows and classes of ((logits_S - logits_T) / temperature)^2.

    :func:`kd_ce_loss` describes the arguments.
    """
    return _compute("mse", logits_S, logits_T, temperature)


def _compute(
    divergence: str, student: Tensor, teacher: Tensor, temperature: float | Tensor
) -> Tensor:
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(shapes.accumulator(student))
        temperature = temperature.reshape(()) if temperature.numel() == 1 else temperature
    else:
        temperature = check_positive("temperature", temperature)
    # The weight 1 / T^2 cancels fastkd's factor T^2.
    options = {"temperature": temperature, "soft_weight": temperature**-2}
    return losses.loss(student, teacher, divergence=divergence, **options)  # type: ignore[arg-type]
