"""Define helpers of the fuzzers: special values, layouts, comparisons, and the command line."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

# conftest.py sets this variable for pytest, but `make fuzz` runs without pytest.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import torch
from hypothesis import strategies as st
from support import FP32
from torch import Tensor

from fastkd import _C
from fastkd._core import autograd

SPECIAL_VALUES = (0.0, -0.0, 1e-40, 1e-45, 6e-8, 1e38, -1e38, 3e4, -math.inf, math.inf, math.nan)
BATCH = 500
LAYOUTS = ("contiguous", "rows apart", "sliced", "transposed", "classes apart", "misaligned")
TEMPERATURES = st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0]), st.floats(0.25, 30.0))
WEIGHTS = st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 2.5])] * 2)
SMOOTHING = st.sampled_from([0.0, 0.1, 0.9, 1.0])
# Powers of two, and 0, scale 16-bit gradients without rounding, unless results are subnormal.
GRAD_OUTPUTS = st.sampled_from([1.0, 1.0, -1.0, -0.5, 2.0, 0.0])


def special_values(tensors: int) -> st.SearchStrategy[tuple[tuple[int, int, int, float], ...]]:
    """Return a strategy for at most 4 tuples (tensor index, row, column, value)."""
    place = (st.integers(0, tensors - 1), st.integers(0, 4), st.integers(0, 2**14))
    return st.lists(st.tuples(*place, st.sampled_from(SPECIAL_VALUES)), max_size=4).map(tuple)


NARROW = {"int32": torch.int32, "int16": torch.int16, "uint8": torch.uint8}


def narrow_labels(labels: Tensor, dtype: str, classes: int, ignore_index: int = -100) -> Tensor:
    """Convert labels to the dtype that ``NARROW`` names, or return them for any other name.

    Labels that the dtype cannot represent are replaced by labels that it can represent.
    """
    if dtype not in NARROW:
        return labels
    largest = torch.iinfo(NARROW[dtype]).max
    if dtype == "uint8":
        labels = labels.where(labels >= 0, min(ignore_index % 256, classes - 1))
    return labels.clamp(max=largest).to(NARROW[dtype])


def draw_rarely(usual: Any, others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy that draws ``usual`` or, less often, a value of ``others``."""
    return st.one_of(st.just(usual), st.just(usual), others)


def write_special_values(
    values: list[Tensor], odd: tuple[tuple[int, int, int, float], ...]
) -> None:
    """Write special values into contiguous matrices; row and column indices wrap around."""
    for which, row, column, value in odd:
        matrix = values[which].view(-1, values[which].shape[-1])
        if len(matrix):
            matrix[row % len(matrix), column % matrix.shape[1]] = value


def copy_to_layout(values: Tensor, layout: str) -> Tensor:
    """Copy a tensor into a layout of LAYOUTS; NaN fills gaps between the elements."""
    shape = values.shape
    if layout == "misaligned" and values.device.type == "cpu" and values.numel():
        size = values.element_size()
        memory = bytearray(values.numel() * size + 1)
        view = torch.frombuffer(memory, dtype=values.dtype, offset=1, count=values.numel())
        return view.view(shape).copy_(values)
    if layout == "sliced":  # like logits[..., :vocabulary] and logits[:, :-1]
        more = [n + (1 if i else 0) for i, n in enumerate(shape)]
        base = values.new_full(more, math.nan)
        view = base[tuple(slice(0, n) for n in shape)]
    elif layout == "rows apart":
        view = values.new_full((*shape[:-1], 2, shape[-1]), math.nan)[..., 1, :]
    elif layout == "transposed" and len(shape) > 2:
        order = [shape[1], shape[0], *shape[2:]]
        view = values.new_full(order, math.nan).transpose(0, 1)
    elif layout == "classes apart":
        view = values.new_full((*shape, 2), math.nan)[..., 0]
    else:
        return values.clone(memory_format=torch.contiguous_format)
    return view.copy_(values)


def has_equal_bits(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0)) and torch.equal(
        a.isnan(), b.isnan()
    )


def check_close(
    got: Tensor, want: Tensor, relative: float, absolute: float | Tensor, name: str
) -> None:
    """Raise AssertionError if an entry is off by more than ``relative * abs(want) + absolute``."""
    # Entries above half the maximum of the dtype, or of float32, may overflow, so every result of
    # such an entry passes.
    largest = min(torch.finfo(got.dtype).max, torch.finfo(FP32).max) / 2
    huge = want.abs() > largest
    # Values up to half the dtype's least subnormal number round to 0.
    absolute = absolute + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps / 2
    got = got.double()
    fits = (got - want).abs() <= relative * want.abs() + absolute
    fits |= (got == want) | (got.isnan() & want.isnan()) | huge
    if not bool(fits.all()):
        at = int((~fits).flatten().nonzero()[0])
        pair = (float(got.flatten()[at]), float(want.flatten()[at]))
        raise AssertionError(f"{name}[{at}] is {pair[0]!r}, float64 says {pair[1]!r}")


def largest_of(*tensors: Tensor) -> float:
    """Return the greatest magnitude of the finite entries."""
    finite = [x.double().nan_to_num(0, 0, 0).abs() for x in tensors if x.numel()]
    return max([float(x.max()) for x in finite], default=0.0)


def lacks_inverse(lengths: Tensor, dtype: torch.dtype) -> bool:
    """Return True if the inverse of a nonzero length overflows in ``dtype``."""
    return bool(((lengths > 0) & (lengths <= 1 / torch.finfo(dtype).max)).any())


@contextmanager
def execution_settings(isa: str, threads: int, *, in_python: bool) -> Iterator[None]:
    before, count = _C.isa(), torch.get_num_threads()
    _C.use_isa(isa)
    torch.set_num_threads(threads)
    try:
        with autograd.without_cpp() if in_python else nullcontext():
            yield
    finally:
        torch.set_num_threads(count)
        _C.use_isa(before)


def program(cases: st.SearchStrategy[Any], run: Callable[[Any, torch.device], None]) -> None:
    """Run a fuzzer by the command ``FILE [CASES [FIRST_SEED]]``; print failures."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures = []
    for seed in range(first, first + math.ceil(count / BATCH)):
        fuzz = hypothesis.seed(seed)(hypothesis.given(case=cases)(lambda case: run(case, device)))
        try:
            hypothesis.settings(
                max_examples=min(BATCH, count), deadline=None, database=None, derandomize=False,
                suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
            )(fuzz)()  # fmt: skip
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            print(f"seed {seed}: {type(error).__name__}: {error}\n{notes}", flush=True)
            failures.append(seed)
    figures = {"cases": count, "first seed": first, "failures": len(failures)}
    print("figures: " + json.dumps(figures | {"device": device.type}))
    sys.exit(bool(failures))
