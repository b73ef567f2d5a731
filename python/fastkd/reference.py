"""fastkd's loss in plain PyTorch: the definition of every option, written to be read.

Tests and benchmarks hold the kernels against it in float64, and fastkd itself uses it where no
kernel can run (options that are not fused, function transforms, second derivatives, devices without
kernels). It imports torch alone, and it is written from the definitions, not from the kernels'
formulas, so that a mistake in those cannot hide here.

Letters are those of docs/maths.md: p the teacher, q the student, z and w their logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS = ("none", "sum", "mean")
TEACHER_FORMS = ("logits", "log_probs", "probs")
ENSEMBLES = ("probs", "logits")


class Terms(NamedTuple):
    """What one call computes, each reduced like the loss. Only ``loss`` carries a gradient."""

    loss: Tensor
    """``hard_weight * hard + soft_weight * T^2 * soft``."""
    hard: Tensor
    """Cross entropy of the student (at temperature 1) with the labels; 0 without labels."""
    soft: Tensor
    """The divergence of the softened teacher and student, before its weight and T^2."""
    student_entropy: Tensor
    """Entropy of softmax(student / T), in nats."""
    teacher_entropy: Tensor
    """Entropy of softmax(teacher / T), in nats."""
    agreement: Tensor
    """1 where some class is the most probable one for the teacher and for the student, else 0."""


# ---- divergences of probabilities; a class of probability 0 counts nothing where 0 log 0 would


def _log_ratio_sum(p: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum of p (log_a - log_b) over classes, where classes with p = 0 count nothing."""
    absent = p == 0
    return (p * (log_a.masked_fill(absent, 0) - log_b.masked_fill(absent, 0))).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _log_ratio_sum(log_a.exp(), log_a, log_b)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), 0 < weight < 1; 0 where both are 0, for nobody to use."""
    mixed = weight * log_a.exp() + (1 - weight) * log_b.exp()
    return mixed.masked_fill(mixed == 0, 1).log()


def _weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value, where a term that weighs nothing is left out even when it is infinite."""
    nothing = value.isinf() & (weight == 0)
    return value.masked_fill(nothing, 0) * weight


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The teacher's surprise at the student."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The student's surprise at the teacher: it seeks the teacher's modes."""
    return _kl(log_q, log_p)


def symmetric_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """``mix`` weighs the forward KL."""
    return _weighted(mix, _kl(log_p, log_q)) + _weighted(1 - mix, _kl(log_q, log_p))


