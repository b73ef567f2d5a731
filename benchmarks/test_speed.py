"""Find regressions of speed by micro-benchmarks, which also check loss and gradient.

    python -m pytest benchmarks --benchmark-autosave         save a run under .benchmarks/
    python -m pytest benchmarks --benchmark-compare          compare with the last saved run
    python -m pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:10%

The last command fails if a median is more than 10 % slower. The normal test run leaves out these
benchmarks. ``python -m benchmarks`` also times baselines.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.baselines import floor, fused
from benchmarks.cases import DTYPES, Case
from benchmarks.measure import Step, make_inputs
from benchmarks.truth import Truth

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

# The first shape measures the overhead of a call. The next two are batches of images, and the last
# two are logits of language models.
SHAPES = [(8, 10), (128, 100), (1024, 1000), (32, 32000), (4, 128257)]


def _run(benchmark: Any, case: Case, device: str) -> None:
    inputs = make_inputs(case, device, 0)
    step = Step(case, fused(case), [inputs])

    def call() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    loss, gradient = step.run(inputs)
    truth = Truth(case, inputs.student, inputs.teacher, inputs.labels)
    errors = truth.compute_errors("kd", loss, gradient)
    assert errors.loss < 1e-5
    if errors.gradient is not None:
        rounding = truth.compute_rounding()
        assert rounding is not None
        assert errors.gradient < 1e-6 + 1.5 * rounding
    benchmark(call)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), SHAPES, ids=lambda value: str(value))
def test_loss_and_gradient(
    benchmark: Any, device: str, dtype: str, rows: int, classes: int
) -> None:
    _run(benchmark, Case("micro", rows, classes, dtype), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "classes"), SHAPES, ids=lambda value: str(value))
def test_loss_alone(benchmark: Any, device: str, rows: int, classes: int) -> None:
    _run(benchmark, Case("micro", rows, classes, gradient=False), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0])
def test_temperature(benchmark: Any, device: str, temperature: float) -> None:
    _run(benchmark, Case("micro", 64, 32000, temperature=temperature), device)


@pytest.mark.parametrize("device", DEVICES)
def test_half_of_the_rows_ignored(benchmark: Any, device: str) -> None:
    _run(benchmark, Case("micro", 64, 32000, ignored=0.5), device)


@pytest.mark.parametrize("device", DEVICES)
def test_pytorchs_own_cost(benchmark: Any, device: str) -> None:
    """Time a sum and its backward pass, which show PyTorch's overhead on the smallest case."""
    case = Case("micro", 8, 10)
    inputs = make_inputs(case, device, 0)
    step = Step(case, floor(case), [inputs])
    loss, gradient = step.run(inputs)
    assert gradient is not None
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.allclose(loss, inputs.student.detach().sum())

    def call() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
