"""Choose how many logits of a Head are in memory at a time, from sizes alone.

The functions read no tensor and query no device, so equal sizes give equal plans on all machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from fastkd.linear import products

MIB = 2**20
LOGITS_BYTES = {"cuda": 2048 * MIB, "cpu": 48 * MIB}
"""Bound for the sum of ``Sizes.row_bytes`` over a chunk of rows, if there is no
``max_workspace``. Matrix products of 2048 rows on a GPU, or 256 rows on a CPU, are about as fast
per row as larger products."""
LEAST_ROWS = {"cuda": 512, "cpu": 128}
"""Rows that a chunk may have without ``max_workspace``, even if their logits exceed
``LOGITS_BYTES``. The minimum limits the number of chunks: each chunk reads both weights and adds to
the complete gradient of the student's weight."""
FEW_ROWS = {"cuda": 256, "cpu": 32}
"""Chunks of fewer rows take longer than chunks of classes, although the latter compute the logits
twice."""
CLASSES = {"cuda": 8192, "cpu": 4096}
"""Most classes of a chunk of classes, by default."""
PADDING = 8
"""Masked classes at the end of each row in a chunk of classes. A label outside the chunk becomes
the first masked class. 8 classes keep rows of 16-bit logits aligned to 16 bytes."""
ALIGNMENT = 256  # bytes; each buffer of logits begins at a multiple of ALIGNMENT in its memory
_FEWEST_CLASSES = 64
"""Most classes of a chunk whose logits lie outside the weight's gradient, if the weight gets one.
``max_workspace`` makes no chunk smaller than this number."""
_MULTIPLE = 64
"""Chunks of more than 64 rows or classes have a multiple of 64, a tile of matrix products."""
_ROW_STATISTICS_BYTES = 128
"""Bytes of the loss, label and statistics of a row in the loop over chunks of classes."""

ChunkBy = Literal["auto", "rows", "classes"]


class Plan(NamedTuple):
    """Hold the chunks that :func:`fastkd.chunks.plan` chose for a call."""

    rows: int
    """Rows of hidden states, including ignored rows."""
    chunk: int
    """Largest number of rows of a chunk; for chunks of classes, largest number of classes."""
    logits_bytes: int
    """Bytes of a chunk's logits (student and teacher) and of its intermediate results."""
    peak_bytes: int
    """Bound for the bytes in use beyond the inputs, including the gradients."""
    accumulate: torch.dtype
    """The dtype in which the gradient of the student's weight is summed."""
    chunks: int
    """Number of chunks if no row is ignored."""
    chunk_by: Literal["rows", "classes"] = "rows"

    def __str__(self) -> str:
        """Return the chunks, their logits, the weight gradient's dtype, and the memory's bound."""
        chunks = f"{self.chunks} x {self.chunk} of {self.rows} rows"
        if self.chunk_by == "classes":
            chunks = f"{self.chunks} chunks of up to {self.chunk} classes, of all {self.rows} rows"
        return (
            f"{chunks}: "
            f"{self.logits_bytes / MIB:,.1f} MiB of logits at a time, weight gradient in "
            f"{str(self.accumulate).removeprefix('torch.')}, at most "
            f"{self.peak_bytes / MIB:,.1f} MiB beyond the inputs"
        )


class Sizes(NamedTuple):
    """Hold the properties of a call that decide its chunks."""

    rows: int
    classes: int
    width: int
    """Columns of the student's weight."""
    teacher_width: int
    """Columns of the teacher's weight; 0 without a teacher's head."""
    dtype: torch.dtype
    """The dtype of the student's logits."""
    teacher_dtype: torch.dtype
    weight_dtype: torch.dtype
    """The dtype of the student's weight and of its gradient."""
    weight_grad: bool
    """True if the student's weight gets a gradient."""
    device: Literal["cpu", "cuda"]
    logits_per_row: float = 2.0
    """Number of tensors of the logits' size that exist at a time: 2 for a student and a teacher."""
    cast_per_class: int = 0
    """Bytes of autocast's copies of the weights, for each class."""
    copied_per_row: int = 0
    """Bytes of copied hidden states for each row, which count only for chunks of classes."""

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row's logits: student, teacher, and intermediate results."""
        item_bytes = self.dtype.itemsize * (self.logits_per_row - 1) + self.teacher_dtype.itemsize
        return math.ceil(self.classes * item_bytes)

    def compute_weight_bytes(self, accumulate: torch.dtype) -> tuple[int, int]:
        """Return the bytes of the weight's summed gradient, and of its copy in the weight's dtype.

        The copy has 0 bytes if the sum has the weight's dtype.
        """
        size = self.classes * self.width if self.weight_grad else 0
        cast = size * self.weight_dtype.itemsize + self.compute_scratch_bytes(0)
        return size * accumulate.itemsize, 0 if accumulate == self.weight_dtype else cast

    def compute_scratch_bytes(self, rows: int) -> int:
        """Return the bytes of temporary memory that matrix products of ``rows`` rows need."""
        if self.device != "cpu" or 2 not in (self.dtype.itemsize, self.teacher_dtype.itemsize):
            return 0
        return products.compute_scratch_bytes(rows, max(self.width, self.teacher_width))