def jsd(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """``mix`` weighs the teacher."""
    log_m = _log_mixture(log_p, log_q, mix)
    return mix * _kl(log_p, log_m) + (1 - mix) * _kl(log_q, log_m)


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """``mix`` is the teacher's share of what stands in for the student."""
    return _kl(log_p, _log_mixture(log_p, log_q, mix))


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """``mix`` is the student's share of what stands in for the teacher."""
    return _kl(log_q, _log_mixture(log_q, log_p, mix))


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half of the L1 distance; its slope where p = q is taken to be 0."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The forward KL plus the teacher's entropy, which has no gradient for the student."""
    return _log_ratio_sum(log_p.exp(), torch.zeros_like(log_q), log_q)


def dkd(log_p: Tensor, log_q: Tensor, labels: Tensor, mix: float) -> Tensor:
    """The KL of (label, the rest), plus ``mix`` times that of the other classes among themselves.

    ``labels``: class indices, ``(...)``. The second part is 0 where the teacher masks every other
    class.
    """
    index = labels.unsqueeze(-1)
    # The same two for teacher and student: log-probabilities of (label, the rest), (..., 2), and of
    # the other classes among themselves, (..., C), that of the label being -inf.
    binary, others, alone = [], [], []
    for log_probs in (log_p, log_q):
        rest = log_probs.scatter(-1, index, -math.inf)
        none = (rest == -math.inf).all(-1)
        rest = rest.masked_fill(none.unsqueeze(-1), 0)
        log_rest = rest.logsumexp(-1).masked_fill(none, -math.inf)
        binary.append(torch.stack((log_probs.gather(-1, index).squeeze(-1), log_rest), -1))
        others.append(F.log_softmax(rest, -1))
        alone.append(none)
    within = _kl(*others).masked_fill(alone[1], math.inf).masked_fill(alone[0], 0)
    return _kl(*binary) + _weighted(mix, within)


# ---- divergences of logits; a class that both mask is as if it were not there


def _gap(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """(student - teacher, 0 for classes that both mask; how many classes there are without)."""
    absent = (teacher == -math.inf) & (student == -math.inf)
    gap = student.masked_fill(absent, 0) - teacher.masked_fill(absent, 0)
    return gap, (~absent).sum(-1, keepdim=True)


def _centered(logits: Tensor) -> Tensor:
    """Logits minus the mean of those that are not masked."""
    masked = logits == -math.inf
    total = logits.masked_fill(masked, 0).sum(-1, keepdim=True)
    return logits - total / (~masked).sum(-1, keepdim=True)


def standardized(logits: Tensor) -> Tensor:
    """Each row minus its mean, over its standard deviation (unbiased) + 1e-7 (Sun et al. 2024)."""
    centered = _centered(logits)
    masked = logits == -math.inf
    freedom = ((~masked).sum(-1, keepdim=True) - 1).clamp(min=1)
    # The norm, whose slope at 0 is 0, and not the root of a variance, which has none.
    length: Tensor = torch.linalg.vector_norm(centered.masked_fill(masked, 0), dim=-1, keepdim=True)
    return _over(centered, length / freedom.to(logits.dtype).sqrt() + 1e-7)


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean over classes of the squared difference."""
    gap, count = _gap(teacher, student)
    return gap.square().sum(-1) / count.squeeze(-1)


def centered_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """The same once each row's mean has been taken off: adding a constant changes nothing."""
    return mse(_centered(teacher), _centered(student))


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """One minus the cosine of the angle between the rows; 1 if either is all zeros."""
    absent = (teacher == -math.inf) & (student == -math.inf)
    rows = [logits.masked_fill(absent, 0) for logits in (teacher, student)]
    squares = [row.square().sum(-1) for row in rows]
    inverse = [square.masked_fill(square == 0, 1).rsqrt() for square in squares]
    return 1 - (rows[0] * rows[1]).sum(-1) * inverse[0] * inverse[1]


class Divergence(NamedTuple):
    """One choice of the soft term's D, before weight and T^2."""

    compute: Callable[..., Tensor]
    """Of (teacher, student), of the labels if it needs them, of ``mix`` if it has one."""
    formula: str
    source: str
    compares: str = "probabilities"
    """``"probabilities"``: it is given log p and log q; ``"logits"``: w / T_t and z / T."""
    mix: float | None = None
    """The default of ``mix``; None for those that have none."""
    mix_meaning: str = ""
    mix_range: tuple[float, float] = (0.0, 1.0)
    mix_open: bool = False
    """Whether the ends of the range are outside."""
    needs_labels: bool = False


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(
        forward_kl,
        "KL(p || q) = sum p log(p / q)",
        "Hinton, Vinyals and Dean 2015",
    ),
    "reverse_kl": Divergence(
        reverse_kl,
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
        skewed_reverse_kl,
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
        "KL of (p_y, 1 - p_y) from (q_y, 1 - q_y) + mix KL of the other classes, renormalised",
        "Zhao, Cui, Song, Qiu and Liang 2022 (DKD)",
        mix=8.0,
        mix_meaning="the weight of the other classes' KL",
        mix_range=(0.0, math.inf),
        needs_labels=True,
    ),
}
"""Every divergence by its name."""


# ---- the teacher, the temperatures, the labels


def column(value: float | Tensor) -> float | Tensor:
    """One number for each row, (..., 1), to go with (..., C)."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def _over(logits: Tensor, t: float | Tensor) -> Tensor:
    """logits / t, such that masked classes say nothing about t (no 0 * inf in its gradient)."""
    if not isinstance(t, Tensor):
        return logits / t
    masked = logits == -math.inf
    return torch.where(masked, logits / t.detach(), logits.masked_fill(masked, 0) / t)


def _mixed_log_probs(log_probs: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log of the weighted sum of several teachers' probabilities."""
    stack = torch.stack([x + math.log(w) for x, w in zip(log_probs, weights, strict=True)])
    absent = (stack == -math.inf).all(0)
    return stack.masked_fill(absent, 0).logsumexp(0).masked_fill(absent, -math.inf)


def softened_teacher(
    teachers: Sequence[Tensor],
    t: float | Tensor,
    form: str,
    weights: Sequence[float] | None,
    ensemble: str,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """(w / T_t, logits whose softmax is p; what agreement ranks the classes by).

    ``teachers``: each ``(..., C)`` in the given form. ``t``: T_t, a number or ``(..., 1)``.
    """
    if form == "probs":  # their logarithms are logits too: softmax undoes them
        teachers = [probs.log() for probs in teachers]
    ranked = teachers[0]
    if standardize:
        teachers = [standardized(logits) for logits in teachers]
    if len(teachers) == 1:
        return _over(teachers[0], t), ranked
    total = sum(weights) if weights else len(teachers)
    shares = [w / total for w in weights or [1.0] * len(teachers)]
    if ensemble == "logits":
        mixed = shares[0] * teachers[0]
        for share, logits in zip(shares[1:], teachers[1:], strict=True):
            mixed = mixed + share * logits
        return _over(mixed, t), mixed
    mixed = _mixed_log_probs([F.log_softmax(_over(x, t), -1) for x in teachers], shares)
    return mixed, mixed


def _entropy(log_p: Tensor) -> Tensor:
    return -_log_ratio_sum(log_p.exp(), log_p, torch.zeros_like(log_p))


def _products(weights: Tensor, log_q: Tensor) -> Tensor:
    """-sum weights log q over classes, where a weight of 0 leaves a masked class out."""
    return -(weights * log_q.masked_fill(weights == 0, 0)).sum(-1)


def _cross_entropy(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """``F.cross_entropy`` of each row; labels (...) are in range, or probabilities (..., C)."""
    log_q = F.log_softmax(logits, -1)
    each = log_q.new_ones(log_q.shape[-1]) if class_weight is None else class_weight
    if labels.is_floating_point():
        target = labels.to(log_q.dtype) * each
        hard = _products(target, log_q)
    else:
        hard = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        if class_weight is not None:
            hard = _weighted(class_weight[labels], hard)
    if label_smoothing:
        smooth = _products(each.expand_as(log_q), log_q) / log_q.shape[-1]
        hard = (1 - label_smoothing) * hard + label_smoothing * smooth
    return hard


# ---- the loss


def terms(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    teacher_temperature: float | Tensor | None = None,
    hard_weight: float | Tensor = 0.5,
    soft_weight: float | Tensor = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
    mix: float | None = None,
    teacher_form: str = "logits",
    teacher_weights: Sequence[float] | None = None,
    ensemble: str = "probs",
    standardize: bool = False,
    classes: int | None = None,
    dim: int = -1,
) -> Terms:
    """The loss and its terms, by differentiable PyTorch operations, in float32 or better.

    Arguments are those of :func:`fastkd.loss`, not checked, with ``hard_weight`` and
    ``soft_weight`` in the place of ``alpha``. Without labels the soft term stands alone.
    """
    teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
    soft_labels = labels is not None and labels.is_floating_point()
    if dim != -1:
        student_logits = student_logits.movedim(dim, -1)
        teachers = [teacher.movedim(dim, -1) for teacher in teachers]
        labels = labels.movedim(dim, -1) if labels is not None and soft_labels else labels
    acc = torch.promote_types(student_logits.dtype, torch.float32)
    for teacher in teachers:
        acc = torch.promote_types(acc, teacher.dtype)
    student = student_logits[..., :classes].to(acc)
    teachers = [teacher[..., :classes].to(acc) for teacher in teachers]
    if class_weight is not None:
        class_weight = class_weight.detach().to(acc)

    valid = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    known: float | Tensor = 1.0
    if labels is not None and not soft_labels:
        # Masked rows are taken out before anything is computed, so that a NaN in them stays out.
        valid = labels != ignore_index
        keep = valid.unsqueeze(-1)
        student = student.where(keep, torch.zeros_like(student))
        neutral = 1 / student.shape[-1] if teacher_form == "probs" else 0.0
        teachers = [teacher.where(keep, torch.full_like(teacher, neutral)) for teacher in teachers]
        # A label out of range makes its row NaN.
        in_range = (labels >= 0) & (labels < student.shape[-1])
        known = torch.where(in_range | ~valid, 1.0, math.nan)
        labels = labels.where(in_range, torch.zeros_like(labels))

    if teacher_temperature is None:
        teacher_temperature = temperature if teacher_form == "logits" else 1.0
    temperature, teacher_temperature, hard_weight, soft_weight = (
        value.to(acc) if isinstance(value, Tensor) else value
        for value in (temperature, teacher_temperature, hard_weight, soft_weight)
    )
    scaled_teacher, ranked = softened_teacher(
        teachers, column(teacher_temperature), teacher_form, teacher_weights, ensemble, standardize
    )
    log_p = F.log_softmax(scaled_teacher, -1)
    scaled = _over(standardized(student) if standardize else student, column(temperature))
    log_q = F.log_softmax(scaled, -1)
    kind = DIVERGENCES[divergence]
    of_logits = kind.compares == "logits"
    arguments: list[object] = [scaled_teacher, scaled] if of_logits else [log_p, log_q]
    arguments += [labels] if kind.needs_labels else []
    arguments += [] if kind.mix is None else [kind.mix if mix is None else mix]
    zero = torch.zeros(student.shape[:-1], dtype=acc, device=student.device)
    soft = (kind.compute(*arguments) * (known if kind.needs_labels else 1)).where(valid, zero)
    hard = hard_part = zero
    if labels is not None:
        hard = _cross_entropy(student, labels, class_weight, label_smoothing) * known
        hard = hard.where(valid, zero)
        hard_part = _weighted(hard_weight, hard)
    soft_part = _weighted(soft_weight * temperature**2, soft)
    with torch.no_grad():
        both = (student == student.amax(-1, keepdim=True)) & (
            ranked == ranked.amax(-1, keepdim=True)
        )
        fields = (_entropy(log_q), _entropy(log_p), both.any(-1).to(acc))
        logged = [field.where(valid, zero) for field in fields]
    if reduction == "none":
        return Terms(hard_part + soft_part, hard.detach(), soft.detach(), *logged)
    of_hard: float | Tensor = 1.0
    of_soft: float | Tensor = 1.0
    if reduction == "mean" and normalizer is not None:
        of_hard = of_soft = normalizer
    elif reduction == "mean":
        of_hard = of_soft = valid.sum().clamp(min=1)
        if class_weight is not None and labels is not None and not soft_labels:
            of_hard = class_weight[labels].where(valid, zero).sum()
            of_hard = of_hard.where(of_hard != 0, torch.ones_like(of_hard))
    return Terms(
        hard_part.sum() / of_hard + soft_part.sum() / of_soft,
        hard.detach().sum() / of_hard,
        *(field.detach().sum() / of_soft for field in (soft, *logged)),
    )


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    **options: object,
) -> Tensor:
    """The loss of :func:`terms`, with the same arguments."""
    return terms(student_logits, teacher_logits, labels, **options).loss  # type: ignore[arg-type]
