"""The loop over chunks of classes, which needs the least memory.

Each chunk has some classes of all rows, so that its part of the weight's gradient is complete: one
product writes it, and nothing is summed. The loss of a row is known only after all classes, so the
logits are computed twice: once for the statistics of the rows and the loss (class_statistics.py),
once for the gradients. The logits of a chunk lie in that part of the weight's gradient that is not
written yet (``chunks.class_chunks``).
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
    call_of,
    empty_outputs,
    objective_of,
    power_of,
    rows_of,
    scales_late,
    soft_cap_,
)
from fastkd.linear.chunks import (
    ALIGNMENT,
    PADDING,
    ClassChunk,
    buffer_bytes,
    chunk_beside,
    class_chunks,
)
from fastkd.linear.class_statistics import DIVERGENCES, RowStatistics


def missing(inputs: Inputs, call: LinearCall) -> list[str]:
    """Return the features of a call that chunks of classes lack, as users write them."""
    lacks = dispatch.lacking(inputs.hidden, inputs.labels, objective_of(inputs, call))
    if inputs.topk_indices is not None:
        lacks.append("a TopK as teacher")
    if inputs.class_weight is not None and not call.label_smoothing:
        lacks.append("class_weight=")
    if call.divergence not in DIVERGENCES and not lacks:
        lacks.append(f'divergence="{call.divergence}"')
    if call.label_smoothing:
        lacks.append(f"label_smoothing={call.label_smoothing}")
    if call.with_terms:
        lacks.append("fastkd.terms")
    other = call.teacher_temperature is not None or inputs.teacher_temperature is not None
    if other and inputs.hidden.is_cuda:
        lacks.append("a teacher_temperature of its own on cuda")
    return lacks


class _Logits(NamedTuple):
    """A chunk's logits; the classes beyond ``size`` are masked."""

    size: int
    student: Tensor
    teacher: Tensor
    slope: Tensor
    """What the soft cap multiplies the student's gradient by; empty without one."""


