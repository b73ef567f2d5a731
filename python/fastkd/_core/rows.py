"""Flatten a checked call to rows, and run the reference on parts of the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkd import reference
from fastkd._core.arguments import Call
from fastkd._core.objective import PER_ROW_OPTIONS, Objective

# The reference saves about 14 tensors of the logits' size for its backward pass. Larger inputs are
# split into parts, and the backward pass recomputes each part, which bounds the memory.
MAX_LOGITS_PER_PART = 2**24


def compute_reference_terms(call: Call) -> reference.Terms:
    """Compute the terms of all rows at once by :mod:`fastkd.reference`."""
    return reference.terms(call.student, call.teachers, call.labels, **call.objective._asdict())


def map_rows(call: Call, function: Callable[[Tensor], Tensor]) -> Call:
    """Apply a function to every tensor of the call whose first dimensions are the rows.

    The call must not have a sparse teacher.
    """
    o = call.objective._asdict()
    for name in PER_ROW_OPTIONS:
        if isinstance(o[name], Tensor) and o[name].dim():
            o[name] = function(o[name])
    return call._replace(
        student=function(call.student),
        teachers=tuple(function(teacher) for teacher in call.teachers),
        labels=None if call.labels is None else function(call.labels),
        objective=Objective(**o),
    )


def flatten_rows(call: Call) -> tuple[Call, tuple[float | Tensor, float | Tensor]]:
    """Flatten the rows; return the call, and the divisors of the hard and the soft term.

    The reduction "mean" becomes "sum", and the weights of the terms are divided by the divisors.
    """
    dims = call.student.dim() - 1
    call = map_rows(call, lambda x: x.flatten(0, dims - 1) if dims else x.unsqueeze(0))
    divisors: tuple[float | Tensor, float | Tensor] = (1.0, 1.0)
    o = call.objective
    if o.reduction == "mean":
        divisors = _compute_divisors(call)
        o = o._replace(reduction="sum", normalizer=None)
    hard, soft = o.hard_weight / divisors[0], o.soft_weight / divisors[1]
    return call._replace(objective=o._replace(hard_weight=hard, soft_weight=soft)), divisors


def compute_mean_divisors(
    rows: int, labels: Tensor | None, o: Objective, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """Return the divisors of the hard and the soft term in a mean."""
    if o.normalizer is not None:
        return o.normalizer, o.normalizer
    if labels is None or labels.is_floating_point():
        return max(rows, 1), max(rows, 1)
    valid = labels != o.ignore_index
    count = valid.sum().clamp(min=1).to(dtype)
    if o.class_weight is None:
        return count, count
    # The loss of a row whose label is out of range is NaN, so the weight of that row is irrelevant.
    classes = labels.clamp(0, len(o.class_weight) - 1)
    weight = (o.class_weight[classes] * valid).sum(dtype=dtype)
    return weight.where(weight != 0, torch.ones_like(weight)), count


def _compute_divisors(call: Call) -> tuple[float | Tensor, float | Tensor]:
    rows = call.student.numel() // call.student.shape[-1]
    return compute_mean_divisors(rows, call.labels, call.objective, call.dtype)


def compute_divisor_ratio(call: Call) -> float | Tensor:
    """Return the soft term's divisor divided by the hard term's divisor.

    The kernels divide both terms by the soft term's divisor, so the hard term needs this factor.
    """
    if call.objective.reduction != "mean" or call.objective.normalizer is not None:
        return 1.0
    hard_divisor, soft_divisor = _compute_divisors(call)
    return soft_divisor / hard_divisor


def compute_checkpointed(call: Call) -> reference.Terms:
    """Compute the terms by :mod:`fastkd.reference`, in parts that bound the temporary memory."""
    if call.student.numel() <= MAX_LOGITS_PER_PART:
        return compute_reference_terms(call)
    rows, (hard_divisor, soft_divisor) = flatten_rows(call)
    step = max(1, MAX_LOGITS_PER_PART // call.student.shape[-1])
    # The backward pass of split() concatenates the gradients of the parts. The backward pass of
    # slices would add a tensor of the full size for each part.
    splits: dict[int, tuple[Tensor, ...]] = {}
    map_rows(rows, lambda x: splits.setdefault(id(x), x.split(step))[0])  # type: ignore[no-untyped-call]
    parts = [
        checkpoint(
            compute_reference_terms,
            map_rows(rows, lambda x, i=i: splits[id(x)][i]),  # type: ignore[misc]
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for i in range(len(splits[id(rows.student)]))
    ]
    fields = [field for field in zip(*parts, strict=True) if field[0] is not None]
    if call.objective.reduction == "none":
        shape = call.student.shape[:-1]
        return reference.Terms(*(torch.cat(field).reshape(shape) for field in fields))
    loss, hard, *others = (torch.stack(field).sum() for field in fields)
    return reference.Terms(loss, hard / hard_divisor, *(field / soft_divisor for field in others))
