"""How much of two linear heads' logits exists at a time, and what that costs in memory.

:func:`plan` is arithmetic on sizes: it looks at no tensor and at no device, and the same sizes give
the same plan anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from fastkd._core import checks
from fastkd.linear import products

MIB = 2**20
LOGITS_BYTES = {"cuda": 2048 * MIB, "cpu": 48 * MIB}
"""How much the logits of a chunk, student's and teacher's, take if nobody says otherwise. On a GPU
the products are as fast as one large one from about 2048 rows on; on a CPU from about 256."""
LEAST_ROWS = {"cuda": 512, "cpu": 128}
"""Fewer than these are planned only for ``max_workspace``: every chunk reads both weights and adds
to the whole gradient of the student's, however few its rows are."""
FEW_ROWS = {"cuda": 256, "cpu": 32}
"""Chunks of fewer rows cost more than computing the logits twice, as chunks of classes do."""
CLASSES = {"cuda": 8192, "cpu": 4096}
"""Most classes of a chunk, where it has all rows."""
PADDING = 8
"""Classes that a chunk of classes has beside its own: 16 bytes, so that rows stay aligned."""
ALIGNMENT = 256
_LAST = 64  # classes of a chunk for which no room is left in the weight's gradient
_MULTIPLE = 64  # rows or classes of a tile of the matrix products
_HALF = (torch.bfloat16, torch.float16)

AccumulateDtype = torch.dtype | Literal["auto"]
ChunkBy = Literal["auto", "rows", "classes"]
CHUNK_BY: tuple[ChunkBy, ...] = ("auto", "rows", "classes")


class Plan(NamedTuple):
    """Rows or classes in chunks; ``print`` it."""

    rows: int
    """Rows of hidden states, ignored ones among them."""
    chunk: int
    """Rows whose logits exist at a time; or classes, at most."""
    logits_bytes: int
    """Size of the logits of a chunk."""
    peak_bytes: int
    """Most memory in use at a time beyond the inputs, gradients included."""
    accumulate: torch.dtype
    """What the gradient of the student's weight is summed up in."""
    chunks: int
    """How many there are, if no row is ignored."""
    chunk_by: Literal["rows", "classes"] = "rows"

    def __str__(self) -> str:
        """The plan in words."""
        each = f"{self.chunks} x {self.chunk} of {self.rows} rows"
        if self.chunk_by == "classes":
            each = f"{self.chunks} chunks of up to {self.chunk} classes, of all {self.rows} rows"
        return (
            f"{each}: "
            f"{self.logits_bytes / MIB:,.1f} MiB of logits at a time, weight gradient in "
            f"{str(self.accumulate).removeprefix('torch.')}, at most "
            f"{self.peak_bytes / MIB:,.1f} MiB beyond the inputs"
        )


