"""A checked call of the loss of heads: tensors, numbers, results, and helpers of both loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import dispatch, topk
from fastkd._core.arguments import Call
from fastkd._core.objective import PER_ROW_OPTIONS, Objective
from fastkd._core.values import TopK


class Inputs(NamedTuple):
    """The tensors of a call: rows flattened, classes last."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_logits: Tensor | None
    topk_indices: Tensor | None
    topk_log_probs: Tensor | None
    labels: Tensor | None
    temperature: Tensor | None
    """One number for each row; None: ``LinearCall.temperature`` serves all rows. The fields
    ``teacher_temperature``, ``hard_weight`` and ``soft_weight`` have the same form."""
    teacher_temperature: Tensor | None
    hard_weight: Tensor | None
    soft_weight: Tensor | None
    class_weight: Tensor | None
    denominator: Tensor | None
    """The divisor of a mean."""
    grad_rows: Tensor | None
    """The factor of each row's gradient: the grad_output of reduction="none"."""


OUTPUTS_OF_ROWS = ("hidden", "teacher_hidden", "teacher_logits", "topk_indices", "topk_log_probs")
"""Fields of ``Inputs`` that are matrices with one line for each row."""
_ROW_FIELDS = (*OUTPUTS_OF_ROWS, "labels", *PER_ROW_OPTIONS, "grad_rows")


class LinearCall(NamedTuple):
    """The numbers and names of a call, in the order of the op's schema (loops.py)."""

    temperature: float
    teacher_temperature: float | None
    """None: the student's."""
    hard_weight: float
    soft_weight: float
    ignore_index: int
    reduction: str
    label_smoothing: float
    divergence: str
    mix: float | None
    standardize: bool
    tail: str
    """The ``tail`` of a :class:`fastkd.TopK`."""
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float
    teacher_scale: float
    dtype: torch.dtype
    """The dtype of the student's logits: that of its head, or autocast's."""
    teacher_dtype: torch.dtype
    accumulate: torch.dtype
    """The dtype in which the gradient of the weight is summed."""
    chunk: int
    """Rows of a chunk, or, if ``by_classes``, the largest number of classes."""
    by_classes: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool
    with_terms: bool

    @property
    def grads(self) -> bool:
        """Return True if any gradient is asked for."""
        return self.hidden_grad or self.weight_grad or self.bias_grad


def defers_mean_division(call: LinearCall) -> bool:
    """Return True if backward divides the gradients by the denominator of a float16 mean.

    Dividing earlier would underflow.
    """
    # Not a property of LinearCall: Dynamo of torch 2.10 cannot trace one where sizes are dynamic.
    return call.reduction == "mean" and call.dtype is torch.float16


def objective_of(inputs: Inputs, call: LinearCall) -> Objective:
    """Build the Objective for a chunk, or for all rows."""
    numbers: dict[str, Any] = {}
    for name in PER_ROW_OPTIONS:
        tensor = getattr(inputs, name)
        numbers[name] = getattr(call, name) if tensor is None else tensor
    if numbers["teacher_temperature"] is None:
        numbers["teacher_temperature"] = numbers["temperature"]
    return Objective(
        **numbers,
        ignore_index=call.ignore_index,
        reduction=call.reduction,
        label_smoothing=call.label_smoothing,
        class_weight=inputs.class_weight,
        normalizer=inputs.denominator if call.reduction == "mean" else None,
        divergence=call.divergence,
        mix=call.mix,
        teacher_form="logits",
        teacher_weights=None,
        ensemble="probs",
        standardize=call.standardize,
    )


