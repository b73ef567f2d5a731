"""Several teachers, or probabilities, as the logits of one, which is what the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import native, reference  # noqa: F401 - native registers the op
from fastkd.objective import Objective, row_numbers

_mixture = torch.ops.fastkd.mixture.default


@torch.library.register_fake("fastkd::mixture")  # type: ignore[untyped-decorator]
def _(teachers: Sequence[Tensor], *settings: Any) -> Tensor:
    *_, in_double = settings
    dtype = torch.float64 if in_double else torch.float32
    return teachers[0].new_empty(teachers[0].shape, dtype=dtype)


def one_teacher(
    teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype
) -> tuple[Tensor, float | Tensor]:
    """A teacher's logits, and the temperature at which their softmax is p.

    Teachers that are several, and probabilities, cost one tensor in ``dtype`` of the teacher's
    size: written by a kernel on CPUs where the classes of all are adjacent, by PyTorch operations
    elsewhere.
    """
    o = objective
    if len(teachers) == 1 and o.teacher_form != "probs":
        return teachers[0], o.teacher_temperature
    adjacent = all(teacher.stride(-1) == 1 for teacher in teachers)
    with torch.no_grad():
        if teachers[0].device.type in ("cpu", "meta") and adjacent:
            return _mix(teachers, o, dtype), o.temperature
        logits, _ = reference.softened_teacher(
            [teacher.to(dtype) for teacher in teachers],
            reference.column(o.teacher_temperature),
            o.teacher_form,
            o.teacher_weights,
            o.ensemble,
        )
        return logits * reference.column(o.temperature), o.temperature


def _mix(teachers: tuple[Tensor, ...], objective: Objective, dtype: torch.dtype) -> Tensor:
    """The same by the kernel."""
    o = objective
    weights = o.teacher_weights or (1.0,) * len(teachers)
    temperatures = (o.temperature, o.teacher_temperature)
    of_rows = None
    if any(isinstance(temperature, Tensor) for temperature in temperatures):
        of_rows = row_numbers(temperatures, teachers[0], dtype)
        temperatures = (1.0, 1.0)
    return _mixture(  # type: ignore[no-any-return]
        list(teachers),
        [weight / sum(weights) for weight in weights],
        o.teacher_form == "probs",
        reference.ENSEMBLES.index(o.ensemble),
        of_rows,
        *temperatures,
        dtype is torch.float64,
    )
