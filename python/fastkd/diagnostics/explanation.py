"""Describe in words what the options of a loss compute."""

from __future__ import annotations

import textwrap
from typing import Any

from torch import Tensor

from fastkd import reference
from fastkd._core.arguments import check_sparse_options
from fastkd._core.objective import Objective, Options, resolve
from fastkd._core.values import Sampled, TopK
from fastkd.losses import KDLoss


def _format_number(value: float | Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}"
    learned = ", learned" if value.requires_grad else ""
    return f"(one number for each row{learned})" if value.dim() else f"({value.item():g}{learned})"


def _get_divergence(objective: Objective) -> reference.Divergence:
    return reference.DIVERGENCES[objective.divergence]


def _describe_weights(options: Options, objective: Objective) -> str:
    if options.hard_weight is None and options.soft_weight is None:
        share = "alpha" if options.alpha is not None else "alpha, 0.5 by default,"
        text = (
            f"{share} weighs the hard term, the cross entropy; the soft term weighs 1 - alpha = "
            f"{_format_number(objective.soft_weight)}."
        )
        if _get_divergence(objective).needs_labels or options.alpha:
            return text
        return f"{text} Without labels the soft term stands alone, with weight 1."
    return (
        f"hard_weight {_format_number(objective.hard_weight)} weighs the cross entropy, "
        f"soft_weight {_format_number(objective.soft_weight)} the divergence; they need not sum to "
        "1."
    )


def _is_softened_again(objective: Objective) -> bool:
    """Return True if a teacher given as probabilities gets a temperature other than 1."""
    t = objective.teacher_temperature
    return objective.teacher_form != "logits" and (isinstance(t, Tensor) or t != 1.0)


def _format_distribution(objective: Objective) -> str:
    """Return the formula of the teacher's distribution p."""
    form = objective.teacher_form
    if form != "logits" and not _is_softened_again(objective):
        return "softmax(w)" if form == "log_probs" else "w / sum w"
    w = "log(w)" if form == "probs" else "w"
    same = objective.teacher_temperature is objective.temperature
    return f"softmax({w} / {'T' if same else 'T_t'})"


def _describe_temperatures(objective: Objective) -> str:
    t = _format_number(objective.temperature)
    same = objective.teacher_temperature is objective.temperature
    symbols = "T = T_t" if same and "T_t" in _get_divergence(objective).formula else "T"
    text = f"{symbols} = {t} softens the student"
    if objective.divergence == "cosine":
        text = f"T = {t}; the cosine has none"
    elif objective.teacher_form != "logits":
        text += f"; the teacher comes as {objective.teacher_form}, softened already"
        if _is_softened_again(objective):
            text += (
                f", and is softened again at T_t = {_format_number(objective.teacher_temperature)}"
            )
    elif same:
        text += " and the teacher"
    else:
        text += f", T_t = {_format_number(objective.teacher_temperature)} the teacher"
    return (
        f"{text}. The cross entropy is that of softmax(z), at temperature 1. T^2, the student's T, "
        "multiplies the soft term alone."
    )


def _describe_teacher(options: Options, objective: Objective) -> str:
    weights = options.teacher_weights
    shares = "equal weights"
    if weights:
        shares = "weights " + ", ".join(f"{w / sum(weights):.3g}" for w in weights)
    space = "probabilities, after softening" if objective.ensemble == "probs" else "logits"
    return f"A sequence of teachers is mixed with {shares}, in {space}."


def _accepts_probabilities(objective: Objective, teacher: TopK | Sampled | None) -> bool:
    """Return True if labels may be probabilities."""
    return teacher is None and not _get_divergence(objective).needs_labels


def _describe_labels(objective: Objective, teacher: TopK | Sampled | None) -> str:
    accepted = "class indices"
    if _accepts_probabilities(objective, teacher):
        accepted += " or probabilities"
    elif teacher is None:
        accepted += ", which D needs"
    text = f"Labels are {accepted}, as in torch's cross_entropy"
    if objective.label_smoothing:
        text += f", smoothed by {objective.label_smoothing:g}"
    if objective.class_weight is not None:
        text += ", each class with its weight"
    return text + "."


def _describe_reduction(objective: Objective) -> str:
    if objective.reduction == "none":
        return "One loss for each row, divided by nothing."
    if objective.reduction == "sum":
        return "The sum over the rows, divided by nothing."
    if objective.normalizer is not None:
        number = f"{float(objective.normalizer):g}"
        return f"Both terms are summed over the rows and divided by the normalizer, {number}."
    rows = f"the number of rows whose label is not {objective.ignore_index}"
    if objective.class_weight is None:
        mean = "mean over classes" in _get_divergence(objective).formula
        alone = "" if mean else " (never by the classes)"
        return f"Both terms are summed over the rows and divided by {rows}{alone}."
    return (
        f"The soft term is summed over the rows and divided by {rows}, the hard term by the sum of "
        "those rows' class weights (by the number of rows where labels are probabilities)."
    )


