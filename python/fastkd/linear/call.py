"""Define a checked call whose student is a Head, its results, and helpers of the chunk loops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import shapes
from fastkd._core.arguments import Call, Listed
from fastkd._core.objective import PER_ROW_OPTIONS, Objective
from fastkd._core.values import Head
from fastkd.linear import products


class Inputs(NamedTuple):
    """Hold the tensors of a call, with flattened rows."""

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
    """One number for each row, a 0-d tensor for all rows, or None if ``LinearCall.temperature``
    serves all rows. The fields ``teacher_temperature``, ``hard_weight`` and ``soft_weight`` have
    this form, too."""
    teacher_temperature: Tensor | None
    hard_weight: Tensor | None
    soft_weight: Tensor | None
    class_weight: Tensor | None
    denominator: Tensor | None
    """The divisor of the loss if the reduction is "mean"."""
    grad_rows: Tensor | None
    """The factor of each row's gradient: the ``grad_output`` of the reduction "none"."""


OUTPUTS_OF_ROWS = ("hidden", "teacher_hidden", "teacher_logits", "topk_indices", "topk_log_probs")
"""Fields of ``Inputs`` of shape ``(rows, n)``, where n is a width, the number of classes, or k."""
_ROW_FIELDS = (*OUTPUTS_OF_ROWS, "labels", *PER_ROW_OPTIONS, "grad_rows")


class LinearCall(NamedTuple):
    """Hold the arguments of a call that are no tensors, in the order of the op's schema."""

    temperature: float
    teacher_temperature: float | None
    """None if equal to the student's temperature."""
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
    estimator: str | None
    """The ``estimator`` of a :class:`fastkd.Sampled`."""
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float
    teacher_scale: float
    dtype: torch.dtype
    """The dtype of the student's logits: autocast's dtype, or the dtype of the hidden states."""
    teacher_dtype: torch.dtype
    accumulate: torch.dtype
    """The dtype in which the gradient of the weight is summed."""
    chunk: int
    """Largest number of rows of a chunk, or, if ``by_classes``, largest number of classes."""
    by_classes: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool
    with_terms: bool

    @property
    def has_grads(self) -> bool:
        """Return True if any tensor of the student's head needs a gradient."""
        return self.hidden_grad or self.weight_grad or self.bias_grad


def is_mean_division_deferred(call: LinearCall) -> bool:
    """Return True if backward divides the gradients by the denominator of a float16 mean.

    A division in the forward pass would make float16 gradients underflow.
    """
    # Dynamo of torch 2.10 cannot trace a property of LinearCall with dynamic sizes.
    return call.reduction == "mean" and call.dtype is torch.float16


def make_objective(inputs: Inputs, call: LinearCall) -> Objective:
    """Make the Objective of a chunk, or of all rows."""
    numbers = {
        name: getattr(call, name) for name in LinearCall._fields if name in Objective._fields
    }
    tensors = {name: getattr(inputs, name) for name in PER_ROW_OPTIONS}
    numbers |= {name: value for name, value in tensors.items() if value is not None}
    if numbers["teacher_temperature"] is None:
        numbers["teacher_temperature"] = numbers["temperature"]
    return Objective(
        **numbers,
        class_weight=inputs.class_weight,
        normalizer=inputs.denominator if call.reduction == "mean" else None,
        teacher_form="logits",
        teacher_weights=None,
        ensemble="probs",
    )


def make_heads(inputs: Inputs, call: LinearCall) -> tuple[Head, Head | None]:
    """Make the student's head, and the teacher's head if the teacher has one."""
    student = Head(
        inputs.hidden, inputs.weight, inputs.bias, call.student_softcap, call.student_scale
    )
    if inputs.teacher_hidden is None or inputs.teacher_weight is None:
        return student, None
    tensors = inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias
    return student, Head(*tensors, call.teacher_softcap, call.teacher_scale)


