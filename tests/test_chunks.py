"""The planner of linear_loss: which chunks, and what it says they cost."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, FP16, FP32, FP64

from fastkd.linear.chunks import MIB, buffer_bytes, class_chunks, plan

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
def test_by_itself(sizes):
    """Chunks cover the rows, and are no smaller than what makes products fast."""
    chosen = plan(**sizes)
    rows = sizes["rows"]
    assert chosen.chunks * chosen.chunk >= rows
    assert (chosen.chunks - 1) * chosen.chunk < max(1, rows)
    assert chosen.chunk >= min(rows, 64)
    assert chosen.peak_bytes >= chosen.logits_bytes or chosen.chunks <= 1


@given(HEADS, st.integers(1, 4096), st.sampled_from(["auto", "rows"]))
def test_keeps_to_max_workspace(sizes, mib, chunk_by):
    """Or says what is too much; and it never takes smaller chunks than it has to."""
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
def test_chunks_of_classes(sizes, most, writes):
    """They cover all classes, and where logits lie in the gradient it is not written yet."""
    rows, classes, width = sizes["rows"], sizes["classes"], sizes["student_width"]
    item = int(sizes["logits_per_row"]) * sizes["dtype"].itemsize
    grad_row = width * sizes["dtype"].itemsize * sizes["weight_grad"]
    classes = min(classes, 500 * most)  # a bound for the test's time
    end = 0
    for chunk in class_chunks(rows, classes, most, item, grad_row, writes=writes):
        assert chunk.start == end and 0 < chunk.size <= most
        end += chunk.size
        if chunk.inside:
            written = end * grad_row if writes else 0
            assert written + buffer_bytes(rows, chunk.size, item) <= classes * grad_row
        elif sizes["weight_grad"]:
            assert chunk.size <= 64
    assert end == classes


# Shapes of Llama 3 and Qwen heads, and what a GPU of 80 GB is meant to spend on them beyond the
# inputs, with the dtype that the gradient is summed in.
TARGETS = [
    ((4096, 128256, 2048), 2100, "auto"),
    ((8192, 151936, 1024), 2300, "auto"),
    ((4096, 128256, 2048), 1200, BF16),
    ((8192, 151936, 1024), 1200, "auto"),
]


@pytest.mark.parametrize(("sizes", "mib", "accumulate"), TARGETS, ids=str)
def test_large_heads(sizes, mib, accumulate):
    options = {"dtype": BF16, "device": "cuda", "accumulate_dtype": accumulate}
    bound = None if mib > 2000 else mib * MIB
    chosen = plan(*sizes, **options, max_workspace=bound)
    assert chosen.peak_bytes <= mib * MIB
    assert chosen.chunk >= 768


# What Liger's fused loss takes on them: docs/linear.md.
@pytest.mark.parametrize(("sizes", "mib"), [(TARGETS[0][0], 564), (TARGETS[1][0], 334)], ids=str)
def test_the_least_memory(sizes, mib):
    """Chunks of classes take the two gradients and little more, with few small chunks."""
    chosen = plan(*sizes, dtype=BF16, device="cuda", max_workspace=mib * MIB - 1)
    rows, classes, width = sizes
    assert chosen.chunk_by == "classes" and chosen.accumulate is BF16
    assert chosen.peak_bytes < mib * MIB
    assert chosen.peak_bytes < 1.02 * (2 * classes + 4 * rows) * width
    found = list(class_chunks(rows, classes, chosen.chunk, 4, 2 * width, writes=True))
    assert len(found) == chosen.chunks
    # Of 10 classes 9 are in chunks of at least 512.
    assert sum(chunk.size for chunk in found if chunk.size >= 512) > 0.9 * classes
    with pytest.raises(ValueError, match="takes less than"):
        plan(*sizes, dtype=BF16, device="cuda", chunk_by="rows", max_workspace=mib * MIB - 1)


def test_one_chunk_sums_nothing():
    assert plan(512, 1000, 64, dtype=BF16).accumulate is BF16
    assert plan(512, 1000, 64, dtype=BF16, chunk_size=128).accumulate is FP32
    assert plan(512, 1000, 64, dtype=BF16, chunk_size=128, accumulate_dtype=BF16).accumulate is BF16
    # Scaled before it is rounded, since unscaled sums may be too large for it.
    assert plan(512, 1000, 64, dtype=FP16).accumulate is FP32
    assert plan(512, 1000, 64, dtype=BF16, weight_dtype=FP32).accumulate is FP32
    assert plan(512, 1000, 64, dtype=FP64, chunk_size=128).accumulate is FP64


def test_says_what_it_chose():
    text = str(plan(4096, 128256, 2048, dtype=BF16, device="cuda", chunk_size=1024))
    assert "4 x 1024 of 4096 rows" in text and "501.0 MiB" in text and "float32" in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": -1}, ValueError, "rows must be an int of at least 0; got -1"),
        ({"rows": 2.5}, TypeError, "rows must be an int of at least 0; got 2.5"),
        ({"classes": 0}, ValueError, "classes must be an int of at least 1; got 0"),
        ({"student_width": -8}, ValueError, "student_width must be an int of at least 0; got -8"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a torch.dtype; got 'bf16'"),
        ({"teacher_dtype": "bf16"}, TypeError, "teacher_dtype must be a torch.dtype"),
        ({"weight_dtype": 16}, TypeError, "weight_dtype must be a torch.dtype; got 16"),
        ({"accumulate_dtype": "fp32"}, ValueError, "accumulate_dtype must be 'auto' or torch.floa"),
        ({"accumulate_dtype": torch.int8}, ValueError, "accumulate_dtype must be 'auto' or torch"),
        (
            {"logits_per_row": -3},
            ValueError,
            "logits_per_row must be finite and at least 1; got -3",
        ),
        ({"cast_per_class": -1}, ValueError, "cast_per_class must be an int of at least 0; got -1"),
        ({"copied_per_row": -1}, ValueError, "copied_per_row must be an int of at least 0; got -1"),
        ({"teacher_width": -8}, ValueError, "teacher_width must be an int of at least 0; got -8"),
        ({"device": "gpu"}, ValueError, "device must be one of 'cuda', 'cpu'; got 'gpu'"),
        ({"chunk_by": "row"}, ValueError, "chunk_by must be one of 'auto', 'rows', 'classes'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of rows"),
        ({"max_workspace": 0}, ValueError, "max_workspace must be a positive number of bytes"),
    ],
    ids=str,
)
def test_sizes_that_are_none_are_refused(change, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        plan(**{"rows": 8, "classes": 10, "student_width": 4, **change})


@given(HEADS, st.integers(1, 4096), st.integers(1, 4096), st.sampled_from(["auto", "rows"]))
def test_keeps_to_max_workspace_with_a_size_of_chunks(sizes, mib, size, chunk_by):
    """Or says that it cannot."""
    options = {**sizes, "chunk_by": chunk_by, "chunk_size": size}
    chosen = plan(**options)
    if chosen.peak_bytes <= mib * MIB:
        assert plan(**options, max_workspace=mib * MIB) == chosen
        return
    with pytest.raises(ValueError, match=f"is too small for chunk_size={size}: .* take"):
        plan(**options, max_workspace=mib * MIB)


def test_no_room():
    with pytest.raises(
        ValueError, match=r"max_workspace=1048576 .* accumulate_dtype=torch.bfloat16"
    ):
        plan(4096, 128256, 2048, dtype=torch.bfloat16, max_workspace=MIB)
    with pytest.raises(ValueError, match=r"take [0-9]+ bytes$"):  # float16 cannot sum
        plan(4096, 128256, 2048, dtype=FP16, max_workspace=MIB, chunk_by="rows")
