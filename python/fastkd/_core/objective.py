"""Define the options of a loss: as the caller passes them, and with every default filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastkd import reference, validation
from fastkd._core import checks, mistakes

PER_ROW_OPTIONS = ("temperature", "teacher_temperature", "hard_weight", "soft_weight")
"""The options that may be a tensor with one number for each row."""


class Options(NamedTuple):
    """Hold the options of :func:`fastkd.loss` as the caller passes them."""

    temperature: float | Tensor | None = None
    teacher_temperature: float | Tensor | None = None
    alpha: float | None = None
    hard_weight: float | Tensor | None = None
    soft_weight: float | Tensor | None = None
    ignore_index: int = -100
    reduction: reference.Reduction = "mean"
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None
    normalizer: float | Tensor | None = None
    divergence: reference.DivergenceName = "forward_kl"
    mix: float | None = None
    teacher_form: reference.TeacherForm = "logits"
    teacher_weights: Sequence[float] | None = None
    ensemble: reference.Ensemble = "probs"
    standardize: bool = False
    dim: int = -1
    shift: int = 0
    inplace: bool = False
    chunks: Any = "auto"

    @property
    def nondefault(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {
            name: value
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) or value != self._field_defaults[name]
        }


class Objective(NamedTuple):
    """Hold the options of :func:`fastkd.reference.terms` but ``dim``, with defaults filled in."""

    temperature: float | Tensor
    teacher_temperature: float | Tensor
    hard_weight: float | Tensor
    soft_weight: float | Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float
    class_weight: Tensor | None
    normalizer: float | Tensor | None
    divergence: str
    mix: float | None
    teacher_form: str
    teacher_weights: tuple[float, ...] | None
    ensemble: str
    standardize: bool


def resolve(
    options: Options, *, has_labels: bool, teachers: int | None, is_sparse: bool = False
) -> Objective:
    """Check the options without logits, and fill in defaults.

    ``teachers``: the number of teachers, or None if the number is not known yet. ``is_sparse``: the
    teacher is a TopK or Sampled, whose log-probabilities have a temperature of 1 by default.
    """
    o = options
    validation.check_one_of(
        "divergence", o.divergence, tuple(reference.DIVERGENCES), mistakes.DIVERGENCE_HINTS
    )
    validation.check_one_of(
        "teacher_form", o.teacher_form, reference.TEACHER_FORMS, mistakes.FORM_HINTS
    )
    validation.check_one_of("ensemble", o.ensemble, reference.ENSEMBLES)
    validation.check_one_of(
        "reduction", o.reduction, reference.REDUCTIONS, mistakes.REDUCTION_HINTS
    )
    for name in ("standardize", "inplace"):
        if not isinstance(getattr(o, name), bool):
            raise TypeError(f"{name} must be True or False; got {getattr(o, name)!r}")
    if type(o.dim) is not int or o.dim not in (-1, 1):
        raise ValueError(
            "dim must be -1, for logits (..., C), or 1, for logits (N, C, d1, ...); got "
            + repr(o.dim)
        )
    validation.check_count("shift", o.shift, 0)
    temperature = checks.check_temperature(
        "temperature", (1.0 if is_sparse else 2.0) if o.temperature is None else o.temperature
    )
    teacher_temperature = 1.0 if o.teacher_form != "logits" else temperature
    if o.teacher_temperature is not None:
        teacher_temperature = checks.check_temperature("teacher_temperature", o.teacher_temperature)
    hard, soft = checks.resolve_weights(o.alpha, o.hard_weight, o.soft_weight, has_labels)
    if o.class_weight is not None:
        if not isinstance(o.class_weight, Tensor):
            got = type(o.class_weight).__name__
            raise TypeError(f"class_weight must be a tensor or None; got {got}")
        if not o.class_weight.is_floating_point():
            got = o.class_weight.dtype
            raise TypeError(f"class_weight must be a floating-point tensor; got {got}")
        checks.check_no_gradient("class_weight", o.class_weight)
        if not has_labels:
            raise ValueError(
                "class_weight weighs the hard term, which needs labels; got labels=None"
            )
    normalizer = o.normalizer
    if normalizer is not None and o.reduction != "mean":
        raise ValueError(f'normalizer goes with reduction="mean"; got reduction={o.reduction!r}')
    if isinstance(normalizer, Tensor):
        checks.check_no_gradient("normalizer", normalizer)
    if normalizer is not None:
        normalizer = checks.check_divisor(normalizer)
    validation.check_ignore_index(o.ignore_index)
    if reference.DIVERGENCES[o.divergence].needs_labels and not has_labels:
        raise ValueError(
            f"divergence={o.divergence!r} needs labels (class indices); got labels=None"
        )
    smoothing = validation.check_number("label_smoothing", o.label_smoothing, 0.0, 1.0)
    if smoothing and not has_labels:
        raise ValueError(
            f"label_smoothing needs labels; got label_smoothing={smoothing!r} and labels=None"
        )
    objective = Objective(
        temperature,
        teacher_temperature,
        hard,
        soft,
        o.ignore_index,
        o.reduction,
        smoothing,
        o.class_weight,
        normalizer,
        o.divergence,
        _check_mix(o.divergence, o.mix),
        o.teacher_form,
        checks.check_teacher_weights(o.teacher_weights, teachers),
        o.ensemble,
        o.standardize,
    )
    _check_compares_logits(objective, teachers)
    return objective


def _check_mix(divergence: str, mix: object) -> float | None:
    """Check ``mix`` and return it as a float; None becomes the divergence's default."""
    definition = reference.DIVERGENCES[divergence]
    if mix is None:
        return definition.mix
    if definition.mix is None:
        names = ", ".join(
            repr(name) for name, other in reference.DIVERGENCES.items() if other.mix is not None
        )
        raise ValueError(
            f"mix belongs to the divergences {names}; got mix={mix!r} with "
            f"divergence={divergence!r}. Omit mix."
        )
    low, high = definition.mix_range
    if divergence == "jsd" and mix in (0, 1):
        limit = "reverse_kl" if mix else "forward_kl"
        raise ValueError(
            f"mix must be in (0, 1); got {float(mix)}. For TRL's beta={mix:g}, pass "
            f"divergence={limit!r}"
        )
    checked = validation.check_number(
        "mix", mix, low, high, open_low=definition.mix_open, open_high=definition.mix_open
    )
    if definition.mix_open and 1 - checked == 1:  # the mixture would be teacher or student alone
        raise ValueError(
            f"mix is too small for float64: 1 - mix must be less than 1; got {checked!r}"
        )
    return checked


def _check_compares_logits(objective: Objective, teachers: int | None) -> None:
    """Raise if the divergence or ``standardize`` needs logits, but gets probabilities."""
    comparing = reference.DIVERGENCES[objective.divergence].compares == "logits"
    if not comparing and not objective.standardize:
        return
    option = f"divergence={objective.divergence!r}" if comparing else "standardize=True"
    if objective.teacher_form != "logits":
        raise ValueError(
            f'{option} compares logits and needs teacher_form="logits"; got '
            f"teacher_form={objective.teacher_form!r}"
        )
    if comparing and teachers is not None and teachers > 1 and objective.ensemble != "logits":
        raise ValueError(
            f'{option} compares logits: with several teachers it needs ensemble="logits"; got '
            f"ensemble={objective.ensemble!r}"
        )