class Outputs(NamedTuple):
    """Hold the results of a call; a gradient that is not needed is an empty tensor."""

    loss: Tensor
    """The loss, or all terms stacked if ``LinearCall.with_terms``."""
    hidden: Tensor
    weight: Tensor
    """The gradient of the weight, in the dtype ``LinearCall.accumulate``."""
    bias: Tensor
    """The gradient of the bias, in float32 or float64."""


def promote_loss_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of a loss of logits with ``dtypes``: float64 or float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def allocate_outputs(inputs: Inputs, call: LinearCall) -> Outputs:
    """Allocate the loss and the gradients that a call needs."""
    hidden, weight = inputs.hidden, inputs.weight
    acc = promote_loss_dtype(call.dtype, call.teacher_dtype)
    fields = shapes.TERMS if inputs.topk_indices is None else len(reference.Terms._fields)
    shape = [fields] if call.with_terms else []
    shape += [hidden.shape[0]] if call.reduction == "none" else []
    return Outputs(
        hidden.new_empty(shape, dtype=acc),
        hidden.new_empty(hidden.shape if call.hidden_grad else (0,)),
        weight.new_empty(weight.shape if call.weight_grad else (0,), dtype=call.accumulate),
        weight.new_empty(weight.shape[:1] if call.bias_grad else (0,), dtype=acc),
    )


def find_counted_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Return the indices of the rows that are not ignored, or None to compute all rows.

    All rows are computed if no row is ignored, or if labels are None or probabilities. The capture
    of a CUDA graph also computes all rows, because a capture forbids synchronization.
    """
    if labels is None or labels.is_floating_point():
        return None
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    counted = (labels != ignore_index).nonzero().squeeze(1)
    return None if counted.numel() == labels.numel() else counted


def select_rows(inputs: Inputs, index: slice | Tensor) -> Inputs:
    """Return ``inputs`` with only the rows at ``index``."""
    values = {name: getattr(inputs, name) for name in _ROW_FIELDS}
    has_rows = {name: x for name, x in values.items() if x is not None and x.dim()}
    return inputs._replace(**{name: x[index] for name, x in has_rows.items()})


def make_call(
    student: Tensor, teacher: Tensor | None, part: Inputs, objective: Objective, call: LinearCall
) -> Call:
    """Make the call for the logits of a chunk; if ``teacher`` is None, the teacher is sparse."""
    dtype = promote_loss_dtype(call.dtype, call.teacher_dtype)
    if teacher is not None:
        return Call(student, (teacher,), part.labels, objective, dtype)
    assert part.topk_indices is not None and part.topk_log_probs is not None
    listed = Listed(part.topk_log_probs, part.topk_indices, call.tail, call.estimator)
    return Call(student, (), part.labels, objective, dtype, listed)


def compute_power(factors: Tensor) -> Tensor:
    """Return a power-of-two scale s such that abs(factors) / s <= 1.

    Matrix products of larger factors may overflow in float16.
    """
    largest = factors.abs().amax()
    # For factors of 0, inf or NaN the quotient is NaN: use the scale 1.
    return (largest / torch.frexp(largest).mantissa).nan_to_num(1.0)


def add_gradients(
    out: Outputs,
    grad: Tensor,
    part: Inputs,
    call: LinearCall,
    power: Tensor | None,
    classes: slice,
    first: bool,
) -> None:
    """Add a chunk's part to the gradients of weight and bias; with ``first``, overwrite them.

    If ``power`` (:func:`compute_power`) is not None, the parts are divided by ``power``, and the
    caller must multiply the sums by ``power``.
    """
    hidden, ones = part.hidden.to(call.dtype), grad.new_ones(len(grad), 1)
    if part.grad_rows is not None and power is not None:
        ones = (part.grad_rows / power).to(call.dtype).unsqueeze(1)
        hidden = hidden * ones
    if call.weight_grad:
        products.add_product_(out.weight[classes], grad.t(), hidden, call.student_scale, first)
    if call.bias_grad:
        total = out.bias[classes].unsqueeze(1)
        products.add_product_(total, grad.t(), ones, call.student_scale, first)
