"""The loop over chunks of classes, which needs the least memory.

Each chunk has some classes of all rows, so that its rows of the weight's gradient are complete
after one matrix product, without a sum over chunks. The loss of a row is known only after all
classes, so the logits are computed twice: once for the loss and the statistics of the rows
(class_statistics.py), once for the gradients. The logits of a chunk lie in the part of the weight's
gradient that is not written yet (``planner.class_chunks``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._core import dispatch
from fastkd._core.arguments import Call
from fastkd.linear import products
from fastkd.linear.call import (
    Inputs,
    LinearCall,
    Outputs,
    acc_dtype,
    defers_mean_division,
    empty_outputs,
    make_call,
    objective_of,
    power_of,
    select_rows,
    soft_cap_,
)
from fastkd.linear.class_statistics import DIVERGENCES, RowStatistics
from fastkd.linear.planner import (
    ALIGNMENT,
    PADDING,
    ClassChunk,
    buffer_bytes,
    class_chunks,
    separate_classes,
)


def missing(inputs: Inputs, call: LinearCall) -> list[str]:
    """Return the features of a call that chunks of classes lack, as users write them."""
    names = dispatch.missing_features(inputs.hidden, inputs.labels, objective_of(inputs, call))
    if inputs.topk_indices is not None:
        names.append("a TopK as teacher")
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


class _Logits(NamedTuple):
    """The logits of a chunk; ``PADDING`` classes beyond ``size`` are masked."""

    size: int
    student: Tensor
    teacher: Tensor
    slope: Tensor
    """The derivative of the student's soft cap; empty without a soft cap."""


