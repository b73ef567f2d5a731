"""Call the op of sparse teachers, and register its fake kernels and its gradient.

:func:`fastkd.reference.topk.terms` replaces the op for second derivatives, for batches of
gradients, for gradients of options, under function transforms, and on devices without kernels.
docs/maths.md, section 13, derives the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import autograd, shapes
from fastkd._core.arguments import Call
from fastkd._core.checks import to_savable
from fastkd._core.dense import DIVERGENCES, make_row_numbers, make_settings
from fastkd._core.objective import PER_ROW_OPTIONS, Objective
from fastkd._core.values import ESTIMATORS, TAILS

_topk_loss = torch.ops.fastkd.topk_loss.default
_NUMBERS = (
    *("temperature", "hard_weight", "soft_weight", "label_smoothing", "ignore_index"),
    *("divergence", "mix", "tail", "estimator", "reduction", "normalizer", "with_terms"),
)
_ESTIMATORS = (None, *ESTIMATORS)
"""The index of a name equals its value in the enum ``Estimator`` of csrc/topk.h."""


def _encode_numbers(
    objective: Objective, tail: str, estimator: str | None, with_terms: bool
) -> tuple[Any, ...]:
    """Return the denominator (None if the normalizer is no tensor) and values for ``_NUMBERS``."""
    rows = (getattr(objective, name) for name in PER_ROW_OPTIONS)
    numbers = [1.0 if isinstance(number, Tensor) else number for number in rows]
    settings = make_settings(objective, numbers, with_terms)
    settings |= {"tail": TAILS.index(tail), "estimator": _ESTIMATORS.index(estimator)}
    normalizer = objective.normalizer
    denominator = normalizer if isinstance(normalizer, Tensor) else None
    return (denominator, *(settings[name] for name in _NUMBERS))


def convert_lists(call: Call) -> tuple[Tensor, Tensor]:
    """Return the teacher's class indices and log-probabilities, in the dtypes of the op."""
    assert call.listed is not None
    log_probs, indices = call.listed[:2]
    return to_savable(indices.long()), to_savable(log_probs.detach().to(call.dtype))


def _make_arguments(call: Call, with_terms: bool) -> tuple[Any, ...]:
    assert call.listed is not None
    o = call.objective
    _, row_settings = make_row_numbers(
        call, (o.temperature, o.temperature, o.hard_weight, o.soft_weight)
    )
    numbers = _encode_numbers(o, call.listed.tail, call.listed.estimator, with_terms)
    return (call.student, *convert_lists(call), call.labels, row_settings, *numbers)


def compute(call: Call, with_terms: bool) -> Tensor:
    """Compute the loss with a sparse teacher, or all terms stacked, by one call of the op."""
    out: Tensor = _topk_loss(*_make_arguments(call, with_terms))
    if call.objective.reduction == "none":
        out = out.reshape((*out.shape[:-1], *call.student.shape[:-1]))
    return out


def compute_by_operations(call: Call) -> reference.Terms:
    """Compute the loss and its terms by differentiable PyTorch operations."""
    assert call.listed is not None
    indices, log_probs = convert_lists(call)
    names = [name for name in _NUMBERS if name in Objective._fields]
    options: Any = {name: getattr(call.objective, name) for name in names}
    options |= {"tail": call.listed.tail, "estimator": call.listed.estimator}
    return reference.topk.terms(call.student, log_probs, indices, call.labels, **options)


def _compute_op_by_operations(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    row_settings: Tensor | None,
    denominator: Tensor | None,
    *numbers: Any,
) -> Tensor:
    options = dict(zip(_NUMBERS, numbers, strict=True))
    del options["with_terms"]
    if row_settings is not None:
        rows = row_settings.reshape(4, *student.shape[:-1])
        options.update(temperature=rows[0], hard_weight=rows[2], soft_weight=rows[3])
    options["divergence"] = DIVERGENCES[options["divergence"]]
    if reference.DIVERGENCES[options["divergence"]].mix is None:
        options["mix"] = None
    options["tail"] = TAILS[options["tail"]]
    options["estimator"] = _ESTIMATORS[options["estimator"]]
    options["reduction"] = shapes.REDUCTIONS[options["reduction"]]
    options["normalizer"] = options["normalizer"] or None if denominator is None else denominator
    return reference.topk.terms(student, log_probs, indices, labels, **options).loss


def prepare_call(objective: Objective, tail: str) -> Callable[..., Tensor]:
    """Bind the options of the op; return a function of student, indices, log_probs and labels.

    No option may be a tensor.
    """
    arguments = (None, None, None, None, None, *_encode_numbers(objective, tail, None, False))
    return autograd.prepare_call("topk_loss", arguments, [0, 1, 2, 3])


autograd.register("topk_loss", strided=False, formula=_compute_op_by_operations)


# ---- fake kernels


def _make_fake_out(
    student: Tensor, log_probs: Tensor, reduction: int, _: float, with_terms: bool
) -> Tensor:
    per_row = shapes.REDUCTIONS[reduction] == "none"
    shape = [len(reference.Terms._fields)] if with_terms else []
    shape += [student.numel() // student.shape[-1]] if per_row else []
    return student.new_empty(shape, dtype=torch.promote_types(log_probs.dtype, torch.float32))


@torch.library.register_fake("fastkd::topk_loss")  # type: ignore[untyped-decorator]
def _(student: Tensor, indices: Tensor, log_probs: Tensor, *arguments: Any) -> Tensor:
    shapes.check_devices(student, indices, log_probs, *arguments)
    return _make_fake_out(student, log_probs, *arguments[-3:])


@torch.library.register_fake("fastkd::topk_loss_into")  # type: ignore[untyped-decorator]
def _(grad: Tensor, student: Tensor, indices: Tensor, log_probs: Tensor, *arguments: Any) -> Tensor:
    shapes.check_devices(grad, student, indices, log_probs, *arguments)
    return _make_fake_out(student, log_probs, *arguments[-3:])


@torch.library.register_fake("fastkd::topk_loss_backward_")  # type: ignore[untyped-decorator]
def _(grad: Tensor, *arguments: Any) -> None:
    shapes.check_devices(grad, *arguments)