def plan(
    rows: int,
    classes: int,
    student_width: int,
    *,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    teacher_width: int | None = None,
    device: str = "cpu",
    logits_per_row: float = 2.0,
    cast_per_class: int = 0,
    copied_per_row: int = 0,
    weight_grad: bool = True,
    chunk_by: ChunkBy = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    max_workspace: int | None = None,
    accumulate_dtype: AccumulateDtype = "auto",
) -> Plan:
    """Chooses how :func:`fastkd.linear_loss` goes through its logits.

    One chunk of rows, if its logits fit; else the fewest equal ones that do. The gradient of a
    16-bit weight is then summed in float32, and rounded once at the end; with one bfloat16 chunk
    there is nothing to sum. (In float16 the sum is float32 always: it is scaled before it is
    rounded.) Chunks of classes, which compute the logits twice, sum nothing of it either; they are
    chosen where ``max_workspace`` leaves room for only a few rows at a time.

    Args:
        rows: rows of hidden states.
        classes: rows of the weights.
        student_width: columns of the student's weight.
        dtype: the student's logits'.
        teacher_dtype: the teacher's logits'. Default: ``dtype``.
        weight_dtype: of the gradient of the student's weight. Default: ``dtype``.
        teacher_width: columns of the teacher's weight. Default: ``student_width``.
        device: ``"cpu"`` or ``"cuda"``.
        logits_per_row: tensors of logits alive at a time: 2 for a student and a teacher.
        cast_per_class: bytes of autocast's copies of the weights, for each class.
        copied_per_row: bytes of the hidden states that chunks of classes copy, for each row:
            where some rows are ignored, the others; and autocast's.
        weight_grad: whether the student's weight gets a gradient.
        chunk_by: ``"rows"`` or ``"classes"``; ``"auto"`` chooses.
        chunk_size: rows of a chunk, or most classes if ``chunk_by="classes"``; or ``"auto"``.
        max_workspace: bound for ``peak_bytes``. Default: as much as it takes to be fast.
        accumulate_dtype: ``"auto"``, or a dtype for the sum.

    Raises:
        TypeError, ValueError: for arguments that are not as above.
        ValueError: if no chunk keeps to ``max_workspace``.

    Example:
        >>> import torch, fastkd
        >>> head = {"rows": 4096, "classes": 128256, "student_width": 2048, "device": "cuda"}
        >>> fastkd.chunks.plan(**head, dtype=torch.bfloat16).peak_bytes // 2**20
        2020
        >>> fastkd.chunks.plan(**head, dtype=torch.bfloat16, max_workspace=1600 * 2**20).chunk
        1024
        >>> fastkd.chunks.plan(**head, dtype=torch.bfloat16, max_workspace=560 * 2**20).chunk_by
        'classes'
    """
    teacher_dtype, weight_dtype = teacher_dtype or dtype, weight_dtype or dtype
    checks.count("rows", rows, 0)
    checks.count("classes", classes)
    checks.count("student_width", student_width, 0)
    teacher_width = student_width if teacher_width is None else teacher_width
    checks.count("teacher_width", teacher_width, 0)
    dtypes = {"dtype": dtype, "teacher_dtype": teacher_dtype, "weight_dtype": weight_dtype}
    for name, value in dtypes.items():
        if not isinstance(value, torch.dtype):
            raise TypeError(f"{name} must be a torch.dtype; got {value!r}")
    check_accumulate_dtype(accumulate_dtype, weight_dtype)
    checks.number("logits_per_row", logits_per_row, 1.0, math.inf)
    checks.count("cast_per_class", cast_per_class, 0)
    checks.count("copied_per_row", copied_per_row, 0)
    checks.one_of("device", device, tuple(CLASSES))
    checks.one_of("chunk_by", chunk_by, CHUNK_BY)
    check_room(chunk_size, max_workspace)
    sizes = _Sizes(
        rows,
        classes,
        student_width,
        max(student_width, teacher_width),
        dtype.itemsize,
        math.ceil(classes * (dtype.itemsize * (logits_per_row - 1) + teacher_dtype.itemsize)),
        cast_per_class,
        copied_per_row,
        weight_grad,
        weight_dtype,
        device == "cpu" and 2 in (dtype.itemsize, teacher_dtype.itemsize),
        device,
    )
    summed, whole = _sums(weight_dtype, accumulate_dtype)
    by_classes = _by_classes(sizes, whole, chunk_size, max_workspace)
    if chunk_by == "classes":
        if max_workspace is not None and by_classes.peak_bytes > max_workspace:
            raise ValueError(
                f"max_workspace={max_workspace} is too small for chunks of classes: the gradients "
                f"and the logits of a few classes take {by_classes.peak_bytes} bytes"
            )
        return by_classes
    try:
        by_rows = _by_rows(sizes, summed, whole, chunk_size, max_workspace)
    except ValueError as error:
        if chunk_by == "rows" or chunk_size != "auto":
            raise
        if by_classes.peak_bytes > (max_workspace or 0):
            take = f"chunks of classes take {by_classes.peak_bytes} bytes"
            raise ValueError(f"{error}; {take}") from None
        return by_classes
    few = by_rows.chunk < min(rows, FEW_ROWS[sizes.kind]) and chunk_size == "auto"
    if chunk_by == "auto" and few and by_classes.peak_bytes <= (max_workspace or 0):
        return by_classes
    return by_rows


