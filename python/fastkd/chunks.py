"""How many rows of a linear head's logits exist at a time, and what that costs in memory.

:func:`plan` is arithmetic on sizes: it looks at no tensor and at no device, and the same sizes give
the same plan anywhere.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

MIB = 2**20
LOGITS_BYTES = {"cuda": 2048 * MIB, "cpu": 48 * MIB}
"""How much the logits of a chunk, student's and teacher's, take if nobody says otherwise. On a GPU
the products are as fast as one large one from about 2048 rows on; on a CPU from about 256."""
LEAST_ROWS = {"cuda": 512, "cpu": 128}
"""Fewer than these are planned only for ``max_workspace``: every chunk reads both weights and adds
to the whole gradient of the student's, however few its rows are."""
_MULTIPLE = 64  # rows of a tile of the matrix products
_HALF = (torch.bfloat16, torch.float16)

AccumulateDtype = torch.dtype | Literal["auto"]


class Plan(NamedTuple):
    """Rows in chunks; ``print`` it."""

    rows: int
    """Rows of hidden states, ignored ones among them."""
    chunk: int
    """Rows whose logits exist at a time."""
    logits_bytes: int
    """Size of the buffers for the logits of a chunk."""
    peak_bytes: int
    """Most memory in use at a time beyond the inputs, gradients included."""
    accumulate: torch.dtype
    """What the gradient of the student's weight is summed up in."""

    @property
    def chunks(self) -> int:
        """How many there are, if no row is ignored."""
        return -(-self.rows // self.chunk) if self.rows else 0

    def __str__(self) -> str:
        """The plan in words."""
        return (
            f"{self.chunks} x {self.chunk} of {self.rows} rows: "
            f"{self.logits_bytes / MIB:,.1f} MiB of logits at a time, weight gradient in "
            f"{str(self.accumulate).removeprefix('torch.')}, at most "
            f"{self.peak_bytes / MIB:,.1f} MiB beyond the inputs"
        )


class _Costs(NamedTuple):
    """Bytes, as far as they depend on the sizes alone."""

    row: int
    """Of logits, for each row of a chunk."""
    throughout: int
    """The gradient of the hidden states, and the like."""
    sum: int
    """The sum of the weight's gradients over chunks."""
    weight_grad: int
    """The gradient that is handed back, where it is not that sum itself; else 0."""

    def peak(self, chunk: int) -> int:
        return self.throughout + self.sum + max(chunk * self.row, self.weight_grad)


def plan(
    rows: int,
    classes: int,
    student_width: int,
    *,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
    logits_per_row: float = 2.0,
    other_bytes: int = 0,
    weight_grad: bool = True,
    chunk_size: int | Literal["auto"] = "auto",
    max_workspace: int | None = None,
    accumulate_dtype: AccumulateDtype = "auto",
) -> Plan:
    """Chooses how :func:`fastkd.linear_loss` goes through its rows.

    One chunk, if its logits fit; else the fewest equal chunks that do. The gradient of a 16-bit
    weight is then summed in float32, and rounded once at the end; with one bfloat16 chunk there is
    nothing to sum. (In float16 the sum is float32 always: it is scaled before it is rounded.)

    Args:
        rows: rows of hidden states.
        classes: rows of the weights.
        student_width: columns of the student's weight.
        dtype: the student's logits'.
        teacher_dtype: the teacher's logits'. Default: ``dtype``.
        weight_dtype: of the gradient of the student's weight. Default: ``dtype``.
        device: ``"cpu"`` or ``"cuda"``.
        logits_per_row: tensors of logits alive at a time: 2 for a student and a teacher.
        other_bytes: what else is alive throughout, such as autocast's copies of weights.
        weight_grad: whether the student's weight gets a gradient.
        chunk_size: rows of a chunk, or ``"auto"``.
        max_workspace: bound for ``peak_bytes``. Default: as much as it takes to be fast.
        accumulate_dtype: ``"auto"``, or a dtype for the sum.

    Raises:
        ValueError: if no chunk keeps to ``max_workspace``.

    Example:
        >>> import torch, fastkd
        >>> head = {"rows": 4096, "classes": 128256, "student_width": 2048}
        >>> fastkd.chunks.plan(**head, dtype=torch.bfloat16, device="cuda").peak_bytes // 2**20
        2020
        >>> fastkd.chunks.plan(**head, dtype=torch.bfloat16, max_workspace=1600 * 2**20).chunk
        1024
    """
    teacher_dtype, weight_dtype = teacher_dtype or dtype, weight_dtype or dtype
    row = math.ceil(classes * (dtype.itemsize * (logits_per_row - 1) + teacher_dtype.itemsize))

    def finished(chunk: int, accumulate: torch.dtype) -> Plan:
        peak = _costs(accumulate).peak(chunk)
        if chunk >= rows:  # its logits of the teacher are gone when the gradients are made
            costs, own = _costs(accumulate), rows * classes * dtype.itemsize
            peak = costs.throughout + max(
                rows * row, own + costs.sum, costs.sum + costs.weight_grad
            )
        return Plan(rows, chunk, chunk * row, peak, accumulate)

    def _costs(accumulate: torch.dtype) -> _Costs:
        size = classes * student_width if weight_grad else 0
        cast = 0 if accumulate == weight_dtype else size * weight_dtype.itemsize
        throughout = rows * student_width * dtype.itemsize + other_bytes
        return _Costs(row, throughout, size * accumulate.itemsize, cast)

    summed, whole = _sums(weight_dtype, accumulate_dtype)
    least = max(1, rows)
    if chunk_size != "auto":
        chunk = min(least, chunk_size)
        return finished(chunk, whole if chunk >= rows else summed)
    one = finished(least, whole)
    if max_workspace is None:
        kind = "cuda" if device == "cuda" else "cpu"
        most = max(LEAST_ROWS[kind], LOGITS_BYTES[kind] // row)
        if rows <= most:
            return one
        return finished(_equal(rows, most), summed)
    if one.peak_bytes <= max_workspace:
        return one
    costs = _costs(summed)
    most = (max_workspace - costs.throughout - costs.sum) // row
    if most < 1 or costs.peak(1) > max_workspace:
        raise ValueError(
            f"max_workspace={max_workspace} is too small: the gradients of the hidden states and "
            f"of the weight and one row of logits take {costs.peak(1)} bytes"
            + (
                f". accumulate_dtype={weight_dtype} takes less than {summed}"
                if summed != weight_dtype
                else ""
            )
        )
    return finished(_equal(rows, most), summed)


def _sums(
    weight_dtype: torch.dtype, accumulate_dtype: AccumulateDtype
) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the weight's gradient until it is finished: of several chunks, and of one."""
    if accumulate_dtype != "auto":
        return accumulate_dtype, accumulate_dtype
    summed = torch.float32 if weight_dtype in _HALF else weight_dtype
    return summed, torch.float32 if weight_dtype is torch.float16 else weight_dtype


def _equal(rows: int, most: int) -> int:
    """Chunks of about the same size, at most ``most`` rows."""
    if most >= rows:
        return rows
    if most >= _MULTIPLE:
        most -= most % _MULTIPLE
    count = -(-rows // most)
    chunk = -(-rows // count)
    return min(most, -(-chunk // _MULTIPLE) * _MULTIPLE)
