"""Several teachers, or probabilities, in place of one, whose logits are what the kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import native
from fastkd._core.objective import Objective, row_numbers

_mixture = torch.ops.fastkd.mixture.default
_MOST_ON_CUDA = 32  # as csrc/mixture.h has it


class Mixing(NamedTuple):
    """How, as the ops take it beside the teachers and the temperatures of rows
    (csrc/torch/mixture.cpp). The mixture's softmax is taken at the student's temperature.
    """

    shares: tuple[float, ...]
    probabilities: bool
    ensemble: int
    temperature: float
    teacher_temperature: float


def is_one(teachers: tuple[Tensor, ...], objective: Objective) -> bool:
    """Whether the kernels take the teacher as it is."""
    return len(teachers) == 1 and objective.teacher_form != "probs"


def mixing(
    teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype
) -> tuple[Mixing, Tensor | None] | None:
    """How a kernel mixes these, and the temperatures of rows; None where it cannot: it wants the
    classes of all adjacent, and on CUDA no more than so many teachers.
    """
    o = objective
    device = teachers[0].device.type
    if device == "cuda" and (not native.CUDA_KERNELS or len(teachers) > _MOST_ON_CUDA):
        return None
    if device not in ("cpu", "meta", "cuda"):
        return None
    if any(teacher.stride(-1) != 1 for teacher in teachers):
        return None
    weights = o.teacher_weights or (1.0,) * len(teachers)
    shares = tuple(weight / sum(weights) for weight in weights)
    how = (shares, o.teacher_form == "probs", reference.ENSEMBLES.index(o.ensemble))
    mine, own = o.temperature, o.teacher_temperature
    if isinstance(mine, Tensor) or isinstance(own, Tensor):
        return Mixing(*how, 1.0, 1.0), row_numbers((mine, own), teachers[0], dtype)
    return Mixing(*how, mine, own), None


def mixed(
    teachers: tuple[Tensor, ...],
    how: Mixing,
    row_temperatures: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The logits of the mixture, by the kernel, as one tensor in ``dtype``."""
    in_double = dtype is torch.float64
    with torch.no_grad():
        return _mixture(list(teachers), row_temperatures, *how, in_double)  # type: ignore[no-any-return]


def as_one(teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype) -> Tensor:
    """The logits of the mixture, whose softmax is taken at the student's temperature, as one tensor
    in ``dtype``."""
    kernel = mixing(teachers, objective, dtype)
    if kernel is None:
        return mixed_by_operations(teachers, objective, dtype)
    return mixed(teachers, *kernel, dtype)


def mixed_by_operations(
    teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype
) -> Tensor:
    """The same by PyTorch operations."""
    o = objective
    with torch.no_grad():
        logits, _ = reference.softened_teacher(
            [teacher.to(dtype) for teacher in teachers],
            reference.column(o.teacher_temperature),
            o.teacher_form,
            o.teacher_weights,
            o.ensemble,
        )
        return logits * reference.column(o.temperature)
