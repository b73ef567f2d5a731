"""Define the measured cases: shapes of well-known models, and the rows that fit a machine.

A row is a sample or pixel of a vision model, or a token of a language model. Vision cases have the
rows of a usual batch. Language models have 8192 rows on a GPU, halved until a tensor of logits
takes at most 1/48 of the GPU's memory. This limit leaves room for two sets of inputs and the
largest baseline: eager PyTorch in float32 on 16-bit logits takes 16 tensors of logits. On a CPU,
language models have 128 rows, halved until a float32 tensor of logits takes at most 32 MiB.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Model:
    """Describe the shape of a well-known model's logits."""

    name: str
    classes: int
    what: str
    rows: int = 0
    """Rows of one step; 0 for the number that ``fit_rows`` returns."""


MODELS = {
    model.name: model
    for model in (
        Model("digits", 10, "ten digits", rows=128),
        Model("cifar-100", 100, "CIFAR-100, batch 128", rows=128),
        Model("imagenet-1k", 1000, "ImageNet-1k", rows=1024),
        Model("imagenet-21k", 21841, "ImageNet-21k", rows=256),
        Model("llama-2", 32000, "Llama-2's vocabulary"),
        Model("gpt-2", 50257, "GPT-2's vocabulary"),
        Model("llama-3", 128256, "Llama-3's vocabulary"),
        Model("qwen", 151936, "Qwen's vocabulary"),
        Model("gemma", 262144, "Gemma's vocabulary"),
        Model("segmentation", 19, "Cityscapes, one image, a row for each pixel", rows=512 * 1024),
    )
}


@dataclass(frozen=True)
class Case:
    """Describe a measurement: the logits, the options of the loss, and the measured quantities."""

    name: str
    rows: int
    classes: int
    dtype: str = "fp32"
    temperature: float = 2.0
    gradient: bool = True
    alpha: float = 0.5
    ignored: float = 0.0
    """Share of rows whose label is ignored."""
    compiled: str = "default"
    """Measured modes of torch.compile: "no" for none, "default", or "best" for both modes."""
    pixels: bool = False
    """True if dim=1 is the dimension of the classes, as in an image's logits (1, C, H, W)."""
    memory: bool = False
    """True to also measure fastkd in place and, on a CPU, the peak memory."""

    @property
    def elements(self) -> int:
        """Return the number of elements of one tensor of logits."""
        return self.rows * self.classes

    @property
    def tensor_bytes(self) -> int:
        """Return the bytes of one tensor of logits."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def least_bytes(self) -> int:
        """Return the bytes of the tensors to read and write: logits and, if computed, gradient."""
        return (3 if self.gradient else 2) * self.tensor_bytes

    @property
    def grad_scale(self) -> float:
        """Return the factor of the loss in the backward pass, against underflow in float16."""
        return 4096.0 if self.dtype == "fp16" else 1.0

    @property
    def title(self) -> str:
        """Return the case as text, without alpha."""
        mode = "loss + backward" if self.gradient else "loss alone"
        ignored = f", {self.ignored:.0%} of rows ignored" if self.ignored else ""
        shape = f"{self.rows} x {self.classes} {self.dtype}{', dim=1' if self.pixels else ''}"
        return f"{self.name}: {shape}, T = {self.temperature:g}, {mode}{ignored}"

    def asdict(self) -> dict[str, Any]:
        """Return the case as a dictionary for JSON."""
        return asdict(self)


def fit_rows(classes: int, dtype: str, device: str) -> int:
    """Return the number of rows that fit the device; the module's docstring has the rule."""
    if device == "cuda":
        rows, size = 8192, DTYPES[dtype].itemsize
        limit = torch.cuda.get_device_properties(0).total_memory // 48
    else:
        rows, size, limit = 128, 4, 32 * 2**20
    while rows > 1 and rows * classes * size > limit:
        rows //= 2
    return rows


def make_case(name: str, device: str, dtype: str, temperature: float, **options: Any) -> Case:
    """Return a case of the model with this name."""
    model = MODELS[name]
    rows = model.rows or fit_rows(model.classes, dtype, device)
    return Case(name, rows, model.classes, dtype, temperature, **options)


def list_default(device: str) -> list[Case]:
    """Return cases that take a few minutes; the cases that claims.py needs come first."""
    return _list_default_cuda() if device == "cuda" else _list_default_cpu()


def list_full(device: str) -> list[Case]:
    """Return the default cases, and all combinations of model, dtype, temperature and gradient."""
    cases = list_default(device)
    for name in MODELS:
        for dtype in DTYPES:
            for temperature in (1.0, 2.0, 3.0):
                for gradient in (True, False):
                    compiled = "best" if temperature == 2.0 else "no"
                    cases.append(
                        make_case(
                            name, device, dtype, temperature, gradient=gradient, compiled=compiled
                        )
                    )
    seen: set[str] = set()
    return [each for each in cases if not (each.title in seen or seen.add(each.title))]  # type: ignore[func-returns-value]


