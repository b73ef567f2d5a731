"""Differentiate the loss of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import autograd, dense, topk
from fastkd._core.values import Head
from fastkd.linear import loops, products
from fastkd.linear.call import (
    Inputs,
    LinearCall,
    Outputs,
    defers_mean_division,
    make_call,
    objective_of,
)


def compute(inputs: Inputs, call: LinearCall) -> Outputs:
    """Run the loop over chunks; while operations are traced, call it as a single op."""
    return (loops.compiled if autograd.is_traced() else loops.run)(inputs, call)


def by_operations(inputs: Inputs, call: LinearCall) -> Tensor:
    """Compute the loss, or all terms, by differentiable operations on all rows at once.

    Second derivatives and function transforms need this.
    """
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        hidden, teacher = inputs.hidden, inputs.teacher_logits
        labels = inputs.labels
        if labels is not None and not labels.is_floating_point():
            ignored = (labels == call.ignore_index).unsqueeze(1)  # these rows may hold NaN
            hidden = hidden.masked_fill(ignored, 0)
        head = (hidden, inputs.weight, inputs.bias)
        student = _logits(head, call.dtype, call.student_softcap, call.student_scale)
        if inputs.teacher_hidden is not None:
            head = (inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias)  # type: ignore[assignment]
            teacher = _logits(head, call.teacher_dtype, call.teacher_softcap, call.teacher_scale)
        core = make_call(student, teacher, inputs, objective_of(inputs, call), call)
        if teacher is None:
            terms = topk.compute_by_operations(core)
        else:
            objective = core.objective._asdict()
            terms = reference.terms(student, teacher, inputs.labels, **objective)
        return torch.stack(terms) if call.with_terms else terms.loss


def _logits(
    head: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype,
    softcap: float | None,
    scale: float,
) -> Tensor:
    hidden, weight, bias = (None if x is None else x.to(dtype) for x in head)
    return Head(hidden, weight, bias, softcap, scale).logits()  # type: ignore[arg-type]


class LinearLoss(torch.autograd.Function):
    """The loss by a loop over chunks; forward computes the gradients unless reduction is "none"."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Tensor | None) -> Any:
        """Compute the loss or all terms; ``tensors`` are the fields of ``Inputs``."""
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        in_backward = call.reduction == "none"
        without = call._replace(hidden_grad=False, weight_grad=False, bias_grad=False)
        out, *grads = compute(inputs, without if in_backward else call)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        # Not saved by save_for_backward: backward scales the gradients in place and returns them.
        ctx.grads = None if in_backward else tuple(grads)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Compute the gradients of hidden states, weight and bias."""
        call, inputs = ctx.call, Inputs(*ctx.saved_tensors)
        if call.with_terms:  # only the loss, the first of the terms, has a gradient
            grad_output, call = grad_output[0], call._replace(with_terms=False)
        if autograd.needs_formula(grad_output):
            return (None, *_differentiable(inputs, call, grad_output), *[None] * len(inputs[3:]))
        scale: Tensor | None = grad_output
        if call.reduction == "none":
            inputs = inputs._replace(grad_rows=grad_output.contiguous())
            _, *grads = compute(inputs, call._replace(reduction="sum"))
            scale = None
        else:
            grads = ctx.grads
            if not autograd.is_traced():
                ctx.grads = None
            if grads is None:  # retain_graph=True: the first backward returned them
                _, *grads = compute(inputs, call)
            if defers_mean_division(call):
                assert inputs.denominator is not None
                divisor = inputs.denominator
                # The divisor may be 0 if every row is ignored; the gradient is then 0.
                scale = grad_output / divisor.where(divisor != 0, 1)
        wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
        scaled = [
            _scaled(grad, scale, leaf.dtype) if want and leaf is not None else None
            for grad, leaf, want in zip(grads, inputs, wanted, strict=False)
        ]
        return (None, *scaled, *[None] * len(inputs[3:]))


def _autograd(inputs: list[Tensor | None], *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the loss. Autograd kernel of the op ``linear_loss``, for traced programs."""
    tensors, call = Inputs(*inputs), LinearCall(*arguments)  # type: ignore[arg-type]
    needs_grad = [t is not None and t.requires_grad for t in tensors[:3]]
    if torch.is_grad_enabled() and any(needs_grad):
        hidden, weight, bias = needs_grad
        call = call._replace(hidden_grad=hidden, weight_grad=weight, bias_grad=bias)
        loss = LinearLoss.apply(call, *tensors)  # type: ignore[no-untyped-call]
        # LinearLoss returns the gradients to autograd, so the op's other results are empty.
        return (loss, *(loss.new_empty(0) for _ in needs_grad))
    with torch._C._AutoDispatchBelowAutograd():
        return loops.compiled(tensors, call)


loops.LIBRARY.impl("linear_loss", _autograd, "Autograd")


def _scaled(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return scale * grad in ``dtype``; the memory of ``grad`` may be overwritten."""
    if scale is None:
        return grad.to(dtype)
    if autograd.is_traced():
        return (grad * scale).to(dtype)
    if grad.dtype == dtype:
        return dense.scale_(grad, scale)
    return products.scale_and_round(grad, scale, dtype)


def _differentiable(inputs: Inputs, call: LinearCall, grad_output: Tensor) -> list[Tensor | None]:
    """Compute differentiable gradients of hidden states, weight and bias."""
    wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
    leaves = [t for t, want in zip(inputs, wanted, strict=False) if want and t is not None]
    with torch.enable_grad():
        loss = by_operations(inputs, call)
        grads = iter(torch.autograd.grad(loss, leaves, grad_output, create_graph=True))
    return [next(grads) if want else None for want in wanted]
