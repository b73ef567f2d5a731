"""Run the op of the dense loss, in place if asked to, and define its differentiable gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import autograd
from fastkd._core.autograd import needs_formula
from fastkd._core.mixture import Mixing, mix_with_kernel
from fastkd._core.native import _C
from fastkd._core.shapes import REDUCTIONS, STATS, Settings, accumulator

DIVERGENCES: tuple[str, ...] = _C.divergences
KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if _C.cuda_architectures else {"cpu", "meta"})

_loss = torch.ops.fastkd.loss.default
_loss_into = torch.ops.fastkd.loss_into.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default

# The mixture arguments of the ops for a single teacher, given as logits.
NO_MIXTURE = (None, (), False, 0, 1.0, 1.0)


class Arguments(NamedTuple):
    """The arguments of the op ``loss`` after the student (csrc/torch/library.cpp)."""

    teachers: tuple[Tensor, ...]
    row_temperatures: Tensor | None  # (2, rows), replaces the two temperatures in ``mixing``
    mixing: Mixing | None  # None for a single teacher, given as logits
    labels: Tensor | None
    row_settings: Tensor | None
    denominator: Tensor | None
    settings: Settings

    def flat(self) -> tuple[Any, ...]:
        """Return the arguments in the order of the op's schema."""
        mixture = NO_MIXTURE if self.mixing is None else (self.row_temperatures, *self.mixing)
        rows = (self.labels, self.row_settings, self.denominator)
        return (self.teachers, *mixture, *rows, *self.settings)

    @classmethod
    def from_flat(cls, flat: tuple[Any, ...]) -> Arguments:
        """Make the arguments from the result of :meth:`flat`."""
        teachers, row_temperatures, *rest = flat
        mixing = Mixing(*rest[:5]) if rest[0] else None
        labels, row_settings, denominator = rest[5:8]
        settings = Settings(*rest[8:])
        teachers = tuple(teachers)
        return cls(teachers, row_temperatures, mixing, labels, row_settings, denominator, settings)


def loss(student: Tensor, call: Arguments, inplace: bool) -> Tensor:
    """Run the op ``loss``, in place if ``inplace``.

    The result is 0-d, ``(rows,)``, or, with terms, has the terms as its first dimension.
    """
    differentiated = torch.is_grad_enabled() and student.requires_grad
    if inplace and differentiated and not torch.compiler.is_compiling():
        out = _InplaceLoss.apply(student, *call.flat())  # type: ignore[no-untyped-call]
    else:
        out = _loss(student, *call.flat())
    return out  # type: ignore[no-any-return]


class _InplaceLoss(torch.autograd.Function):
    """The loss whose forward pass writes the gradient over the student's logits."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *flat: Any) -> Any:
        out, stats = _loss_into(student, student, *flat, True)
        torch.autograd.graph.increment_version(student)
        ctx.with_terms = Arguments.from_flat(flat).settings.with_terms
        ctx.no_grads = (None,) * len(flat)  # for the arguments after the student
        ctx.grad = student.detach()
        ctx.save_for_backward(stats)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (stats,) = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        if needs_formula(grad_output) or grad is None:
            raise RuntimeError(
                "inplace=True: the logits were overwritten by their gradient, which can be had "
                "once. For second derivatives, batches of gradients or a second backward pass use "
                "inplace=False"
            )
        if ctx.with_terms:
            grad_output = grad_output[0]
        _scale_(grad, grad_output.contiguous(), stats)
        return grad, *ctx.no_grads


def _scale_(grad: Tensor, factor: Tensor, stats: Tensor) -> None:
    """Multiply ``grad`` by ``factor`` in place; on CUDA a factor of 1 costs next to nothing."""
    if factor.dtype is not accumulator(grad):  # float64 because of a float64 teacher
        grad.mul_(factor)
        return
    settings = Settings(1.0, 1.0, 0.0, 1.0, 0.0, -100, 0, 0.5, REDUCTIONS.index("sum"), 0.0, False)
    call = Arguments((grad,), None, None, None, None, None, settings)
    _loss_backward_(grad, factor, stats, grad, *call.flat(), True)


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``grad`` by ``factor`` in place, without synchronizing; a factor of 1 is cheap.

    ``factor``: 0-d, float32, or float64 for a float64 ``grad``.
    """
    if grad.device.type not in KERNEL_DEVICES or grad.numel() == 0 or not grad.is_contiguous():
        return grad.mul_(factor)
    _scale_(grad.view(1, -1), factor, factor.new_zeros(STATS + 1))
    return grad


def _gradient(grad_output: Tensor, student: Tensor, *flat: Any) -> Tensor:
    """Compute grad_output times the gradient by differentiable operations."""
    call = Arguments.from_flat(flat)
    (teacher, *_), settings = call.teachers, call.settings._replace(with_terms=False)
    if call.mixing is not None:
        acc = accumulator(student, *call.teachers)
        teacher = mix_with_kernel(call.teachers, call.mixing, call.row_temperatures, acc)
    rows = (call.labels, call.row_settings, call.denominator)
    with torch.enable_grad():
        leaf = student if student.requires_grad else student.detach().requires_grad_()
        out = by_operations(leaf, teacher, *rows, settings)
        (gradient,) = torch.autograd.grad(out, leaf, grad_output, create_graph=True)
    return gradient


autograd.register("loss", strided=True, gradient=_gradient)


def by_operations(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Compute the result of the op ``loss`` by differentiable PyTorch operations."""
    numbers: Any = settings[:4]
    if row_settings is not None:
        numbers = row_settings.reshape(4, *student.shape[:-1]).unbind(0)
    temperature, teacher_temperature, hard_weight, soft_weight = numbers
    name = DIVERGENCES[settings.divergence]
    if labels is None and reference.DIVERGENCES[name].needs_labels:
        raise ValueError(f"labels must be class indices for divergence={name!r}; got None")
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
