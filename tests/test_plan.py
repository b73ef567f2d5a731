"""The planner of the CUDA kernels chooses valid launches for devices that are not installed."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest

from fastkd import _C

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)  # as in csrc/dtypes.h
DTYPES = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
HOT = (FLOAT32, FLOAT16, BFLOAT16)


class Device(NamedTuple):
    """Properties of a device that the planner reads."""

    processors: int
    cluster: int


DEVICES = {
    "turing": Device(40, 1),
    "ampere": Device(108, 1),
    "hopper": Device(132, 8),
    "a slice of one": Device(16, 4),
}
CLASSES = (
    *(1, 2, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1000, 1023, 1024, 1025, 2047, 2048, 2049),
    *(4095, 4096, 4097, 8191, 8192, 8193, 14336, 28673, 50257, 128257, 262144, 425985, 2**20),
)
ROWS = (1, 2, 7, 8, 9, 64, 65, 128, 129, 131, 132, 133, 1024, 8192, 2**20)


def plan(
    classes: int,
    rows: int = 1024,
    student: int = BFLOAT16,
    teacher: int | None = None,
    device: Device = DEVICES["hopper"],
    strided: bool = False,
) -> dict[str, Any]:
    teacher = student if teacher is None else teacher
    return _C.plan_cuda(rows, classes, student, teacher, device.processors, device.cluster, strided)


def size_of(dtype: int) -> int:
    return {FLOAT32: 4, FLOAT64: 8, FLOAT16: 2, BFLOAT16: 2}[dtype]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("pair", [*((d, d) for d in DTYPES), (BFLOAT16, FLOAT32), (FLOAT32, 1)])
def test_every_plan_can_be_launched(name: str, pair: tuple[int, int]) -> None:
    device = DEVICES[name]
    for classes, rows, strided in itertools.product(CLASSES, ROWS, (False, True)):
        p = plan(classes, rows, *pair, device=device, strided=strided)
        assert p["family"] in ("tiny", "registers", "streaming", "strided")
        assert (p["family"] == "strided") == strided
        assert 32 <= p["threads"] <= 1024 and p["threads"] % 32 == 0
        assert 1 <= p["cluster"] <= device.cluster
        blocks = -(-rows // p["rows_per_block"])
        if p["finish_inside"]:  # the grid is the cluster
            assert p["cluster"] == blocks <= 8
        else:
            assert p["cluster"] == 1
        # The threads of a row hold all of its classes.
        if p["family"] == "tiny":
            assert p["lanes"] in (8, 32) and classes <= 4 * p["lanes"]
            assert p["rows_per_block"] * p["lanes"] == p["threads"]
        if strided:  # full warps of neighboring rows
            assert (
                p["rows_per_block"] * p["lanes"] == p["threads"] and p["rows_per_block"] % 32 == 0
            )
        if p["family"] == "registers":
            assert pair[0] == pair[1] != FLOAT64
            assert classes * size_of(pair[0]) <= 64 * p["lanes"]
            assert p["rows_per_block"] * p["lanes"] == p["threads"]
            assert p["threads"] <= (512 if p["lanes"] == 32 else 256)


@pytest.mark.parametrize("name", ["ampere", "hopper"])
@pytest.mark.parametrize(("dtype", "warps", "ctas"), [(FLOAT32, 512, 4096), (BFLOAT16, 1024, 8192)])
def test_each_size_has_its_kernel(name: str, dtype: int, warps: int, ctas: int) -> None:
    def kind(classes: int, teacher: int = dtype) -> tuple[str, int]:
        p = plan(classes, 4096, dtype, teacher, device=DEVICES[name])
        return p["family"], p["lanes"]

    assert kind(1) == kind(32) == ("tiny", 8)
    assert kind(33) == kind(128) == ("tiny", 32)
    assert kind(129) == kind(warps) == ("registers", 32)
    assert kind(warps + 1) == ("registers", 64)
    assert kind(ctas) == ("registers", 256)
    assert kind(ctas + 1)[0] == "streaming"
    assert kind(8193) == kind(262144) == ("streaming", 512)
    # Different dtypes use tiny, then streaming; double never uses tiny.
    other_dtype = BFLOAT16 if dtype == FLOAT32 else FLOAT16
    assert kind(128, other_dtype) == ("tiny", 32)
    assert kind(129, other_dtype) == kind(1023, other_dtype) == ("streaming", 64)
    assert kind(1024, other_dtype) == kind(8191, other_dtype) == ("streaming", 256)
    assert kind(5, FLOAT64) == ("streaming", 64)


def test_longer_rows_never_use_a_family_of_shorter_rows() -> None:
    order = ("tiny", "registers", "streaming")
    for dtype, rows in itertools.product(HOT, ROWS):
        families = [order.index(plan(n, rows, dtype)["family"]) for n in range(1, 2**14, 61)]
        assert families == sorted(families)


def test_threads_share_rows_whose_classes_are_not_adjacent() -> None:
    def sharing(classes: int, rows: int) -> int:
        return plan(classes, rows, strided=True)["lanes"]

    many_rows = 2**20
    assert sharing(1, many_rows) == sharing(24, many_rows) == 1
    assert sharing(25, many_rows) == sharing(48, many_rows) == 2
    assert sharing(49, many_rows) == 4
    assert sharing(97, many_rows) == sharing(2**20, many_rows) == 8
    # With few rows, the device has spare threads.
    assert sharing(19, 512 * 512) == sharing(19, 132 * 512) == 1
    assert sharing(19, 132 * 512 - 1) == 2
    assert sharing(19, 1) == 4
    assert sharing(8, 1) == 1


@pytest.mark.parametrize("classes", [10, 100, 1000, 8192, 128256])
def test_a_small_grid_sums_the_total_itself(classes: int) -> None:
    with_clusters, without = DEVICES["hopper"], DEVICES["ampere"]
    one_row = plan(classes, 1, device=without)
    assert one_row["finish_inside"] and one_row["cluster"] == 1
    eight_blocks = plan(classes, 8 * one_row["rows_per_block"], device=without)
    assert not eight_blocks["finish_inside"]
    per_block = plan(classes, 8, device=with_clusters)["rows_per_block"]
    p = plan(classes, 8, device=with_clusters)
    assert p["finish_inside"] and p["cluster"] == -(-8 // per_block)
    assert not plan(classes, 8192, device=with_clusters)["finish_inside"]


def test_invalid_dtypes_are_refused() -> None:
    for student, teacher in ((4, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="dtype"):
            plan(100, student=student, teacher=teacher)
