"""``compute``, the one way in: native ops for what they have; :mod:`fastkd.reference` for what is
not fused, under function transforms and on devices without kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import autograd, checks, dense, mixture, row_terms
from fastkd._core.autograd import is_transformed
from fastkd._core.dense import DIVERGENCES, KERNEL_DEVICES, NO_MIXTURE, Arguments
from fastkd._core.objective import Objective, row_numbers
from fastkd._core.rows import in_parts, label_targets, label_weights
from fastkd._core.shapes import REDUCTIONS, Settings, accumulator

_warned: set[str] = set()

_loss_into = torch.ops.fastkd.loss_into.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default

# What an objective may use beyond what every kernel has: how it is written, for the docs.
USES = {
    **{name: f'divergence="{name}"' for name in reference.DIVERGENCES},
    "soft labels": "labels of probabilities",
    "class_weight": "class_weight=",
    "smoothed class_weight": "class_weight= with label_smoothing=",
    "row weights": "hard_weight= or soft_weight= as a tensor",
    "learned": "gradients of temperatures and of weights",
    "standardize": "standardize=True",
}
# What of it the kernels have. All else is computed by fastkd.reference.
FUSED = frozenset({*DIVERGENCES, "row weights", "class_weight"})
# What CPUs have by two passes of the kernels, which cannot be in place.
IN_TWO_PASSES = frozenset({"soft labels", "smoothed class_weight"})
# What they have by the terms of each row and their derivatives.
BY_ROWS = frozenset({"learned", "standardize"})


def uses(labels: Tensor | None, objective: Objective) -> set[str]:
    """The names in USES that apply to a call."""
    o = objective
    weights = [x for x in (o.hard_weight, o.soft_weight) if isinstance(x, Tensor)]
    temperatures = [x for x in (o.temperature, o.teacher_temperature) if isinstance(x, Tensor)]
    found = {o.divergence}
    if labels is not None and labels.is_floating_point():
        found.add("soft labels")
    if o.class_weight is not None:
        found.add("smoothed class_weight" if o.label_smoothing else "class_weight")
    if weights:
        found.add("row weights")
    learns = any(number.requires_grad for number in weights + temperatures)
    if learns and torch.is_grad_enabled():
        found.add("learned")
    if o.standardize:
        found.add("standardize")
    return found


def _missing(labels: Tensor | None, objective: Objective) -> set[str]:
    """What of a call the kernels lack."""
    return uses(labels, objective) - FUSED


def in_passes(teachers: tuple[Tensor, ...], labels: Tensor | None, objective: Objective) -> bool:
    """Whether what the kernels lack of a call is computed by several passes of them, on a CPU."""
    missing = _missing(labels, objective)
    if (missing & IN_TWO_PASSES and labels is None) or missing - IN_TWO_PASSES - BY_ROWS:
        return False
    return missing <= IN_TWO_PASSES or row_terms.has(objective, mixture.is_one(teachers, objective))


def is_fused(student: Tensor, labels: Tensor | None, objective: Objective) -> bool:
    """Whether the kernels have all that a call uses, so that it may be in place."""
    device = student.device.type
    if device not in KERNEL_DEVICES or is_transformed():
        return False
    return not _missing(labels, objective)


def lacking(student: Tensor, labels: Tensor | None, objective: Objective) -> list[str]:
    """What of a call the kernels lack, as users write it."""
    if student.device.type not in KERNEL_DEVICES:
        return [f"logits on {student.device.type}"]
    return [USES[use] for use in sorted(_missing(labels, objective))]


def compute(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    objective: Objective,
    *,
    with_terms: bool,
    inplace: bool,
) -> Tensor:
    """The loss, or all terms stacked, of checked arguments, by kernels or by the reference."""
    device = student.device.type
    transformed = is_transformed()
    if device not in KERNEL_DEVICES:
        _warn_once(device)
    elif not transformed:
        missing = _missing(labels, objective)
        if not missing:
            return _fused(student, teachers, labels, objective, with_terms, inplace)
        if inplace:
            raise ValueError(
                "inplace=True needs a call that the kernels compute; they do not have "
                f"{', '.join(lacking(student, labels, objective))} on {device}"
            )
        if checks.may_look(student):
            checks.check_rows(student, labels, objective.ignore_index, objective.temperature)
            if in_passes(teachers, labels, objective):
                passes = _in_two_passes if missing & IN_TWO_PASSES else _by_rows
                out = passes(student, teachers, labels, objective, with_terms)
                if out is not None:
                    return out
    if transformed or torch.compiler.is_compiling():
        terms = reference.terms(student, teachers, labels, **objective._asdict())
    else:
        terms = in_parts(student, teachers, labels, objective)
    return torch.stack(terms) if with_terms else terms.loss


def _fused(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    objective: Objective,
    with_terms: bool,
    inplace: bool,
) -> Tensor:
    """The same by the native ops, for what they have; weights of classes as weights of rows."""
    o, hard = objective, None
    if o.class_weight is not None:
        weight = label_weights(student, labels, o)
        o = o._replace(class_weight=None)
        if with_terms:  # what they show of the hard term has these weights, which the ops' has not
            alone = o._replace(hard_weight=weight, soft_weight=0.0)
            with torch.no_grad():
                hard = _fused(student, teachers, labels, alone, False, False)
        o = o._replace(hard_weight=o.hard_weight * weight)
    out = dense.loss(student, _arguments(student, teachers, labels, o, with_terms), inplace)
    if o.reduction == "none" and student.dim() != 2:
        out = out.reshape((*out.shape[:-1], *student.shape[:-1]))
    return out if hard is None else torch.cat((out[:1], hard.unsqueeze(0), out[2:]))


def _by_rows(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    objective: Objective,
    with_terms: bool,
) -> Tensor:
    """The same by the native ops, for what they have by the terms of each row."""
    if not _missing(labels, objective):
        return _fused(student, teachers, labels, objective, with_terms, False)
    terms = row_terms.terms(student, teachers, labels, objective)
    return torch.stack(terms) if with_terms else terms.loss


def _in_two_passes(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    objective: Objective,
    with_terms: bool,
) -> Tensor | None:
    """The divergence, and the cross entropy with probabilities: the soft cross entropy of one more
    teacher, at temperature 1. None where labels are not all positive, as those of teachers are.
    """
    assert labels is not None
    o, acc = objective, accumulator(student, *teachers)
    target, total = label_targets(labels, student.shape[-1], o, acc)
    if target.numel() and not bool((target.amin() >= 0) & (total > 0).all()):
        return None
    indices = None if labels.is_floating_point() else labels  # which mask rows
    student = student.to(acc)  # so that the sum of the two gradients is rounded once
    o = o._replace(hard_weight=0.0, class_weight=None, label_smoothing=0.0)
    out = _by_rows(student, teachers, indices, o, with_terms)
    cross_entropy = o._replace(
        temperature=1.0,
        teacher_temperature=1.0,
        divergence="soft_cross_entropy",
        mix=None,
        teacher_form="probs",
        teacher_weights=None,
        ensemble="probs",
        standardize=False,
    )

    def hard(weight: float | Tensor) -> Tensor:
        of_rows = cross_entropy._replace(soft_weight=weight * total)
        return _by_rows(student, (target,), indices, of_rows, False)

    if not with_terms:
        return out + hard(objective.hard_weight)
    with torch.no_grad():
        alone = hard(1.0)
    return torch.cat((out[:1] + hard(objective.hard_weight), alone.unsqueeze(0), out[2:]))


def _arguments(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    objective: Objective,
    with_terms: bool,
) -> Arguments:
    """Convert an objective to the arguments of the native ops."""
    o, mixing, row_temperatures = objective, None, None
    if not mixture.is_one(teachers, o):
        acc = accumulator(student, *teachers)
        kernel = mixture.mixing(teachers, o, acc)
        if kernel is None or student.is_cuda:  # whose kernels read a mixture as they read a teacher
            teachers = (mixture.as_one(teachers, o, acc),)
        else:
            mixing, row_temperatures = kernel
        o = o._replace(teacher_temperature=o.temperature)
    denominator = o.normalizer if isinstance(o.normalizer, Tensor) else None
    numbers = (o.temperature, o.teacher_temperature, o.hard_weight, o.soft_weight)
    row_settings = None
    if any(isinstance(number, Tensor) for number in numbers):
        row_settings = row_numbers(numbers, student, accumulator(student, *teachers))
        # Equal temperatures here promise equal ones in every row (csrc/kernels.h).
        numbers = (1.0, 1.0 if _same_temperature(o) else 2.0, 1.0, 1.0)
    settings = Settings(
        *numbers,  # type: ignore[arg-type]
        o.label_smoothing,
        o.ignore_index,
        DIVERGENCES.index(o.divergence),
        0.5 if o.mix is None else o.mix,
        REDUCTIONS.index(o.reduction),
        0.0 if denominator is not None else o.normalizer or 0.0,  # type: ignore[arg-type]
        with_terms,
    )
    return Arguments(
        teachers, row_temperatures, mixing, labels, row_settings, denominator, settings
    )


def prepare_call(objective: Objective, with_terms: bool) -> Callable[..., Tensor]:
    """Bind the options of the op ``loss``; return a function of student, teacher and labels.

    No option may be a tensor, and the kernels must implement every option.
    """
    o = objective
    settings = Settings(
        o.temperature,  # type: ignore[arg-type]
        o.teacher_temperature,  # type: ignore[arg-type]
        o.hard_weight,  # type: ignore[arg-type]
        o.soft_weight,  # type: ignore[arg-type]
        o.label_smoothing,
        o.ignore_index,
        DIVERGENCES.index(o.divergence),
        0.5 if o.mix is None else o.mix,
        REDUCTIONS.index(o.reduction),
        o.normalizer or 0.0,  # type: ignore[arg-type]
        with_terms,
    )
    arguments = (None, None, *NO_MIXTURE, None, None, None, *settings)
    return autograd.prepare_call("loss", arguments, [0, 1, 2 + len(NO_MIXTURE)])


def statistics(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Return each row's divergence, and the statistics for its gradient (Stat in kernels.h)."""
    assert objective.reduction == "none" and mixture.is_one((teacher,), objective)
    call = _arguments(student, (teacher,), labels, objective, True)
    terms, stats = _loss_into(None, student, *call.flat(), True)
    return terms[reference.Terms._fields.index("soft")], stats


def gradient_(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective, stats: Tensor
) -> None:
    """Write the gradient of rows with these statistics over the student's logits."""
    assert mixture.is_one((teacher,), objective)
    call = _arguments(student, (teacher,), labels, objective, False)
    _loss_backward_(student, stats.new_ones(()), stats, student, *call.flat(), False)


def _same_temperature(objective: Objective) -> bool:
    """Whether student and teacher are known to have the same temperature in every row."""
    mine, own = objective.temperature, objective.teacher_temperature
    return own is mine or (isinstance(mine, float) and isinstance(own, float) and mine == own)


def _warn_once(device_type: str) -> None:
    """Says, once for each type of device, that the kernels are not at work there."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    how = (
        "install fastkd where nvcc and a CUDA build of torch are found"
        if device_type == "cuda"
        else "move the logits to a CPU or CUDA device"
    )
    warnings.warn(
        f"this build of fastkd has no {device_type} kernels: plain PyTorch operations are used "
        f"instead, which are slower and take more memory. To get the kernels, {how}.",
        RuntimeWarning,
        stacklevel=5,
    )
