"""Register fake kernels of the native ops for meta tensors, FakeTensor and torch.compile.

topk.py registers the fake kernels of the sparse loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastkd import reference

REDUCTIONS = reference.REDUCTIONS  # the index of a name is its number in csrc
TERMS = len(reference.Terms._fields) - len(reference.Terms._field_defaults)
"""Number of terms with a dense teacher; the last fields of ``Terms`` need a sparse teacher."""
STATS = 7  # equals kStats of csrc/kernels.h


def accumulator(*logits: Tensor) -> torch.dtype:
    """Return the dtype of the loss: float64 if any of ``logits`` is float64, else float32."""
    is_double = any(tensor.dtype is torch.float64 for tensor in logits)
    return torch.float64 if is_double else torch.float32


def check_devices(*arguments: Any) -> None:
    """Raise RuntimeError unless all tensors among the arguments of an op are on one device.

    If the student is on a CPU or GPU and another tensor is on "meta", the dispatcher calls a fake
    kernel. The result would be uninitialized memory.
    """
    lists = [each if isinstance(each, (list, tuple)) else [each] for each in arguments]
    devices = {tensor.device for each in lists for tensor in each if isinstance(tensor, Tensor)}
    if len(devices) > 1:
        names = sorted(str(device) for device in devices)
        raise RuntimeError(f"all tensors must be on one device; got tensors on {names}")


def _make_fake_out(
    student: Tensor, teachers: Sequence[Tensor], reduction: int, with_terms: bool
) -> Tensor:
    shape = [TERMS] if with_terms else []
    if REDUCTIONS[reduction] == "none":
        shape.append(student.numel() // student.shape[-1])
    return student.new_empty(shape, dtype=accumulator(student, *teachers))


def _make_fake_gradient(student: Tensor, strided: bool) -> Tensor:
    """Return a tensor laid out like a gradient (gradient_strides in csrc/torch/gradient_strides.h).

    With ``strided``, the gradient of contiguous logits, such as (N, C, H, W), with the classes
    moved last has the student's order in memory. Otherwise the gradient is contiguous.
    """
    *shape, classes = student.shape
    place = len(shape)
    *strides, class_stride = student.stride()
    if strided and class_stride != 1 and classes > 1 and student.numel() > 0:
        rows = [(dim, strides[dim]) for dim in range(len(shape)) if shape[dim] != 1]
        if all(outer >= inner for (_, outer), (_, inner) in pairwise(rows)):
            place = next((dim for dim, stride in rows if stride < class_stride), place)
    if place == len(shape):
        return student.new_empty(student.shape)
    return student.new_empty([*shape[:place], classes, *shape[place:]]).movedim(place, -1)


def _make_fake_stats(student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    rows = student.numel() // student.shape[-1]
    return student.new_empty([STATS * rows + 1], dtype=accumulator(student, *teachers))


@torch.library.register_fake("fastkd::empty_gradient")  # type: ignore[untyped-decorator]
def _(student: Tensor, strided: bool) -> Tensor:
    return _make_fake_gradient(student, strided)


@torch.library.register_fake("fastkd::loss")  # type: ignore[untyped-decorator]
def _(student: Tensor, teachers: Sequence[Tensor], *arguments: Any) -> Tensor:
    check_devices(student, teachers, *arguments)
    *_, reduction, _, with_terms = arguments
    return _make_fake_out(student, teachers, reduction, with_terms)


@torch.library.register_fake("fastkd::loss_into")  # type: ignore[untyped-decorator]
def _(
    grad: Any, student: Tensor, teachers: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor]:
    check_devices(grad, student, teachers, *arguments)
    *_, reduction, _, with_terms, with_stats = arguments
    out = _make_fake_out(student, teachers, reduction, with_terms)
    needs_stats = (with_stats and grad is None) or student.device.type == "cuda"
    return out, _make_fake_stats(student, teachers) if needs_stats else out.new_empty([0])


@torch.library.register_fake("fastkd::loss_backward_")  # type: ignore[untyped-decorator]
def _(grad: Tensor, *arguments: Any) -> None:
    check_devices(grad, *arguments)


@torch.library.register_fake("fastkd::mixture")  # type: ignore[untyped-decorator]
def _(teachers: Sequence[Tensor], *settings: Any) -> Tensor:
    check_devices(teachers, *settings)
    *_, in_double = settings
    dtype = torch.float64 if in_double else torch.float32
    return teachers[0].new_empty(teachers[0].shape, dtype=dtype)
