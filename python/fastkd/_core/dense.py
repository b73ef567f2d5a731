"""Convert a checked call to the arguments of the op ``loss``, and run the op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import autograd
from fastkd._core.arguments import Call
from fastkd._core.native import _C
from fastkd._core.objective import PER_ROW_OPTIONS, Objective
from fastkd._core.shapes import REDUCTIONS, STATS, accumulator

DIVERGENCES: tuple[str, ...] = _C.divergences
KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if _C.cuda_architectures else {"cpu", "meta"})
MOST_TEACHERS_ON_CUDA = 32  # equals kMostTeachers of csrc/mixture.h

_loss = torch.ops.fastkd.loss.default
_loss_into = torch.ops.fastkd.loss_into.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default
_mixture = torch.ops.fastkd.mixture.default


class Arguments(NamedTuple):
    """Hold the arguments of the op ``loss`` after the student (csrc/torch/library.cpp)."""

    teachers: tuple[Tensor, ...]
    row_temperatures: Tensor | None = None
    """Flattened ``(2, rows)``: ``mixture_temperature`` and ``teachers_temperature`` of each row."""
    shares: tuple[float, ...] = ()
    """The weight of each teacher in the mixture; empty if there is one teacher, of logits."""
    probabilities: bool = False
    ensemble: int = 0
    mixture_temperature: float = 1.0
    """The student's temperature, by which the loss divides the mixture."""
    teachers_temperature: float = 1.0
    labels: Tensor | None = None
    row_settings: Tensor | None = None
    """Flattened ``(4, rows)``: both temperatures and both weights of each row."""
    denominator: Tensor | None = None
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    hard_weight: float = 0.0
    soft_weight: float = 1.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    divergence: int = 0
    mix: float = 0.5
    reduction: int = REDUCTIONS.index("sum")
    normalizer: float = 0.0
    with_terms: bool = False


def make_arguments(call: Call, with_terms: bool) -> Arguments:
    """Convert a call that the kernels compute to the arguments of the op."""
    o, teachers = call.objective, call.teachers
    mixing: dict[str, Any] = {}
    if len(teachers) > 1 or o.teacher_form == "probs":
        teachers = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in teachers)
        weights = o.teacher_weights or (1.0,) * len(teachers)
        temperatures, rows = make_row_numbers(call, (o.temperature, o.teacher_temperature))
        mixing = {
            "row_temperatures": rows,
            "shares": tuple(weight / sum(weights) for weight in weights),
            "probabilities": o.teacher_form == "probs",
            "ensemble": reference.ENSEMBLES.index(o.ensemble),
            "mixture_temperature": temperatures[0],
            "teachers_temperature": temperatures[1],
        }
        if call.student.is_cuda:  # CUDA kernels of the loss take one teacher: the mixture
            teachers, mixing = (mix_teachers(Arguments(teachers, **mixing), call.dtype),), {}
        o = o._replace(teacher_temperature=o.temperature)
    numbers, rows = make_row_numbers(call, tuple(getattr(o, name) for name in PER_ROW_OPTIONS))
    return Arguments(
        teachers,
        **mixing,
        labels=call.labels,
        row_settings=rows,
        denominator=o.normalizer if isinstance(o.normalizer, Tensor) else None,
        **make_settings(o, numbers, with_terms),
    )


def make_row_numbers(
    call: Call, numbers: tuple[float | Tensor, ...]
) -> tuple[tuple[float, ...], Tensor | None]:
    """Return temperatures and weights as scalars, and as a flat tensor if any is a tensor.

    If any number is a tensor, the kernels read the flat tensor, and the scalars are placeholders.
    Placeholders of the temperatures are equal only if both temperatures of each row are equal, as
    the kernels then assume (csrc/kernels.h). ``numbers`` begins with these two temperatures.
    """
    if not any(isinstance(number, Tensor) for number in numbers):
        return numbers, None  # type: ignore[return-value]
    rows = call.student.shape[:-1]
    with torch.no_grad():
        each = [
            torch.as_tensor(number, dtype=call.dtype, device=call.student.device).expand(rows)
            for number in numbers
        ]
    student, teacher, *_ = numbers
    is_number = not isinstance(student, Tensor) and not isinstance(teacher, Tensor)
    is_equal = teacher is student or (is_number and teacher == student)
    return (1.0, 1.0 if is_equal else 2.0, 1.0, 1.0)[: len(numbers)], torch.stack(each).flatten()


