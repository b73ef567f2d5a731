"""Decide by a few cheap checks whether a call of ``loss`` or ``topk_loss`` takes the fast path."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.autograd import is_transformed
from fastkd.checks import FLOATS
from fastkd.derivatives import KERNEL_DEVICES

_TENSORS = (Tensor, torch.nn.Parameter)
_FLOATS = frozenset(FLOATS)
IMMUTABLE = frozenset({bool, float, int, str, type(None)})
"""Types of options that may be part of the cache key of a checked call."""


def is_eligible(student: object, teacher: object, labels: object) -> bool:
    """Return True if the kernels take these logits and class indices as they are.

    ``teacher``: logits, or the log-probabilities of a sparse teacher. The caller checks its shape.
    False does not mean that the call is wrong: the slow path then checks the call and computes it.
    """
    if type(student) not in _TENSORS or type(teacher) not in _TENSORS:
        return False
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    if student.layout is not torch.strided or student.is_nested:
        return False
    device, shape = student.device, student.shape
    if not (
        student.dtype in _FLOATS
        and teacher.dtype in _FLOATS
        and teacher.device == device
        and device.type in KERNEL_DEVICES
        and teacher.layout is torch.strided
        and not teacher.is_nested
        and len(shape) > 0
        and shape[-1] > 0
        and not teacher.requires_grad
        and not is_transformed()
        and torch._C._len_torch_function_stack() == 0
        and not (torch.is_grad_enabled() and teacher.is_inference())
    ):
        return False
    if labels is None:
        return True
    return (
        type(labels) is Tensor
        and labels.dtype is torch.int64
        and not labels.is_nested
        and labels.shape == shape[:-1]
        and labels.device == device
        and labels.layout is torch.strided
        and not (torch.is_grad_enabled() and labels.is_inference())
    )
