"""Compute fastkd's objectives in NumPy and float64, without fastkd's code.

Logits have shape (R, C), for R rows of C classes. Labels have shape (R,) or (R, C). A temperature
or weight is one number, or one number per row.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray


class Fields(NamedTuple):
    """Hold the fields of fastkd.Terms, except student_mass and teacher_mass."""

    loss: Array
    hard: Array
    soft: Array
    student_entropy: Array
    teacher_entropy: Array
    agreement: Array


def softmax(logits: Array) -> Array:
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def kl(a: Array, b: Array) -> Array:
    return (a * np.log(a / b)).sum(-1)


def entropy(p: Array) -> Array:
    return -(p * np.log(p)).sum(-1)


def dkd(p: Array, q: Array, y: Array, mix: float) -> Array:
    rows = np.arange(len(y))
    others = np.ones_like(p, dtype=bool)
    others[rows, y] = False
    parts = []
    for x in (p, q):
        rest = x[others].reshape(len(y), -1)
        parts.append((np.stack([x[rows, y], 1 - x[rows, y]], -1), rest / rest.sum(-1)[:, None]))
    (p_binary, p_rest), (q_binary, q_rest) = parts
    return kl(p_binary, q_binary) + mix * kl(p_rest, q_rest)


def cosine(w: Array, z: Array) -> Array:
    return 1 - (w * z).sum(-1) / np.sqrt((w**2).sum(-1) * (z**2).sum(-1))


def centered(x: Array) -> Array:
    return x - x.mean(-1, keepdims=True)


# Each function takes probabilities (p of the teacher, q of the student), logits divided by their
# temperatures (w of the teacher, z of the student), labels y and the option mix.
DIVERGENCES: dict[str, Any] = {
    "forward_kl": lambda p, q, w, z, y, mix: kl(p, q),
    "reverse_kl": lambda p, q, w, z, y, mix: kl(q, p),
    "symmetric_kl": lambda p, q, w, z, y, mix: mix * kl(p, q) + (1 - mix) * kl(q, p),
    "jsd": lambda p, q, w, z, y, mix: (
        entropy(mix * p + (1 - mix) * q) - mix * entropy(p) - (1 - mix) * entropy(q)
    ),
    "skewed_forward_kl": lambda p, q, w, z, y, mix: kl(p, mix * p + (1 - mix) * q),
    "skewed_reverse_kl": lambda p, q, w, z, y, mix: kl(q, mix * q + (1 - mix) * p),
    "total_variation": lambda p, q, w, z, y, mix: np.maximum(p - q, 0).sum(-1),
    "soft_cross_entropy": lambda p, q, w, z, y, mix: kl(p, q) + entropy(p),
    "mse": lambda p, q, w, z, y, mix: ((z - w) ** 2).mean(-1),
    "centered_mse": lambda p, q, w, z, y, mix: np.var(z - w, -1),
    "cosine": lambda p, q, w, z, y, mix: cosine(w, z),
    "dkd": lambda p, q, w, z, y, mix: dkd(p, q, y, mix),
}


MIX = {
    "symmetric_kl": 0.5,
    "jsd": 0.5,
    "skewed_forward_kl": 0.1,
    "skewed_reverse_kl": 0.1,
    "dkd": 8,
}


def double(value: Any) -> Any:
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else value


def standardized(x: Array) -> Array:
    return centered(x) / (x.std(-1, ddof=1, keepdims=True) + 1e-7)


def teacher(
    arrays: list[Array], t: Any, form: str, weights: Any, ensemble: str, standardize: bool
) -> tuple[Array, Array]:
    """Return the teacher's (logits divided by the temperature, probabilities).

    For a mixture of probabilities, the logits are those of the first teacher.
    """
    logits = [np.log(x) if form == "probs" else x for x in arrays]
    if standardize:
        logits = [standardized(x) for x in logits]
    shares = np.array(weights or [1.0] * len(logits))
    shares = (shares / shares.sum())[:, None, None]
    if ensemble == "logits":
        mixed = (shares * np.stack(logits)).sum(0) / t
        return mixed, softmax(mixed)
    return logits[0] / t, (shares * softmax(np.stack(logits) / t)).sum(0)


def cross_entropy(logits: Array, labels: Array, weight: Array | None, smoothing: float) -> Array:
    log_q = np.log(softmax(logits))
    classes = log_q.shape[-1]
    weight = np.ones(classes) if weight is None else weight
    target = labels if labels.ndim == 2 else np.eye(classes)[labels]
    smooth = np.full_like(target, 1 / classes)
    each = -(weight * log_q)
    if labels.ndim == 1:
        return (1 - smoothing) * (target * each).sum(-1) + smoothing * (smooth * each).sum(-1)
    return (((1 - smoothing) * target + smoothing * smooth) * each).sum(-1)


class Parts(NamedTuple):
    """Hold each row's parts of the loss and fields of Terms, and the divisors of the mean."""

    hard: Array
    soft: Array
    fields: list[Array]
    of_hard: float
    of_soft: float