_TAILS = {
    "ghost": (
        "D compares k + 1 classes: those listed, and one class of all others. D is a lower bound "
        "of the divergence with all classes of the teacher: how the student divides the others "
        "counts nothing."
    ),
    "renormalize": (
        "D compares the listed classes alone, student and teacher divided by their sums over the "
        "list: what the student gives to other classes counts nothing."
    ),
    "ignore": (
        "D is the forward KL's sum over the listed classes as it stands. It may be negative, and "
        "pushes the student to leave nothing to other classes."
    ),
}
_ESTIMATORS = {
    "k1": (
        "-d",
        "D is an unbiased estimate of KL(q || p), and may be negative. Its gradient is -d, "
        "detached, times the gradient of log q(y): a policy gradient with the advantage d, whose "
        "expected value is the gradient of KL(q || p).",
    ),
    "k2": (
        "d^2 / 2",
        "D is a biased estimate of KL(q || p), never negative. Its gradient is that of k1, -d "
        "times the gradient of log q(y), whose expected value is the gradient of KL(q || p).",
    ),
    "k3": (
        "exp(d) - 1 - d",
        "D is an unbiased estimate of KL(q || p), never negative. Its gradient is 1 - exp(d) times "
        "the gradient of log q(y), whose expected value is the gradient of KL(p || q).",
    ),
}


def _describe_sparse_teacher(teacher: TopK | Sampled) -> str:
    if isinstance(teacher, Sampled):
        text = _ESTIMATORS[teacher.estimator][1]
        return (
            "One class y of each row, sampled from the student, and the teacher's log-probability "
            f"of y, both at temperature T. {text}"
        )
    return (
        "The teacher lists k classes of each row, with log-probabilities at temperature T. "
        f"{_TAILS[teacher.tail]}"
    )


def explain(*, teacher: TopK | Sampled | None = None, show: bool = True, **options: Any) -> str:
    """Describe in words what options compute: weights, temperatures, labels, divisors and masks.

    Args:
        teacher: a sparse teacher, whose tail or estimator is described. Default: a dense teacher.
        show: print the text. Default True.
        options: the options of :func:`fastkd.loss`, which are checked.

    Returns:
        The objective as a formula and in words.

    Raises:
        TypeError: if ``teacher`` is not a :class:`fastkd.TopK`, a :class:`fastkd.Sampled` or None.
        TypeError, ValueError: as :func:`fastkd.loss` does for the same options.

    Example:
        >>> import fastkd
        >>> text = fastkd.explain(temperature=4.0, alpha=0.1)  # doctest: +ELLIPSIS
        loss = 0.1 CE(softmax(z), y) + 0.9 T^2 D
        D    = KL(p || q) = sum p log(p / q)   [forward_kl: Hinton, Vinyals and Dean 2015]
        q    = softmax(z / T), p = softmax(w / T); z are the student's logits, w the teacher's
        <BLANKLINE>
        weights      alpha weighs the hard term, the cross entropy; the soft term weighs 1 - ...
    """
    chosen = Options()._replace(**KDLoss(**options).options)
    weights = chosen.teacher_weights
    if teacher is not None:
        if not isinstance(teacher, (TopK, Sampled)):
            raise TypeError(
                "teacher must be a fastkd.TopK, a fastkd.Sampled, or None for other teachers; got "
                f"{type(teacher).__name__}"
            )
        check_sparse_options(teacher, chosen)
    objective = resolve(
        chosen,
        has_labels=True,
        teachers=len(weights) if weights else None,
        is_sparse=teacher is not None,
    )
    definition, p = _get_divergence(objective), _format_distribution(objective)
    if teacher is not None:  # the log-probabilities are not softened again
        objective = objective._replace(teacher_form="log_probs", teacher_temperature=1.0)
        p = "exp(w)"
    softened = " " * 7 if definition.compares == "logits" else f"q    = softmax(z / T), p = {p}; "
    form_names = {"logits": "logits", "log_probs": "log-probabilities", "probs": "probabilities"}
    divergence = f"{definition.formula}   [{objective.divergence}: {definition.source}]"
    if isinstance(teacher, Sampled):
        formula = _ESTIMATORS[teacher.estimator][0]
        divergence = f"{formula}, d = log p(y) - log q(y)   [{teacher.estimator}: Schulman 2020]"
    head = [
        f"loss = {_format_number(objective.hard_weight)} CE(softmax(z), y) + "
        f"{_format_number(objective.soft_weight)} T^2 D",
        f"D    = {divergence}",
        f"{softened}z are the student's logits, w the teacher's"
        + ("" if objective.teacher_form == "logits" else f" {form_names[objective.teacher_form]}"),
    ]
    words = {
        "weights": _describe_weights(chosen, objective),
        "temperature": _describe_temperatures(objective),
        "teacher": _describe_teacher(chosen, objective)
        if teacher is None
        else _describe_sparse_teacher(teacher),
        "labels": _describe_labels(objective, teacher),
        "reduction": _describe_reduction(objective),
        "masked rows": (
            f"Rows labeled {objective.ignore_index} count nothing in either term and get a zero "
            "gradient; their logits may hold anything."
            + (
                " Labels that are probabilities mask no row."
                if _accepts_probabilities(objective, teacher)
                else ""
            )
        ),
    }
    if chosen.shift:
        last = "row" if chosen.shift == 1 else f"{chosen.shift} rows"
        words["shift"] = (
            f"Row i is compared with label, list or sampled class i + {chosen.shift}, and with row "
            f"i of a teacher's logits; the last {last} of each sequence counts nothing."
        )
    if definition.mix is not None:
        words["mix"] = f"{objective.mix:g}, {definition.mix_meaning}."
    if objective.standardize:
        words["standardize"] = (
            "Before D, each row of z and of w has its mean subtracted and is divided by its "
            "standard deviation + 1e-7."
        )
    indent = " " * 13
    lines = [
        textwrap.fill(line, 100, initial_indent=f"{name:<13}", subsequent_indent=indent)
        for name, line in words.items()
    ]
    text = "\n".join([*head, "", *lines])
    if show:
        print(text)
    return text
