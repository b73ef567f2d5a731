"""Write docs/accuracy.md, the errors of fastkd and of eager PyTorch against float64.

The truth is `fastkd.reference` in float64, on logits rounded to the tested dtype. Eager
PyTorch computes the divergence's formula in the tested dtype. The error of a row's loss is the
difference from the true loss, divided by the true loss. The error of a row's gradient is the 2-norm
of the difference from the true gradient, divided by the true gradient's 2-norm.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks import environment
from fastkd import _C, reference

FILE = Path(__file__).parents[1] / "docs" / "accuracy.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = 2.0


class Regime(NamedTuple):
    """Describe random logits: shape, standard deviation (``spread``) and mean (``offset``)."""

    name: str
    rows: int = 64
    classes: int = 1000
    spread: float = 3.0
    apart: float | None = None  # standard deviation of teacher - student; None: independent logits
    offset: float = 0.0


REGIMES = (
    Regime("independent"),
    Regime("10 classes", rows=512, classes=10),
    Regime("262,144 classes", rows=4, classes=262_144),
    Regime("logits up to 1e4", spread=3e3),
    Regime("logits about 1e4", spread=300.0, offset=1e4),
    *(Regime(f"KL about 1e-{n}", apart=T * math.sqrt(2 * 10.0**-n)) for n in range(2, 10)),
)


def draw(regime: Regime, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Draw the logits of student and teacher, and round them to a dtype."""
    generator = torch.Generator().manual_seed(0)
    shape = (regime.rows, regime.classes)
    student, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "sn")
    student = student * regime.spread + regime.offset
    teacher = noise * regime.spread + regime.offset
    if regime.apart is not None:
        teacher = student + noise * regime.apart
    return student.to(dtype).to(device), teacher.to(dtype).to(device)