class _Loop:
    """The buffers of a call, and the steps of the loop; the rows are those that count."""

    def __init__(
        self, inputs: Inputs, call: LinearCall, weight: Tensor, counted: Tensor | None
    ) -> None:
        """``weight``: memory of its gradient, or empty."""
        part = inputs._replace(teacher_logits=None)
        if counted is not None:
            part = inputs._replace(**rows_of(part, counted))
        self.inputs = part._replace(teacher_logits=inputs.teacher_logits)
        self.call, self.counted = call, counted
        self.hidden = part.hidden.to(call.dtype)
        self.teacher_hidden = None
        if part.teacher_hidden is not None:
            self.teacher_hidden = part.teacher_hidden.to(call.teacher_dtype)
        self.whole = objective_of(part, call)._replace(reduction="none", normalizer=None)
        # Labels of a chunk are numbered anew (labels_in): any number from 0 on is a class there.
        self.objective = self.whole._replace(ignore_index=-1)
        self.free = weight.view(-1).view(torch.uint8)
        self.grad_row = self.free.numel() // inputs.weight.shape[0]
        caps = call.student_softcap is not None and call.grads
        self.dtypes = (call.dtype, call.teacher_dtype, *[call.dtype] * caps)
        self.item = sum(dtype.itemsize for dtype in self.dtypes)
        rows, classes = len(self.hidden), inputs.weight.shape[0]
        beside = chunk_beside(min(call.chunk, classes), self.grad_row > 0)
        self.beside = self.free.new_empty(buffer_bytes(rows, beside, self.item))

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
            for one in (logits.student, logits.teacher):
                one[:, chunk.size :] = -math.inf
            yield part, logits

    def _memory(self, chunk: ClassChunk) -> _Logits:
        rows, width = len(self.hidden), chunk.size + PADDING
        at, memory = 0, self.beside
        if chunk.inside:
            at, memory = self.free.numel() - buffer_bytes(rows, chunk.size, self.item), self.free
        parts: list[Tensor] = []
        for dtype in self.dtypes:
            at = -(-at // ALIGNMENT) * ALIGNMENT
            size = rows * width * dtype.itemsize
            parts.append(memory[at : at + size].view(dtype).view(rows, width))
            at += size
        slope = parts[2][:, : chunk.size] if len(parts) > 2 else parts[0][:0]
        return _Logits(chunk.size, parts[0], parts[1], slope)

    def _student(self, logits: _Logits, part: slice, writes: bool) -> None:
        call, given = self.call, self.inputs
        out = logits.student[:, : logits.size]
        weight = given.weight[part].to(call.dtype)
        bias = None if given.bias is None else given.bias[part].to(call.dtype)
        products.logits_(out, self.hidden, weight, bias, call.student_scale)
        if call.student_softcap is not None:
            soft_cap_(out, call.student_softcap, logits.slope if writes else None)

    def _teacher(self, logits: _Logits, part: slice) -> None:
        call, given = self.call, self.inputs
        out = logits.teacher[:, : logits.size]
        if given.teacher_logits is not None:
            if self.counted is None:
                out.copy_(given.teacher_logits[:, part])
            else:
                torch.index_select(given.teacher_logits[:, part], 0, self.counted, out=out)
            return
        if self.teacher_hidden is None or given.teacher_weight is None:
            raise ValueError(
                "by_classes=True needs teacher_logits, or teacher_hidden and teacher_weight; "
                "got neither"
            )
        weight, bias = given.teacher_weight[part].to(call.teacher_dtype), given.teacher_bias
        bias = None if bias is None else bias[part].to(call.teacher_dtype)
        products.logits_(out, self.teacher_hidden, weight, bias, call.teacher_scale)
        if call.teacher_softcap is not None:
            soft_cap_(out, call.teacher_softcap, None)

    def labels_in(self, part: slice) -> Tensor | None:
        """Return the labels as positions in a chunk.

        A label in another chunk becomes the first of the masked classes.
        """
        labels, size = self.inputs.labels, part.stop - part.start
        if labels is None:
            return None
        has = (labels >= part.start) & (labels < part.stop)
        inside = (labels - part.start).where(has, size)
        # Of ignored rows there are any only while a graph is captured.
        ignored: Tensor = labels == self.call.ignore_index
        return torch.where(ignored, self.objective.ignore_index, inside)

    def core_call(self, logits: _Logits, labels: Tensor | None) -> Call:
        """Return the core's call for a chunk."""
        part = self.inputs._replace(labels=labels)
        return call_of(logits.student, logits.teacher, part, self.objective, self.call)

    def statistics(self) -> RowStatistics:
        """Run the first pass over the classes."""
        acc = acc_dtype(self.call.dtype, self.call.teacher_dtype)
        like = self.hidden.new_empty((), dtype=acc)
        rows = RowStatistics(len(self.hidden), self.whole, like)
        for part, logits in self.chunks(writes=False):
            labels = self.labels_in(part)
            of_part = dispatch.statistics(self.core_call(logits, labels))
            label_logits = None
            if labels is not None:
                at = labels.clamp(0, logits.size).unsqueeze(1)
                label_logits = logits.student.gather(1, at).squeeze(1)
            rows.add(*of_part, label_logits)
        return rows

    def gradients(self, stats: Tensor, out: Outputs) -> None:
        """Run the second pass. ``out.hidden`` has the rows that count, in a dtype to sum in."""
        call, given, scale = self.call, self.inputs, self.call.student_scale
        factor, hidden = given.grad_rows, self.hidden
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
                weight = given.weight[part].to(call.dtype)
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

    With ``scales_late()`` the gradients lack the division by the denominator.
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
            if not scales_late(call):
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
        hidden = products.narrowed(hidden, inputs.hidden.dtype)
    return out._replace(loss=loss, hidden=hidden)
