"""Bound the memory of a loss whose student is a :class:`fastkd.Head`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastkd import validation
from fastkd._core import autograd, dispatch
from fastkd._core.arguments import Teacher
from fastkd._core.mistakes import raise_for_call
from fastkd._core.objective import Options
from fastkd._core.values import Head
from fastkd.linear import class_loop
from fastkd.linear.arguments import prepare_heads
from fastkd.linear.call import Inputs, LinearCall, make_objective, promote_loss_dtype
from fastkd.linear.planner import ChunkBy, Plan, Sizes, check_accumulate_dtype, plan_sizes

__all__ = ["Plan", "plan"]

_TYPICAL_ROWS = 4096
_REFERENCE_LOGITS = 24
"""Upper bound on the number of logits-sized tensors that autograd saves for a loss without a
kernel."""


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__


def plan(
    student: Head,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    max_workspace: int | None = None,
    chunk_by: ChunkBy = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    accumulate_dtype: torch.dtype | Literal["auto"] = "auto",
    **options: Any,
) -> Plan:
    """Choose how many logits of a :class:`fastkd.Head` are in memory at a time.

    ::

        chunks = fastkd.chunks.plan(student, teacher, labels, max_workspace=2**30)
        loss = fastkd.loss(student, teacher, labels, chunks=chunks)

    A plan depends on the shapes, dtypes, device and ``requires_grad`` of the tensors, on autocast,
    and on the options of the loss. The function computes no logits. A plan serves later calls that
    differ only in their data, or that have fewer rows. Without a GPU, or before the tensors exist,
    pass tensors on the meta device: the plan is then for a GPU.

    By default there is one chunk of rows if its logits fit in 2 GiB on a GPU or 48 MiB on a CPU.
    Otherwise the plan has the fewest chunks of equal size that fit. A chunk may always have 512
    rows on a GPU and 128 rows on a CPU.

    Args:
        student, teacher, labels: the arguments of the call, as in :func:`fastkd.loss`.
        max_workspace: bound for ``peak_bytes``, the memory in use beyond the inputs, which includes
            the gradients. If the bound leaves room for only a few rows at a time, the plan has
            chunks of classes. Chunks of classes compute the logits twice, and need little memory
            besides the gradients. Default None: 2 GiB or 48 MiB of logits, as above.
        chunk_by: ``"rows"``, ``"classes"``, or ``"auto"``: chunks of rows unless ``max_workspace``
            is too small for them. docs/linear.md lists the options that chunks of classes support.
            Default ``"auto"``.
        chunk_size: rows of a chunk, or the largest number of classes of a chunk if
            ``chunk_by="classes"``; or ``"auto"``. Default ``"auto"``.
        accumulate_dtype: the dtype in which several chunks of rows sum the gradient of the
            student's weight. ``"auto"``: float32 for a 16-bit weight, else the weight's dtype.
            ``torch.bfloat16``, for a bfloat16 weight, needs half the memory of float32, and rounds
            the sum once a chunk. Default ``"auto"``.
        **options: the options of the loss, as in :func:`fastkd.loss`.

    Raises:
        TypeError, ValueError: for invalid arguments, or arguments that the loss refuses.
        ValueError: if ``max_workspace`` is too small; the message has the bytes that are needed.

    Example:
        >>> import torch, fastkd
        >>> def head(rows, classes, width):
        ...     shapes, dtype = ((rows, width), (classes, width)), torch.bfloat16
        ...     return fastkd.Head(*(torch.empty(s, dtype=dtype, device="meta") for s in shapes))
        >>> student, teacher = head(4096, 128256, 2048), head(4096, 128256, 4096)
        >>> student.weight.requires_grad_().shape
        torch.Size([128256, 2048])
        >>> fastkd.chunks.plan(student, teacher).peak_bytes // 2**20
        2020
        >>> fastkd.chunks.plan(student, teacher, max_workspace=1600 * 2**20).chunk
        1024
        >>> fastkd.chunks.plan(student, teacher, max_workspace=560 * 2**20).chunk_by
        'classes'
    """
    unknown = next((name for name in options if name not in Options._fields[:-1]), None)
    if unknown is not None:
        of_plan = ("max_workspace", "chunk_by", "chunk_size", "accumulate_dtype")
        raise_for_call("plan", "", 0, {unknown: None}, (*of_plan, *Options._fields[:-1]))
    if not isinstance(student, Head):
        raise TypeError(f"student must be a fastkd.Head; got {type(student).__name__}")
    validation.check_one_of("chunk_by", chunk_by, get_args(ChunkBy))
    if chunk_size != "auto" and not _is_positive(chunk_size):
        raise ValueError(
            'chunk_size must be a positive number of rows or classes, or "auto"; got '
            f"{chunk_size!r}"
        )
    if max_workspace is not None and not _is_positive(max_workspace):
        raise ValueError(
            f"max_workspace must be a positive number of bytes or None; got {max_workspace!r}"
        )
    inputs, call = prepare_heads(student, teacher, labels, Options(**options), with_terms=False)
    check_accumulate_dtype(accumulate_dtype, inputs.weight.dtype)
    missing = class_loop.list_missing_features(inputs, call)
    if missing and chunk_by == "classes":
        raise ValueError(
            f'chunk_by must be "auto" or "rows" with {" and ".join(missing)}; got "classes"'
        )
    return plan_sizes(
        make_sizes(inputs, call),
        max_workspace=max_workspace,
        chunk_by="rows" if missing else chunk_by,
        chunk_size=chunk_size,
        accumulate_dtype=accumulate_dtype,
    )


def check_plan(chunks: object) -> None:
    """Raise unless ``chunks`` is a plan or "auto"."""
    if not isinstance(chunks, Plan) and not (isinstance(chunks, str) and chunks == "auto"):
        raise TypeError(
            f'chunks must be "auto" or the result of fastkd.chunks.plan; got {chunks!r}'
        )


def choose_plan(chunks: Plan | Literal["auto"], inputs: Inputs, call: LinearCall) -> Plan:
    """Return ``chunks`` if it is a plan that fits the call, or a new plan for ``"auto"``."""
    check_plan(chunks)
    if not isinstance(chunks, Plan):
        return plan_sizes(make_sizes(inputs, call))
    check_accumulate_dtype(chunks.accumulate, inputs.weight.dtype, "chunks.accumulate")
    if not autograd.is_traced() and inputs.hidden.shape[0] > chunks.rows:
        raise ValueError(
            f"chunks must be a plan for at least as many rows as the call has, "
            f"{inputs.hidden.shape[0]}; got one for {chunks.rows}"
        )
    missing = class_loop.list_missing_features(inputs, call) if chunks.chunk_by == "classes" else []
    if missing:
        raise ValueError(
            f'chunks must be a plan of rows (chunk_by="rows") with {" and ".join(missing)}; got '
            "chunks of classes"
        )
    return chunks


def make_sizes(inputs: Inputs, call: LinearCall) -> Sizes:
    """Collect the properties of a call that decide its chunks."""
    (classes, width), labels = inputs.weight.shape, inputs.labels
    heads = [(inputs.hidden, inputs.weight, call.dtype)]
    if inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
        heads.append((inputs.teacher_hidden, inputs.teacher_weight, call.teacher_dtype))
    ignores = labels is not None and not labels.is_floating_point()
    buffers, teacher_dtype = 2.0, call.teacher_dtype
    if inputs.topk_indices is not None:
        # A chunk has the student's logits, their gradient, two lists of at most 8 bytes an entry,
        # and the kernel's copies of the lists.
        teacher_dtype = call.dtype
        lists = 4 * 8 * inputs.topk_indices.shape[-1]
        buffers = 1 + call.has_grads + lists / (classes * call.dtype.itemsize)
    if call.student_softcap is not None and call.has_grads:
        buffers += 1
    if not dispatch.is_fused(inputs.hidden, labels, make_objective(inputs, call)):
        wide = promote_loss_dtype(call.dtype, call.teacher_dtype)
        buffers += _REFERENCE_LOGITS * wide.itemsize / call.dtype.itemsize
    return Sizes(
        _count_rows(inputs.hidden),
        classes,
        width,
        0 if len(heads) == 1 else heads[1][1].shape[1],
        call.dtype,
        teacher_dtype,
        inputs.weight.dtype,
        call.weight_grad,
        "cpu" if inputs.hidden.device.type == "cpu" else "cuda",
        logits_per_row=buffers,
        cast_per_class=sum(w.shape[1] * d.itemsize for _, w, d in heads if w.dtype != d),
        copied_per_row=sum(
            h.shape[1] * (ignores * h.itemsize + (h.dtype != d) * d.itemsize) for h, _, d in heads
        ),
    )


def _count_rows(hidden: Tensor) -> int:
    """Return the number of rows, or ``_TYPICAL_ROWS`` if a trace does not know if there are any."""
    rows = hidden.shape[0]
    if not autograd.is_traced():
        return rows
    # A trace does not know, for example, how many rows a boolean mask selects.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return rows if statically_known_true(rows > 0) else _TYPICAL_ROWS


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
