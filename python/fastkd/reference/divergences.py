"""Define the divergences, and list their names, formulas and sources.

Formulas use the letters of docs/maths.md: p are the teacher's probabilities, q the student's
probabilities, z the student's logits and w the teacher's logits. T and T_t are the temperatures of
student and teacher, and y is the label. A divergence takes rows, ``(..., C)``, and returns one
number for each row, ``(...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_DEVIATION = 1e-7
"""The number added to the standard deviation by which standardized logits are divided."""


def divide(logits: Tensor, t: float | Tensor) -> Tensor:
    """Return logits / t; masked classes (-inf) add 0, not NaN, to the gradient of t."""
    if not isinstance(t, Tensor):
        return logits / t
    masked = logits == -math.inf
    return torch.where(masked, logits / t.detach(), logits.masked_fill(masked, 0) / t)


# ---- divergences of probabilities, where 0 log 0 = 0


def log_ratio_sum(p: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum p (log_a - log_b) over the classes with p > 0."""
    absent = p == 0
    return (p * (log_a.masked_fill(absent, 0) - log_b.masked_fill(absent, 0))).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Compute KL(a || b) of each row."""
    return log_ratio_sum(log_a.exp(), log_a, log_b)


def _infinite_if_masked(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return infinity for each row in which the student alone masks a class, else 0.

    The forward KL of such a row is infinite, also if the teacher's probability of the class
    underflows to 0.
    """
    is_masked = ((log_p > -math.inf) & (log_q == -math.inf)).any(-1)
    return torch.zeros_like(log_q[..., 0]).masked_fill(is_masked, math.inf)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p || q)."""
    return _kl(log_p, log_q) + _infinite_if_masked(log_p, log_q)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return log(weight a + (1 - weight) b) for 0 < weight < 1; 0 where both a and b are 0."""
    mixed = weight * log_a.exp() + (1 - weight) * log_b.exp()
    return mixed.masked_fill(mixed == 0, 1).log()


def weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """Multiply ``value`` by ``weight``; the product with weight 0 is 0 even for infinity."""
    is_undefined = value.isinf() & (weight == 0)
    return value.masked_fill(is_undefined, 0) * weight


def symmetric_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """Compute mix KL(p || q) + (1 - mix) KL(q || p)."""
    if mix in (0, 1):  # the KL with weight 0 may be infinite, and its gradient NaN
        return forward_kl(log_p, log_q) if mix == 1 else _kl(log_q, log_p)
    return mix * forward_kl(log_p, log_q) + (1 - mix) * _kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """Compute the generalized Jensen-Shannon divergence; ``mix`` weighs the teacher."""
    log_m = _log_mixture(log_p, log_q, mix)
    return mix * _kl(log_p, log_m) + (1 - mix) * _kl(log_q, log_m)


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """Compute KL(p || mix p + (1 - mix) q)."""
    return _kl(log_p, _log_mixture(log_p, log_q, mix))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute half of the L1 distance between p and q; the gradient is 0 where p = q."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute -sum p log q: the forward KL plus the teacher's entropy."""
    cross_entropy = log_ratio_sum(log_p.exp(), torch.zeros_like(log_q), log_q)
    return cross_entropy + _infinite_if_masked(log_p, log_q)


def dkd(log_p: Tensor, log_q: Tensor, labels: Tensor, mix: float) -> Tensor:
    """Compute decoupled distillation: a binary KL, plus ``mix`` times a KL without the label.

    The binary KL has two classes: the label, and all other classes together. The second KL compares
    the other classes, and is 0 if the teacher masks all of them. ``labels``: class indices,
    ``(...)``. Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022).
    """
    index = labels.unsqueeze(-1)
    # ``binary``: log-probabilities of (label, all other classes), (..., 2). ``others``:
    # log-probabilities without the label, (..., C), with -inf for the label.
    binary, others, alone = [], [], []
    for log_probs in (log_p, log_q):
        rest = log_probs.scatter(-1, index, -math.inf)
        none = (rest == -math.inf).all(-1)
        rest = rest.masked_fill(none.unsqueeze(-1), 0)
        log_rest = rest.logsumexp(-1).masked_fill(none, -math.inf)
        binary.append(torch.stack((log_probs.gather(-1, index).squeeze(-1), log_rest), -1))
        others.append(F.log_softmax(rest, -1))
        alone.append(none)
    within = forward_kl(*others).masked_fill(alone[1], math.inf).masked_fill(alone[0], 0)
    return forward_kl(*binary) + mix * within if mix else forward_kl(*binary)


# ---- divergences of logits, over the classes that teacher and student do not both mask


def _subtract(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Return student - teacher, 0 where both mask a class, and the count of remaining classes."""
    absent = (teacher == -math.inf) & (student == -math.inf)
    difference = student.masked_fill(absent, 0) - teacher.masked_fill(absent, 0)
    return difference, (~absent).sum(-1, keepdim=True)


def _center(logits: Tensor) -> Tensor:
    """Subtract from each row the mean of its unmasked logits."""
    masked = logits == -math.inf
    count = (~masked).sum(-1, keepdim=True)

    def mean(values: Tensor) -> Tensor:
        # Divide before the sum, which would overflow for finite masks such as -1e38.
        return (values.masked_fill(masked, 0) / count).sum(-1, keepdim=True)

    centered = logits - mean(logits)
    return centered - mean(centered.detach())  # subtract the rounding error of the first mean


def deviation(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row minus its mean, and the row's standard deviation + LEAST_DEVIATION.

    The standard deviation is unbiased, ``(..., 1)``, and omits masked classes.
    """
    masked = logits == -math.inf
    centered = _center(logits)
    values = centered.masked_fill(masked, 0)
    freedom = ((~masked).sum(-1, keepdim=True) - 1).clamp(min=1)
    # Divide by the largest value, so that no square overflows.
    largest = values.detach().abs().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == 0, 1)
    # At 0, PyTorch's derivative of a norm is 0; that of a square root is infinite.
    length: Tensor = torch.linalg.vector_norm(values / largest, dim=-1, keepdim=True)
    return centered, length / freedom.to(logits.dtype).sqrt() * largest + LEAST_DEVIATION


