"""Register the sparse-teacher op: calls, fake kernels and gradients.

The formula in plain PyTorch, :func:`fastkd.reference.topk.terms`, is used for second derivatives,
under function transforms and on devices without kernels. docs/maths.md, section 13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import autograd, shapes
from fastkd._core.arguments import Call
from fastkd._core.dense import KERNEL_DEVICES
from fastkd._core.objective import Objective
from fastkd._core.values import TAILS

_topk_loss = torch.ops.fastkd.topk_loss.default


class TopKSettings(NamedTuple):
    """The numbers of a call, in the order of the ops' schemas (csrc/torch/topk.cpp)."""

    temperature: float
    hard_weight: float
    soft_weight: float
    label_smoothing: float
    ignore_index: int
    divergence: int
    mix: float
    tail: int
    estimator: int
    reduction: int
    normalizer: float

    def as_options(self, denominator: Tensor | None) -> dict[str, Any]:
        """Return the arguments of :func:`fastkd.reference.topk.terms`."""
        return {
            **self._asdict(),
            "tail": TAILS[self.tail],
            "reduction": shapes.REDUCTIONS[self.reduction],
            "normalizer": self.normalizer or None if denominator is None else denominator,
        }


def _settings(objective: Objective, tail: str) -> tuple[Tensor | None, TopKSettings]:
    """Return the denominator, if it is a tensor, and the numbers of the op."""
    o = objective
    denominator = o.normalizer if isinstance(o.normalizer, Tensor) else None
    return denominator, TopKSettings(
        o.temperature,  # type: ignore[arg-type]
        o.hard_weight,  # type: ignore[arg-type]
        o.soft_weight,  # type: ignore[arg-type]
        o.label_smoothing,
        o.ignore_index,
        TAILS.index(tail),
        shapes.REDUCTIONS.index(o.reduction),
        0.0 if denominator is not None else o.normalizer or 0.0,  # type: ignore[arg-type]
    )


def is_fused(student: Tensor) -> bool:
    """Return True if the kernels compute the call."""
    return student.device.type in KERNEL_DEVICES and not autograd.is_transformed()


def compute(call: Call) -> Tensor:
    """Compute the loss of a checked call whose teacher is sparse, by the kernels."""
    topk, objective = call.topk, call.objective
    assert topk is not None
    denominator, settings = _settings(objective, topk.tail)
    arguments = (topk.indices, topk.log_probs, call.labels, denominator)
    out: Tensor = _topk_loss(call.student, *arguments, *settings)
    return out.reshape(call.student.shape[:-1]) if objective.reduction == "none" else out


def compute_by_operations(call: Call) -> reference.Terms:
    """Compute the loss and its terms by differentiable PyTorch operations."""
    topk = call.topk
    assert topk is not None
    denominator, settings = _settings(call.objective, topk.tail)
    options = settings.as_options(denominator)
    return reference.topk.terms(call.student, *topk[:2], call.labels, **options)


def prepare_call(objective: Objective, tail: str) -> Callable[..., Tensor]:
    """Bind the options of the op; return a function of student, indices, log_probs and labels.

    No option may be a tensor.
    """
    _, settings = _settings(objective, tail)
    arguments = (None, None, None, None, None, *settings)
    return autograd.prepare_call("topk_loss", arguments, [0, 1, 2, 3])


# ---- fake kernels, and gradients


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


def _gradient(grad_output: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    """Compute grad_output times the gradient by differentiable operations."""
    indices, log_probs, labels, denominator = arguments[:4]
    options = TopKSettings(*arguments[4:]).as_options(denominator)
    with torch.enable_grad():
        leaf = student if student.requires_grad else student.detach().requires_grad_()
        out = reference.topk.terms(leaf, log_probs, indices, labels, **options).loss
        gradient = torch.autograd.grad(
            out.reshape(grad_output.shape), leaf, grad_output, create_graph=True
        )
    return gradient[0]


autograd.register("topk_loss", strided=False, gradient=_gradient)