def plan_sizes(
    sizes: Sizes,
    *,
    max_workspace: int | None = None,
    chunk_by: ChunkBy = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    accumulate_dtype: torch.dtype | Literal["auto"] = "auto",
) -> Plan:
    """Choose the chunks; the options are those of :func:`fastkd.chunks.plan`, checked."""
    # By default, several chunks of rows sum the gradient of a 16-bit weight in float32. With one
    # chunk of rows, or chunks of classes, the gradient of a bfloat16 weight is bfloat16. That of a
    # float16 weight is float32, because backward scales the gradient and then rounds.
    summed = accumulate_dtype
    if summed == "auto":
        summed = torch.float32 if sizes.weight_dtype.itemsize == 2 else sizes.weight_dtype
    is_rounded = accumulate_dtype == "auto" and sizes.weight_dtype is torch.bfloat16
    single = torch.bfloat16 if is_rounded else summed
    by_classes = _plan_classes(sizes, single, chunk_size, max_workspace)
    fits = max_workspace is not None and by_classes.peak_bytes <= max_workspace
    if chunk_by == "classes":
        if max_workspace is not None and not fits:
            raise ValueError(
                f"max_workspace={max_workspace} is too small for chunks of classes: the gradients "
                f"and the logits of a chunk take {by_classes.peak_bytes} bytes"
            )
        return by_classes
    try:
        by_rows = _plan_rows(sizes, summed, single, chunk_size, max_workspace)
    except ValueError as error:
        if chunk_by == "rows" or chunk_size != "auto":
            raise
        if not fits:
            take = f"chunks of classes take {by_classes.peak_bytes} bytes"
            raise ValueError(f"{error}; {take}") from None
        return by_classes
    is_small = chunk_size == "auto" and by_rows.chunk < min(sizes.rows, FEW_ROWS[sizes.device])
    return by_classes if chunk_by == "auto" and is_small and fits else by_rows


def check_accumulate_dtype(
    value: object, weight: torch.dtype, name: str = "accumulate_dtype"
) -> None:
    """Raise unless the gradient of a weight may be summed in ``value``.

    float16 is refused, because sums in float16 may overflow.
    """
    accepted: list[object] = [torch.float32 if weight.itemsize == 2 else weight]
    if weight is torch.bfloat16:
        accepted.append(weight)
    if value != "auto" and value not in accepted:
        listed = " or ".join(str(dtype) for dtype in accepted)
        raise ValueError(
            f"{name} must be 'auto' or {listed} for a weight in {weight}; got {value!r}"
        )


