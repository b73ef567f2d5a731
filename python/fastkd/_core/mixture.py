"""Mix several teachers, or a teacher of probabilities, into the logits of one teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import native
from fastkd._core.objective import Objective
from fastkd._core.shapes import row_numbers

_mixture = torch.ops.fastkd.mixture.default
_MOST_ON_CUDA = 32  # as csrc/mixture.h has it


class Mixing(NamedTuple):
    """The ops' arguments that describe a mixture (csrc/torch/mixture.cpp).

    The softmax of the mixture is taken at the student's temperature.
    """

    shares: tuple[float, ...]
    probabilities: bool
    ensemble: int
    temperature: float
    teacher_temperature: float


def needs_no_mixing(teachers: tuple[Tensor, ...], objective: Objective) -> bool:
    """Return True for a single teacher whose logits the kernels take as they are."""
    return len(teachers) == 1 and objective.teacher_form != "probs"


def mixture_arguments(
    teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype
) -> tuple[Mixing, Tensor | None] | None:
    """Return the ops' arguments of a mixture and the temperatures of rows.

    Return None if no kernel mixes these teachers: some teacher has a class stride other than 1, or
    there are more than 32 teachers on CUDA.
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
    temperatures = (o.temperature, o.teacher_temperature)
    if any(isinstance(t, Tensor) for t in temperatures):
        return Mixing(*how, 1.0, 1.0), row_numbers(temperatures, teachers[0], dtype)
    return Mixing(*how, *temperatures), None  # type: ignore[arg-type]


def mix_with_kernel(
    teachers: tuple[Tensor, ...],
    how: Mixing,
    row_temperatures: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the logits of the mixture as one tensor in ``dtype``, by the kernel."""
    in_double = dtype is torch.float64
    with torch.no_grad():
        return _mixture(list(teachers), row_temperatures, *how, in_double)  # type: ignore[no-any-return]


def mix(teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype) -> Tensor:
    """Return the logits of the mixture as one tensor in ``dtype``.

    Their softmax is taken at the student's temperature.
    """
    kernel = mixture_arguments(teachers, objective, dtype)
    if kernel is None:
        return mix_by_operations(teachers, objective, dtype)
    return mix_with_kernel(teachers, *kernel, dtype)


def mix_by_operations(
    teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype
) -> Tensor:
    """Return the logits of the mixture as one tensor in ``dtype``, by PyTorch operations."""
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