def make_settings(objective: Objective, numbers: Iterable[Any], with_terms: bool) -> dict[str, Any]:
    """Return the scalar arguments of the op; ``numbers``: the values of PER_ROW_OPTIONS."""
    o = objective
    return {
        **dict(zip(PER_ROW_OPTIONS, numbers, strict=True)),
        "label_smoothing": o.label_smoothing,
        "ignore_index": o.ignore_index,
        "divergence": DIVERGENCES.index(o.divergence),
        "mix": 0.5 if o.mix is None else o.mix,
        "reduction": REDUCTIONS.index(o.reduction),
        "normalizer": 0.0 if isinstance(o.normalizer, Tensor) else o.normalizer or 0.0,
        "with_terms": with_terms,
    }


def prepare_call(objective: Objective, with_terms: bool) -> Callable[..., Tensor]:
    """Bind the options of the op ``loss``; return a function of student, teacher and labels.

    No option may be a tensor, and the kernels must implement every option.
    """
    numbers = [getattr(objective, name) for name in PER_ROW_OPTIONS]
    arguments = (None, *Arguments((), **make_settings(objective, numbers, with_terms)))
    labels = 1 + Arguments._fields.index("labels")
    return autograd.prepare_call("loss", arguments, [0, 1, labels])


def mix_teachers(arguments: Arguments, dtype: torch.dtype) -> Tensor:
    """Return the logits of the mixture if there are shares, else of the only teacher."""
    if not arguments.shares:
        return arguments.teachers[0]
    with torch.no_grad():
        return _mixture(list(arguments.teachers), *arguments[1:7], dtype is torch.float64)  # type: ignore[no-any-return]


def compute(call: Call, with_terms: bool) -> Tensor:
    """Compute the loss, or all terms stacked, by one pass of the kernels."""
    student, arguments = call.student, make_arguments(call, with_terms)
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    if call.inplace and needs_gradient and not torch.compiler.is_compiling():
        out = _InplaceLoss.apply(student, *arguments)  # type: ignore[no-untyped-call]
    else:
        out = _loss(student, *arguments)
    if call.objective.reduction == "none" and student.dim() != 2:
        out = out.reshape((*out.shape[:-1], *student.shape[:-1]))
    return out  # type: ignore[no-any-return]


class _InplaceLoss(torch.autograd.Function):
    """Compute the loss, and write the gradient over the student's logits in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *arguments: Any) -> Any:
        out, stats = _loss_into(student, student, *arguments, True)
        torch.autograd.graph.increment_version(student)
        ctx.with_terms = Arguments(*arguments).with_terms
        ctx.no_grads = (None,) * len(arguments)
        ctx.grad = student.detach()
        ctx.save_for_backward(stats)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (stats,) = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        if autograd.is_formula_needed(grad_output) or grad is None:
            raise RuntimeError(
                "inplace=True: the logits were overwritten by their gradient, which is "
                "available once. For second derivatives, batches of gradients or a second backward "
                "pass use inplace=False"
            )
        if ctx.with_terms:
            grad_output = grad_output[0]
        return scale_(grad, grad_output.contiguous(), stats), *ctx.no_grads


def scale_(grad: Tensor, factor: Tensor, stats: Tensor | None = None) -> Tensor:
    """Multiply ``grad`` by a 0-d ``factor`` in place, without synchronizing CUDA.

    ``stats``: the statistics from ``loss_into``, if that op wrote ``grad``.
    """
    out = grad
    if stats is None:
        if grad.device.type not in KERNEL_DEVICES or grad.numel() == 0 or not grad.is_contiguous():
            return grad.mul_(factor)
        out, stats = grad.view(1, -1), factor.new_zeros(STATS + 1)
    if factor.dtype is not accumulator(grad):  # a float64 teacher makes the loss float64
        return grad.mul_(factor)
    _loss_backward_(out, factor, stats, out, *Arguments((out,)), True)
    return grad


def _compute_by_operations(student: Tensor, *flat: Any) -> Tensor:
    a = Arguments(*flat)
    name = DIVERGENCES[a.divergence]
    if a.labels is None and reference.DIVERGENCES[name].needs_labels:
        raise ValueError(f"labels must be class indices for divergence={name!r}; got None")
    numbers: Any = (getattr(a, option) for option in PER_ROW_OPTIONS)
    if a.row_settings is not None:
        numbers = a.row_settings.reshape(4, *student.shape[:-1]).unbind(0)
    return reference.loss(
        student,
        mix_teachers(a, accumulator(student, *a.teachers)),
        a.labels,
        **dict(zip(PER_ROW_OPTIONS, numbers, strict=True)),
        label_smoothing=a.label_smoothing,
        ignore_index=a.ignore_index,
        reduction=REDUCTIONS[a.reduction],
        normalizer=a.normalizer or None if a.denominator is None else a.denominator,
        divergence=name,
        mix=a.mix if reference.DIVERGENCES[name].mix is not None else None,
    )


autograd.register("loss", strided=True, formula=_compute_by_operations)