def eager(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Return the loss of each row, computed by PyTorch operations in the inputs' dtype."""
    kind = reference.DIVERGENCES[divergence]
    pair = (teacher / T, student / T)
    if kind.compares == "probabilities":
        pair = (F.log_softmax(pair[0], -1), F.log_softmax(pair[1], -1))
    if divergence == "forward_kl":
        value = F.kl_div(pair[1], pair[0], reduction="none", log_target=True).sum(-1)
    else:
        labels = [make_labels(student)] if kind.needs_labels else []
        mix = {} if kind.mix is None else {"mix": kind.mix}
        value = kind.compute(*pair, *labels, **mix)
    return T * T * value


def make_labels(student: Tensor) -> Tensor:
    """Return one label for each row, for divergences that need labels."""
    return torch.arange(len(student), device=student.device) % student.shape[-1]


def fused(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Return the loss of each row, computed by fastkd without a hard term."""
    needs = reference.DIVERGENCES[divergence].needs_labels
    labels = make_labels(student) if needs else None
    weights = {"hard_weight": 0.0, "soft_weight": 1.0} if needs else {}
    return fastkd.loss(
        student, teacher, labels, temperature=T, divergence=divergence, reduction="none", **weights
    )


class Errors(NamedTuple):
    """Hold the median and the maximum over the rows of the errors of loss and gradient."""

    loss: float
    loss_most: float
    grad: float
    grad_most: float

    def __str__(self) -> str:
        """Return the errors as two cells of a Markdown table, one for loss and one for gradient."""
        return " | ".join(
            f"{a:.0e} / {b:.0e}" for a, b in ((self.loss, self.loss_most), self[2:])
        ).replace("e-0", "e-")


Rows = tuple[Tensor, Tensor]


def compute_rows(compute: Callable[[Tensor], Tensor], student: Tensor) -> Rows:
    """Return the loss and the gradient of each row, converted to float64."""
    leaf = student.detach().clone().requires_grad_()
    value = compute(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().double(), gradient.double()


def compute_errors(rows: Rows, truth: Rows) -> Errors:
    """Return the median and largest relative errors over the rows; NaN counts as infinite."""
    numbers: list[float] = []
    for got, exact in zip(rows, truth, strict=True):
        got, exact = got.reshape(len(got), -1), exact.reshape(len(exact), -1)
        relative = ((got - exact).norm(dim=1) / exact.norm(dim=1)).nan_to_num(math.inf)
        numbers += [float(relative.median()), float(relative.max())]
    return Errors(*numbers)


def compare(
    regime: Regime, dtype: torch.dtype, device: str, divergence: str
) -> tuple[Errors, Errors, float]:
    """Return the errors of fastkd and eager PyTorch, and the median error of rounding alone.

    Rounding alone means the exact gradient, rounded to ``dtype``.
    """
    student, teacher = draw(regime, dtype, device)
    exact_teacher = teacher.double()
    needs = reference.DIVERGENCES[divergence].needs_labels

    def exact(leaf: Tensor) -> Tensor:
        return reference.loss(
            leaf, exact_teacher, make_labels(student) if needs else None, temperature=T,
            hard_weight=0.0, soft_weight=1.0, divergence=divergence, reduction="none",
        )  # fmt: skip

    truth = compute_rows(exact, student.double())
    ours = compute_errors(
        compute_rows(lambda leaf: fused(leaf, teacher, divergence), student), truth
    )
    theirs = compute_errors(
        compute_rows(lambda leaf: eager(leaf, teacher, divergence), student), truth
    )
    rounded = compute_errors((truth[0], truth[1].to(dtype).double()), truth)
    return ours, theirs, rounded.grad


HEAD = (
    "| | fastkd, loss | fastkd, gradient | eager, loss | eager, gradient | rounding alone |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def make_table(rows: Iterable[tuple[str, tuple[Errors, Errors, float]]]) -> str:
    """Return a Markdown table of errors."""
    lines = [
        f"| {name} | {ours} | {theirs} | {rounded:.0e} |".replace("e-0", "e-")
        for name, (ours, theirs, rounded) in rows
    ]
    return "\n".join([HEAD, *lines])


def write_document(device: str) -> str:
    """Return the text of docs/accuracy.md."""
    facts = environment.describe(device)
    parts = [
        "# Accuracy\n",
        f"Written by `python -m benchmarks.accuracy` on {facts['device']}, torch "
        f"{torch.__version__}, {_C.isa()} kernels, commit {facts['commit']}, {facts['date']}.\n",
        f"{' '.join((__doc__ or '').split(chr(10) * 2)[1].split())} Each cell is the median / "
        "the maximum over the rows; `inf` stands for a row with NaN. T is 2. The last column is "
        "the median error of rounding the true gradient to the dtype: no kernel that stores a "
        "gradient in this dtype can do better. The loss is float32 for all these dtypes. At a KL "
        "of 1e-9 the truth itself has six correct digits. The tables lack float64 logits, because "
        "a float64 truth cannot judge them: `tests/kernels/cpu_kernels.cpp` compares them with "
        "long double.\n",
        "## The forward KL, by dtype and inputs\n",
    ]
    for name, dtype in DTYPES.items():
        results = [(r.name, compare(r, dtype, device, "forward_kl")) for r in REGIMES]
        parts += [f"### {name}\n", make_table(results), ""]
    parts += ["## Every divergence\n", "Independent logits, 64 x 1000.\n"]
    for name, dtype in DTYPES.items():
        results = [(d, compare(REGIMES[0], dtype, device, d)) for d in fastkd.divergences()]
        parts += [f"### {name}\n", make_table(results), ""]
    if device == "cpu":
        parts += ["## Every instruction set\n", "Independent logits, 64 x 1000, forward KL.\n"]
        before, results = _C.isa(), []
        for isa in _C.available_isas():
            _C.use_isa(isa)
            for name, dtype in DTYPES.items():
                results.append((f"{isa}, {name}", compare(REGIMES[0], dtype, device, "forward_kl")))
        _C.use_isa(before)
        parts += [make_table(results), ""]
        parts.append(
            "Two instruction sets differ by rounding alone: losses by at most 2e-6 (1e-13 in "
            "fp64), 16-bit gradients by one unit in the last place. "
            "`tests/test_determinism.py::test_instruction_sets_agree` checks these bounds.\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Write docs/accuracy.md, or docs/accuracy-cuda.md with ``--device cuda``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    path = FILE if device == "cpu" else FILE.with_name("accuracy-cuda.md")
    path.write_text(write_document(device))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
