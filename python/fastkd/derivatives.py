"""The native ops, and their derivatives."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Arguments(NamedTuple):
    """What an op takes beside the student."""

    labels: Tensor | None
    row_settings: Tensor | None
    denominator: Tensor | None
    row_temperatures: Tensor | None  # of the teachers and their mixture
    settings: Settings
    mixing: Mixing | None  # None: the one teacher as it is
    teachers: tuple[Tensor, ...]

    def flat(self) -> tuple[Any, ...]:
        """As autograd takes it, which looks for tensors at the first level alone."""
        return *self[:-1], *self.teachers

    @classmethod
    def of_flat(cls, flat: tuple[Any, ...]) -> Arguments:
        """What ``flat`` was made of."""
        return cls._make((*flat[:6], flat[6:]))

    def options(self) -> tuple[Any, ...]:
        """Of the forward ops, after the teachers."""
        return self.labels, self.row_settings, self.denominator, *self.settings

    def mixture(self) -> tuple[Any, ...]:
        """Of the ops of ensembles, in the place of a teacher."""
        assert self.mixing is not None
        return list(self.teachers), self.row_temperatures, *self.mixing


def is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def wants_formula(grad_output: Tensor) -> bool:
    """Whether a backward pass is to be made of PyTorch operations, since it will be differentiated
    in turn (create_graph=True), or its gradient is a batch of them (is_grads_batched=True)."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad_output)


def loss(student: Tensor, call: Arguments, inplace: bool) -> Tensor:
    """Runs an op; results are shaped as csrc/torch/library.cpp says."""
    if not (torch.is_grad_enabled() and student.requires_grad):
        return _forward(student, call, False)[0]
    if inplace and not torch.compiler.is_compiling():
        out = _InplaceLoss.apply(student, *call.flat())  # type: ignore[no-untyped-call]
    else:
        out = _Loss.apply(student, *call.flat())  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def _forward(
    student: Tensor, call: Arguments, with_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The result, the gradient if it is written along with it, and the statistics of the rows."""
    filled = with_grad and REDUCTIONS[call.settings.reduction] != "none"
    if call.mixing is None:
        out, grad, stats = _loss(student, *call.teachers, *call.options(), with_grad)
        return out, grad if filled else None, stats
    grad = empty_gradient(student) if filled else None
    out, stats = _ensemble_loss_into(grad, student, *call.mixture(), *call.options(), with_grad)
    return out, grad, stats


class _Loss(torch.autograd.Function):
    """The op, whose forward pass has written the gradient already unless the reduction is
    "none"."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *flat: Any) -> Any:
        call = Arguments.of_flat(flat)
        # The gradient is not saved like the others: backward scales it in place and gives it away.
        out, ctx.grad, stats = _forward(student, call, True)
        ctx.settings, ctx.mixing = call.settings, call.mixing
        ctx.save_for_backward(student, stats, *call[:4], *call.teachers)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        student, stats, *tensors = ctx.saved_tensors
        settings = ctx.settings
        call = Arguments.of_flat((*tensors[:4], settings, ctx.mixing, *tensors[4:]))
        others = (None,) * len(call.flat())
        if wants_formula(grad_output):
            (teacher, *_), acc = call.teachers, accumulator(student, *call.teachers)
            if call.mixing is not None:
                teacher = mixed(call.teachers, call.mixing, call.row_temperatures, acc)
            grad = differentiable_gradient(student, teacher, *call[:3], settings, grad_output)
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
        numbers = (call.labels, call.row_settings, *settings[:8], filled)
        if call.mixing is None:
            _loss_backward_(*results, *call.teachers, *numbers)
        else:
            _ensemble_loss_backward_(*results, *call.mixture(), *numbers)
        return grad, *others


class _InplaceLoss(torch.autograd.Function):
    """The op that writes the gradient over the student's logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *flat: Any) -> Any:
        call = Arguments.of_flat(flat)
        if call.mixing is None:
            out, stats = _loss_(student, *call.teachers, *call.options())
        else:
            given = (*call.mixture(), *call.options())
            out, stats = _ensemble_loss_into(student, student, *given, True)
        torch.autograd.graph.increment_version(student)
        ctx.settings, ctx.others = call.settings, (None,) * len(flat)
        ctx.grad = student.detach()
        ctx.save_for_backward(stats, *(call.teachers if call.mixing is None else ()))
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        stats, *teachers = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        if wants_formula(grad_output) or grad is None:
            raise RuntimeError(
                "inplace=True: the logits were overwritten by their gradient, which can be had "
                "once. For second derivatives, batches of gradients or a second backward pass use "
                "inplace=False"
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
    with torch.enable_grad():
        out = by_operations(student, teacher, labels, row_settings, denominator, settings)
        (gradient,) = torch.autograd.grad(out, student, grad_output, create_graph=True)
    return gradient


def by_operations(
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