def check_accumulate_dtype(
    value: object, weight: torch.dtype, name: str = "accumulate_dtype"
) -> None:
    """Raise unless sums of the weight's gradient may be kept in ``value``; float16 overflows."""
    accepted: list[object] = [torch.float32 if weight.itemsize == 2 else weight]
    if weight is torch.bfloat16:
        accepted.append(weight)
    if value != "auto" and value not in accepted:
        listed = " or ".join(str(dtype) for dtype in accepted)
        raise ValueError(
            f"{name} must be 'auto' or {listed} for a weight in {weight}; got {value!r}"
        )


def check_room(chunk_size: object, max_workspace: object) -> None:
    """A number of rows or classes, or "auto"; a number of bytes, or None."""
    if chunk_size != "auto" and not _is_positive(chunk_size):
        raise ValueError(
            f'chunk_size must be a positive number of rows or classes, or "auto"; got '
            f"{chunk_size!r}"
        )
    if max_workspace is not None and not _is_positive(max_workspace):
        raise ValueError(
            f"max_workspace must be a positive number of bytes or None; got {max_workspace!r}"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class _Sizes(NamedTuple):
    """What a plan depends on, in bytes where it says nothing else."""

    rows: int  # a number
    classes: int  # a number
    width: int  # a number
    widest: int  # a number
    item: int
    """A logit of the student."""
    row: int
    """The logits of a row, of student and teacher and what comes between."""
    cast_per_class: int
    copied_per_row: int
    weight_grad: bool
    weight_dtype: torch.dtype
    widens: bool
    """Whether products go through float32, as those of 16 bits may on a CPU."""
    kind: str

    def weight_bytes(self, accumulate: torch.dtype) -> tuple[int, int]:
        """The weight's gradient until it is finished, and the one that is handed back, where it is
        not that one itself; else 0."""
        size = self.classes * self.width if self.weight_grad else 0
        cast = size * self.weight_dtype.itemsize + self.scratch(0)
        return size * accumulate.itemsize, 0 if accumulate == self.weight_dtype else cast

    def scratch(self, rows: int) -> int:
        """What the products of some rows take beside their factors."""
        return products.scratch_bytes(rows, self.widest) if self.widens else 0


def _by_rows(
    sizes: _Sizes,
    summed: torch.dtype,
    whole: torch.dtype,
    chunk_size: int | Literal["auto"],
    max_workspace: int | None,
) -> Plan:
    """Chunks of rows. Gradients of the weight are ``whole`` of one chunk, else ``summed``."""
    rows, row = sizes.rows, sizes.row
    throughout = rows * sizes.width * sizes.item + sizes.classes * sizes.cast_per_class

    def several(chunk: int) -> int:
        total, cast = sizes.weight_bytes(summed)
        return throughout + total + max(chunk * row + sizes.scratch(chunk), cast)

    def finished(chunk: int, accumulate: torch.dtype) -> Plan:
        total, cast = sizes.weight_bytes(accumulate)
        scratch = sizes.scratch(chunk)
        peak = throughout + total + max(chunk * row + scratch, cast)
        if chunk >= rows:  # its logits of the teacher are gone when the gradients are made
            own = rows * sizes.classes * sizes.item
            peak = throughout + max(rows * row + scratch, own + total + scratch, total + cast)
        return Plan(rows, chunk, chunk * row, peak, accumulate, -(-rows // chunk) if rows else 0)

    least = max(1, rows)
    if chunk_size != "auto":
        chunk = min(least, chunk_size)
        chosen = finished(chunk, whole if chunk >= rows else summed)
        if max_workspace is not None and chosen.peak_bytes > max_workspace:
            raise ValueError(
                f"max_workspace={max_workspace} is too small for chunk_size={chunk_size}: the "
                f"gradients and the logits of {chunk} rows take {chosen.peak_bytes} bytes"
            )
        return chosen
    one = finished(least, whole)
    if max_workspace is None:
        most = max(LEAST_ROWS[sizes.kind], LOGITS_BYTES[sizes.kind] // row)
        return one if rows <= most else finished(_equal(rows, most), summed)
    if one.peak_bytes <= max_workspace:
        return one
    fixed, each = sizes.scratch(0), sizes.scratch(1) - sizes.scratch(0)
    most = (max_workspace - throughout - sizes.weight_bytes(summed)[0] - fixed) // (row + each)
    if most < 1 or several(1) > max_workspace:
        raise ValueError(
            f"max_workspace={max_workspace} is too small: the gradients of the hidden states and "
            f"of the weight and one row of logits take {several(1)} bytes"
            + (
                f". accumulate_dtype={sizes.weight_dtype} takes less than {summed}"
                if summed != sizes.weight_dtype and sizes.weight_dtype is torch.bfloat16
                else ""
            )
        )
    return finished(_equal(rows, most), summed)


def _by_classes(
    sizes: _Sizes,
    accumulate: torch.dtype,
    chunk_size: int | Literal["auto"],
    max_workspace: int | None,
) -> Plan:
    """Chunks of classes, in ``max_workspace`` if they fit."""
    rows, classes = sizes.rows, sizes.classes
    item = -(-sizes.row // classes)
    total, cast = sizes.weight_bytes(accumulate)
    wide = max(4, sizes.item)  # what the gradient of the hidden states is summed in
    throughout = total + rows * (sizes.width * wide + sizes.copied_per_row + _NUMBERS_OF_A_ROW)
    if sizes.copied_per_row:
        throughout += rows * sizes.width * sizes.item

    def finished(chunk: int) -> Plan:
        own = buffer_bytes(rows, chunk_beside(chunk, sizes.weight_grad), item)
        peak = throughout + max(own + chunk * sizes.cast_per_class + sizes.scratch(rows), cast)
        grad = total // classes
        count = sum(1 for _ in class_chunks(rows, classes, chunk, item, grad, writes=True))
        logits = buffer_bytes(rows, chunk, item)
        return Plan(rows, chunk, logits, peak, accumulate, count, "classes")

    if chunk_size != "auto":
        return finished(min(classes, chunk_size))
    chunk = min(classes, CLASSES[sizes.kind])
    if sizes.weight_grad:  # no more than what its gradient has room for
        chunk = next(class_chunks(rows, classes, chunk, item, total // classes, writes=False)).size
    chosen = finished(chunk)
    while max_workspace is not None and chosen.peak_bytes > max_workspace and chunk > _LAST:
        chunk = max(_LAST, chunk // 2)
        chosen = finished(chunk)
    return chosen


# Losses, labels, statistics.
_NUMBERS_OF_A_ROW = 128


class ClassChunk(NamedTuple):
    """Some classes, and where their logits lie."""

    start: int
    size: int
    inside: bool
    """In the gradient of the weight, in the part that is not written yet; else beside it."""


def buffer_bytes(rows: int, classes: int, item: int) -> int:
    """Memory for the logits of a chunk of classes, ``item`` bytes for each class of a row."""
    return rows * (classes + PADDING) * item + 4 * ALIGNMENT


def chunk_beside(chunk: int, weight_grad: bool) -> int:
    """Classes of the chunks whose logits do not lie in the gradient of the weight."""
    return min(chunk, _LAST) if weight_grad else chunk


def class_chunks(
    rows: int, classes: int, most: int, item: int, grad_row: int, *, writes: bool
) -> Iterator[ClassChunk]:
    """Chunks of at most ``most`` classes, and of as many as their logits have room for.

    The gradient of the weight, of ``grad_row`` bytes for each class, is memory that every call
    needs in the end: until its rows are written, the logits of other classes lie there. ``writes``:
    the rows of each chunk are written, so that what is left shrinks. The last chunks are small.
    """
    start = 0
    fixed = buffer_bytes(rows, 0, item) + ALIGNMENT
    beside = chunk_beside(most, grad_row > 0)
    while start < classes:
        left = classes - start
        room = (left if writes else classes) * grad_row - fixed
        fit = max(0, room // max(1, rows * item + (grad_row if writes else 0)))
        size = min(left, most, max(fit, beside))
        if _MULTIPLE < size < left:
            size -= size % _MULTIPLE
        yield ClassChunk(start, size, size <= fit)
        start += size


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
