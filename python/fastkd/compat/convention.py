"""What the adapters share: the record that says what a peer's convention is, and two translations.

A record is what ``docs/compat.md`` prints (``python -m fastkd.compat`` writes it), so that the
page cannot say something else than the file that computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastkd._core import checks


@dataclass(frozen=True)
class Convention:
    """One peer's way to define the loss, in words."""

    peer: str
    """The library's name."""
    before: str
    """The import that is replaced."""
    after: str
    """The import that replaces it."""
    weighs: str
    """Which term the peer's weight multiplies."""
    t_squared: str
    """Whether the soft term is multiplied by the temperature squared."""
    denominator: str
    """What sums are divided by."""
    mask: str
    """Which rows are left out, and of which term."""
    differences: tuple[str, ...]
    """What is not as in the peer, and why."""


def kl_div_reduction(
    reduction: str, logits: Tensor, dim: int = -1
) -> tuple[Literal["mean", "sum"], float]:
    """:class:`torch.nn.KLDivLoss`'s reduction as fastkd's, and a factor of the soft term.

    fastkd sums over classes and averages over rows; ``KLDivLoss`` divides by all elements
    (``"mean"``) or by the first dimension alone (``"batchmean"``).
    """
    checks.one_of("reduction", reduction, ("mean", "batchmean", "sum"))
    if reduction == "sum":
        return "sum", 1.0
    classes = logits.shape[dim]
    if reduction == "mean":
        return "mean", 1.0 / max(classes, 1)
    return "mean", logits.numel() / max(classes * logits.shape[0], 1)


def generalized_jsd(beta: float) -> dict[str, Any]:
    """fastkd's options for beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    At 0 and 1, where that is 0 everywhere, TRL and Liger define it as forward and reverse KL.
    """
    checks.number("beta", beta, 0.0, 1.0)
    if beta == 0:
        return {"divergence": "forward_kl"}
    if beta == 1:
        return {"divergence": "reverse_kl"}
    return {"divergence": "jsd", "mix": beta}


def absent(name: str, value: object, why: str) -> None:
    """Refuses what a peer's signature has and the adapter does not."""
    if value is not None:
        raise ValueError(f"{name} must be None: {why}; got {value!r}")


def positive(name: str, value: float) -> float:
    """``value`` as a positive, finite number."""
    return checks.number(name, value, 0.0, math.inf, open_low=True)


def divisor(name: str, value: float | Tensor) -> float | Tensor:
    """What the sum over rows is divided by: a positive number, or a tensor with one element."""
    return (
        checks.check_normalizer(value, name) if isinstance(value, Tensor) else positive(name, value)
    )
