"""Test plans that divide the logits of a Head into chunks: sizes and memory."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, FP16, FP32, FP64, make_heads

import fastkd
from fastkd import Head, TopK
from fastkd.linear.chunks import make_sizes
from fastkd.linear.planner import MIB, Plan, Sizes, compute_buffer_bytes, divide_classes, plan_sizes


def plan(
    rows: int,
    classes: int,
    student_width: int,
    *,
    dtype: torch.dtype = FP32,
    weight_dtype: torch.dtype | None = None,
    device: Any = "cpu",
    logits_per_row: float = 2.0,
    weight_grad: bool = True,
    **options: Any,
) -> Plan:
    """Make a plan from sizes; the teacher has the student's width."""
    widths, dtypes = [student_width] * 2, [dtype, dtype, weight_dtype or dtype]
    sizes = Sizes(rows, classes, *widths, *dtypes, weight_grad, device, logits_per_row)
    return plan_sizes(sizes, **options)


HEADS = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 20000),
        "classes": st.integers(1, 200000),
        "student_width": st.integers(1, 8192),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "device": st.sampled_from(["cpu", "cuda"]),
        "weight_grad": st.booleans(),
        "logits_per_row": st.sampled_from([2.0, 3.0]),
    }
)


@given(HEADS)
def test_default_chunks_cover_all_rows(sizes):
    chosen = plan(**sizes)
    rows = sizes["rows"]
    assert chosen.chunks * chosen.chunk >= rows
    assert (chosen.chunks - 1) * chosen.chunk < max(1, rows)
    assert chosen.chunk >= min(rows, 64)
    assert chosen.peak_bytes >= chosen.logits_bytes or chosen.chunks <= 1