def _plan_rows(
    sizes: Sizes,
    summed: torch.dtype,
    single: torch.dtype,
    chunk_size: int | Literal["auto"],
    max_workspace: int | None,
) -> Plan:
    """Plan chunks of rows.

    ``single``: dtype of the weight's gradient for one chunk. ``summed``: dtype for several chunks.
    """
    rows, row_bytes = sizes.rows, sizes.row_bytes
    constant_bytes = (
        rows * sizes.width * sizes.dtype.itemsize + sizes.classes * sizes.cast_per_class
    )

    def make_plan(chunk: int) -> Plan:
        accumulate = single if chunk >= rows else summed
        total, cast = sizes.compute_weight_bytes(accumulate)
        scratch = sizes.compute_scratch_bytes(chunk)
        peak = total + max(chunk * row_bytes + scratch, cast)
        if chunk >= rows:  # the teacher's logits are freed before the gradients are written
            grad = rows * sizes.classes * sizes.dtype.itemsize
            peak = max(rows * row_bytes + scratch, grad + total + scratch, total + cast)
        count = -(-rows // chunk)
        return Plan(rows, chunk, chunk * row_bytes, constant_bytes + peak, accumulate, count)

    if chunk_size != "auto":
        plan = make_plan(min(max(1, rows), chunk_size))
        if max_workspace is not None and plan.peak_bytes > max_workspace:
            raise ValueError(
                f"max_workspace={max_workspace} is too small for chunk_size={chunk_size}: the "
                f"gradients and the logits of {plan.chunk} rows take {plan.peak_bytes} bytes"
            )
        return plan
    unchunked = make_plan(max(1, rows))
    if max_workspace is None:
        most = max(LEAST_ROWS[sizes.device], LOGITS_BYTES[sizes.device] // row_bytes)
        return unchunked if rows <= most else make_plan(_choose_chunk_size(rows, most))
    if unchunked.peak_bytes <= max_workspace:
        return unchunked
    least = make_plan(1)
    if least.peak_bytes > max_workspace:
        can_narrow = sizes.weight_dtype is torch.bfloat16 and least.accumulate is torch.float32
        raise ValueError(
            f"max_workspace={max_workspace} is too small: the gradients of the hidden states and "
            f"of the weight and one row of logits take {least.peak_bytes} bytes"
            + f". accumulate_dtype=torch.bfloat16 takes less than {summed}"
            * can_narrow
        )
    fixed = constant_bytes + sizes.compute_weight_bytes(summed)[0] + sizes.compute_scratch_bytes(0)
    scratch_per_row = sizes.compute_scratch_bytes(1) - sizes.compute_scratch_bytes(0)
    return make_plan(
        _choose_chunk_size(rows, (max_workspace - fixed) // (row_bytes + scratch_per_row))
    )


def _choose_chunk_size(rows: int, most: int) -> int:
    """Return the rows of a chunk, for the fewest equal chunks of at most ``most`` rows."""
    if most >= _MULTIPLE:
        most -= most % _MULTIPLE
    chunk = -(-rows // -(-rows // most))
    return min(most, -(-chunk // _MULTIPLE) * _MULTIPLE)


def _plan_classes(
    sizes: Sizes,
    accumulate: torch.dtype,
    chunk_size: int | Literal["auto"],
    max_workspace: int | None,
) -> Plan:
    """Plan chunks of classes that are as small as ``max_workspace`` requires."""
    rows, classes = sizes.rows, sizes.classes
    item_bytes = -(-sizes.row_bytes // classes)
    total, cast = sizes.compute_weight_bytes(accumulate)
    grad = total // classes
    sum_itemsize = max(4, sizes.dtype.itemsize)  # of the summed gradient of the hidden states
    row_bytes = sizes.width * sum_itemsize + sizes.copied_per_row + _ROW_STATISTICS_BYTES
    if sizes.copied_per_row:
        row_bytes += sizes.width * sizes.dtype.itemsize

    def make_plan(chunk: int) -> Plan:
        buffer = compute_buffer_bytes(rows, separate_classes(chunk, sizes.weight_grad), item_bytes)
        buffer += chunk * sizes.cast_per_class + sizes.compute_scratch_bytes(rows)
        count = sum(1 for _ in divide_classes(rows, classes, chunk, item_bytes, grad, writes=True))
        peak = total + rows * row_bytes + max(buffer, cast)
        logits = compute_buffer_bytes(rows, chunk, item_bytes)
        return Plan(rows, chunk, logits, peak, accumulate, count, "classes")

    if chunk_size != "auto":
        return make_plan(min(classes, chunk_size))
    chunk = min(classes, CLASSES[sizes.device])
    if sizes.weight_grad:  # the logits of a chunk must fit in the weight's gradient
        chunk = next(divide_classes(rows, classes, chunk, item_bytes, grad, writes=False)).size
    plan = make_plan(chunk)
    while max_workspace is not None and plan.peak_bytes > max_workspace and chunk > _FEWEST_CLASSES:
        chunk = max(_FEWEST_CLASSES, chunk // 2)
        plan = make_plan(chunk)
    return plan


class ClassChunk(NamedTuple):
    """Hold a range of classes, and the place of their logits."""

    start: int
    size: int
    is_inside: bool
    """True if the logits lie in the unwritten part of the weight's gradient, else in a buffer."""


def compute_buffer_bytes(rows: int, classes: int, item_bytes: int) -> int:
    """Return the bytes of a buffer of logits, at ``item_bytes`` for each class of a row."""
    return rows * (classes + PADDING) * item_bytes + 4 * ALIGNMENT


def separate_classes(chunk: int, weight_grad: bool) -> int:
    """Return the largest number of classes of a chunk whose logits lie in a separate buffer."""
    return min(chunk, _FEWEST_CLASSES) if weight_grad else chunk


def divide_classes(
    rows: int, classes: int, most: int, item_bytes: int, grad_row: int, *, writes: bool
) -> Iterator[ClassChunk]:
    """Divide the classes into chunks of at most ``most`` classes, and place the chunks' logits.

    The weight's gradient has ``grad_row`` bytes for each class. Until the gradient of a class is
    written, its memory may hold logits. With ``writes``, each chunk ends with writing the gradient
    of its classes, so the unwritten memory shrinks from chunk to chunk. Chunks whose logits do not
    fit in unwritten memory are small (``separate_classes()``), and use a separate buffer.
    """
    start = 0
    fixed = compute_buffer_bytes(rows, 0, item_bytes) + ALIGNMENT
    separate = separate_classes(most, grad_row > 0)
    while start < classes:
        remaining = classes - start
        free_bytes = (remaining if writes else classes) * grad_row - fixed
        fitting = max(0, free_bytes // max(1, rows * item_bytes + (grad_row if writes else 0)))
        size = min(remaining, most, max(fitting, separate))
        if _MULTIPLE < size < remaining:
            size -= size % _MULTIPLE
        yield ClassChunk(start, size, size <= fitting)
        start += size
