"""Run a call of the loss with cached options if a few cheap checks show that its tensors allow it.

The slow path (arguments.py, dispatch.py) checks every argument of every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd._core import dispatch, native, topk
from fastkd._core.arguments import check_sparse_options
from fastkd._core.autograd import is_transformed
from fastkd._core.checks import FLOATS
from fastkd._core.dense import KERNEL_DEVICES
from fastkd._core.objective import Options, resolve
from fastkd._core.shapes import accumulator
from fastkd._core.values import TAILS, TopK

_TENSORS = (Tensor, torch.nn.Parameter)
_FLOATS = frozenset(FLOATS)
_IMMUTABLE = frozenset({bool, float, int, str, type(None)})


def run(
    with_terms: bool, student: object, teacher: object, labels: object, options: tuple[Any, ...]
) -> Tensor | None:
    """Compute the loss, or all terms stacked; return None if the slow path must do it.

    ``options``: the fields of :class:`Options`. None does not mean that the call is wrong.
    """
    if not _IMMUTABLE.issuperset(map(type, options)):
        return None
    try:
        if type(teacher) is TopK:
            log_probs, indices, tail = teacher
            # A field that _replace() has set was not checked.
            if with_terms or type(tail) is not str or tail not in TAILS:
                return None
            if not _are_lists_eligible(student, log_probs, indices, labels):
                return None
            call = _prepare(native.EAGER, tail, False, labels is not None, *options)
            return None if call is None else call(student, indices, log_probs, labels)
        if not is_eligible(student, teacher, labels) or student.shape != teacher.shape:  # type: ignore[attr-defined]
            return None
        call = _prepare(native.EAGER, None, with_terms, labels is not None, *options)
        return None if call is None else call(student, teacher, labels)
    except RuntimeError:
        # The op refused the tensors. The slow path fails likewise, and explains why.
        return None


@functools.lru_cache(maxsize=128, typed=True)
def _prepare(
    _eager: Any, tail: str | None, with_terms: bool, has_labels: bool, *values: Any
) -> Callable[..., Tensor] | None:
    """Check the options and bind them to the op; return None if the fast path lacks one of them.

    ``_eager`` is only part of the cache key: autograd in C++ and in Python have different calls.
    """
    options = Options(*values)
    if options.chunks != "auto" or options.inplace is not False or options.dim != -1:
        return None
    if tail is not None:
        check_sparse_options(options)
    objective = resolve(
        options,
        has_labels=has_labels,
        teachers=1,
        default_temperature=2.0 if tail is None else 1.0,
    )
    if objective.reduction == "none" or objective.normalizer == 0:
        return None
    if tail is not None:
        return topk.prepare_call(objective, tail)
    fused = objective.divergence in dispatch.FUSED and objective.divergence != "dkd"
    if not fused or objective.teacher_form != "logits" or objective.standardize:
        return None
    return dispatch.prepare_call(objective, with_terms)


def is_eligible(student: object, teacher: object, labels: object) -> bool:
    """Return True if the kernels may take these logits and class indices as they are.

    ``teacher``: logits, or the log-probabilities of a sparse teacher. The caller checks its shape.
    Devices and memory layouts are left to the op, which refuses what it cannot take by a
    RuntimeError.
    """
    if type(student) not in _TENSORS or type(teacher) not in _TENSORS:
        return False
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    shape = student.shape
    if not (
        student.dtype in _FLOATS
        and teacher.dtype in _FLOATS
        and (student.is_cpu or student.device.type in KERNEL_DEVICES)
        and len(shape) > 0
        and shape[-1] > 0
        and not teacher.requires_grad
        and not is_transformed()
        and torch._C._len_torch_function_stack() == 0
    ):
        return False
    saves = torch.is_grad_enabled()  # autograd cannot save inference tensors
    if labels is None:
        return not (saves and teacher.is_inference())
    return (
        type(labels) is Tensor
        and labels.dtype is torch.int64
        and labels.shape == shape[:-1]
        and not (saves and (teacher.is_inference() or labels.is_inference()))
    )


def _are_lists_eligible(student: Any, log_probs: Any, indices: Any, labels: object) -> bool:
    """Return True if the kernels may take these logits, lists and class indices as they are."""
    return (
        is_eligible(student, log_probs, labels)
        and type(indices) is Tensor
        and indices.dtype is torch.int64
        and not indices.is_nested
        and indices.shape == log_probs.shape
        and indices.shape[:-1] == student.shape[:-1]
        and indices.dim() == student.dim()
        and indices.shape[-1] > 0
        and indices.device == student.device
        and indices.layout is torch.strided
        and log_probs.dtype is accumulator(student, log_probs)
        and not (torch.is_grad_enabled() and indices.is_inference())
    )
