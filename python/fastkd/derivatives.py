"""The native ops, and their derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd.mixture import Mixing, mixed
from fastkd.native import _C
from fastkd.shapes import REDUCTIONS, STATS, Settings, accumulator, empty_gradient

DIVERGENCES: tuple[str, ...] = _C.divergences
KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if _C.cuda_architectures else {"cpu", "meta"})

_loss = torch.ops.fastkd.loss.default
_loss_ = torch.ops.fastkd.loss_.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default
_ensemble_loss_into = torch.ops.fastkd.ensemble_loss_into.default
_ensemble_loss_backward_ = torch.ops.fastkd.ensemble_loss_backward_.default


def loss(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    row_temperatures: Tensor | None,
    settings: Settings,
    mixing: Mixing | None,
    inplace: bool,
) -> Tensor:
    """Runs an op; results are shaped as csrc/torch/library.cpp says."""
    arguments = (labels, row_settings, denominator, row_temperatures, settings, mixing)
    if not (torch.is_grad_enabled() and student.requires_grad):
        return _forward(student, teachers, *arguments, False)[0]
    if inplace and not torch.compiler.is_compiling():
        out = _InplaceLoss.apply(student, *arguments, *teachers)  # type: ignore[no-untyped-call]
    else:
        out = _Loss.apply(student, *arguments, *teachers)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def _forward(
    student: Tensor,
    teachers: tuple[Tensor, ...],
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    row_temperatures: Tensor | None,
    settings: Settings,
    mixing: Mixing | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The result, the gradient if it is written along with it, and the statistics of the rows."""
    options = (labels, row_settings, denominator, *settings)
    filled = with_grad and REDUCTIONS[settings.reduction] != "none"
    if mixing is None:
        out, grad, stats = _loss(student, teachers[0], *options, with_grad)
        return out, grad if filled else None, stats
    grad = empty_gradient(student) if filled else None
    out, stats = _ensemble_loss_into(
        grad, student, list(teachers), row_temperatures, *mixing, *options, with_grad
    )
    return out, grad, stats


class _Loss(torch.autograd.Function):
    """The op, whose forward pass has written the gradient already unless the reduction is
    "none"."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        labels: Tensor | None,
        row_settings: Tensor | None,
        denominator: Tensor | None,
        row_temperatures: Tensor | None,
        settings: Settings,
        mixing: Mixing | None,
        *teachers: Tensor,
    ) -> Any:
        options = (labels, row_settings, denominator, row_temperatures)
        # The gradient is not saved like the others: backward scales it in place and gives it away.
        out, ctx.grad, stats = _forward(student, teachers, *options, settings, mixing, True)
        ctx.settings, ctx.mixing = settings, mixing
        ctx.save_for_backward(student, stats, *options, *teachers)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        student, stats, *options = ctx.saved_tensors
        labels, row_settings, denominator, row_temperatures, *teachers = options
        settings, mixing = ctx.settings, ctx.mixing
        others = (None,) * (6 + len(teachers))
        if torch.is_grad_enabled():  # create_graph=True: this will be differentiated in turn
            teacher = teachers[0]
            if mixing is not None:
                acc = accumulator(student, *teachers)
                teacher = mixed(tuple(teachers), mixing, row_temperatures, acc)
            grad = differentiable_gradient(
                student, teacher, labels, row_settings, denominator, settings, grad_output
            )
            return grad, *others
        if settings.with_terms:
            grad_output = grad_output[0]  # the other terms carry no gradient
        grad, ctx.grad = ctx.grad, None
        compiling = torch.compiler.is_compiling()
        if compiling and grad is not None and student.dtype is not torch.float16:
            return (grad * grad_output).to(student.dtype), *others
        filled = grad is not None and not compiling
        if not filled:
            # In fp16 a scale cannot bring back what has underflowed, and a compiled graph cannot
            # tell beforehand whether there is one.
            # With retain_graph=True the first call gave its buffer away; it may not be scaled
            # again.
            grad = empty_gradient(student)
        results = (grad, grad_output.contiguous(), stats, student)
        numbers = (labels, row_settings, *settings[:8], filled)
        if mixing is None:
            _loss_backward_(*results, *teachers, *numbers)
        else:
            _ensemble_loss_backward_(*results, teachers, row_temperatures, *mixing, *numbers)
        return grad, *others


class _InplaceLoss(torch.autograd.Function):
    """The op that writes the gradient over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        labels: Tensor | None,
        row_settings: Tensor | None,
        denominator: Tensor | None,
        row_temperatures: Tensor | None,
        settings: Settings,
        mixing: Mixing | None,
        *teachers: Tensor,
    ) -> Any:
        options = (labels, row_settings, denominator, *settings)
        if mixing is None:
            out, stats = _loss_(student, *teachers, *options)
        else:
            mixture = (list(teachers), row_temperatures, *mixing)
            out, stats = _ensemble_loss_into(student, student, *mixture, *options, True)
        torch.autograd.graph.increment_version(student)
        ctx.settings, ctx.others = settings, (None,) * (6 + len(teachers))
        ctx.grad = student.detach()
        ctx.save_for_backward(stats, *(teachers if mixing is None else ()))
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        stats, *teachers = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        if torch.is_grad_enabled() or grad is None:
            raise RuntimeError(
                "inplace=True: the logits were overwritten by their gradient, which can be had "
                "once. For second derivatives or a second backward pass use inplace=False"
            )
        if ctx.settings.with_terms:
            grad_output = grad_output[0]
        _scale_(grad, grad_output.contiguous(), stats, *teachers)
        return grad, *ctx.others


def _scale_(grad: Tensor, factor: Tensor, stats: Tensor, teacher: Tensor | None = None) -> None:
    """What backward does to a gradient in the place of its logits. The teacher is not read: its
    dtype tells the factor's."""
    numbers = (1.0, 1.0, 0.0, 1.0, 0.0, -100, 0, 0.5)
    teacher = grad if teacher is None else teacher
    _loss_backward_(grad, factor, stats, grad, teacher, None, None, *numbers, True)


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad *= factor, which the device looks at itself: a factor of 1 costs next to nothing.

    ``factor``: 0-d, float32, or float64 for a float64 ``grad``.
    """
    if grad.device.type not in KERNEL_DEVICES or grad.numel() == 0 or not grad.is_contiguous():
        return grad.mul_(factor)
    _scale_(grad.view(1, -1), factor, factor.new_zeros(STATS + 1))
    return grad


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
