"""Run the loss with cached options if the tensors of a call pass a few cheap checks.

The slow path (arguments.py, dispatch.py) checks every argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd._core import dense, native, topk
from fastkd._core.arguments import check_tail
from fastkd._core.autograd import is_transformed
from fastkd._core.objective import Options, resolve
from fastkd._core.shapes import accumulator
from fastkd._core.values import TAILS, TopK

_TENSORS = (Tensor, torch.nn.Parameter)
# Looking up these attributes in torch would take time in every call.
_function_modes = torch._C._len_torch_function_stack
_is_grad_enabled = torch.is_grad_enabled
_int64 = torch.int64
_IMMUTABLE = frozenset({bool, float, int, str, type(None)})
_BoundOp = Callable[..., Tensor] | None
_bound_ops: dict[tuple[Any, ...], _BoundOp] = {}
_MAX_BOUND_OPS = 128


def run(
    with_terms: bool, student: object, teacher: object, labels: object, options: tuple[Any, ...]
) -> Tensor | None:
    """Compute the loss, or all terms stacked; return None if the slow path must compute it.

    ``options``: the fields of :class:`Options`. The result is also None for invalid tensors, which
    the slow path reports. Invalid options may raise an error here.
    """
    try:
        if type(teacher) is TopK:
            log_probs, indices, tail = teacher
            # _replace() does not check the fields that it sets.
            if with_terms or type(tail) is not str or tail not in TAILS:
                return None
            if not _is_sparse_eligible(student, log_probs, indices, labels):
                return None
            call = _find_call(tail, False, labels is not None, options)
            return None if call is None else call(student, indices, log_probs, labels)
        if not is_eligible(student, teacher, labels):
            return None
        call = _find_call(None, with_terms, labels is not None, options)
        return None if call is None else call(student, teacher, labels)
    except RuntimeError:
        # The op refused the tensors. The slow path converts the tensors, or reports an error.
        return None


def _find_call(
    tail: str | None, with_terms: bool, has_labels: bool, options: tuple[Any, ...]
) -> _BoundOp:
    """Return the op with ``options`` bound, or None if the fast path does not support them."""
    # The key includes types, because True == 1 == 1.0, and native.EAGER, because tests replace it.
    types = tuple(map(type, options))
    key = (native.EAGER, tail, with_terms, has_labels, types, options)
    try:
        return _bound_ops[key]
    except TypeError:  # an option that cannot be hashed, such as a list
        return None
    except KeyError:
        pass
    if not _IMMUTABLE.issuperset(types):
        return None
    if len(_bound_ops) >= _MAX_BOUND_OPS:
        _bound_ops.clear()
    call = _bound_ops[key] = _bind(tail, with_terms, has_labels, Options(*options))
    return call


def _bind(tail: str | None, with_terms: bool, has_labels: bool, options: Options) -> _BoundOp:
    """Check options and bind them to the op; return None if the fast path does not support them."""
    if (
        options.chunks != "auto"
        or options.inplace is not False
        or options.dim != -1
        or options.shift
    ):
        return None
    if tail is not None:
        check_tail(tail, options)
    is_sparse = tail is not None
    objective = resolve(options, has_labels=has_labels, teachers=1, is_sparse=is_sparse)
    if objective.reduction == "none" or objective.normalizer == 0:
        return None
    if tail is not None:
        return topk.prepare_call(objective, tail)
    fused = objective.divergence in dense.DIVERGENCES and objective.divergence != "dkd"
    if not fused or objective.teacher_form != "logits" or objective.standardize:
        return None
    return dense.prepare_call(objective, with_terms)


def is_eligible(student: object, teacher: object, labels: object) -> bool:
    """Return True if the kernels may take the logits and class indices without conversion.

    ``teacher``: logits, or the log-probabilities of a sparse teacher. Shapes, floating-point dtypes
    and memory layouts are not checked here: the op checks them.
    """
    if type(student) not in _TENSORS or type(teacher) not in _TENSORS:
        return False
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    if not (
        (student.is_cpu or (native.CUDA_KERNELS and student.is_cuda))
        and not teacher.requires_grad
        and not is_transformed()
        and _function_modes() == 0
    ):
        return False
    if labels is None:
        return not (_is_grad_enabled() and teacher.is_inference())
    if type(labels) is not Tensor or labels.dtype is not _int64:
        return False
    # Autograd cannot save inference tensors.
    return not (_is_grad_enabled() and (teacher.is_inference() or labels.is_inference()))


def _is_sparse_eligible(student: Any, log_probs: Any, indices: Any, labels: object) -> bool:
    return (
        is_eligible(student, log_probs, labels)
        and type(indices) is Tensor
        and indices.dtype is torch.int64
        and indices.shape == log_probs.shape
        and indices.shape[:-1] == student.shape[:-1]
        and indices.layout is torch.strided
        and log_probs.dtype is accumulator(student, log_probs)
        and not (torch.is_grad_enabled() and indices.is_inference())
    )
