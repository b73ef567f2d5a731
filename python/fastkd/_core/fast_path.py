"""Decide by a few cheap checks whether a call of ``loss`` or ``topk_loss`` takes the fast path."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._core.autograd import is_transformed
from fastkd._core.checks import FLOATS
from fastkd._core.dense import KERNEL_DEVICES

_TENSORS = (Tensor, torch.nn.Parameter)
_FLOATS = frozenset(FLOATS)
IMMUTABLE = frozenset({bool, float, int, str, type(None)})
"""Types of options that may be part of the cache key of a checked call."""


def is_eligible(student: object, teacher: object, labels: object) -> bool:
    """Return True if the kernels may take these logits and class indices as they are.

    ``teacher``: logits, or the log-probabilities of a sparse teacher. The caller checks its shape.
    False does not mean that the call is wrong: the slow path then checks the call and computes it.
    Devices and memory layouts are left to the op, which refuses what it cannot take by a
    RuntimeError; the caller then takes the slow path, whose error names the argument.
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
