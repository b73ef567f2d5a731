"""The loss of a student that is a head: its logits exist in part at a time."""

from __future__ import annotations

from torch import Tensor

from fastkd._core import autograd
from fastkd._core.arguments import Teacher
from fastkd._core.objective import Options
from fastkd._core.values import Head
from fastkd.linear import autograd as derivatives
from fastkd.linear import chunks
from fastkd.linear.arguments import prepare_heads
from fastkd.linear.call import LinearCall


def compute(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, with_terms: bool
) -> Tensor:
    """Check the arguments, plan the chunks, and compute the loss, or all terms stacked."""
    inputs, call = prepare_heads(student, teacher, labels, options, with_terms)
    plan = chunks.choose(options.chunks, inputs, call)
    if autograd.is_transformed():
        return derivatives.by_operations(inputs, call).reshape(_shape(student, call))
    call = call._replace(
        accumulate=plan.accumulate,
        chunk=max(1, plan.chunk),
        by_classes=plan.chunk_by == "classes",
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
