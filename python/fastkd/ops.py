"""The native ops: loading them, their shapes for tracing, and their derivatives.

``apply`` is the one way in. It runs the fused kernel where there is one, and
:mod:`fastkd.reference` under function transforms and on devices without kernels.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference

try:
    from fastkd import _C
except ImportError as error:  # pragma: no cover - needs a broken installation
    raise ImportError(
        f"fastkd's native library could not be loaded ({error}). It needs torch >= 2.10 (this is "
        f"{torch.__version__}); if it was built for another Python, reinstall it."
    ) from error


def _load_eager() -> Any:
    """The optional fast way in (csrc/torch/eager.cpp), if it was built with exactly this torch."""
    try:
        from fastkd import _eager
    except ImportError:
        return None
    return _eager if _eager.torch_version == torch.__version__ else None


EAGER = _load_eager()
REDUCTIONS = ("none", "sum", "mean")
DIVERGENCES: tuple[str, ...] = _C.divergences
CUDA_KERNELS = bool(_C.cuda_architectures)
_KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if CUDA_KERNELS else {"cpu", "meta"})
_warned: set[str] = set()
_TERMS = len(reference.Terms._fields)
_STATS = 6

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


def _acc(student: Tensor, teacher: Tensor) -> torch.dtype:
    double = student.dtype == torch.float64 or teacher.dtype == torch.float64
    return torch.float64 if double else torch.float32


def _fake_out(student: Tensor, teacher: Tensor, reduction: int, with_terms: bool) -> Tensor:
    shape = [_TERMS] if with_terms else []
    if REDUCTIONS[reduction] == "none":
        shape.append(student.numel() // student.shape[-1])
    return student.new_empty(shape, dtype=_acc(student, teacher))


def _fake_stats(student: Tensor, teacher: Tensor) -> Tensor:
    rows = student.numel() // student.shape[-1]
    return student.new_empty([_STATS * rows + 1], dtype=_acc(student, teacher))


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
    grad = student.new_empty(student.shape) if filled else nothing
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
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
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


# ---- the way in


def apply(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
    inplace: bool,
) -> Tensor:
    """Runs the op on checked arguments; results are shaped as csrc/torch/library.cpp says."""
    if student.device.type not in _KERNEL_DEVICES:
        _warn_once(student.device.type)
        return _reference(student, teacher, labels, row_settings, denominator, settings)
    if _is_transformed():
        return _reference(student, teacher, labels, row_settings, denominator, settings)
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
    temperature: float | Tensor = settings.temperature
    if row_settings is not None:
        temperature = row_settings.reshape(student.shape[:-1])
    normalizer: float | Tensor | None = (
        denominator if denominator is not None else settings.normalizer or None
    )
    terms = reference.terms(
        student,
        teacher,
        labels,
        temperature=temperature,
        hard_weight=settings.hard_weight,
        soft_weight=settings.soft_weight,
        label_smoothing=settings.label_smoothing,
        ignore_index=settings.ignore_index,
        reduction=REDUCTIONS[settings.reduction],
        normalizer=normalizer,
        divergence=DIVERGENCES[settings.divergence],
    )
    if REDUCTIONS[settings.reduction] == "none":
        terms = reference.Terms(*(term.flatten() for term in terms))
    return torch.stack(terms) if settings.with_terms else terms.loss