class _Loop:
    """The buffers of a call, and the two passes over its classes."""

    def __init__(
        self, inputs: Inputs, call: LinearCall, weight_grad: Tensor, counted: Tensor | None
    ) -> None:
        """Select the rows that are not ignored; ``weight_grad`` may be empty."""
        teacher_logits = inputs.teacher_logits
        if counted is not None:  # the teacher's logits are selected chunk by chunk
            without = inputs._replace(teacher_logits=None)
            inputs = inputs._replace(**select_rows(without, counted))
        self.inputs = inputs._replace(teacher_logits=teacher_logits)
        self.call, self.counted = call, counted
        self.hidden = inputs.hidden.to(call.dtype)
        self.teacher_hidden = None
        if inputs.teacher_hidden is not None:
            self.teacher_hidden = inputs.teacher_hidden.to(call.teacher_dtype)
        self.objective = objective_of(inputs, call)._replace(reduction="none", normalizer=None)
        # labels_in() returns positions in a chunk, from 0 on, and -1 for ignored rows.
        self.chunk_objective = self.objective._replace(ignore_index=-1)
        self.weight_grad = weight_grad.view(-1).view(torch.uint8)
        self.grad_row = self.weight_grad.numel() // inputs.weight.shape[0]
        needs_slope = call.student_softcap is not None and call.grads
        self.dtypes = (call.dtype, call.teacher_dtype, *[call.dtype] * needs_slope)
        self.item = sum(dtype.itemsize for dtype in self.dtypes)
        rows, classes = len(self.hidden), inputs.weight.shape[0]
        separate = separate_classes(min(call.chunk, classes), self.grad_row > 0)
        self.buffer = self.weight_grad.new_empty(buffer_bytes(rows, separate, self.item))

    def chunks(self, *, writes: bool) -> Iterator[tuple[slice, _Logits]]:
        """Yield the logits of all classes, chunk by chunk, in memory that each overwrites."""
        rows, classes = len(self.hidden), self.inputs.weight.shape[0]
        for chunk in class_chunks(
            rows, classes, self.call.chunk, self.item, self.grad_row, writes=writes
        ):
            logits = self._memory(chunk)
            part = slice(chunk.start, chunk.start + chunk.size)
            self._student(logits, part, writes)
            self._teacher(logits, part)
            for values in (logits.student, logits.teacher):
                values[:, chunk.size :] = -math.inf
            yield part, logits

    def _memory(self, chunk: ClassChunk) -> _Logits:
        rows, width = len(self.hidden), chunk.size + PADDING
        start, memory = 0, self.buffer
        if chunk.is_inside:
            memory = self.weight_grad
            start = memory.numel() - buffer_bytes(rows, chunk.size, self.item)
        parts: list[Tensor] = []
        for dtype in self.dtypes:
            start = -(-start // ALIGNMENT) * ALIGNMENT
            size = rows * width * dtype.itemsize
            parts.append(memory[start : start + size].view(dtype).view(rows, width))
            start += size
        slope = parts[2][:, : chunk.size] if len(parts) > 2 else parts[0][:0]
        return _Logits(chunk.size, parts[0], parts[1], slope)

    def _student(self, logits: _Logits, part: slice, writes: bool) -> None:
        call, inputs = self.call, self.inputs
        out = logits.student[:, : logits.size]
        weight = inputs.weight[part].to(call.dtype)
        bias = None if inputs.bias is None else inputs.bias[part].to(call.dtype)
        products.logits_(out, self.hidden, weight, bias, call.student_scale)
        if call.student_softcap is not None:
            soft_cap_(out, call.student_softcap, logits.slope if writes else None)

    def _teacher(self, logits: _Logits, part: slice) -> None:
        call, inputs = self.call, self.inputs
        out = logits.teacher[:, : logits.size]
        if inputs.teacher_logits is not None:
            if self.counted is None:
                out.copy_(inputs.teacher_logits[:, part])
            else:
                torch.index_select(inputs.teacher_logits[:, part], 0, self.counted, out=out)
            return
        if self.teacher_hidden is None or inputs.teacher_weight is None:
            raise ValueError(
                "by_classes=True needs teacher_logits, or teacher_hidden and teacher_weight; "
                "got none of them"
            )
        weight, bias = inputs.teacher_weight[part].to(call.teacher_dtype), inputs.teacher_bias
        bias = None if bias is None else bias[part].to(call.teacher_dtype)
        products.logits_(out, self.teacher_hidden, weight, bias, call.teacher_scale)
        if call.teacher_softcap is not None:
            soft_cap_(out, call.teacher_softcap, None)

    def labels_in(self, part: slice) -> Tensor | None:
        """Return the labels as positions in a chunk.

        A label outside the chunk becomes the position of the first masked class.
        """
        labels, size = self.inputs.labels, part.stop - part.start
        if labels is None:
            return None
        is_inside = (labels >= part.start) & (labels < part.stop)
        positions = (labels - part.start).where(is_inside, size)
        # Ignored rows are still there while a CUDA graph is captured.
        ignored: Tensor = labels == self.call.ignore_index
        return torch.where(ignored, self.chunk_objective.ignore_index, positions)

    def core_call(self, logits: _Logits, labels: Tensor | None) -> Call:
        """Return the core's call for a chunk."""
        part = self.inputs._replace(labels=labels)
        return make_call(logits.student, logits.teacher, part, self.chunk_objective, self.call)

    def statistics(self) -> RowStatistics:
        """Run the first pass over the classes."""
        acc = acc_dtype(self.call.dtype, self.call.teacher_dtype)
        like = self.hidden.new_empty((), dtype=acc)
        rows = RowStatistics(len(self.hidden), self.objective, like)
        for part, logits in self.chunks(writes=False):
            labels = self.labels_in(part)
            divergence, stats = dispatch.statistics(self.core_call(logits, labels))
            label_logits = None
            if labels is not None:
                positions = labels.clamp(0, logits.size).unsqueeze(1)
                label_logits = logits.student.gather(1, positions).squeeze(1)
            rows.add(divergence, stats, label_logits)
        labels = self.inputs.labels
        if labels is not None:  # labels on a GPU are not checked before
            is_class = (labels >= 0) & (labels < self.inputs.weight.shape[0])
            rows.invalidate(~is_class & (labels != self.call.ignore_index))
        return rows

    def gradients(self, stats: Tensor, out: Outputs) -> None:
        """Run the second pass over the classes, which writes the gradients.

        ``out.hidden`` has the rows that are not ignored, in the dtype of the sum.
        """
        call, inputs, scale = self.call, self.inputs, self.call.student_scale
        factor, hidden = inputs.grad_rows, self.hidden
        ones = hidden.new_ones(len(hidden), 1)
        if factor is not None:
            power = power_of(factor)
            ones = (factor / power).to(call.dtype)[:, None]
            hidden = hidden * ones
        for part, logits in self.chunks(writes=True):
            labels = self.labels_in(part)
            dispatch.gradient_(self.core_call(logits, labels), stats)
            grad = logits.student[:, : logits.size]
            if logits.slope.numel():
                grad.mul_(logits.slope)
            if call.hidden_grad:
                weight = inputs.weight[part].to(call.dtype)
                products.add_product_(out.hidden, grad, weight, scale, part.start == 0)
            if call.weight_grad:
                products.add_product_(out.weight[part], grad.t(), hidden, scale, True)
            if call.bias_grad:
                products.add_product_(out.bias[part].unsqueeze(1), grad.t(), ones, scale, True)
        if factor is not None:
            out.weight.mul_(power)
            out.bias.mul_(power)
            if call.hidden_grad:
                out.hidden.mul_(factor.unsqueeze(1))


def run(inputs: Inputs, call: LinearCall, counted: Tensor | None) -> Outputs:
    """Compute the loss of at least one row that counts, and its gradients for a grad_output of 1.

    With ``defers_mean_division()`` the gradients lack the division by the denominator.
    """
    out = empty_outputs(inputs, call._replace(hidden_grad=False))
    loop = _Loop(inputs, call, out.weight, counted)
    rows = loop.statistics()
    losses = rows.loss(loop.inputs.labels)
    loss, scale = out.loss, rows.like.new_ones(())
    if call.reduction == "none":
        loss = losses if counted is None else out.loss.zero_().index_copy_(0, counted, losses)
    else:
        loss = losses.double().sum().to(losses.dtype)
        if call.reduction == "mean" and inputs.denominator is not None:
            loss = loss / inputs.denominator
            if not defers_mean_division(call):
                scale = scale / inputs.denominator
    if not call.grads:
        return out._replace(loss=loss)
    stats = rows.stats(scale, loop.inputs.labels is not None)
    del rows, losses
    if call.hidden_grad:
        wide = acc_dtype(call.dtype, inputs.hidden.dtype)
        out = out._replace(hidden=loop.hidden.new_empty(loop.hidden.shape, dtype=wide))
    loop.gradients(stats, out)
    hidden = out.hidden
    del loop
    if call.hidden_grad and counted is not None:
        hidden = inputs.hidden.new_zeros(inputs.hidden.shape)
        hidden[counted] = out.hidden.to(hidden.dtype)
    elif hidden.dtype != inputs.hidden.dtype and call.hidden_grad:
        hidden = products.round_in_place(hidden, inputs.hidden.dtype)
    return out._replace(loss=loss, hidden=hidden)