def standardized(logits: Tensor) -> Tensor:
    """Subtract each row's mean, and divide by the row's standard deviation (Sun et al. 2024)."""
    return divide(*deviation(logits))


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the mean over classes of the squared difference of the logits."""
    difference, count = _subtract(teacher, student)
    return difference.square().sum(-1) / count.squeeze(-1)


def centered_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute the mean squared difference of the logits after subtracting each row's mean."""
    return mse(_center(teacher), _center(student))


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute 1 minus the cosine of the angle between two rows; 1 if a row is all zeros."""
    absent = (teacher == -math.inf) & (student == -math.inf)
    rows = [logits.masked_fill(absent, 0) for logits in (teacher, student)]
    squares = [row.square().sum(-1) for row in rows]
    inverse = [square.masked_fill(square == 0, 1).rsqrt() for square in squares]
    return 1 - (rows[0] * rows[1]).sum(-1) * inverse[0] * inverse[1]


class Divergence(NamedTuple):
    """Define a divergence: the soft term before its weight and T^2."""

    compute: Callable[..., Tensor]
    """A function of (teacher, student[, labels][, mix]) that returns one number for each row."""
    formula: str
    source: str
    compares: str = "probabilities"
    """Input of ``compute``: "probabilities" means log-probabilities, "logits" softened logits."""
    mix: float | None = None
    """The default of ``mix``; None if the divergence has no ``mix``."""
    mix_meaning: str = ""
    mix_range: tuple[float, float] = (0.0, 1.0)
    mix_open: bool = False
    """True if ``mix_range`` excludes its ends."""
    needs_labels: bool = False


DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
    "soft_cross_entropy",
    "mse",
    "centered_mse",
    "cosine",
    "dkd",
]

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        forward_kl,
        "KL(p || q) = sum p log(p / q)",
        "Hinton, Vinyals and Dean 2015",
    ),
    "reverse_kl": Divergence(
        lambda log_p, log_q: _kl(log_q, log_p),
        "KL(q || p) = sum q log(q / p)",
        "Gu, Dong, Wei and Huang 2024 (MiniLLM)",
    ),
    "symmetric_kl": Divergence(
        symmetric_kl,
        "mix KL(p || q) + (1 - mix) KL(q || p)",
        "Jeffreys 1946; Kullback and Leibler 1951",
        mix=0.5,
        mix_meaning="the weight of the forward KL",
    ),
    "jsd": Divergence(
        jsd,
        "mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q",
        "Lin 1991; Agarwal et al. 2024 (GKD)",
        mix=0.5,
        mix_meaning="the weight of the teacher",
        mix_open=True,
    ),
    "skewed_forward_kl": Divergence(
        skewed_forward_kl,
        "KL(p || mix p + (1 - mix) q)",
        "Ko, Kim, Chen and Yun 2024 (DistiLLM)",
        mix=0.1,
        mix_meaning="the teacher's share of the mixture",
        mix_open=True,
    ),
    "skewed_reverse_kl": Divergence(
        lambda log_p, log_q, mix: skewed_forward_kl(log_q, log_p, mix),
        "KL(q || mix q + (1 - mix) p)",
        "Ko, Kim, Chen and Yun 2024 (DistiLLM)",
        mix=0.1,
        mix_meaning="the student's share of the mixture",
        mix_open=True,
    ),
    "total_variation": Divergence(
        total_variation,
        "1/2 sum |p - q|",
        "Wen, Li, Du and Mou 2023 (f-distill)",
    ),
    "soft_cross_entropy": Divergence(
        soft_cross_entropy,
        "-sum p log q",
        "Hinton, Vinyals and Dean 2015",
    ),
    "mse": Divergence(
        mse,
        "mean over classes of (z / T - w / T_t)^2",
        "Bucila, Caruana and Niculescu-Mizil 2006; Ba and Caruana 2014",
        compares="logits",
    ),
    "centered_mse": Divergence(
        centered_mse,
        "mean over classes of ((z - mean z) / T - (w - mean w) / T_t)^2",
        "Hinton, Vinyals and Dean 2015, section 2.1",
        compares="logits",
    ),
    "cosine": Divergence(
        cosine,
        "1 - z . w / (|z| |w|)",
        "Sanh, Debut, Chaumond and Wolf 2019 (DistilBERT), there of hidden states",
        compares="logits",
    ),
    "dkd": Divergence(
        dkd,
        "KL of (p_y, 1 - p_y) from (q_y, 1 - q_y) + mix KL of the other classes, renormalized",
        "Zhao, Cui, Song, Qiu and Liang 2022 (DKD)",
        mix=8.0,
        mix_meaning="the weight of the other classes' KL",
        mix_range=(0.0, math.inf),
        needs_labels=True,
    ),
}
