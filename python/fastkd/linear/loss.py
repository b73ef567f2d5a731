"""Compute the loss of a Head student in chunks of logits."""

from __future__ import annotations

from torch import Tensor

from fastkd._core.arguments import Teacher
from fastkd._core.autograd import is_traced, is_transformed
from fastkd._core.objective import Options
from fastkd._core.values import Head
from fastkd.linear import autograd, chunks
from fastkd.linear.arguments import prepare_heads
from fastkd.linear.call import LinearCall


def compute(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, with_terms: bool
) -> Tensor:
    """Check the arguments, plan the chunks, and compute the loss, or all terms stacked."""
    inputs, call = prepare_heads(student, teacher, labels, options, with_terms)
    plan = chunks.choose_plan(options.chunks, inputs, call)
    if is_transformed():
        return autograd.by_operations(inputs, call).reshape(_shape(student, call))
    call = call._replace(
        accumulate=plan.accumulate,
        chunk=max(1, plan.chunk),
        by_classes=plan.chunk_by == "classes",
    )
    if call.grads and not is_traced():  # a traced op has its own autograd kernel
        out = autograd.LinearLoss.apply(call, *inputs)  # type: ignore[no-untyped-call]
    else:
        out = autograd.compute(inputs, call).loss
    return out.reshape(_shape(student, call))  # type: ignore[no-any-return]


def _shape(student: Head, call: LinearCall) -> tuple[int, ...]:
    """Return the shape of the result."""
    rows = student.hidden.shape[:-1] if call.reduction == "none" else ()
    return (6, *rows) if call.with_terms else tuple(rows)