class Outputs(NamedTuple):
    """The results of a call; gradients that are not asked for are empty."""

    loss: Tensor
    """The loss, or, with terms, all terms stacked."""
    hidden: Tensor
    weight: Tensor
    """In ``LinearCall.accumulate``."""
    bias: Tensor
    """float32 or float64."""


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of losses of logits in these dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def empty_outputs(inputs: Inputs, call: LinearCall) -> Outputs:
    """Allocate the results of a call; tracing needs their shapes alone."""
    hidden, weight = inputs.hidden, inputs.weight
    acc = acc_dtype(call.dtype, call.teacher_dtype)
    shape = [len(reference.Terms._fields)] if call.with_terms else []
    shape += [hidden.shape[0]] if call.reduction == "none" else []
    return Outputs(
        hidden.new_empty(shape, dtype=acc),
        hidden.new_empty(hidden.shape if call.hidden_grad else (0,)),
        weight.new_empty(weight.shape if call.weight_grad else (0,), dtype=call.accumulate),
        weight.new_empty(weight.shape[:1] if call.bias_grad else (0,), dtype=acc),
    )


def counted_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Return the indices of the rows that are not ignored, or None to compute all rows.

    None: no row is ignored, labels are None or probabilities, or a CUDA graph is being captured.
    Counting the rows synchronizes with the GPU, which is an error during the capture.
    """
    if labels is None or labels.is_floating_point():
        return None
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    counted = (labels != ignore_index).nonzero().squeeze(1)
    return None if counted.numel() == labels.numel() else counted


def select_rows(inputs: Inputs, index: slice | Tensor) -> dict[str, Tensor]:
    """Select rows of all fields that have rows."""
    values = {name: getattr(inputs, name) for name in _ROW_FIELDS}
    return {
        name: value[index] for name, value in values.items() if value is not None and value.dim()
    }


def make_call(
    student: Tensor, teacher: Tensor | None, part: Inputs, objective: Objective, call: LinearCall
) -> Call:
    """Build the core's call for a chunk. If ``teacher`` is None, use the TopK lists."""
    dtype = acc_dtype(call.dtype, call.teacher_dtype)
    if teacher is not None:
        return Call(student, (teacher,), part.labels, objective, dtype)
    assert part.topk_indices is not None and part.topk_log_probs is not None
    lists = TopK(part.topk_log_probs.to(dtype), part.topk_indices.long(), call.tail)  # type: ignore[arg-type]
    return Call(student, (), part.labels, objective, dtype, lists)


_REFERENCE_LOGITS = 24
"""Upper bound on logits-sized tensors saved by autograd for an unfused loss."""


def logits_per_row(inputs: Inputs, call: LinearCall) -> float:
    """Return how many tensors of logits, in the student's dtype, exist at a time."""
    buffers = 2.0  # student and teacher
    if inputs.topk_indices is not None:
        # Lists of 8-byte numbers: those of a chunk, and their copies for the kernel.
        lists = 4 * 8 * inputs.topk_indices.shape[-1]
        # The student, its gradient, and the lists.
        buffers = 1 + call.grads + lists / (inputs.weight.shape[0] * call.dtype.itemsize)
        fused = topk.is_fused(inputs.hidden)
    else:
        fused = dispatch.is_fused(inputs.hidden, inputs.labels, objective_of(inputs, call))
    if call.student_softcap is not None and call.grads:
        buffers += 1
    if not fused:
        wide = acc_dtype(call.dtype, call.teacher_dtype)
        buffers += _REFERENCE_LOGITS * wide.itemsize / call.dtype.itemsize
    return buffers


def power_of(factors: Tensor) -> Tensor:
    """Return a power-of-two scale s such that abs(factors) / s <= 1.

    Matrix products of larger factors may overflow in float16.
    """
    largest = factors.abs().amax()
    # 0 / 0 and inf / inf: no power of two helps.
    return (largest / torch.frexp(largest).mantissa).nan_to_num(1.0)


def soft_cap_(logits: Tensor, cap: float, slope: Tensor | None) -> None:
    """Set logits to cap * tanh(logits / cap), and ``slope`` to the derivative of that function."""
    logits.div_(cap)
    if slope is not None:
        # 1 / cosh^2: 1 - tanh^2 would cancel in 16 bits.
        torch.cosh(logits, out=slope).pow_(-2)
    logits.tanh_().mul_(cap)
