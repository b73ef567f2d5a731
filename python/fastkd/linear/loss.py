"""The loss of a student that is a head: its logits exist in part at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd._core import autograd
from fastkd._core.arguments import Teacher
from fastkd._core.objective import Options
from fastkd._core.values import Head
from fastkd.linear import autograd as derivatives
from fastkd.linear import class_loop
from fastkd.linear.arguments import cast_per_class, copied_per_row, prepare_heads
from fastkd.linear.call import Inputs, LinearCall, logits_per_row
from fastkd.linear.chunks import Plan, check_accumulate_dtype, plan

_TYPICAL_ROWS = 4096


def compute(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, with_terms: bool
) -> Tensor:
    """Check the arguments, plan the chunks, and compute the loss, or all terms stacked."""
    inputs, call = prepare_heads(student, teacher, labels, options, with_terms)
    _check_chunks(options.chunks, inputs, call)
    if autograd.is_transformed():
        return derivatives.by_operations(inputs, call).reshape(_shape(student, call))
    chosen = options.chunks if isinstance(options.chunks, Plan) else _plan(inputs, call)
    call = call._replace(
        accumulate=chosen.accumulate,
        chunk=max(1, chosen.chunk),
        by_classes=chosen.chunk_by == "classes",
    )
    if call.grads and not autograd.is_traced():  # a traced op has its own autograd kernel
        out = derivatives.LinearLoss.apply(call, *inputs)  # type: ignore[no-untyped-call]
    else:
        out = derivatives.compute(inputs, call).loss
    return out.reshape(_shape(student, call))  # type: ignore[no-any-return]


def _shape(student: Head, call: LinearCall) -> tuple[int, ...]:
    """Return the shape of the result."""
    rows = student.hidden.shape[:-1] if call.reduction == "none" else ()
    return (6, *rows) if call.with_terms else tuple(rows)


def _plan(inputs: Inputs, call: LinearCall) -> Plan:
    """Return the chunks for a call that asks for ``chunks="auto"``."""
    return plan(
        _rows(inputs.hidden),
        *inputs.weight.shape,
        dtype=call.dtype,
        teacher_dtype=call.dtype if inputs.topk_indices is not None else call.teacher_dtype,
        weight_dtype=inputs.weight.dtype,
        teacher_width=0 if inputs.teacher_weight is None else inputs.teacher_weight.shape[1],
        device="cuda" if inputs.hidden.is_cuda else "cpu",
        logits_per_row=logits_per_row(inputs, call),
        cast_per_class=cast_per_class(inputs, call),
        copied_per_row=copied_per_row(inputs, call),
        weight_grad=call.weight_grad,
    )


def _check_chunks(chunks: Any, inputs: Inputs, call: LinearCall) -> None:
    """Raise unless ``chunks`` is "auto", or a plan that the call can keep to."""
    if isinstance(chunks, str) and chunks == "auto":
        return
    if not isinstance(chunks, Plan):
        raise TypeError(
            f'chunks must be "auto" or the result of fastkd.chunks.plan; got {chunks!r}'
        )
    check_accumulate_dtype(chunks.accumulate, inputs.weight.dtype, "chunks.accumulate")
    if not autograd.is_traced() and inputs.hidden.shape[0] > chunks.rows:
        raise ValueError(
            f"chunks must be a plan for at least as many rows as the call has, "
            f"{inputs.hidden.shape[0]}; got one for {chunks.rows}"
        )
    lacks = class_loop.missing(inputs, call) if chunks.chunk_by == "classes" else []
    if lacks:
        raise ValueError(
            f'chunks must be a plan of rows (chunk_by="rows") with {" and ".join(lacks)}; got '
            "chunks of classes"
        )


def _rows(hidden: Tensor) -> int:
    """Return the number of rows, or a typical one if a trace does not know it.

    After a boolean mask the number of rows depends on the data. It sets the size of chunks alone.
    """
    rows = hidden.shape[0]
    if not autograd.is_traced():
        return rows
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return rows if statically_known_true(rows > 0) else _TYPICAL_ROWS