def parts(
    student: Any,
    teachers: Any,
    labels: Any = None,
    *,
    temperature: Any = 2.0,
    teacher_temperature: Any = None,
    hard_weight: Any = 0.5,
    soft_weight: Any = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Any = None,
    normalizer: Any = None,
    divergence: str = "forward_kl",
    mix: float | None = None,
    teacher_form: str = "logits",
    teacher_weights: Any = None,
    ensemble: str = "probs",
    standardize: bool = False,
) -> Parts:
    raw, y, given_weight = double(student), double_labels(labels), double(class_weight)
    forms = [double(x) for x in (teachers if isinstance(teachers, (list, tuple)) else [teachers])]
    by_index = y is not None and y.ndim == 1
    valid = y != ignore_index if by_index else np.ones(len(raw), bool)
    index = np.where(valid, y, 0) if by_index else y
    t = np.broadcast_to(double(temperature), raw.shape[:1])
    teacher_t = teacher_temperature
    teacher_t = (
        (temperature if teacher_form == "logits" else 1.0) if teacher_t is None else teacher_t
    )
    teacher_t = np.broadcast_to(double(teacher_t), raw.shape[:1])[:, None]
    z = (standardized(raw) if standardize else raw) / t[:, None]
    w, p = teacher(forms, teacher_t, teacher_form, teacher_weights, ensemble, standardize)
    q = softmax(z)
    soft = DIVERGENCES[divergence](p, q, w, z, index, MIX.get(divergence) if mix is None else mix)
    hard = np.zeros(len(raw))
    if y is not None:
        hard = cross_entropy(raw, index, given_weight, label_smoothing)
    ranked = forms[0] if len(forms) == 1 else p
    agreement = (raw.argmax(-1) == ranked.argmax(-1)).astype(float)
    hard_part = double(hard_weight) * hard if y is not None else 0 * hard
    soft_part = double(soft_weight) * t**2 * soft
    rows = [hard_part, soft_part, hard, soft, entropy(q), entropy(p), agreement]
    rows = [np.where(valid, row, 0) for row in rows]
    of_hard = of_soft = 1.0
    if reduction == "mean":
        of_hard = of_soft = max(valid.sum(), 1)
        if given_weight is not None and by_index:
            of_hard = given_weight[index][valid].sum()
        if normalizer is not None:
            of_hard = of_soft = normalizer
    return Parts(rows[0] / of_hard, rows[1] / of_soft, rows[2:], of_hard, of_soft)


def terms(*arguments: Any, **options: Any) -> Fields:
    rows = parts(*arguments, **options)
    if options.get("reduction") == "none":
        return Fields(rows.hard + rows.soft, *rows.fields)
    hard, *others = (field.sum() for field in rows.fields)
    loss = rows.hard.sum() + rows.soft.sum()
    return Fields(loss, hard / rows.of_hard, *(field / rows.of_soft for field in others))


def double_labels(labels: Any) -> Any:
    if labels is None:
        return None
    return double(labels) if labels.is_floating_point() else labels.numpy()


def gradient(student: torch.Tensor, *arguments: Any, step: float = 1e-3, **options: Any) -> Array:
    """Differentiate the summed loss by fourth-order central differences.

    Rows are independent, so each step moves one class's logit in all rows.
    """
    base = double(student)
    grad = np.zeros_like(base)
    for place in range(base.shape[-1]):
        for size, share in ((1, 2 / 3), (2, -1 / 12)):
            for sign in (1, -1):
                moved = base.copy()
                moved[:, place] += sign * size * step
                rows = parts(torch.from_numpy(moved), *arguments, **options)
                grad[:, place] += sign * share * (rows.hard + rows.soft) / step
    return grad
