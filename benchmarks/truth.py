"""Compute a case's loss and gradient in float64, and the errors of a baseline.

The loss includes every row. A small gradient is stored for every row. To bound the memory, a large
gradient is stored for some rows, spread evenly from the first row to the last row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import DTYPES, Case
from fastkd import reference

# A baseline with larger relative errors is not timed. The bounds are wide, because eager PyTorch is
# inaccurate in 16 bits.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.25}


@dataclass(frozen=True)
class Errors:
    """Hold the errors of a loss and its gradient against float64."""

    loss: float
    """|loss - truth| / |truth|."""
    gradient: float | None = None
    """||gradient - truth|| / ||truth||, over the rows that were checked."""
    gradient_max: float | None = None
    """Largest error of a gradient's element, divided by the true gradient's largest element."""

    def is_acceptable(self, case: Case) -> bool:
        """Return True if the errors are within the bounds; NaN counts as outside the bounds."""
        gradient = 0.0 if self.gradient is None else self.gradient
        return (
            self.loss <= LOSS_TOLERANCE[case.dtype] and gradient <= GRADIENT_TOLERANCE[case.dtype]
        )


class Truth:
    """Compute losses and gradients of one set of inputs in float64."""

    def __init__(self, case: Case, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Store the inputs, and choose the rows whose gradients are stored."""
        self.case = case
        self.inputs = (student.detach().clone(), teacher, labels)
        on_gpu = student.device.type == "cuda"
        most_elements = 2**29 if on_gpu else 2**24
        self.chunk = max(1, (2**26 if on_gpu else 2**22) // case.classes)
        count = min(case.rows, max(2, most_elements // case.classes))
        self.rows = torch.linspace(0, case.rows - 1, count, device=student.device).round().long()
        self._losses: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}

    def _sum_losses(self, kind: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses of the rows, by the formula that ``kind`` names."""
        case, t = self.case, self.case.temperature
        if kind == "jsd":
            log_q, log_p = F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1)
            log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
            terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
            return 0.5 * terms.sum()
        options = {"temperature": t, "hard_weight": case.alpha, "soft_weight": 1 - case.alpha}
        loss = reference.loss(student, teacher, labels, reduction="sum", **options)
        if kind == "soft_ce":
            log_p = F.log_softmax(teacher / t, -1)
            loss = loss - (1 - case.alpha) * t**2 * (log_p.exp() * log_p).sum()
        return loss

    def _compute(self, kind: str) -> None:
        student, teacher, labels = self.inputs
        divisor = max(1, int((labels != -100).sum())) if kind != "jsd" else self.case.rows
        gradients, total = [], 0.0
        for start in range(0, self.case.rows, self.chunk):
            rows = slice(start, start + self.chunk)
            arguments = (student[rows].double(), teacher[rows].double(), labels[rows])
            total += self._sum_losses(kind, *arguments).item()
        self._losses[kind] = total / divisor
        if not self.case.gradient:
            return
        for start in range(0, len(self.rows), self.chunk):
            stored_rows = self.rows[start : start + self.chunk]
            leaf = student[stored_rows].double().requires_grad_()
            loss = self._sum_losses(kind, leaf, teacher[stored_rows].double(), labels[stored_rows])
            (gradient,) = torch.autograd.grad(loss * (self.case.grad_scale / divisor), leaf)
            gradients.append(gradient)
        self._gradients[kind] = torch.cat(gradients)

    def compute_errors(self, kind: str, loss: Tensor, gradient: Tensor | None) -> Errors:
        """Return the errors of a loss and gradient against the formula that ``kind`` names."""
        if kind not in self._losses:
            self._compute(kind)
        exact = self._losses[kind]
        loss_error = abs(loss.double().item() - exact) / abs(exact)
        if gradient is None:
            return Errors(loss_error)
        return Errors(loss_error, *self._compute_distance(self._gradients[kind], gradient))

    def compute_rounding(self) -> float | None:
        """Return the relative error of rounding the true gradient to the case's dtype.

        Return None if the case has no gradient, or if the gradient of "kd" was not computed.
        """
        if not self.case.gradient or "kd" not in self._gradients:
            return None
        rounded = self._gradients["kd"].to(DTYPES[self.case.dtype])
        return self._compute_distance(self._gradients["kd"], rounded, everything=True)[0]

    def _compute_distance(
        self, exact: Tensor, gradient: Tensor, everything: bool = False
    ) -> tuple[float, float]:
        squares = torch.zeros(2, dtype=torch.float64, device=exact.device)
        largest = torch.zeros(2, dtype=torch.float64, device=exact.device)
        for start in range(0, len(exact), self.chunk):
            part = exact[start : start + self.chunk]
            rows = self.rows[start : start + self.chunk]
            computed = (
                gradient[start : start + self.chunk] if everything else gradient[rows]
            ).double()
            difference = computed - part
            squares += torch.stack([difference.square().sum(), part.square().sum()])
            largest = torch.maximum(
                largest, torch.stack([difference.abs().max(), part.abs().max()])
            )
        ratio, ratio_max = (squares[0] / squares[1]).sqrt(), largest[0] / largest[1]
        return ratio.item(), ratio_max.item()