def _list_default_cpu() -> list[Case]:
    def llm(name: str, dtype: str, temperature: float = 4.0, **options: Any) -> Case:
        return make_case(name, "cpu", dtype, temperature, **options)

    return [
        llm("llama-3", "fp32", memory=True),
        llm("llama-2", "fp32", memory=True),
        llm("llama-3", "bf16", memory=True),
        llm("llama-2", "bf16", memory=True),
        Case("imagenet-1k", 1024, 1000, "fp32", 4.0),
        Case("imagenet-1k", 1024, 1000, "bf16", 4.0),
        Case("imagenet-1k, small batch", 37, 1000, "fp32", 4.0, compiled="no"),
        Case("imagenet-1k, small batch", 37, 1000, "bf16", 4.0, compiled="no"),
        Case("digits, tiny batch", 8, 10, "fp32", 4.0, compiled="no"),
        make_case("digits", "cpu", "fp32", 4.0),
        llm("llama-2", "fp16", compiled="no"),
        make_case("cifar-100", "cpu", "fp32", 4.0),
        make_case("imagenet-21k", "cpu", "fp32", 4.0, compiled="no"),
        llm("gpt-2", "fp32", 1.0, compiled="no"),
        llm("qwen", "bf16", 2.0, compiled="no"),
        llm("gemma", "bf16", 3.0, compiled="no"),
        make_case("segmentation", "cpu", "fp32", 2.0, compiled="no", pixels=True),
        llm("llama-2", "fp32", gradient=False, compiled="no"),
        make_case("imagenet-1k", "cpu", "fp32", 4.0, gradient=False, compiled="no"),
    ]


def _list_default_cuda() -> list[Case]:
    def llm(name: str, dtype: str = "bf16", temperature: float = 2.0, **options: Any) -> Case:
        return make_case(name, "cuda", dtype, temperature, **options)

    def width(classes: int, dtype: str = "bf16", **options: Any) -> Case:
        rows = fit_rows(classes, dtype, "cuda")
        return Case(f"{classes} classes", rows, classes, dtype, 2.0, **options)

    return [
        llm("llama-2", compiled="best", memory=True),
        llm("llama-3", compiled="best", memory=True),
        llm("gemma", compiled="best"),
        llm("qwen", compiled="best"),
        llm("gpt-2", compiled="best"),
        width(65536),
        width(8192, compiled="no"),
        Case("imagenet-1k, large batch", 8192, 1000, "bf16", 2.0),
        width(128257, compiled="no"),
        llm("llama-2", "fp32"),
        llm("llama-3", "fp32", compiled="no"),
        Case("few rows", 16, 131072, "bf16", 2.0, compiled="no"),
        Case("digits", 128, 16, "bf16", 2.0),
        Case("imagenet-1k, small batch", 128, 1000, "bf16", 2.0),
        llm("llama-2", "fp16", compiled="no"),
        llm("llama-2", temperature=1.0, compiled="no"),
        llm("llama-2", temperature=3.0, compiled="no"),
        make_case("cifar-100", "cuda", "bf16", 2.0, compiled="no"),
        make_case("imagenet-21k", "cuda", "bf16", 2.0, compiled="no"),
        make_case("segmentation", "cuda", "bf16", 2.0),
        make_case("segmentation", "cuda", "bf16", 2.0, compiled="no", pixels=True),
        make_case("segmentation", "cuda", "fp32", 2.0, compiled="no", pixels=True),
        llm("llama-2", gradient=False, compiled="no"),
        llm("llama-3", gradient=False, compiled="no"),
    ]


@dataclass(frozen=True)
class Duel:
    """Describe two cases on which the times of fastkd are compared."""

    name: str
    first: Case
    second: Case
    """Divisor: the result is ``first``'s time per logit divided by ``second``'s."""


def list_duels(device: str) -> list[Duel]:
    """Return the pairs of cases on which the times of fastkd are compared."""
    dtype = "bf16" if device == "cuda" else "fp32"

    def fit(classes: int, temperature: float = 2.0, ignored: float = 0.0) -> Case:
        rows = fit_rows(classes, dtype, device)
        return Case(f"{classes} classes", rows, classes, dtype, temperature, ignored=ignored)

    return [
        Duel("T = 3 against T = 2, 32000 classes", fit(32000, 3.0), fit(32000)),
        Duel("T = 3 against T = 2, 128256 classes", fit(128256, 3.0), fit(128256)),
        Duel("128257 classes against 128256", fit(128257), fit(128256)),
        Duel("half of the rows ignored, 32000 classes", fit(32000, ignored=0.5), fit(32000)),
    ]


def list_scaling(device: str) -> dict[str, list[Case]]:
    """Return series of cases; on a CPU, one series is timed with each number of threads."""
    if device == "cuda":
        rows = [2**power for power in range(0, 14, 2)]
        classes = [10, 100, 1000, 8192, 32000, 65536, 128256, 262144]
        return {
            "rows": [Case("llama-2", n, 32000, "bf16") for n in rows],
            "classes": [Case("width", 2048, v, "bf16") for v in classes],
        }
    return {
        "rows": [Case("llama-2", n, 32000, "fp32", 4.0) for n in (1, 4, 16, 64, 256)],
        "classes": [
            Case("width", 64, v, "fp32", 4.0) for v in (10, 100, 1000, 10000, 32000, 128256)
        ],
        "threads": [
            Case("llama-2", 128, 32000, "fp32", 4.0),
            Case("imagenet-1k", 1024, 1000, "fp32", 4.0),
        ],
    }
