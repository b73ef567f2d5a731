"""The native ops: loading them, their shapes for tracing, and their derivatives.

``compute`` is the one way in. It runs the fused kernel where there is one, and
:mod:`fastkd.reference` for what is not fused, under function transforms and on devices without
kernels.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import checks, reference
from fastkd.mixture import one_teacher
from fastkd.native import _C
from fastkd.objective import Objective, row_numbers
from fastkd.rows import in_parts, label_weights


def _load_eager() -> Any:
    """The optional fast way in (csrc/torch/eager.cpp), if it was built with exactly this torch."""
    try:
        from fastkd import _eager
    except ImportError:
        return None
    return _eager if _eager.torch_version == torch.__version__ else None


EAGER = _load_eager()
REDUCTIONS = reference.REDUCTIONS  # a name's place is its number in C++
DIVERGENCES: tuple[str, ...] = _C.divergences
CUDA_KERNELS = bool(_C.cuda_architectures)
_KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if CUDA_KERNELS else {"cpu", "meta"})
_warned: set[str] = set()
_TERMS = len(reference.Terms._fields)
_STATS = 7

_loss = torch.ops.fastkd.loss.default
_loss_ = torch.ops.fastkd.loss_.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default


class Settings(NamedTuple):
    """The numbers of a call, in the order of the ops' schemas (csrc/torch/library.cpp)."""

    temperature: float
    teacher_temperature: float
    hard_weight: float
    soft_weight: float
    label_smoothing: float
    ignore_index: int
    divergence: int
    mix: float
    reduction: int
    normalizer: float
    with_terms: bool


# ---- shapes for FakeTensor, meta and torch.compile


def accumulator(*logits: Tensor) -> torch.dtype:
    """What the loss is computed in, and its dtype: float64 if any of the logits are."""
    double = any(tensor.dtype is torch.float64 for tensor in logits)
    return torch.float64 if double else torch.float32


