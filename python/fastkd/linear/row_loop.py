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
from fastkd._core.values import Head
from fastkd.linear import products
from fastkd.linear.call import (
    Inputs,
    LinearCall,
    Outputs,
    add_gradients,
    defers_mean_division,
    empty_outputs,
    make_call,
    make_heads,
    objective_of,
    power_of,
    select_rows,
)


def run(inputs: Inputs, call: LinearCall, counted: Tensor | None) -> Outputs:
    """Compute the loss of at least one row that counts, and its gradients for a grad_output of 1.

    With ``defers_mean_division()`` the gradients lack the division by the denominator.
    """
    out = empty_outputs(inputs, call)
    rows = inputs.hidden.shape[0] if counted is None else counted.numel()
    if counted is not None:
        out.hidden.zero_()
    out.loss.zero_()
    chunk = -(-rows // -(-rows // call.chunk))  # equal chunks of the rows that are not ignored
    student, teacher = make_heads(inputs, call)
    student, buffer = _prepare(student, call.dtype, chunk)
    slope, teacher_buffer = None, buffer
    if teacher is not None:
        teacher, teacher_buffer = _prepare(teacher, call.teacher_dtype, chunk)
    if call.student_softcap is not None and call.grads:
        slope = torch.empty_like(buffer)
    power, factors = None, inputs.grad_rows
    if factors is not None:
        power = power_of(factors if counted is None else factors[counted])
    for start in range(0, rows, chunk):
        index: slice | Tensor = slice(start, min(rows, start + chunk))
        if counted is not None:
            index = counted[index]
        part = inputs._replace(**select_rows(inputs, index))
        size, hidden = len(part.hidden), part.hidden.to(call.dtype)
        part_slope = None if slope is None else slope[:size]
        logits = products.logits_(buffer[:size], student._replace(hidden=hidden), part_slope)
        teacher_logits = part.teacher_logits
        if teacher is not None and part.teacher_hidden is not None:
            head = teacher._replace(hidden=part.teacher_hidden)
            teacher_logits = products.logits_(teacher_buffer[:size], head)
        value, grad = _compute_loss(logits, teacher_logits, part, call)
        if call.reduction == "none":
            out.loss[..., index] = value
        else:
            out.loss.add_(value)
        if grad is None:
            continue
        del logits, teacher_logits
        if chunk == rows:  # free the buffers, except the one that holds the gradient
            del buffer, teacher_buffer
        if part_slope is not None:
            grad.mul_(part_slope)
        factor = part.grad_rows
        if call.hidden_grad:
            is_direct = isinstance(index, slice) and out.hidden.dtype == grad.dtype
            rows_grad = out.hidden[index] if is_direct else torch.empty_like(hidden)
            products.hidden_gradient_(rows_grad, grad, student.weight, call.student_scale)
            if factor is not None:
                rows_grad.mul_(factor.unsqueeze(1))
            if not is_direct:
                out.hidden[index] = rows_grad.to(out.hidden.dtype)
        add_gradients(out, call, grad, hidden, factor, power, slice(None), start == 0)
        del grad  # before the next chunk allocates one, if it is not in the logits' buffer
    if power is not None:
        out.weight.mul_(power)
        out.bias.mul_(power)
    if defers_mean_division(call) and inputs.denominator is not None:
        out.loss.div_(inputs.denominator)
    return out


def _prepare(head: Head, dtype: torch.dtype, rows: int) -> tuple[Head, Tensor]:
    """Cast the parameters of a head, and allocate the logits of some rows."""
    bias = None if head.bias is None else head.bias.to(dtype)
    head = head._replace(weight=head.weight.to(dtype), bias=bias)
    return head, head.weight.new_empty((rows, len(head.weight)))


def _compute_loss(
    logits: Tensor, teacher: Tensor | None, part: Inputs, call: LinearCall
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of a chunk, or its terms, and the gradient.

    The gradient is in the memory of the logits if a kernel can write it there.
    """
    objective = objective_of(part, call)
    if defers_mean_division(call):
        objective = objective._replace(reduction="sum", normalizer=None)
    core = make_call(logits, teacher, part, objective, call)
    if not call.grads:
        return dispatch.compute(core, call.with_terms), None
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        inplace = teacher is not None and dispatch.is_fused(logits, part.labels, objective)
        core = core._replace(student=leaf.view_as(leaf), inplace=inplace)
        value = dispatch.compute(core, call.with_terms)
        loss = value[0] if call.with_terms else value
    (grad,) = torch.autograd.grad(loss, leaf)
    return value.detach(), grad
