"""Register the sparse-teacher op: calls, fake kernels and gradients.

The formula in plain PyTorch, :func:`fastkd.reference.topk.terms`, is used for second derivatives,
under function transforms and on devices without kernels. docs/maths.md, section 13.
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
from fastkd._core.dense import KERNEL_DEVICES
from fastkd._core.objective import Objective
from fastkd._core.values import TAILS

_topk_loss = torch.ops.fastkd.topk_loss.default
_NUMBERS = (
    *("temperature", "hard_weight", "soft_weight", "label_smoothing", "ignore_index"),
    *("tail", "reduction", "normalizer"),
)


def is_fused(student: Tensor) -> bool:
    """Return True if the kernels compute the call."""
    return student.device.type in KERNEL_DEVICES and not autograd.is_transformed()


def _numbers(objective: Objective, tail: str) -> tuple[Any, ...]:
    """Return the denominator, if it is a tensor, and the numbers of the op (_NUMBERS)."""
    o = objective
    is_tensor = isinstance(o.normalizer, Tensor)
    return (
        o.normalizer if is_tensor else None,
        *(getattr(o, name) for name in _NUMBERS[:5]),
        TAILS.index(tail),
        shapes.REDUCTIONS.index(o.reduction),
        0.0 if is_tensor else o.normalizer or 0.0,
    )


def arguments(call: Call) -> tuple[Any, ...]:
    """Return the arguments of the op (csrc/torch/topk.cpp)."""
    assert call.topk is not None
    log_probs, indices, tail = call.topk
    indices, log_probs = to_savable(indices.long()), to_savable(log_probs.to(call.dtype))
    return (call.student, indices, log_probs, call.labels, *_numbers(call.objective, tail))


def compute(call: Call) -> Tensor:
    """Compute the loss of a checked call whose teacher is sparse, by the kernels."""
    out: Tensor = _topk_loss(*arguments(call))
    return out.reshape(call.student.shape[:-1]) if call.objective.reduction == "none" else out


def compute_by_operations(call: Call) -> reference.Terms:
    """Compute the loss and its terms by differentiable PyTorch operations."""
    return _by_operations(*arguments(call))


def _by_operations(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    denominator: Tensor | None,
    *numbers: Any,
) -> reference.Terms:
    options = dict(zip(_NUMBERS, numbers, strict=True))
    options["tail"] = TAILS[options["tail"]]
    options["reduction"] = shapes.REDUCTIONS[options["reduction"]]
    options["normalizer"] = options["normalizer"] or None if denominator is None else denominator
    return reference.topk.terms(student, log_probs, indices, labels, **options)


def prepare_call(objective: Objective, tail: str) -> Callable[..., Tensor]:
    """Bind the options of the op; return a function of student, indices, log_probs and labels.

    No option may be a tensor.
    """
    numbers = _numbers(objective, tail)
    return autograd.prepare_call("topk_loss", (None, None, None, None, *numbers), [0, 1, 2, 3])


autograd.register(
    "topk_loss", strided=False, formula=lambda *arguments: _by_operations(*arguments).loss
)


# ---- fake kernels


def _fake_out(student: Tensor, log_probs: Tensor, reduction: int) -> Tensor:
    per_row = shapes.REDUCTIONS[reduction] == "none"
    shape = [student.numel() // student.shape[-1]] if per_row else []
    return student.new_empty(shape, dtype=torch.promote_types(log_probs.dtype, torch.float32))


@torch.library.register_fake("fastkd::topk_loss")  # type: ignore[untyped-decorator]
def _(student: Tensor, indices: Tensor, log_probs: Tensor, *arguments: Any) -> Tensor:
    shapes.check_devices(student, indices, log_probs, *arguments)
    return _fake_out(student, log_probs, arguments[-2])


@torch.library.register_fake("fastkd::topk_loss_into")  # type: ignore[untyped-decorator]
def _(grad: Tensor, student: Tensor, indices: Tensor, log_probs: Tensor, *arguments: Any) -> Tensor:
    shapes.check_devices(grad, student, indices, log_probs, *arguments)
    return _fake_out(student, log_probs, arguments[-2])


@torch.library.register_fake("fastkd::topk_loss_backward_")  # type: ignore[untyped-decorator]
def _(grad: Tensor, *arguments: Any) -> None:
    shapes.check_devices(grad, *arguments)
