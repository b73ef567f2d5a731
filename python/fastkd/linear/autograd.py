"""The derivatives of :func:`fastkd.linear_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import reference
from fastkd._core import autograd, dense
from fastkd.linear import loops, products, row_loop
from fastkd.linear.row_loop import Call, Inputs


def compute(inputs: Inputs, call: Call) -> row_loop.Outputs:
    """Run the loop over chunks; while operations are traced, call it as a single op."""
    return (loops.compiled if autograd.is_traced() else loops.run)(inputs, call)


def plain(inputs: Inputs, call: Call) -> Tensor:
    """The same by differentiable operations on all rows at once: for second derivatives and
    function transforms."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        hidden, teacher_hidden = inputs.hidden, inputs.teacher_hidden
        labels = inputs.labels
        if labels is not None and not labels.is_floating_point():
            ignored = (labels == call.ignore_index).unsqueeze(1)  # they may hold anything
            hidden = hidden.masked_fill(ignored, 0)
        student = _plain_logits(
            hidden, inputs.weight, inputs.bias, call.dtype, call.student_scale, call.student_softcap
        )
        teacher = inputs.teacher_logits
        if teacher_hidden is not None:
            assert inputs.teacher_weight is not None
            teacher = _plain_logits(
                teacher_hidden,
                inputs.teacher_weight,
                inputs.teacher_bias,
                call.teacher_dtype,
                call.teacher_scale,
                call.teacher_softcap,
            )
        objective = row_loop.objective_of(inputs, call)
        if teacher is None:
            return row_loop.loss_of(student, None, inputs, objective, call, False)
        return reference.loss(student, teacher, inputs.labels, **objective._asdict())


def _plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    cap: float | None,
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), bias) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class LinearLoss(torch.autograd.Function):
    """The loop, whose forward pass has made the gradients already unless the reduction is
    "none"."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Any:
        """The loss; ``tensors`` are the fields of ``Inputs``."""
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        later = call.reduction == "none"
        now = call._replace(hidden_grad=False, weight_grad=False, bias_grad=False)
        out, *grads = compute(inputs, now if later else call)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        # Not saved like the others: backward scales them in place and gives them away.
        ctx.grads = None if later else tuple(grads)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """The gradients of hidden states, weight and bias."""
        call, inputs = ctx.call, Inputs(*ctx.saved_tensors)
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
            if grads is None:  # retain_graph=True: the first call gave them away
                _, *grads = compute(inputs, call)
            if row_loop.scales_late(call):
                assert inputs.denominator is not None
                divisor = inputs.denominator
                # The divisor may be 0 if every row is ignored; the gradient is then 0.
                scale = grad_output / divisor.where(divisor != 0, 1)
        wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
        finished = [
            _finished(grad, scale, of.dtype) if want and of is not None else None
            for grad, of, want in zip(grads, inputs, wanted, strict=False)
        ]
        return (None, *finished, *[None] * len(inputs[3:]))


def _autograd(inputs: list[Tensor | None], *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the loss. Autograd kernel of the op ``linear_loss``, for traced programs."""
    tensors, call = Inputs(*inputs), Call(*arguments)  # type: ignore[arg-type]
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


def _finished(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * grad in ``dtype``; ``grad`` is not used again."""
    if scale is None:
        return grad.to(dtype)
    if autograd.is_traced():
        return (grad * scale).to(dtype)
    if grad.dtype == dtype:
        return dense.scale_(grad, scale)
    return products.finished(grad, scale, dtype)


def _differentiable(inputs: Inputs, call: Call, grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of hidden states, weight and bias, differentiable in turn."""
    wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
    of = [t for t, want in zip(inputs, wanted, strict=False) if want and t is not None]
    with torch.enable_grad():
        grads = iter(torch.autograd.grad(plain(inputs, call), of, grad_output, create_graph=True))
    return [next(grads) if want else None for want in wanted]
