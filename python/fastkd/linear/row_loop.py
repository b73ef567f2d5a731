"""The loop behind :func:`fastkd.linear_loss`: rows in chunks, gradients ready in the forward pass.

For each chunk: the logits of both into buffers that every chunk reuses; the loss, which writes its
gradient over the student's logits; and from that gradient the rows of the hidden states' and a
term of the weight's. Nothing waits for the device but counting the rows that are not ignored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._core import dispatch, topk
from fastkd._core.objective import Objective
from fastkd.linear import products


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
    """This and the next three: one number for each row, in place of that of ``Call``."""
    teacher_temperature: Tensor | None
    hard_weight: Tensor | None
    soft_weight: Tensor | None
    class_weight: Tensor | None
    denominator: Tensor | None
    """What "mean" divides by."""
    grad_rows: Tensor | None
    """What each row's gradient is multiplied by: the grad_output of reduction="none"."""


_NUMBERS = ("temperature", "teacher_temperature", "hard_weight", "soft_weight")
OUTPUTS_OF_ROWS = ("hidden", "teacher_hidden", "teacher_logits", "topk_indices", "topk_log_probs")
"""What of ``Inputs`` has, for each row, as many numbers as it likes."""
_OF_ROWS = (*OUTPUTS_OF_ROWS, "labels", *_NUMBERS, "grad_rows")


class Call(NamedTuple):
    """The numbers and names of a call, in the order of the op's schema."""

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
    """Of a sparse teacher."""
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float
    teacher_scale: float
    dtype: torch.dtype
    """What the student's logits are computed in: its own, or autocast's."""
    teacher_dtype: torch.dtype
    accumulate: torch.dtype
    """What the gradient of the weight is summed up in."""
    chunk: int
    """Rows of a chunk, or, if ``by_classes``, most classes."""
    by_classes: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool

    @property
    def grads(self) -> bool:
        """Whether anything is differentiated."""
        return self.hidden_grad or self.weight_grad or self.bias_grad


def scales_late(call: Call) -> bool:
    """Whether the gradients wait for the denominator: a mean's underflow in float16."""
    # No property of Call: Dynamo of older torches cannot trace one where sizes are dynamic.
    return call.reduction == "mean" and call.dtype is torch.float16


def objective_of(inputs: Inputs, call: Call) -> Objective:
    """What the loss of some rows is, for the core."""
    numbers: dict[str, Any] = {}
    for name in _NUMBERS:
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


# What autograd keeps of a loss that is not fused, at most: tensors of its logits in float32.
_REFERENCE_LOGITS = 24


class Outputs(NamedTuple):
    """What a call gives; gradients that are not wanted are empty."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    """In ``Call.accumulate``."""
    bias: Tensor
    """float32 or float64."""


def acc_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of losses, of logits in these."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def empty_outputs(inputs: Inputs, call: Call) -> Outputs:
    """Memory for what a call gives; all that tracing needs to know."""
    hidden, weight = inputs.hidden, inputs.weight
    acc = acc_dtype(call.dtype, call.teacher_dtype)
    return Outputs(
        hidden.new_empty(hidden.shape[:1] if call.reduction == "none" else (), dtype=acc),
        hidden.new_empty(hidden.shape if call.hidden_grad else (0,)),
        weight.new_empty(weight.shape if call.weight_grad else (0,), dtype=call.accumulate),
        weight.new_empty(weight.shape[:1] if call.bias_grad else (0,), dtype=acc),
    )


def counted_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """The positions of the rows that are not ignored; None if that is all of them.

    This waits for a GPU, once. While a CUDA graph is captured nothing may wait: all rows are kept
    then, and the loss leaves the ignored ones out.
    """
    if labels is None or labels.is_floating_point():
        return None
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    counted = (labels != ignore_index).nonzero().squeeze(1)
    return None if counted.numel() == labels.numel() else counted


class _Heads:
    """The buffers of a call, and the steps of the loop."""

    def __init__(self, inputs: Inputs, call: Call, out: Outputs, counted: Tensor | None) -> None:
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
        """The student's logits, and what the soft cap multiplies their gradient by."""
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
        """The teacher's logits; None, if it is sparse."""
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
        """The loss of a chunk and its gradient, in its logits' memory where a kernel does that."""
        objective, teacher = objective_of(part, self.call), self.teacher(part)
        if scales_late(self.call):
            objective = objective._replace(reduction="sum", normalizer=None)
        if not self.call.grads:
            return loss_of(logits, teacher, part, objective, self.call, False), None
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            inplace = teacher is not None and dispatch.is_fused(logits, part.labels, objective)
            value = loss_of(leaf.view_as(leaf), teacher, part, objective, self.call, inplace)
        (grad,) = torch.autograd.grad(value, leaf)
        return value.detach(), grad

    def drop_logits(self) -> None:
        """Gives back the buffers, but for what holds the gradient."""
        self.logits = self.teacher_logits = None

    def add_gradients(self, grad: Tensor, part: Inputs, rows: slice | Tensor, first: bool) -> None:
        """What a chunk's gradient says about its hidden states, the weight and the bias."""
        call, out, scale = self.call, self.out, self.call.student_scale
        factor = part.grad_rows
        if call.hidden_grad:
            direct = isinstance(rows, slice) and out.hidden.dtype == grad.dtype
            into = out.hidden[rows] if direct else torch.empty_like(part.hidden, dtype=grad.dtype)
            products.hidden_gradient_(into, grad, self.weight, scale)
            if factor is not None:
                into.mul_(factor.unsqueeze(1))
            if not direct:
                out.hidden[rows] = into.to(out.hidden.dtype)
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


