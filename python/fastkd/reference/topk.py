"""The loss with a sparse teacher in plain PyTorch. docs/maths.md, section 13."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.reference.dense import Terms, cross_entropy, reduce
from fastkd.reference.divergences import weighted

MOST_MASS = 1.1
"""The largest accepted sum of a row's listed probabilities (kMostMass in csrc/topk.h). Above 1
because 16-bit log-probabilities carry rounding errors of a few percent."""


def mark_padding(indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return the class indices, with -1 where the log-probability is -inf."""
    return indices.masked_fill(log_probs == -math.inf, -1)


def find_duplicate(indices: Tensor) -> Tensor:
    """Return for each row a class that it lists twice, or -1."""
    ordered = indices.sort(-1).values
    if ordered.shape[-1] == 1:
        return torch.full_like(ordered[..., 0], -1)
    again, minus_one = ordered[..., 1:], torch.full_like(ordered[..., 1:], -1)
    return again.where((again >= 0) & (again == ordered[..., :-1]), minus_one).amax(-1)


def mass(indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return the sum of each row's listed probabilities."""
    return log_probs.exp().masked_fill(indices < 0, 0).sum(-1)


def _log_sum(log_q: Tensor, present: Tensor) -> Tensor:
    """Return log of the sum of exp(log_q) where ``present``; -inf, with no gradient, if empty."""
    present = present & (log_q > -math.inf)
    is_empty = ~present.any(-1, keepdim=True)
    terms = log_q.masked_fill(~present, -math.inf).masked_fill(is_empty, 0)
    return terms.logsumexp(-1).masked_fill(is_empty.squeeze(-1), -math.inf)


def _log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log_p - log_q), 0 where p is 0.

    The result is inf where q is 0 and p has underflowed but is not 0.
    """
    absent = p == 0
    ratio = p * (log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0))
    return ratio.masked_fill(absent & (log_p > -math.inf) & (log_q == -math.inf), math.inf)


def _listed_log_probs(indices: Tensor, log_probs: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """Return the teacher's log-probabilities, adjusted for ``tail``, and the mass of each list."""
    log_p = log_probs.masked_fill(indices < 0, -math.inf)
    total = log_p.exp().sum(-1)
    if tail == "renormalize":
        log_p = log_p - total.log().unsqueeze(-1).masked_fill(total.unsqueeze(-1) == 0, 0)
    return log_p, total


def divergence(log_q: Tensor, indices: Tensor, log_probs: Tensor, tail: str) -> Tensor:
    """Compute each row's divergence as defined in :class:`fastkd.TopK`."""
    listed = indices >= 0
    log_p, total = _listed_log_probs(indices, log_probs, tail)
    log_q_listed = log_q.gather(-1, indices.clamp(0, log_q.shape[-1] - 1))
    if tail == "renormalize":
        log_share = _log_sum(log_q_listed, listed).unsqueeze(-1)
        log_q_listed = log_q_listed - log_share.masked_fill(log_share == -math.inf, 0)
    value = _log_ratio(log_p.exp(), log_p, log_q_listed).sum(-1)
    if tail != "ghost":
        return value
    # scatter needs a place for padding: one more than there are classes.
    places = indices.masked_fill(~listed, log_q.shape[-1]).clamp(max=log_q.shape[-1])
    others = torch.ones((*log_q.shape[:-1], log_q.shape[-1] + 1), device=log_q.device).bool()
    others = others.scatter(-1, places, False)[..., :-1]
    log_rest = _log_sum(log_q, others)
    rest = (1 - total).clamp(min=0).masked_fill(log_rest == -math.inf, 0)
    value = value + _log_ratio(rest, rest.log(), log_rest)
    # This adds 0 if p sums to 1, as it should.
    q = log_q_listed.exp().masked_fill(~listed, 0).sum(-1) + log_rest.exp()
    return value + q - (total + rest)


def entropy(indices: Tensor, log_probs: Tensor, tail: str) -> Tensor:
    """Compute the entropy of each list in nats; with "ghost", of k + 1 classes."""
    log_p, total = _listed_log_probs(indices, log_probs, tail)
    p = log_p.exp()
    value = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    rest = (1 - total).clamp(min=0)
    return value - torch.special.xlogy(rest, rest) if tail == "ghost" else value


def agreement(student: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return 1 for each row if no logit exceeds the most probable listed class's, else 0."""
    log_p = log_probs.masked_fill(indices < 0, -math.inf)
    best = indices.gather(-1, log_p.argmax(-1, keepdim=True)).clamp(0, student.shape[-1] - 1)
    agrees = student.gather(-1, best).squeeze(-1) == student.amax(-1)
    return (agrees & (log_p > -math.inf).any(-1)).to(log_probs.dtype)


def terms(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "ghost",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    soft_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
) -> Terms:
    """Compute the loss and its terms by differentiable PyTorch operations.

    Arguments are those of :func:`fastkd.loss` with a :class:`fastkd.TopK`, converted to the dtype
    of ``log_probs``. Rows with an invalid label or list are NaN.
    """
    logits = student.to(log_probs.dtype)
    indices = mark_padding(indices, log_probs)
    valid = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if labels is not None:
        valid = labels != ignore_index
        # Ignored rows are replaced before any computation, so that a NaN in them has no effect.
        logits = logits.where(valid.unsqueeze(-1), torch.zeros_like(logits))
        indices = indices.where(valid.unsqueeze(-1), torch.full_like(indices, -1))
    log_q = F.log_softmax(logits / temperature, -1)
    soft = divergence(log_q, indices, log_probs, tail)
    loss = weighted(soft_weight * temperature**2, soft)
    is_valid = (indices < logits.shape[-1]).all(-1) & (find_duplicate(indices) < 0)
    is_valid = is_valid & (mass(indices, log_probs) <= MOST_MASS)
    # log_softmax gives NaN for all classes if a logit is NaN or +inf, or none is above -inf.
    is_valid = is_valid & ~log_q[..., 0].isnan()
    hard = torch.zeros_like(soft)
    if labels is not None:
        in_range = (labels >= 0) & (labels < logits.shape[-1])
        index = labels.where(in_range, torch.zeros_like(labels))
        hard = cross_entropy(logits, index, None, label_smoothing)
        loss = loss + weighted(hard_weight, hard)
        is_valid = is_valid & in_range
    loss = loss * torch.ones_like(loss).masked_fill(valid & ~is_valid, math.nan)
    with torch.no_grad():
        student_entropy = -_log_ratio(log_q.exp(), log_q, torch.zeros_like(log_q)).sum(-1)
        teacher_entropy = entropy(indices, log_probs, tail)
        agrees = agreement(logits, indices, log_probs)
    fields = (loss, hard.detach(), soft.detach(), student_entropy, teacher_entropy, agrees)
    return Terms(*(reduce(field, valid, reduction, normalizer) for field in fields))
