"""Differentiate the fused losses.

For each loss ``op`` of csrc/torch/library.cpp and topk.cpp, three more ops take its arguments:

- ``op_into`` writes the gradient in the forward pass, unless the reduction is "none";
- ``op_backward_`` scales or writes the gradient in the backward pass;
- ``op_gradient`` computes the gradient by differentiable operations.

csrc/torch/eager.cpp implements the same autograd in C++, which replaces this module's autograd if
eager.cpp was built with the installed version of torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd._core import native
from fastkd._core.shapes import REDUCTIONS

_NONE = REDUCTIONS.index("none")
_empty_gradient = torch.ops.fastkd.empty_gradient.default
_is_under_functorch = torch._C._are_functorch_transforms_active


def is_transformed() -> bool:
    """Return True under torch.func (grad, vmap, jvp, ...) and forward-mode differentiation."""
    return _is_under_functorch() or forward_ad._current_level >= 0


def is_batch(grad_output: Tensor) -> bool:
    """Return True for a batch of gradients (is_grads_batched=True), or if is_transformed()."""
    return torch._C._functorch.is_legacy_batchedtensor(grad_output) or is_transformed()


def is_formula_needed(grad_output: Tensor) -> bool:
    """Return True if a backward pass must consist of PyTorch operations, without kernels.

    ``create_graph=True`` needs differentiable operations. The kernels take no batch of gradients.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return is_batch(grad_output)


def is_traced() -> bool:
    """Return True while torch.compile or torch.export traces operations."""
    key = torch._C._TorchDispatchModeKey
    return torch.compiler.is_compiling() or any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (key.FAKE, key.PROXY, key.FUNCTIONAL)
    )


def is_writable(tensor: Tensor) -> bool:
    """Return True if the memory of ``tensor`` may be read and written directly.

    Return False while torch.compile traces, under a ``TorchDispatchMode``, and for an instance of a
    subclass of Tensor.
    """
    if torch.compiler.is_compiling():
        return False
    return type(tensor) is Tensor and torch._C._len_torch_dispatch_stack() == 0


class Ops(NamedTuple):
    """Hold the op of a loss, the ops of its gradient, and the layout of their arguments."""

    loss: Any
    loss_into: Any
    backward_: Any
    gradient: Any
    strided: bool
    """True if ``loss_into`` can write a gradient whose classes are not adjacent."""
    has_stats: bool
    """True if ``loss_into`` returns statistics that ``backward_`` takes."""
    tensors: tuple[int, ...]
    """Indices of tensors, and of lists of tensors, among the arguments after the student."""
    reduction: int
    """Index of ``reduction`` among the arguments after the student."""

    def compute(self, student: Tensor, *arguments: Any) -> Tensor:
        """Compute the loss, as the autograd kernel of ``loss`` if eager.cpp is not used."""
        if torch.is_grad_enabled() and student.requires_grad:
            return _FusedLoss.apply(student, self, arguments)  # type: ignore[no-any-return,no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return self.loss(student, *arguments)  # type: ignore[no-any-return]


_LOSSES: dict[str, Ops] = {}


def register(name: str, *, strided: bool, formula: Callable[..., Tensor]) -> None:
    """Make the op ``name`` differentiable; the op ``name_gradient`` differentiates ``formula``.

    ``formula``: a function that computes the loss by differentiable operations. ``strided``: see
    :class:`Ops`.
    """

    def differentiate(grad_output: Tensor, student: Tensor, *arguments: Any) -> Tensor:
        with torch.enable_grad():
            leaf = student if student.requires_grad else student.detach().requires_grad_()
            out = formula(leaf, *arguments).reshape(grad_output.shape)
            (gradient,) = torch.autograd.grad(out, leaf, grad_output, create_graph=True)
        return gradient

    suffixes = ("", "_into", "_backward_", "_gradient")
    ops = [getattr(torch.ops.fastkd, name + suffix).default for suffix in suffixes]
    loss, loss_into, backward_, gradient = ops
    arguments = loss._schema.arguments[1:]
    _LOSSES[name] = Ops(
        loss,
        loss_into,
        backward_,
        gradient,
        strided,
        len(loss_into._schema.returns) == 2,
        tuple(i for i, each in enumerate(arguments) if "Tensor" in str(each.type)),
        [each.name for each in arguments].index("reduction"),
    )
    _LIBRARY.impl(f"{name}_gradient", differentiate, "CompositeImplicitAutograd")
    if native.EAGER is None:
        _LIBRARY.impl(name, _LOSSES[name].compute, "Autograd")


_LIBRARY: Any = torch.library.Library("fastkd", "IMPL")  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def without_cpp() -> Iterator[None]:
    """Use this module's autograd in a ``with`` statement, even if eager.cpp is built; for tests."""
    library: Any = torch.library.Library("fastkd", "IMPL")  # type: ignore[no-untyped-call]
    eager, native.EAGER = native.EAGER, None
    for name, ops in _LOSSES.items():
        for key in ("AutogradCPU", "AutogradCUDA") if eager is not None else ():
            library.impl(name, ops.compute, key)
    try:
        yield
    finally:
        native.EAGER = eager
        library._destroy()
        for ops in _LOSSES.values():  # torch caches the kernels of traced calls
            ops.loss._dispatch_cache.clear()


