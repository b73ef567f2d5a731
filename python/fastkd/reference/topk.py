"""Define the loss with a sparse teacher in PyTorch operations (docs/maths.md, section 13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.reference.dense import Terms, column, cross_entropy, entropy, reduce
from fastkd.reference.divergences import DIVERGENCES, weighted

MOST_MASS = 1.1
"""The largest accepted sum of a row's listed probabilities (kMostMass in csrc/topk.h). The bound is
above 1 because rounding log-probabilities to 16 bits changes probabilities by a few percent."""


def mark_padding(indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return the class indices, with -1 where the log-probability is -inf."""
    return indices.masked_fill(log_probs == -math.inf, -1)


def find_duplicate(indices: Tensor) -> Tensor:
    """Return for each row a class that the row lists twice, or -1."""
    ordered = indices.sort(-1).values
    if ordered.shape[-1] == 1:
        return torch.full_like(ordered[..., 0], -1)
    current, minus_one = ordered[..., 1:], torch.full_like(ordered[..., 1:], -1)
    return current.where((current >= 0) & (current == ordered[..., :-1]), minus_one).amax(-1)


def mass(indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return the sum of each row's listed probabilities."""
    return log_probs.exp().masked_fill(indices < 0, 0).sum(-1)


def _logsumexp(log_q: Tensor, present: Tensor) -> Tensor:
    """Return log sum exp(log_q) over ``present``; for an empty sum, -inf with a gradient of 0."""
    present = present & (log_q > -math.inf)
    is_empty = ~present.any(-1, keepdim=True)
    terms = log_q.masked_fill(~present, -math.inf).masked_fill(is_empty, 0)
    # torch.compile cannot compile torch.logsumexp for an unknown number of rows.
    largest = terms.detach().amax(-1, keepdim=True)
    log_sum = (terms - largest).exp().sum(-1).log() + largest.squeeze(-1)
    return log_sum.masked_fill(is_empty.squeeze(-1), -math.inf)


def is_infinite_without_rest(name: str, mix: float | None) -> bool:
    """Return True if the divergence is infinite for a class whose teacher probability is 0."""
    return name == "reverse_kl" or (name == "symmetric_kl" and mix is not None and mix < 1)


def distributions(
    log_q: Tensor, indices: Tensor, log_probs: Tensor, tail: str, has_floor: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of teacher and student that a divergence compares.

    The shape is ``(..., k)``, with -inf for padding, or ``(..., k + 1)`` for ``tail="ghost"``. The
    ghost, the last class, stands for all classes that are not listed. ``has_floor``: the
    teacher's probability of the ghost is at least half the machine epsilon, which keeps the
    divergence finite for a list that adds up to 1.
    """
    listed = indices >= 0
    log_p = log_probs.masked_fill(~listed, -math.inf)
    total = log_p.exp().sum(-1, keepdim=True)
    places = indices.clamp(0, log_q.shape[-1] - 1)
    listed_q = log_q.gather(-1, places).masked_fill(~listed, -math.inf)
    if tail == "ignore":
        return log_p, listed_q
    rest = torch.zeros_like(total)
    if tail == "ghost":
        # scatter writes padding to an extra class, which is removed.
        outside = torch.ones((*log_q.shape[:-1], log_q.shape[-1] + 1), device=log_q.device).bool()
        places = indices.masked_fill(~listed, log_q.shape[-1]).clamp(max=log_q.shape[-1])
        outside = outside.scatter(-1, places, False)[..., :-1]
        log_rest_q = _logsumexp(log_q, outside).unsqueeze(-1)
        floor = torch.finfo(log_q.dtype).eps / 2 if has_floor else 0.0
        rest = (1 - total).clamp(min=floor).masked_fill(log_rest_q == -math.inf, 0)
        listed_q = torch.cat((listed_q, log_rest_q), -1)
    else:
        share = _logsumexp(log_q.gather(-1, places), listed).unsqueeze(-1)
        listed_q = listed_q - share.masked_fill(share == -math.inf, 0)
    return _complete_teacher(log_p, rest, tail), listed_q


def _complete_teacher(log_p: Tensor, rest: Tensor, tail: str) -> Tensor:
    """Scale the listed probabilities so that they and ``rest`` sum to 1.

    ``rest``: the probability of the classes that are not listed, ``(..., 1)``. For the tail
    "ghost", ``rest`` is appended to the list.
    """
    total = log_p.exp().sum(-1, keepdim=True)
    # The sum is computed in logarithms, because all probabilities of a list may underflow.
    log_total = _logsumexp(log_p, log_p > -math.inf).unsqueeze(-1)
    is_scaled = (rest != 1 - total) & (log_total > -math.inf)
    log_p = log_p + (torch.log1p(-rest) - log_total).masked_fill(~is_scaled, 0)
    return torch.cat((log_p, rest.log()), -1) if tail == "ghost" else log_p


def _compute_divergence(
    log_q: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail: str,
    name: str = "forward_kl",
    mix: float | None = None,
) -> Tensor:
    """Compute each row's divergence as defined in :class:`fastkd.TopK`."""
    log_p, listed_q = distributions(
        log_q, indices, log_probs, tail, is_infinite_without_rest(name, mix)
    )
    options = {} if mix is None else {"mix": mix}
    value: Tensor = DIVERGENCES[name].compute(log_p, listed_q, **options)
    # The divergence is 0 if neither the list nor the ghost has any probability.
    return value.masked_fill((log_p == -math.inf).all(-1), 0)


def estimate(log_q: Tensor, indices: Tensor, log_probs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(student || teacher) from one class of each row, as :class:`fastkd.Sampled` says.

    ``indices``, ``log_probs``: ``(..., 1)``. The estimate is 0 for padding, and infinite with a
    gradient of 0 for a class that the student masks.
    """
    log_q = log_q.gather(-1, indices.clamp(0, log_q.shape[-1] - 1))
    is_masked = log_q == -math.inf
    log_q = log_q.masked_fill(is_masked, 0)
    log_ratio = log_probs.masked_fill(indices < 0, 0) - log_q
    if estimator == "k1":
        value = -log_ratio.detach() + (log_q - log_q.detach()) * -log_ratio.detach()
    elif estimator == "k2":
        value = 0.5 * log_ratio.square()
    else:
        value = log_ratio.expm1() - log_ratio
    value = value.masked_fill(is_masked, -math.inf if estimator == "k1" else math.inf)
    return value.masked_fill(indices < 0, 0).squeeze(-1)


def _describe(
    logits: Tensor,
    log_q: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail: str,
    is_sampled: bool,
    has_floor: bool,
) -> tuple[Tensor, ...]:
    """Return teacher_entropy, agreement, student_mass and teacher_mass of Terms for each row.

    ``teacher_entropy`` is the entropy of the distribution that the divergence compares. If
    ``is_sampled``, ``teacher_entropy`` and ``agreement`` are NaN, because one class does not
    determine them.
    """
    log_p = log_probs.masked_fill(indices < 0, -math.inf)
    places = indices.clamp(0, log_q.shape[-1] - 1)
    student_mass = log_q.gather(-1, places).exp().masked_fill(indices < 0, 0).sum(-1)
    teacher_mass = log_p.exp().sum(-1)
    if is_sampled:
        unknown = torch.full_like(teacher_mass, math.nan)
        return unknown, unknown, student_mass, teacher_mass
    is_best = (log_p == log_p.amax(-1, keepdim=True)) & (log_p > -math.inf)
    agrees = (is_best & (logits.gather(-1, places) == logits.amax(-1, keepdim=True))).any(-1)
    log_p, _ = distributions(log_q, indices, log_probs, tail, has_floor)
    return entropy(log_p), agrees.to(log_probs.dtype), student_mass, teacher_mass


def terms(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "ghost",
    estimator: str | None = None,
    temperature: float | Tensor = 1.0,
    hard_weight: float | Tensor = 0.0,
    soft_weight: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    mix: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
) -> Terms:
    """Compute the loss and its terms by differentiable PyTorch operations.

    Arguments have the meaning of those of :func:`fastkd.loss`, and of the fields of a
    :class:`fastkd.TopK` or :class:`fastkd.Sampled`. Option tensors must have the dtype of
    ``log_probs``. All fields of a row with invalid logits, an invalid label or an invalid list are
    NaN.
    """
    logits = student.to(log_probs.dtype)
    indices = mark_padding(indices, log_probs)
    valid = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if labels is not None:
        valid = labels != ignore_index
        # Ignored rows are replaced before any computation, so that NaN in such a row has no effect.
        logits = logits.where(valid.unsqueeze(-1), torch.zeros_like(logits))
        indices = indices.where(valid.unsqueeze(-1), torch.full_like(indices, -1))
    log_q = F.log_softmax(logits / column(temperature), -1)
    if estimator is not None:
        soft = estimate(log_q, indices, log_probs, estimator)
    else:
        soft = _compute_divergence(log_q, indices, log_probs, tail, divergence, mix)
    loss = weighted(soft_weight * temperature**2, soft)
    is_valid = (indices < logits.shape[-1]).all(-1) & (find_duplicate(indices) < 0)
    is_valid = is_valid & (mass(indices, log_probs) <= MOST_MASS)
    # log_softmax gives NaN for all classes if a logit is NaN or +inf, or all logits are -inf.
    is_valid = is_valid & ~log_q[..., 0].isnan()
    hard = torch.zeros_like(soft)
    if labels is not None:
        in_range = (labels >= 0) & (labels < logits.shape[-1])
        index = labels.where(in_range, torch.zeros_like(labels))
        hard = cross_entropy(logits, index, None, label_smoothing)
        loss = loss + weighted(hard_weight, hard)
        is_valid = is_valid & in_range
    one_or_nan = torch.ones_like(loss).masked_fill(valid & ~is_valid, math.nan)
    loss = loss * one_or_nan
    with torch.no_grad():
        unweighted = (
            *(hard.detach(), soft.detach(), entropy(log_q)),
            *_describe(
                *(logits, log_q, indices, log_probs, tail, estimator is not None),
                is_infinite_without_rest(divergence, mix),
            ),
        )
        fields = (loss, *(field * one_or_nan for field in unweighted))
    return Terms(*(reduce(field, valid, reduction, normalizer) for field in fields))
