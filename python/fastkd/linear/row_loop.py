"""The loop over chunks of rows, which computes the gradients in the forward pass.

Each chunk has four steps: write the logits of both heads to buffers that every chunk reuses;
compute the loss, and write its gradient over the student's logits; multiply that gradient by the
weight, which gives rows of the gradient of the hidden states; and add its product with the hidden
states to the gradient of the weight. Only counting the rows that are not ignored waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._core import dispatch
from fastkd.linear import products
from fastkd.linear.call import (
    Inputs,
    LinearCall,
    Outputs,
    defers_mean_division,
    empty_outputs,
    make_call,
    objective_of,
    power_of,
    select_rows,
    soft_cap_,
)


class _Loop:
    """The buffers of a call, and the steps of the loop."""

    def __init__(
        self, inputs: Inputs, call: LinearCall, out: Outputs, counted: Tensor | None
    ) -> None:
        self.inputs, self.call, self.out = inputs, call, out
        self.weight = inputs.weight.to(call.dtype)
        self.bias = None if inputs.bias is None else inputs.bias.to(call.dtype)
        shape = (call.chunk, inputs.weight.shape[0])
        device = inputs.hidden.device
        self.logits: Tensor | None = torch.empty(shape, dtype=call.dtype, device=device)
        self.slope = None
        if call.student_softcap is not None and call.grads:
            self.slope = torch.empty(shape, dtype=call.dtype, device=device)
        self.teacher_logits = self.teacher_weight = self.teacher_bias = None
        if inputs.teacher_weight is not None:
            self.teacher_weight = inputs.teacher_weight.to(call.teacher_dtype)
            if inputs.teacher_bias is not None:
                self.teacher_bias = inputs.teacher_bias.to(call.teacher_dtype)
            self.teacher_logits = torch.empty(shape, dtype=call.teacher_dtype, device=device)
        factors, self.power = inputs.grad_rows, None
        if factors is not None:
            self.power = power_of(factors if counted is None else factors[counted])

    def student(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the student's logits, and the derivative of the soft cap."""
        assert self.logits is not None
        call, rows = self.call, hidden.shape[0]
        logits = products.logits_(
            self.logits[:rows], hidden, self.weight, self.bias, call.student_scale
        )
        slope = None if self.slope is None else self.slope[:rows]
        if call.student_softcap is not None:
            soft_cap_(logits, call.student_softcap, slope)
        return logits, slope

    def teacher(self, part: Inputs) -> Tensor | None:
        """Compute the teacher's logits; return None for a sparse teacher."""
        if part.teacher_hidden is None:
            return part.teacher_logits
        assert self.teacher_weight is not None and self.teacher_logits is not None
        call = self.call
        logits = products.logits_(
            self.teacher_logits[: part.hidden.shape[0]],
            part.teacher_hidden.to(call.teacher_dtype),
            self.teacher_weight,
            self.teacher_bias,
            call.teacher_scale,
        )
        if call.teacher_softcap is not None:
            soft_cap_(logits, call.teacher_softcap, None)
        return logits

    def loss(self, logits: Tensor, part: Inputs) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of a chunk, or its terms, and the gradient.

        The gradient is in the memory of the logits if a kernel can write it there.
        """
        objective, teacher = objective_of(part, self.call), self.teacher(part)
        if defers_mean_division(self.call):
            objective = objective._replace(reduction="sum", normalizer=None)
        call = make_call(logits, teacher, part, objective, self.call)
        if not self.call.grads:
            return dispatch.compute(call, self.call.with_terms), None
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            inplace = teacher is not None and dispatch.is_fused(logits, part.labels, objective)
            call = call._replace(student=leaf.view_as(leaf), inplace=inplace)
            value = dispatch.compute(call, self.call.with_terms)
            loss = value[0] if self.call.with_terms else value
        (grad,) = torch.autograd.grad(loss, leaf)
        return value.detach(), grad

    def drop_logits(self) -> None:
        """Free the buffers, except the one that holds the gradient."""
        self.logits = self.teacher_logits = None

    def add_gradients(self, grad: Tensor, part: Inputs, rows: slice | Tensor, first: bool) -> None:
        """Add a chunk's part to the gradients of hidden states, weight and bias."""
        call, out, scale = self.call, self.out, self.call.student_scale
        factor = part.grad_rows
        if call.hidden_grad:
            is_direct = isinstance(rows, slice) and out.hidden.dtype == grad.dtype
            rows_grad = (
                out.hidden[rows] if is_direct else torch.empty_like(part.hidden, dtype=grad.dtype)
            )
            products.hidden_gradient_(rows_grad, grad, self.weight, scale)
            if factor is not None:
                rows_grad.mul_(factor.unsqueeze(1))
            if not is_direct:
                out.hidden[rows] = rows_grad.to(out.hidden.dtype)
        if factor is not None:
            assert self.power is not None
            factor = (factor / self.power).to(call.dtype)
        if call.weight_grad:
            hidden = part.hidden.to(call.dtype)
            if factor is not None:
                hidden = hidden * factor.unsqueeze(1)
            products.add_product_(out.weight, grad.t(), hidden, scale, first)
        if call.bias_grad:
            factor = grad.new_ones(len(grad)) if factor is None else factor
            products.add_product_(
                out.bias.unsqueeze(1), grad.t(), factor.unsqueeze(1), scale, first
            )


def run(inputs: Inputs, call: LinearCall, counted: Tensor | None) -> Outputs:
    """Compute the loss of at least one row that counts, and its gradients for a grad_output of 1.

    With ``defers_mean_division()`` the gradients lack the division by the denominator.
    """
    out = empty_outputs(inputs, call)
    rows = inputs.hidden.shape[0] if counted is None else counted.numel()
    if counted is not None:
        out.hidden.zero_()
    if call.reduction != "none" or counted is not None:
        out.loss.zero_()
    chunk = -(-rows // -(-rows // call.chunk))  # equal chunks of the rows that are not ignored
    loop = _Loop(inputs, call._replace(chunk=chunk), out, counted)
    for start in range(0, rows, chunk):
        index: slice | Tensor = slice(start, min(rows, start + chunk))
        if counted is not None:
            index = counted[index]
        part = inputs._replace(**select_rows(inputs, index))
        logits, slope = loop.student(part.hidden.to(call.dtype))
        value, grad = loop.loss(logits, part)
        del logits
        if call.reduction == "none":
            out.loss[..., index] = value
        else:
            out.loss.add_(value)
        if grad is not None:
            if chunk == rows:
                loop.drop_logits()
            if slope is not None:
                grad.mul_(slope)
            loop.add_gradients(grad, part, index, start == 0)
            del grad  # before the next chunk allocates one, if it is not in the logits' buffer
    if loop.power is not None:
        out.weight.mul_(loop.power)
        out.bias.mul_(loop.power)
    if defers_mean_division(call) and inputs.denominator is not None:
        out.loss.div_(inputs.denominator)
    return out