def power_of(factors: Tensor) -> Tensor:
    """A power of two that leaves of all ``factors`` none above 1: in float16 products overflow."""
    largest = factors.abs().amax()
    # Of no number there is none: 0 / 0 and inf / inf.
    return (largest / torch.frexp(largest).mantissa).nan_to_num(1.0)


def logits_per_row(inputs: Inputs, call: Call) -> float:
    """Tensors of logits, in the student's dtype, that are alive at a time."""
    buffers = 2.0  # the teacher's are one of them; of a sparse one, the gradient
    if inputs.topk_indices is not None:
        # Lists of 8-byte numbers: a chunk's, and as the kernel takes them.
        lists = 4 * 8 * inputs.topk_indices.shape[-1]
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


def loss_of(
    student: Tensor,
    teacher: Tensor | None,
    part: Inputs,
    objective: Objective,
    call: Call,
    inplace: bool,
) -> Tensor:
    """The loss of logits; without the teacher's, of its lists."""
    if teacher is not None:
        return dispatch.compute(
            student, (teacher,), part.labels, objective, with_terms=False, inplace=inplace
        )
    assert part.topk_indices is not None and part.topk_log_probs is not None
    return topk.compute(
        student, part.topk_indices, part.topk_log_probs, part.labels, objective, call.tail
    )


def soft_cap_(logits: Tensor, cap: float, slope: Tensor | None) -> None:
    """logits = cap * tanh(logits / cap), and that function's derivative into ``slope``."""
    logits.div_(cap)
    if slope is not None:
        # 1 / cosh^2: 1 - tanh^2 would lose what 16 bits leave of it.
        torch.cosh(logits, out=slope).pow_(-2)
    logits.tanh_().mul_(cap)


def rows_of(inputs: Inputs, index: slice | Tensor) -> dict[str, Tensor]:
    """Some rows of what has any."""
    values = {name: getattr(inputs, name) for name in _OF_ROWS}
    return {
        name: value[index] for name, value in values.items() if value is not None and value.dim()
    }


def run_by_rows(inputs: Inputs, call: Call, counted: Tensor | None) -> Outputs:
    """The loss, and its gradients for a grad_output of 1, of at least one row that counts.

    With ``scales_late()`` the gradients lack the division by the denominator.
    """
    out = empty_outputs(inputs, call)
    rows = inputs.hidden.shape[0] if counted is None else counted.numel()
    if counted is not None:
        out.hidden.zero_()
    if call.reduction != "none" or counted is not None:
        out.loss.zero_()
    chunk = -(-rows // -(-rows // call.chunk))  # of equal size, now that the number is known
    heads = _Heads(inputs, call._replace(chunk=chunk), out, counted)
    for start in range(0, rows, chunk):
        index: slice | Tensor = slice(start, min(rows, start + chunk))
        if counted is not None:
            index = counted[index]
        part = inputs._replace(**rows_of(inputs, index))
        logits, slope = heads.student(part.hidden.to(call.dtype))
        value, grad = heads.loss(logits, part)
        del logits
        if call.reduction == "none":
            out.loss[index] = value
        else:
            out.loss.add_(value)
        if grad is not None:
            if chunk == rows:
                heads.drop_logits()
            if slope is not None:
                grad.mul_(slope)
            heads.add_gradients(grad, part, index, start == 0)
            del grad  # before the next chunk's, where it is not in the buffer of the logits
    if heads.power is not None:
        out.weight.mul_(heads.power)
        out.bias.mul_(heads.power)
    if scales_late(call) and inputs.denominator is not None:
        out.loss.div_(inputs.denominator)
    return out
