"""Check the options of other libraries, and translate them to fastkd's options."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from fastkd import validation
from fastkd._core import checks


def convert_reduction(
    reduction: str, logits: Tensor, dim: int = -1
) -> tuple[Literal["mean", "sum", "none"], float]:
    """Return fastkd's reduction and soft weight for a reduction of :class:`torch.nn.KLDivLoss`.

    fastkd sums over classes and averages over rows. ``KLDivLoss`` divides by the number of elements
    (``"mean"``) or by the size of the first dimension (``"batchmean"``).
    """
    if reduction in ("sum", "none"):
        return reduction, 1.0  # type: ignore[return-value]
    classes = max(logits.shape[dim], 1)
    divisor = logits.numel() if reduction == "mean" else logits.shape[0]
    return "mean", logits.numel() / (classes * max(divisor, 1))


def choose_divergence(beta: float) -> dict[str, Any]:
    """Return fastkd's options for the generalized Jensen-Shannon divergence of TRL and Liger.

    Let p be the teacher's and q the student's distribution, and m = beta p + (1 - beta) q. The
    divergence is beta KL(p || m) + (1 - beta) KL(q || m). For beta = 0 and 1 this formula is 0, and
    TRL and Liger use the forward and the reverse KL instead.
    """
    validation.check_number("beta", beta, 0.0, 1.0)
    if beta == 0:
        return {"divergence": "forward_kl"}
    return {"divergence": "reverse_kl"} if beta == 1 else {"divergence": "jsd", "mix": beta}


def mask_rows(labels: Tensor | None, ignore_index: int) -> dict[str, Any]:
    """Return fastkd's options for labels that mask rows and add no hard term."""
    if labels is None:
        return {}
    return {"labels": labels, "hard_weight": 0.0, "ignore_index": ignore_index}


def check_none(name: str, value: object, reason: str) -> None:
    """Raise ValueError unless ``value`` is None; the message gives the ``reason``."""
    if value is not None:
        raise ValueError(f"{name} must be None: {reason}; got {value!r}")


def check_positive(name: str, value: float) -> float:
    """Return ``value`` as a float; raise unless ``value`` is positive and finite."""
    return validation.check_number(name, value, 0.0, math.inf, open_low=True)


def check_weight(name: str, value: float) -> float:
    """Return ``value`` as a float; raise unless ``value`` is finite and at least 0."""
    return validation.check_number(name, value, 0.0, math.inf)


def check_normalizer(
    name: str, value: float | Tensor, labels: Tensor | None, ignore_index: int
) -> float | Tensor:
    """Return the divisor of the sum over rows; raise unless ``value`` is positive.

    ``value``: a number, or a tensor with one element, which is read on the CPU only. 0 is accepted
    if every row is ignored.
    """
    return checks.check_nonzero(checks.check_divisor(value, name), labels, ignore_index, name)