@given(HEADS, st.integers(1, 4096), st.sampled_from(["auto", "rows"]))
def test_plans_fit_max_workspace(sizes, mib, chunk_by):
    # The planner chooses the largest chunks that fit, and raises an error if no chunk fits.
    try:
        chosen = plan(**sizes, chunk_by=chunk_by, max_workspace=mib * MIB)
    except ValueError as error:
        assert "max_workspace" in str(error)
        assert plan(**sizes, chunk_size=1).peak_bytes > mib * MIB
        if chunk_by == "auto":
            assert plan(**sizes, chunk_by="classes", chunk_size=64).peak_bytes > mib * MIB
        return
    assert chosen.peak_bytes <= mib * MIB
    if chosen.chunk_by == "classes":
        assert chunk_by == "auto"
    elif chosen.chunks > 1:
        larger = plan(**sizes, chunk_size=-(-sizes["rows"] // (chosen.chunks - 1)) + 64)
        assert larger.peak_bytes > mib * MIB


@given(HEADS, st.integers(1, 9000), st.booleans())
def test_chunks_of_classes_cover_all_classes(sizes, largest, writes):
    # Chunks inside the weight's gradient keep their logits in the part that is not yet written.
    rows, classes, width = sizes["rows"], sizes["classes"], sizes["student_width"]
    item = int(sizes["logits_per_row"]) * sizes["dtype"].itemsize
    grad_row = width * sizes["dtype"].itemsize * sizes["weight_grad"]
    classes = min(classes, 500 * largest)  # bounds the test's time
    end = 0
    for chunk in divide_classes(rows, classes, largest, item, grad_row, writes=writes):
        assert chunk.start == end and 0 < chunk.size <= largest
        end += chunk.size
        if chunk.is_inside:
            written = end * grad_row if writes else 0
            assert written + compute_buffer_bytes(rows, chunk.size, item) <= classes * grad_row
        elif sizes["weight_grad"]:
            assert chunk.size <= 64
    assert end == classes


# Each target is ((rows, classes, width) of a Llama 3 or Qwen head, the most memory in MiB besides
# the inputs, accumulate_dtype).
TARGETS = [
    ((4096, 128256, 2048), 2100, "auto"),
    ((8192, 151936, 1024), 2300, "auto"),
    ((4096, 128256, 2048), 1200, BF16),
    ((8192, 151936, 1024), 1200, "auto"),
]


@pytest.mark.parametrize(("sizes", "mib", "accumulate"), TARGETS, ids=str)
def test_large_heads_fit_their_memory(sizes, mib, accumulate):
    options = {"dtype": BF16, "device": "cuda", "accumulate_dtype": accumulate}
    bound = None if mib > 2000 else mib * MIB
    chosen = plan(*sizes, **options, max_workspace=bound)
    assert chosen.peak_bytes <= mib * MIB
    assert chosen.chunk >= 768


# The bounds, in MiB, are the memory of Liger's fused loss for these sizes (docs/linear.md).
@pytest.mark.parametrize(("sizes", "mib"), [(TARGETS[0][0], 564), (TARGETS[1][0], 334)], ids=str)
def test_the_least_memory_is_two_gradients(sizes, mib):
    # Chunks of classes need little more memory than the gradients of weight and hidden states.
    chosen = plan(*sizes, dtype=BF16, device="cuda", max_workspace=mib * MIB - 1)
    rows, classes, width = sizes
    assert chosen.chunk_by == "classes" and chosen.accumulate is BF16
    assert chosen.peak_bytes < mib * MIB
    assert chosen.peak_bytes < 1.02 * (2 * classes + 4 * rows) * width
    pieces = list(divide_classes(rows, classes, chosen.chunk, 4, 2 * width, writes=True))
    assert len(pieces) == chosen.chunks
    assert sum(chunk.size for chunk in pieces if chunk.size >= 512) > 0.9 * classes
    with pytest.raises(ValueError, match="takes less than"):
        plan(*sizes, dtype=BF16, device="cuda", chunk_by="rows", max_workspace=mib * MIB - 1)


def test_one_chunk_needs_no_float32_sum():
    assert plan(512, 1000, 64, dtype=BF16).accumulate is BF16
    assert plan(512, 1000, 64, dtype=BF16, chunk_size=128).accumulate is FP32
    assert plan(512, 1000, 64, dtype=BF16, chunk_size=128, accumulate_dtype=BF16).accumulate is BF16
    # A float16 sum may overflow before it is scaled, so the sum is in float32.
    assert plan(512, 1000, 64, dtype=FP16).accumulate is FP32
    assert plan(512, 1000, 64, dtype=BF16, weight_dtype=FP32).accumulate is FP32
    assert plan(512, 1000, 64, dtype=FP64, chunk_size=128).accumulate is FP64


def test_str_of_a_plan_has_its_chunks():
    text = str(plan(4096, 128256, 2048, dtype=BF16, device="cuda", chunk_size=1024))
    assert "4 x 1024 of 4096 rows" in text and "501.0 MiB" in text and "float32" in text


BAD = {
    "accumulate": ({"accumulate_dtype": "fp32"}, "accumulate_dtype must be 'auto' or torch.floa"),
    "integers": ({"accumulate_dtype": torch.int8}, "accumulate_dtype must be 'auto' or torch.flo"),
    "float16": ({"accumulate_dtype": FP16}, "accumulate_dtype must be 'auto' or torch.float32 fo"),
    "chunk_by": ({"chunk_by": "row"}, "chunk_by must be one of 'auto', 'rows', 'classes'"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size must be a positive number of rows"),
    "max_workspace": ({"max_workspace": 0}, "max_workspace must be a positive number of bytes"),
    "bytes": ({"max_workspace": 1.5}, "max_workspace must be a positive number of bytes"),
    "too small": ({"max_workspace": 100}, "max_workspace=100 is too small"),
    "student": ({"student": torch.zeros(37, 203)}, "student must be a fastkd.Head; got Tensor"),
    "teacher": ({"teacher": None}, "teacher must be a Head, TopK, Sampled or a tensor"),
    "option": ({"divergence": "kl"}, "divergence must be one of"),
    "unknown": ({"tau": 2.0}, "plan() got an unexpected keyword argument 'tau'"),
    "misspelled": (
        {"max_workspce": 1},
        "plan() got an unexpected keyword argument 'max_workspce'. Did you mean 'max_workspace'?",
    ),
    "chunks": ({"chunks": "auto"}, "plan() got an unexpected keyword argument 'chunks'"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(wrong, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        fastkd.chunks.plan(**{**make_heads()._asdict(), **wrong})


# ---- sizes of a call


def sizes(inputs: Any, **options: Any) -> Sizes:
    """Return the Sizes from which fastkd.chunks.plan makes a call's plan."""
    seen: list[Sizes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fastkd.chunks, "make_sizes", lambda *a: seen.append(make_sizes(*a)) or seen[-1]
        )
        fastkd.chunks.plan(*inputs, **options)
    return seen[0]


def test_sizes_are_those_of_the_call(device):
    inputs = make_heads(BF16, device)
    inferred = sizes(inputs)
    assert inferred[:4] == (37, 203, 24, 40)
    assert inferred[4:7] == (BF16, BF16, BF16) and inferred.weight_grad
    assert inferred.device == device.type and inferred.logits_per_row == 2
    assert inferred.cast_per_class == 0 and inferred.copied_per_row == (24 + 40) * 2
    assert sizes(inputs[:2]).copied_per_row == 0
    with torch.no_grad():
        assert not sizes(inputs).weight_grad
    assert sizes(inputs.with_options(softcap=5.0)).logits_per_row == 3
    assert sizes(inputs, standardize=True).logits_per_row > 20
    logits = sizes(inputs._replace(teacher=inputs.teacher.logits().float()))
    assert (logits.teacher_width, logits.teacher_dtype) == (0, FP32)
    lists = inputs._replace(teacher=TopK(*inputs.teacher.logits().float().log_softmax(-1).topk(4)))
    assert sizes(lists).teacher_dtype == BF16 and 2 < sizes(lists).logits_per_row < 3


def test_autocast_changes_the_sizes():
    with torch.autocast("cpu", dtype=BF16):
        inferred = sizes(make_heads())
    assert inferred[4:7] == (BF16, BF16, FP32)
    assert inferred.cast_per_class == (24 + 40) * 2 and inferred.copied_per_row == (24 + 40) * (
        4 + 2
    )


def test_meta_tensors_are_planned_for_a_gpu():
    # A plan needs no data, so meta tensors may be larger than any memory.
    def head(width: int) -> Head:
        shapes = ((4096, width), (128256, width))
        return Head(*(torch.empty(s, dtype=BF16, device="meta") for s in shapes))

    student, teacher = head(2048), head(4096)
    student.weight.requires_grad_()
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    inferred = sizes((student, teacher, labels))
    assert inferred == Sizes(
        4096, 128256, 2048, 4096, BF16, BF16, BF16, True, "cuda", copied_per_row=12288
    )
    for options in ({}, {"max_workspace": 560 * MIB}):
        assert fastkd.chunks.plan(student, teacher, **options) == plan(
            4096, 128256, 2048, dtype=BF16, device="cuda", **options
        )


def test_a_plan_serves_fewer_rows():
    inputs = make_heads()
    plan = fastkd.chunks.plan(*inputs, chunk_size=8)
    smaller = [head._replace(hidden=head.hidden[:5]) for head in inputs[:2]]
    value = fastkd.loss(*smaller, inputs.labels[:5], chunks=plan)
    torch.testing.assert_close(value, fastkd.loss(*smaller, inputs.labels[:5]))


@given(HEADS, st.integers(1, 4096), st.integers(1, 4096), st.sampled_from(["auto", "rows"]))
def test_plans_with_a_chunk_size_fit_max_workspace(sizes, mib, size, chunk_by):
    options = {**sizes, "chunk_by": chunk_by, "chunk_size": size}
    chosen = plan(**options)
    if chosen.peak_bytes <= mib * MIB:
        assert plan(**options, max_workspace=mib * MIB) == chosen
        return
    with pytest.raises(ValueError, match=f"is too small for chunk_size={size}: .* take"):
        plan(**options, max_workspace=mib * MIB)


def test_a_bound_too_small_is_refused():
    with pytest.raises(
        ValueError, match=r"max_workspace=1048576 .* accumulate_dtype=torch.bfloat16"
    ):
        plan(4096, 128256, 2048, dtype=torch.bfloat16, max_workspace=MIB)
    # The message does not suggest a float16 sum.
    with pytest.raises(ValueError, match=r"take [0-9]+ bytes$"):
        plan(4096, 128256, 2048, dtype=FP16, max_workspace=MIB, chunk_by="rows")