def _fake_out(student: Tensor, teacher: Tensor, reduction: int, with_terms: bool) -> Tensor:
    shape = [_TERMS] if with_terms else []
    if REDUCTIONS[reduction] == "none":
        shape.append(student.numel() // student.shape[-1])
    return student.new_empty(shape, dtype=accumulator(student, teacher))


def empty_gradient(student: Tensor) -> Tensor:
    """As the kernels lay a gradient out (gradient_strides in csrc/torch/layout.cpp).

    Contiguous, or, where the student's classes are not adjacent but the other dimensions lie in
    order, as in (N, C, H, W), dense in the student's own order.
    """
    *shape, classes = student.shape
    place = len(shape)
    *strides, of_classes = student.stride()
    if student.numel() > 0 and classes > 1 and of_classes != 1:
        rows = [(dim, strides[dim]) for dim in range(len(shape)) if shape[dim] != 1]
        if all(outer >= inner for (_, outer), (_, inner) in pairwise(rows)):
            place = next((dim for dim, stride in rows if stride < of_classes), place)
    return student.new_empty([*shape[:place], classes, *shape[place:]]).movedim(place, -1)


def _fake_stats(student: Tensor, teacher: Tensor) -> Tensor:
    rows = student.numel() // student.shape[-1]
    return student.new_empty([_STATS * rows + 1], dtype=accumulator(student, teacher))


@torch.library.register_fake("fastkd::loss")  # type: ignore[untyped-decorator]
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Any,
    row_settings: Any,
    denominator: Any,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction, _, with_terms, with_grad = settings
    out = _fake_out(student, teacher, reduction, with_terms)
    nothing = student.new_empty([0], dtype=out.dtype)
    filled = with_grad and REDUCTIONS[reduction] != "none"
    grad = empty_gradient(student) if filled else nothing
    needs_stats = with_grad or student.device.type == "cuda"
    return out, grad, _fake_stats(student, teacher) if needs_stats else nothing.clone()


@torch.library.register_fake("fastkd::loss_")  # type: ignore[untyped-decorator]
def _(
    student: Tensor,
    teacher: Tensor,
    labels: Any,
    row_settings: Any,
    denominator: Any,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    *_, reduction, _, with_terms = settings
    return _fake_out(student, teacher, reduction, with_terms), _fake_stats(student, teacher)


@torch.library.register_fake("fastkd::loss_into")  # type: ignore[untyped-decorator]
def _(
    grad: Tensor,
    grad_output: float,
    student: Tensor,
    teacher: Tensor,
    labels: Any,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    *_, reduction, with_terms = settings
    return _fake_out(student, teacher, reduction, with_terms), _fake_stats(student, teacher)


@torch.library.register_fake("fastkd::loss_backward_")  # type: ignore[untyped-decorator]
def _(grad: Tensor, *_: Any) -> None:
    return None


# ---- derivatives


def differentiable_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
    grad_output: Tensor,
) -> Tensor:
    """grad_output times the gradient, differentiable in both: what create_graph=True needs."""
    out = _reference(student, teacher, labels, row_settings, denominator, settings)
    (gradient,) = torch.autograd.grad(out, student, grad_output, create_graph=True)
    return gradient


class _Loss(torch.autograd.Function):
    """The op, whose forward pass has written the gradient already unless the reduction is
    "none"."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_settings: Tensor | None,
        denominator: Tensor | None,
        settings: Settings,
    ) -> Any:
        out, grad, stats = _loss(
            student, teacher, labels, row_settings, denominator, *settings, True
        )
        ctx.settings = settings
        ctx.save_for_backward(student, teacher, labels, row_settings, denominator, stats)
        # Not saved like the others: backward scales it in place and gives it away.
        ctx.grad = grad
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        student, teacher, labels, row_settings, denominator, stats = ctx.saved_tensors
        settings = ctx.settings
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True: this gradient will be differentiated in turn
            grad = differentiable_gradient(
                student, teacher, labels, row_settings, denominator, settings, grad_output
            )
            return grad, None, None, None, None, None
        if settings.with_terms:
            grad_output = grad_output[0]  # the other terms carry no gradient
        filled = REDUCTIONS[settings.reduction] != "none"
        compiling = torch.compiler.is_compiling()
        if compiling and filled and student.dtype is not torch.float16:
            return (ctx.grad * grad_output).to(student.dtype), None, None, None, None, None
        grad, ctx.grad = ctx.grad, None
        if grad is None or not filled or compiling:
            # In fp16 a scale cannot bring back what has underflowed, and a compiled graph cannot
            # tell beforehand whether there is one.
            # With retain_graph=True the first call gave its buffer away; it may not be scaled
            # again.
            grad = empty_gradient(student)
            filled = False
        _loss_backward_(
            grad,
            grad_output.contiguous(),
            stats,
            student,
            teacher,
            labels,
            row_settings,
            *settings[:8],
            filled,
        )
        return grad, None, None, None, None, None


class _InplaceLoss(torch.autograd.Function):
    """The op that writes the gradient over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        row_settings: Tensor | None,
        denominator: Tensor | None,
        settings: Settings,
    ) -> Any:
        out, stats = _loss_(student, teacher, labels, row_settings, denominator, *settings)
        torch.autograd.graph.increment_version(student)
        ctx.settings = settings
        ctx.grad = student.detach()
        ctx.save_for_backward(teacher, labels, row_settings, stats)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        teacher, labels, row_settings, stats = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        if torch.is_grad_enabled() or grad is None:
            raise RuntimeError(
                "inplace=True: the logits were overwritten by their gradient, which can be had "
                "once. For second derivatives or a second backward pass use inplace=False"
            )
        if ctx.settings.with_terms:
            grad_output = grad_output[0]
        _loss_backward_(
            grad,
            grad_output.contiguous(),
            stats,
            grad,
            teacher,
            labels,
            row_settings,
            *ctx.settings[:8],
            True,
        )
        return grad, None, None, None, None, None


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad *= factor, which the device looks at itself: a factor of 1 costs next to nothing.

    ``factor``: 0-d, float32, or float64 for a float64 ``grad``.
    """
    if grad.device.type not in _KERNEL_DEVICES or grad.numel() == 0 or not grad.is_contiguous():
        return grad.mul_(factor)
    row = grad.view(1, -1)  # a gradient in place of its logits, as after loss_, of one row
    stats = factor.new_zeros(_STATS + 1)
    numbers = (1.0, 1.0, 0.0, 1.0, 0.0, -100, 0, 0.5)
    _loss_backward_(row, factor, stats, row, row, None, None, *numbers, True)
    return grad


# ---- the way in

# What an objective may use beyond what every kernel has: how it is written, for the docs.
USES = {
    **{name: f'divergence="{name}"' for name in reference.DIVERGENCES},
    "soft labels": "labels of probabilities",
    "class_weight": "class_weight=",
    "smoothed class_weight": "class_weight= with label_smoothing=",
    "row weights": "hard_weight= or soft_weight= as a tensor",
    "learned": "gradients of temperature= and of weights",
    "standardize": "standardize=True",
}
# What of it the kernels have. All else is computed by fastkd.reference.
FUSED = frozenset({*DIVERGENCES, "row weights", "class_weight"})


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
    learned = any(number.requires_grad for number in weights + temperatures)
    if learned and torch.is_grad_enabled():
        found.add("learned")
    if o.standardize:
        found.add("standardize")
    return found


def _missing(labels: Tensor | None, objective: Objective) -> set[str]:
    """What of a call the kernels lack."""
    return uses(labels, objective) - FUSED


def is_fused(student: Tensor, labels: Tensor | None, objective: Objective) -> bool:
    """Whether the kernels have all that a call uses, so that it may be in place."""
    device = student.device.type
    if device not in _KERNEL_DEVICES or _is_transformed():
        return False
    return not _missing(labels, objective)


def lacking(student: Tensor, labels: Tensor | None, objective: Objective) -> list[str]:
    """What of a call the kernels lack, as users write it."""
    if student.device.type not in _KERNEL_DEVICES:
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
    transformed = _is_transformed()
    if device not in _KERNEL_DEVICES:
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
    arguments = _arguments(student, teachers, labels, o, with_terms)
    out = _apply(student, *arguments, inplace)
    if o.reduction == "none" and student.dim() != 2:
        out = out.reshape((*out.shape[:-1], *student.shape[:-1]))
    return out if hard is None else torch.cat((out[:1], hard.unsqueeze(0), out[2:]))


Arguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Settings]


def _arguments(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    objective: Objective,
    with_terms: bool,
) -> Arguments:
    """What the native ops take beside the student: teacher, labels, row settings, denominator and
    numbers."""
    o = objective
    teacher, teacher_temperature = one_teacher(teachers, o, accumulator(student, *teachers))
    if labels is not None and labels.dtype is not torch.int64:
        labels = labels.long()
    denominator = o.normalizer if isinstance(o.normalizer, Tensor) else None
    numbers = (o.temperature, teacher_temperature, o.hard_weight, o.soft_weight)
    row_settings = None
    if any(isinstance(number, Tensor) for number in numbers):
        row_settings = row_numbers(numbers, student, accumulator(student, teacher))
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
    return teacher, labels, row_settings, denominator, settings


def statistics(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and what its gradient needs: kernels.h, ``Stat``."""
    *arguments, settings = _arguments(student, (teacher,), labels, objective, True)
    assert objective.reduction == "none"
    terms, _, stats = _loss(student, *arguments, *settings, True)
    return terms[reference.Terms._fields.index("soft")], stats


def gradient_(
    student: Tensor, teacher: Tensor, labels: Tensor | None, objective: Objective, stats: Tensor
) -> None:
    """Writes the gradient of rows with these statistics over the student's logits."""
    arguments = _arguments(student, (teacher,), labels, objective, False)
    teacher, labels, row_settings, _, settings = arguments
    one = stats.new_ones(())
    _loss_backward_(
        student, one, stats, student, teacher, labels, row_settings, *settings[:8], False
    )


def _same_temperature(objective: Objective) -> bool:
    """Whether student and teacher are known to have the same temperature in every row."""
    mine, own = objective.temperature, objective.teacher_temperature
    return own is mine or (isinstance(mine, float) and isinstance(own, float) and mine == own)


def _apply(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
    inplace: bool,
) -> Tensor:
    """Runs an op; results are shaped as csrc/torch/library.cpp says."""
    arguments = (student, teacher, labels, row_settings, denominator, settings)
    if not (torch.is_grad_enabled() and student.requires_grad):
        out, _, _ = _loss(*arguments[:5], *settings, False)
    elif inplace and not torch.compiler.is_compiling():
        out = _InplaceLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        out = _Loss.apply(*arguments)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def _is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


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


def _reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The same result by differentiable PyTorch operations."""
    numbers: Any = settings[:4]
    if row_settings is not None:
        numbers = row_settings.reshape(4, *student.shape[:-1]).unbind(0)
    temperature, teacher_temperature, hard_weight, soft_weight = numbers
    name = DIVERGENCES[settings.divergence]
    normalizer: float | Tensor | None = (
        denominator if denominator is not None else settings.normalizer or None
    )
    terms = reference.terms(
        student,
        teacher,
        labels,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        label_smoothing=settings.label_smoothing,
        ignore_index=settings.ignore_index,
        reduction=REDUCTIONS[settings.reduction],
        normalizer=normalizer,
        divergence=name,
        mix=settings.mix if reference.DIVERGENCES[name].mix is not None else None,
    )
    if REDUCTIONS[settings.reduction] == "none":
        terms = reference.Terms(*(term.flatten() for term in terms))
    return torch.stack(terms) if settings.with_terms else terms.loss
