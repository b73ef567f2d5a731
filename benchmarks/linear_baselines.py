"""Define the linear heads that linear.py measures, and the implementations of their loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks.baselines import UnavailableError, import_package
from benchmarks.cases import DTYPES
from fastkd import Head
from fastkd.linear.planner import MIB

TEMPERATURE, ALPHA = 2.0, 0.5


@dataclass(frozen=True)
class LinearCase:
    """Describe two linear heads, and bounds: multiples of the GEMM time, and MiB of memory."""

    name: str
    rows: int
    student_width: int
    teacher_width: int
    classes: int
    dtype: str
    ignored: float = 0.0
    """Share of rows whose label is ignored."""
    small_mib: int = 0
    """``max_workspace`` of "fastkd, small" in MiB; 0 to leave out this implementation."""
    must: tuple[float, float] | None = None
    """Bounds of "fastkd": multiple of the GEMM time, and MiB."""
    small_must: tuple[float, float] | None = None
    smallest_must: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """Return the name, shape and dtype as text."""
        ignored = f", {self.ignored:.0%} of the rows ignored" if self.ignored else ""
        return (
            f"{self.name}: {self.rows} rows, {self.student_width} (teacher {self.teacher_width}) x "
            f"{self.classes} {self.dtype}{ignored}"
        )


def list_cases(device: str) -> list[LinearCase]:
    """Return cases of two language models for a GPU, or of a smaller head for a CPU."""
    if device == "cuda":
        llama = ("llama-3", 4096, 2048, 4096, 128256, "bf16")
        qwen = ("qwen", 8192, 1024, 4096, 151936, "bf16")
        return [
            LinearCase(
                *llama,
                small_mib=1200,
                must=(1.18, 2100),
                small_must=(1.30, 1200),
                smallest_must=(2.0, 564),
            ),
            LinearCase(
                *qwen,
                small_mib=1200,
                must=(1.20, 2300),
                small_must=(1.35, 1200),
                smallest_must=(2.0, 334),
            ),
            LinearCase(*llama, ignored=0.6),
        ]
    head = ("llama-2", 512, 512, 512, 32000)
    return [
        LinearCase(*head, "fp32", small_mib=80),
        LinearCase(*head, "bf16", small_mib=60),
        LinearCase(*head, "fp32", ignored=0.6),
    ]


class Inputs(NamedTuple):
    """Hold the tensors of a case, in the order of the arguments of Liger-Kernel's loss."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def heads(self) -> tuple[Head, Head]:
        """Return student and teacher as Heads."""
        return Head(*self[:2]), Head(*self[2:4])


def make_inputs(case: LinearCase, device: str) -> Inputs:
    """Draw inputs whose logits have a standard deviation of about 3."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, width: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, width, generator=generator, device=device)
        return values.mul_(scale).to(DTYPES[case.dtype])

    labels = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    if case.ignored:
        drawn = torch.rand(case.rows, generator=generator, device=device)
        labels.masked_fill_(drawn < case.ignored, -100)
    return Inputs(
        draw(case.rows, case.student_width).requires_grad_(),
        draw(case.classes, case.student_width, 3 * case.student_width**-0.5).requires_grad_(),
        draw(case.rows, case.teacher_width),
        draw(case.classes, case.teacher_width, 3 * case.teacher_width**-0.5),
        labels,
    )


# ---- implementations of the loss

LossFunction = Callable[[Inputs], Tensor]


def _fastkd(**chunks: Any) -> LossFunction:
    def loss(inputs: Inputs) -> Tensor:
        arguments = (*inputs.heads, inputs.labels)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA}
        if chunks:
            options["chunks"] = fastkd.chunks.plan(*arguments, **chunks, **options)
        return fastkd.loss(*arguments, **options)

    return loss


def fused(case: LinearCase) -> LossFunction:
    """Make a loss function that calls fastkd.loss with default chunks."""
    return _fastkd()


def fused_small(case: LinearCase) -> LossFunction:
    """Make fastkd's loss in chunks of rows; sum the weight's gradient in the weight's dtype."""
    if not case.small_mib:
        raise UnavailableError("not tried")
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    return _fastkd(chunk_by="rows", max_workspace=case.small_mib * MIB, accumulate_dtype=dtype)


def fused_smallest(case: LinearCase) -> LossFunction:
    """Make fastkd's loss in chunks of classes, which computes the logits twice."""
    return _fastkd(chunk_by="classes")


def _eager(inputs: Inputs, upcast: bool) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(inputs.teacher_hidden, inputs.teacher_weight)
    student = F.linear(inputs.hidden, inputs.weight)
    valid = inputs.labels != -100
    if not valid.all():
        student, teacher = student[valid], teacher[valid]
    if upcast:
        student, teacher = student.float(), teacher.float()
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    soft = F.kl_div(log_q, F.softmax(teacher / TEMPERATURE, -1), reduction="batchmean")
    hard = F.cross_entropy(student, inputs.labels[valid])
    return ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft


def eager(case: LinearCase) -> LossFunction:
    """Make a loss function of F.linear, F.kl_div and F.cross_entropy."""
    return lambda inputs: _eager(inputs, upcast=False)


def eager_upcast(case: LinearCase) -> LossFunction:
    """Make the eager loss function on logits cast to float32."""
    if case.dtype == "fp32":
        raise UnavailableError("the same as eager in float32")
    return lambda inputs: _eager(inputs, upcast=True)


def _liger_chunked(case: LinearCase, compiled: bool) -> LossFunction:
    liger = import_package("liger_kernel.chunked_loss", "liger-kernel")
    # Liger omits the factor T^2, so the soft weight includes T^2. beta=0 is the forward KL.
    criterion = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=ALPHA,
        weight_soft_loss=(1 - ALPHA) * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=1024,
    )
    return lambda inputs: criterion(*inputs)


def liger(case: LinearCase) -> LossFunction:
    """Make Liger-Kernel's chunked loss, compiled."""
    return _liger_chunked(case, compiled=True)


def liger_uncompiled(case: LinearCase) -> LossFunction:
    """Make Liger-Kernel's chunked loss, not compiled."""
    return _liger_chunked(case, compiled=False)


LANES: dict[str, Callable[[LinearCase], LossFunction]] = {
    "fastkd": fused,
    "fastkd, small": fused_small,
    "fastkd, smallest": fused_smallest,
    "eager": eager,
    "eager fp32": eager_upcast,
    "Liger chunked, compiled": liger,
    "Liger chunked": liger_uncompiled,
}


def make_products(case: LinearCase, inputs: Inputs) -> Callable[[], None]:
    """Return a function that computes the four matrix products, without ignored rows.

    All calls of the function write the products to one set of buffers.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    valid = inputs.labels != -100
    hidden, teacher_hidden = hidden[valid], inputs.teacher_hidden[valid]
    logits = torch.empty(len(hidden), case.classes, dtype=hidden.dtype, device=hidden.device)
    teacher = torch.empty_like(logits)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(teacher_hidden, inputs.teacher_weight.t(), out=teacher)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return run
