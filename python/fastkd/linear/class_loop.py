"""Loop over chunks of classes, which need less memory than chunks of rows.

Each chunk has some classes of all rows. One matrix product completes the chunk's rows of the
weight's gradient, without a sum over chunks. The loss of a row is known only after all classes, so
two passes compute the logits. The first pass gives the loss and the statistics of the rows
(class_statistics.py), and the second pass gives the gradients. Logits of a chunk lie in the
unwritten part of the weight's gradient if that part is large enough (``planner.divide_classes``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd._core import dispatch
from fastkd._core.arguments import Call
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
    promote_loss_dtype,
    select_rows,
)
from fastkd.linear.class_statistics import DIVERGENCES, RowStatistics
from fastkd.linear.planner import (
    ALIGNMENT,
    PADDING,
    compute_buffer_bytes,
    divide_classes,
    separate_classes,
)


def list_missing_features(inputs: Inputs, call: LinearCall) -> list[str]:
    """Return the features of a call that chunks of classes lack, as named in messages."""
    names = dispatch.list_missing_features(
        inputs.hidden, inputs.labels, make_objective(inputs, call)
    )
    if inputs.topk_indices is not None:
        names.append("a TopK or Sampled as teacher")
    if inputs.class_weight is not None and not call.label_smoothing:
        names.append("class_weight=")
    if call.divergence not in DIVERGENCES and not names:
        names.append(f'divergence="{call.divergence}"')
    if call.label_smoothing:
        names.append(f"label_smoothing={call.label_smoothing}")
    if call.with_terms:
        names.append("fastkd.terms")
    differs = call.teacher_temperature is not None or inputs.teacher_temperature is not None
    if differs and inputs.hidden.device.type != "cpu":
        names.append("teacher_temperature= on cuda")
    return names


class _Loop:
    """Compute loss and gradients of the selected rows in two passes over the classes."""

    def __init__(
        self, inputs: Inputs, call: LinearCall, weight_grad: Tensor, counted: Tensor | None
    ) -> None:
        """Select the rows at ``counted`` (None: all rows); ``weight_grad`` may be empty."""
        self.call, self.counted, self.teacher_logits = call, counted, inputs.teacher_logits
        if counted is not None:  # chunks() selects the rows of the teacher's logits
            inputs = select_rows(inputs._replace(teacher_logits=None), counted)
        inputs = inputs._replace(hidden=inputs.hidden.to(call.dtype))
        if inputs.teacher_hidden is not None:
            teacher_hidden = inputs.teacher_hidden.to(call.teacher_dtype)
            inputs = inputs._replace(teacher_hidden=teacher_hidden)
        self.inputs = inputs
        self.student, self.teacher = make_heads(inputs, call)
        self.objective = make_objective(inputs, call)._replace(reduction="none", normalizer=None)
        self.weight_grad = weight_grad.view(-1).view(torch.uint8)
        rows, classes = len(inputs.hidden), len(inputs.weight)
        self.grad_row = self.weight_grad.numel() // classes
        needs_slope = call.student_softcap is not None and call.has_grads
        self.dtypes = (call.dtype, call.teacher_dtype, *[call.dtype] * needs_slope)
        self.item_bytes = sum(dtype.itemsize for dtype in self.dtypes)
        separate = separate_classes(min(call.chunk, classes), self.grad_row > 0)
        self.buffer = self.weight_grad.new_empty(
            compute_buffer_bytes(rows, separate, self.item_bytes)
        )

    def chunks(self, *, writes: bool) -> Iterator[tuple[slice, Call, Tensor | None]]:
        """Yield a chunk's classes, the call for their logits, and the soft cap's derivative.

        The next chunk overwrites the logits. The call's logits end with ``PADDING`` masked classes.
        ``writes``: the caller writes the gradients of each chunk.
        """
        call, inputs, rows = self.call, self.inputs, len(self.inputs.hidden)
        for start, size, is_inside in divide_classes(
            rows, len(inputs.weight), call.chunk, self.item_bytes, self.grad_row, writes=writes
        ):
            part = slice(start, start + size)
            memory = self.weight_grad if is_inside else self.buffer
            begin = memory.numel() - compute_buffer_bytes(rows, size, self.item_bytes)
            buffers: list[Tensor] = []
            for dtype in self.dtypes:
                begin = -(-begin // ALIGNMENT) * ALIGNMENT
                end = begin + rows * (size + PADDING) * dtype.itemsize
                buffers.append(memory[begin:end].view(dtype).view(rows, size + PADDING))
                begin = end
            slope = buffers[2][:, :size] if len(buffers) > 2 and writes else None
            student, teacher = (buffer[:, :size] for buffer in buffers[:2])
            products.write_logits_(student, _select_classes(self.student, part), slope)
            if self.teacher is not None:
                products.write_logits_(teacher, _select_classes(self.teacher, part))
            else:
                assert self.teacher_logits is not None
                logits = self.teacher_logits[:, part]
                if self.counted is None:
                    teacher.copy_(logits)
                else:
                    torch.index_select(logits, 0, self.counted, out=teacher)
            for values in buffers[:2]:
                values[:, size:] = -math.inf
            labels, objective = inputs.labels, self.objective._replace(ignore_index=-1)
            if labels is not None:
                # A label becomes its position in the chunk, or, if it lies outside the chunk, the
                # position of the first masked class.
                positions = (labels - start).where(
                    (labels >= start) & (labels < start + size), size
                )
                # Ignored rows, which remain under the capture of a CUDA graph, get the label -1.
                labels = positions.masked_fill(labels == call.ignore_index, -1)
            chunk = inputs._replace(labels=labels)
            yield part, make_call(buffers[0], buffers[1], chunk, objective, call), slope

    def compute_statistics(self) -> RowStatistics:
        """Run the first pass over the classes, and return the statistics of the rows."""
        acc = promote_loss_dtype(self.call.dtype, self.call.teacher_dtype)
        like = self.inputs.hidden.new_empty((), dtype=acc)
        rows = RowStatistics(len(self.inputs.hidden), self.objective, like)
        for _, core, _ in self.chunks(writes=False):
            label_logits = None
            divergence, stats = dispatch.compute_statistics(core)
            if core.labels is not None:
                positions = core.labels.clamp(min=0).unsqueeze(1)
                label_logits = core.student.gather(1, positions).squeeze(1)
            rows.add(divergence, stats, label_logits)
        labels = self.inputs.labels
        if labels is not None:  # no earlier check reads labels on a GPU
            is_class = (labels >= 0) & (labels < len(self.inputs.weight))
            rows.invalidate(~is_class & (labels != self.call.ignore_index))
        return rows

    def write_gradients(self, stats: Tensor, out: Outputs, power: Tensor | None) -> None:
        """Run the second pass over the classes, which writes the gradients to ``out``.

        ``out.hidden`` has only the selected rows, in the dtype of the sum over chunks.
        """
        call = self.call
        for part, core, slope in self.chunks(writes=True):
            dispatch.write_gradient_(core, stats)
            grad, first = core.student[:, :-PADDING], part.start == 0
            if slope is not None:
                grad.mul_(slope)
            if call.hidden_grad:
                weight = self.student.weight[part].to(call.dtype)
                products.add_product_(out.hidden, grad, weight, call.student_scale, first)
            add_gradients(out, grad, self.inputs, call, power, part, first=True)
        if self.inputs.grad_rows is not None and call.hidden_grad:
            out.hidden.mul_(self.inputs.grad_rows.unsqueeze(1))


def _select_classes(head: Head, part: slice) -> Head:
    bias = None if head.bias is None else head.bias[part]
    return head._replace(weight=head.weight[part], bias=bias)


def run(inputs: Inputs, call: LinearCall, counted: Tensor | None, power: Tensor | None) -> Outputs:
    """Compute the loss, and its gradients for a grad_output of 1 or of ``inputs.grad_rows``.

    There must be at least one row. ``counted``: the indices of the rows that are not ignored, at
    least one, or None for all rows. If ``is_mean_division_deferred()``, the caller must divide the
    gradients by the denominator. If ``power`` is not None, the caller must multiply the gradients
    of weight and bias by ``power``.
    """
    out = allocate_outputs(inputs, call._replace(hidden_grad=False))
    loop = _Loop(inputs, call, out.weight, counted)
    rows = loop.compute_statistics()
    losses = rows.loss(loop.inputs.labels)
    loss, scale = out.loss, rows.like.new_ones(())
    if call.reduction == "none":
        loss = losses if counted is None else out.loss.zero_().index_copy_(0, counted, losses)
    else:
        loss = losses.double().sum().to(losses.dtype)
        if call.reduction == "mean" and inputs.denominator is not None:
            loss = loss / inputs.denominator
            if not is_mean_division_deferred(call):
                scale = scale / inputs.denominator
    if not call.has_grads:
        return out._replace(loss=loss)
    stats = rows.stats(scale, loop.inputs.labels is not None)
    del rows, losses
    if call.hidden_grad:
        wide, shape = promote_loss_dtype(call.dtype, inputs.hidden.dtype), loop.inputs.hidden.shape
        out = out._replace(hidden=inputs.hidden.new_empty(shape, dtype=wide))
    loop.write_gradients(stats, out, power)
    del loop
    hidden = out.hidden
    if call.hidden_grad and counted is not None:
        hidden = inputs.hidden.new_zeros(inputs.hidden.shape)
        hidden[counted] = out.hidden.to(hidden.dtype)
    elif hidden.dtype != inputs.hidden.dtype and call.hidden_grad:
        hidden = products.round_in_place(hidden, inputs.hidden.dtype)
    return out._replace(loss=loss, hidden=hidden)
