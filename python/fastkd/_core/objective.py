"""A call's options, checked and made explicit: what the kernels and the reference both take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import checks

TEACHER_GRADS = ("error", "ignore")


class Objective(NamedTuple):
    """The options of :func:`fastkd.reference.terms`, none of them left to a default."""

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


def resolve(options: Mapping[str, Any], *, has_labels: bool, teachers: int | None) -> Objective:
    """The objective that the options of :func:`fastkd.loss` ask for.

    Checks what needs no logits to be checked; ``teachers``: how many, None for not known yet.
    """
    names = reference.DIVERGENCES
    divergence = options["divergence"]
    checks.one_of("divergence", divergence, tuple(names))
    form = options["teacher_form"]
    checks.one_of("teacher_form", form, reference.TEACHER_FORMS)
    checks.one_of("ensemble", options["ensemble"], reference.ENSEMBLES)
    checks.one_of("reduction", options["reduction"], reference.REDUCTIONS)
    checks.one_of("teacher_grad", options["teacher_grad"], TEACHER_GRADS)
    for name in ("standardize", "inplace"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False; got {options[name]!r}")
    checks.dim_and_classes(options["dim"], options["classes"])
    temperature = checks.temperature("temperature", options["temperature"])
    given = options["teacher_temperature"]
    own = 1.0 if form != "logits" else temperature
    if given is not None:
        own = checks.temperature("teacher_temperature", given)
    hard, soft = checks.weights(
        options["alpha"], options["hard_weight"], options["soft_weight"], has_labels
    )
    class_weight = options["class_weight"]
    if class_weight is not None:
        checks.class_weight(class_weight)
        if not has_labels:
            raise ValueError(
                "class_weight weighs the hard term, which needs labels; got labels=None"
            )
    normalizer = options["normalizer"]
    if normalizer is not None and options["reduction"] != "mean":
        raise ValueError(
            f'normalizer goes with reduction="mean"; got reduction={options["reduction"]!r}'
        )
    if isinstance(normalizer, Tensor):
        checks.constant("normalizer", normalizer)
    elif normalizer is not None:
        normalizer = checks.check_divisor(normalizer)
    ignore_index = options["ignore_index"]
    checks.ignored_label(ignore_index)
    if names[divergence].needs_labels and not has_labels:
        raise ValueError(f"divergence={divergence!r} needs labels (class indices); got labels=None")
    result = Objective(
        temperature,
        own,
        hard,
        soft,
        ignore_index,
        options["reduction"],
        checks.smoothing(options["label_smoothing"], has_labels),
        class_weight,
        normalizer,
        divergence,
        _mix(divergence, options["mix"]),
        form,
        checks.teacher_weights(options["teacher_weights"], teachers),
        options["ensemble"],
        options["standardize"],
    )
    _check_logits_are_there(result, teachers)
    return result


def _mix(divergence: str, mix: object) -> float | None:
    """The mixture weight of a divergence that has one."""
    kind = reference.DIVERGENCES[divergence]
    if mix is None:
        return kind.mix
    if kind.mix is None:
        those = ", ".join(
            repr(name) for name, other in reference.DIVERGENCES.items() if other.mix is not None
        )
        raise ValueError(f"mix belongs to {those}; got mix={mix!r} with divergence={divergence!r}")
    low, high = kind.mix_range
    checked = checks.number("mix", mix, low, high, open_low=kind.mix_open, open_high=kind.mix_open)
    if kind.mix_open and 1 - checked == 1:  # the mixture would be equal to one side
        raise ValueError(f"mix must be large enough that 1 - mix is less than 1; got {checked!r}")
    return checked


def _check_logits_are_there(objective: Objective, teachers: int | None) -> None:
    """What compares logits needs the teacher's."""
    comparing = reference.DIVERGENCES[objective.divergence].compares == "logits"
    if not comparing and not objective.standardize:
        return
    what = f"divergence={objective.divergence!r}" if comparing else "standardize=True"
    if objective.teacher_form != "logits":
        raise ValueError(
            f'{what} compares logits and needs teacher_form="logits"; got '
            f"teacher_form={objective.teacher_form!r}"
        )
    if comparing and teachers is not None and teachers > 1 and objective.ensemble != "logits":
        raise ValueError(
            f'{what} compares logits: with several teachers it needs ensemble="logits"; got '
            f"ensemble={objective.ensemble!r}"
        )


def fit(
    objective: Objective, student: Tensor, labels: Tensor | None, dtype: torch.dtype
) -> Objective:
    """Check the tensors of an objective against the student, and convert them.

    Tensors for rows become ``(...)`` in ``dtype``, or stay 0-d.
    """

    def rows(
        name: str, value: float | Tensor, check_data: Callable[[str, Tensor], None]
    ) -> float | Tensor:
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0:
            value = value.to(student.device)
        else:
            checks.rows(value, name, student)
        check_data(name, value)
        return checks.savable(value.to(dtype))

    normalizer, class_weight = objective.normalizer, objective.class_weight
    if isinstance(normalizer, Tensor):
        normalizer = checks.normalizer(normalizer)
    if normalizer is not None:
        normalizer = checks.check_nonzero(normalizer, labels, objective.ignore_index)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device=student.device, dtype=dtype)
    if class_weight is not None:
        checks.classes(class_weight, "class_weight", student)
        class_weight = checks.savable(class_weight.detach().to(dtype))
    temperature = rows("temperature", objective.temperature, checks.check_temperature_data)
    same = objective.teacher_temperature is objective.temperature
    return objective._replace(
        temperature=temperature,
        teacher_temperature=temperature
        if same
        else rows(
            "teacher_temperature", objective.teacher_temperature, checks.check_temperature_data
        ),
        hard_weight=rows("hard_weight", objective.hard_weight, checks.check_weight_data),
        soft_weight=rows("soft_weight", objective.soft_weight, checks.check_weight_data),
        normalizer=normalizer,
        class_weight=class_weight,
    )


def row_numbers(numbers: tuple[float | Tensor, ...], logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers that rows may have of their own, one after the other, as the ops take them."""
    rows = logits.shape[:-1]
    with torch.no_grad():
        return torch.stack(
            [
                torch.as_tensor(number, dtype=dtype, device=logits.device).expand(rows)
                for number in numbers
            ]
        ).flatten()
