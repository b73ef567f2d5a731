"""Loop over chunks of rows, and compute the loss and its gradients in one pass.

Each chunk has four steps; the last two compute only the gradients that are needed:

1. Write the logits of the student's head, and of the teacher's head if the teacher has one, to
   buffers that every chunk reuses.
2. Compute the loss and its gradient. With a dense teacher, a fused kernel, if the options have one,
   writes the gradient over the student's logits.
3. Multiply this gradient by the weight, which gives the gradient of the chunk's hidden states.
4. Multiply the gradient of step 2 by the hidden states, and add the product to the weight's
   gradient. Add the gradient's sum over rows to the bias's gradient.

The loop does not synchronize with a GPU.
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
    allocate_outputs,
    is_mean_division_deferred,
    make_call,
    make_heads,
    make_objective,
    select_rows,
)


def run(inputs: Inputs, call: LinearCall, counted: Tensor | None, power: Tensor | None) -> Outputs:
    """Compute the loss, and its gradients for a grad_output of 1 or of ``inputs.grad_rows``.

    There must be at least one row. ``counted``: the indices of the rows that are not ignored, at
    least one, or None for all rows. If ``is_mean_division_deferred()``, the caller must divide the
    gradients by the denominator. If ``power`` is not None, the caller must multiply the gradients
    of weight and bias by ``power``.
    """
    # The loop allocates the weight's gradient. If there is one chunk, its logits are freed first.
    out = allocate_outputs(inputs, call._replace(weight_grad=False))
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
    if call.student_softcap is not None and call.has_grads:
        slope = torch.empty_like(buffer)
    for start in range(0, rows, chunk):
        index: slice | Tensor = slice(start, min(rows, start + chunk))
        if counted is not None:
            index = counted[index]
        part = select_rows(inputs, index)
        size = len(part.hidden)
        part_slope = None if slope is None else slope[:size]
        logits = products.write_logits_(
            buffer[:size], student._replace(hidden=part.hidden), part_slope
        )
        teacher_logits = part.teacher_logits
        if teacher is not None and part.teacher_hidden is not None:
            head = teacher._replace(hidden=part.teacher_hidden)
            teacher_logits = products.write_logits_(teacher_buffer[:size], head)
        value, grad = _compute_loss(logits, teacher_logits, part, call)
        if call.reduction == "none":
            out.loss[..., index] = value
        else:
            out.loss.add_(value)
        if grad is None:
            continue
        del logits, teacher_logits
        if chunk == rows:  # free the logits' buffers; grad keeps its memory
            del buffer, teacher_buffer
        if part_slope is not None:
            grad.mul_(part_slope)
        if call.hidden_grad:
            is_direct = counted is None and out.hidden.dtype == grad.dtype
            rows_grad = grad.new_empty(part.hidden.shape) if not is_direct else out.hidden[index]
            products.write_hidden_gradient_(rows_grad, grad, student.weight, call.student_scale)
            if part.grad_rows is not None:
                rows_grad.mul_(part.grad_rows.unsqueeze(1))
            if not is_direct:
                out.hidden[index] = rows_grad.to(out.hidden.dtype)
        if call.weight_grad and start == 0:
            weight = inputs.weight.new_empty(inputs.weight.shape, dtype=call.accumulate)
            out = out._replace(weight=weight)
        add_gradients(out, grad, part, call, power, slice(None), start == 0)
        del grad  # free a gradient outside the buffer before the next chunk's gradient is allocated
    if is_mean_division_deferred(call) and inputs.denominator is not None:
        out.loss.div_(inputs.denominator)
    return out


def _prepare(head: Head, dtype: torch.dtype, rows: int) -> tuple[Head, Tensor]:
    """Convert the parameters of a head to ``dtype``, and allocate the logits of ``rows`` rows."""
    bias = None if head.bias is None else head.bias.to(dtype)
    head = head._replace(weight=head.weight.to(dtype), bias=bias)
    return head, head.weight.new_empty((rows, len(head.weight)))


def _compute_loss(
    logits: Tensor, teacher: Tensor | None, part: Inputs, call: LinearCall
) -> tuple[Tensor, Tensor | None]:
    """Compute the loss of a chunk (or all terms, stacked) and the gradient of the logits.

    If a kernel computes the gradient in place, the gradient overwrites the logits.
    """
    objective = make_objective(part, call)
    if is_mean_division_deferred(call):
        objective = objective._replace(reduction="sum", normalizer=None)
    core = make_call(logits, teacher, part, objective, call)
    if not call.has_grads:
        return dispatch.compute(core, call.with_terms), None
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        inplace = teacher is not None and dispatch.is_fused(logits, part.labels, objective)
        core = core._replace(student=leaf.view_as(leaf), inplace=inplace)
        value = dispatch.compute(core, call.with_terms)
        loss = value[0] if call.with_terms else value
    (grad,) = torch.autograd.grad(loss, leaf)
    return value.detach(), grad