def prepare_call(
    name: str, arguments: tuple[Any, ...], places: Sequence[int]
) -> Callable[..., Tensor]:
    """Bind the arguments of the op ``name``; return a function of the tensors at ``places``.

    ``arguments``: the arguments in the order of the op's schema, with None or an empty tuple at
    ``places``. ``places``: indices into ``arguments``, the student's first. The function puts a
    tensor into a list where the op takes a list.
    """
    ops, eager = _LOSSES[name], native.EAGER
    schema = ops.loss._schema.arguments
    lists = [isinstance(schema[place].type, torch.ListType) for place in places]

    def call(*tensors: Tensor | None) -> Tensor:
        complete = list(arguments)
        for place, tensor, in_list in zip(places, tensors, lists, strict=True):
            complete[place] = (tensor,) if in_list else tensor
        student, *others = complete
        if torch.is_grad_enabled() and student.requires_grad:
            # ops.loss() would flatten the arguments in the dispatcher. For 8 x 10 logits on one CPU
            # thread, loss and backward would take 4.7 times the duration of
            # student.sum().backward(), instead of 2.9 times (2026-12-01).
            return _FusedLoss.apply(student, ops, others)  # type: ignore[no-any-return,no-untyped-call]
        return ops.loss(student, *others)  # type: ignore[no-any-return]

    return call if eager is None else eager.PreparedCall(name, arguments, places)


class _FusedLoss(torch.autograd.Function):
    """Compute a loss; the forward pass writes the gradient, unless the reduction is "none"."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, ops: Ops, arguments: Sequence[Any]) -> Any:
        grad = stats = None
        if arguments[ops.reduction] != _NONE:
            grad = _empty_gradient(student, ops.strided)
        if ops.has_stats:
            out, stats = ops.loss_into(grad, student, *arguments, True)
        elif grad is not None:
            out = ops.loss_into(grad, student, *arguments)
        else:
            out = ops.loss(student, *arguments)
        # save_for_backward() forbids changes, and the first backward pass scales grad in place.
        ctx.grad = grad
        saved: list[Tensor | None] = [student, stats]
        numbers = list(arguments)
        for place in ops.tensors:
            value = arguments[place]
            if isinstance(value, (list, tuple)):
                saved += value
                numbers[place] = len(value)
            else:
                saved.append(value)
        ctx.ops, ctx.numbers = ops, numbers
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        student, stats, *tensors = ctx.saved_tensors
        ops, grad, may_write = ctx.ops, ctx.grad, is_writable(grad_output)
        # With terms, only the loss, the first term, has a gradient. ``with_terms`` is the last
        # argument of each loss.
        if ctx.numbers[-1]:
            grad_output = grad_output[0]
        uses_formula = is_formula_needed(grad_output)
        if grad is not None and not uses_formula:
            if may_write:
                ctx.grad = None
                if grad_output.device.type == "cpu" and grad_output.item() == 1.0:
                    return grad, None, None
            elif student.dtype is not torch.float16:
                return (grad * grad_output).to(student.dtype), None, None
        arguments = list(ctx.numbers)
        for place in ops.tensors:
            value = arguments[place]
            count = value if isinstance(value, int) else 1
            arguments[place] = tensors[:count] if isinstance(value, int) else tensors[0]
            tensors = tensors[count:]
        if uses_formula:
            return _compute_gradient(ops, student, arguments, grad_output), None, None
        # Unless may_write, a float16 gradient is recomputed: grad_output may be a loss scale, which
        # cannot restore numbers that underflowed in grad. With the reduction "none", and in a
        # second backward pass (retain_graph=True), grad is None.
        filled = may_write and grad is not None
        grad = grad if filled else _empty_gradient(student, ops.strided)
        statistics = (stats,) if ops.has_stats else ()
        ops.backward_(grad, grad_output.contiguous(), *statistics, student, *arguments, filled)
        return grad, None, None


def _compute_gradient(
    ops: Ops, student: Tensor, arguments: Sequence[Any], grad_output: Tensor
) -> Tensor:
    """Return the gradient for ``grad_output``, which may be a batch, from the op ``gradient``."""
    if not is_batch(grad_output):
        return ops.gradient(grad_output, student, *arguments)  # type: ignore[no-any-return]
    one = torch.ones(grad_output.shape, dtype=grad_output.dtype, device=grad_output.device)
    per_row = arguments[ops.reduction] == _NONE
    factor = grad_output.reshape(*student.shape[:-1], 1) if per_row else grad_output
    gradient: Tensor = ops.gradient(one, student, *arguments)
    return (gradient * factor).to(student.dtype)
