"""Is the fused loss right on your tensors, and how much faster is it there?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import losses, reference

# Float64 gradients are computed for at most this many logits; beyond, for rows spread over the
# tensor.
_CHECKED = {"cpu": 2**24, "cuda": 2**27}
# What float32 arithmetic may cost, next to nothing else: logits far from zero lose digits before
# any loss does.
_FLOOR = {torch.float64: 1e-11}
_FLOOR_OTHERS = 1e-5


class Verification(NamedTuple):
    """What :func:`verify` found. Errors are relative to float64: of the gradient, in the 2-norm."""

    agrees: bool
    """Loss and gradient are as near to float64 as eager PyTorch's, or as near as their dtype
    allows.
    """
    loss_error: float
    gradient_error: float
    eager_loss_error: float | None
    """None if eager PyTorch ran out of memory; so for all that is eager's."""
    eager_gradient_error: float | None
    rounding_error: float
    """The error of the float64 gradient once rounded to the logits' dtype."""
    seconds: float
    """Median time of a loss and its gradient."""
    eager_seconds: float | None
    speedup: float | None
    rows_checked: int
    """How many rows' gradients were compared; the loss is compared over all rows."""

    def __str__(self) -> str:
        """A short table."""

        def number(value: float | None, form: str) -> str:
            return "out of memory" if value is None else format(value, form)

        def milliseconds(value: float | None) -> float | None:
            return None if value is None else 1e3 * value

        rows = [
            ("", "fastkd", "eager PyTorch"),
            ("loss error", f"{self.loss_error:.1e}", number(self.eager_loss_error, ".1e")),
            (
                "gradient error",
                f"{self.gradient_error:.1e}",
                number(self.eager_gradient_error, ".1e"),
            ),
            (
                "milliseconds",
                f"{1e3 * self.seconds:.3g}",
                number(milliseconds(self.eager_seconds), ".3g"),
            ),
        ]
        verdict = "agrees" if self.agrees else "DOES NOT AGREE"
        faster = (
            "" if self.speedup is None else f"; {self.speedup:.1f} times as fast as eager PyTorch"
        )
        lines = [f"{name:<16}{ours:>10}{eager:>16}" for name, ours, eager in rows]
        return "\n".join(
            [
                *lines,
                "Errors are relative to float64; rounding the gradient costs "
                f"{self.rounding_error:.1e} by itself ({self.rows_checked} rows checked).",
                f"fastkd {verdict} with the float64 reference{faster}.",
            ]
        )


class _Problem(NamedTuple):
    """The tensors as rows, and the options as numbers."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    temperature: float | Tensor
    hard_weight: float
    soft_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: str
    divisor: float | Tensor
    divergence: str

    def take(self, rows: Tensor | slice) -> _Problem:
        """Some of the rows in float64, summed: whoever wants the mean divides."""
        t = self.temperature
        return self._replace(
            student=self.student[rows].double(),
            teacher=self.teacher[rows].double(),
            labels=None if self.labels is None else self.labels[rows],
            temperature=t[rows].double() if isinstance(t, Tensor) else t,
            reduction="none" if self.reduction == "none" else "sum",
        )

    def truth(self) -> Tensor:
        """The reference's loss."""
        return reference.loss(
            self.student,
            self.teacher,
            self.labels,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            divergence=self.divergence,
        )

    def eager(self) -> Tensor:
        """The loss as one writes it in PyTorch without further thought, in the student's dtype."""
        student, teacher = self.student, self.teacher.to(self.student.dtype)
        t = self.temperature
        t = t.to(student.dtype) if isinstance(t, Tensor) else t
        column = t.unsqueeze(-1) if isinstance(t, Tensor) else t
        log_q = F.log_softmax(student / column, -1)
        if self.divergence == "forward_kl":
            p = F.softmax(teacher / column, -1)
            soft = F.kl_div(log_q, p, reduction="none").sum(-1)
        else:
            log_p = F.log_softmax(teacher / column, -1)
            soft = reference.DIVERGENCES[self.divergence](log_p, log_q)
        total = self.soft_weight * t**2 * soft
        if self.labels is not None:
            hard = F.cross_entropy(
                student,
                self.labels,
                ignore_index=self.ignore_index,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            total = total + self.hard_weight * hard
            total = total.where(self.labels != self.ignore_index, torch.zeros_like(total))
        return total if self.reduction == "none" else total.sum() / self.divisor


def verify(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    repeats: int = 10,
    show: bool = True,
    **options: Any,
) -> Verification:
    """Checks :func:`fastkd.loss` on your tensors against float64; times it against eager PyTorch.

    Nothing is changed: the tensors get no gradient. Memory for one gradient is needed, and a few
    times that for eager PyTorch, which is left out if it does not fit.

    Args: student_logits: ``(..., C)``, as for :func:`fastkd.loss`. teacher_logits: ``(..., C)``.
    labels: ``(...)`` or None. repeats: how often each is timed. show: whether to print the result.
    options: those of :func:`fastkd.loss`; ``inplace`` and ``teacher_grad`` make no difference here.

    Returns:
        A :class:`Verification`; ``print`` shows it as a table, ``.agrees`` is the verdict.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(64, 1000), torch.randn(64, 1000)
        >>> result = fastkd.verify(student, teacher, torch.randint(1000, (64,)), show=False)
        >>> result.agrees
        True
    """
    options = {
        key: value for key, value in options.items() if key not in ("inplace", "teacher_grad")
    }
    student = student_logits.detach().requires_grad_()
    teacher = teacher_logits.detach()
    result = losses.loss(student, teacher, labels, **options)  # checks the arguments as well
    problem = _problem(student, teacher, labels, options)
    ours = _gradient(result, student)
    ours_rows = ours.reshape(problem.student.shape)

    count, classes = problem.student.shape
    limit = _CHECKED["cuda" if student.is_cuda else "cpu"]
    checked = min(count, max(1, limit // classes))
    rows = torch.linspace(0, max(0, count - 1), checked, device=student.device).round().long()
    true_loss, true_gradient = _truth(problem, rows, limit // 8)
    loss_error = _distance(result, true_loss)
    gradient_error = _distance(ours_rows[rows], true_gradient)
    rounding_error = _distance(true_gradient.to(student.dtype), true_gradient)
    del result, ours, ours_rows

    leaf = problem.student.detach().requires_grad_()
    eager = problem._replace(student=leaf)
    eager_loss_error = eager_gradient_error = eager_seconds = None

    def run_ours() -> None:
        _gradient(losses.loss(student, teacher, labels, **options), student)

    def run_eager() -> None:
        _gradient(eager.eager(), leaf)

    try:
        result = eager.eager()
        eager_loss_error = _distance(result, true_loss)
        eager_gradient_error = _distance(_gradient(result, leaf)[rows], true_gradient)
        seconds, eager_seconds = _time((run_ours, run_eager), repeats, student.is_cuda)
    except torch.OutOfMemoryError:
        eager_loss_error = eager_gradient_error = eager_seconds = None
        torch.cuda.empty_cache()
        (seconds,) = _time((run_ours,), repeats, student.is_cuda)

    floor = _FLOOR.get(student.dtype, _FLOOR_OTHERS)
    agrees = loss_error <= max(floor, eager_loss_error or 0.0) and gradient_error <= max(
        floor + 1.5 * rounding_error, eager_gradient_error or 0.0
    )
    found = Verification(
        agrees,
        loss_error,
        gradient_error,
        eager_loss_error,
        eager_gradient_error,
        rounding_error,
        seconds,
        eager_seconds,
        None if eager_seconds is None else eager_seconds / seconds,
        checked if count else 0,
    )
    if show:
        dtype = str(student.dtype).removeprefix("torch.")
        print(f"fastkd.verify: {count} x {classes}, {dtype}, {student.device}\n{found}")
    return found


def _problem(
    student: Tensor, teacher: Tensor, labels: Tensor | None, options: dict[str, Any]
) -> _Problem:
    """Rows and numbers from the arguments of :func:`fastkd.loss`, which has accepted them."""
    classes = student.shape[-1]
    flat = None if labels is None else labels.reshape(-1).long()
    hard, soft = losses._weights(
        options.get("alpha"),
        options.get("hard_weight"),
        options.get("soft_weight"),
        labels is not None,
    )
    t = options.get("temperature", 2.0)
    if isinstance(t, Tensor):
        t = t.expand(student.shape[:-1]).reshape(-1).to(student.device)
    ignore_index = options.get("ignore_index", -100)
    reduction = options.get("reduction", "mean")
    divisor: float | Tensor = 1.0
    if reduction == "mean":
        divisor = options.get("normalizer")  # type: ignore[assignment]
        if divisor is None:
            rows = student.numel() // classes
            divisor = max(1, rows if flat is None else int((flat != ignore_index).sum()))
        elif isinstance(divisor, Tensor):
            divisor = divisor.item()
    return _Problem(
        student.detach().reshape(-1, classes),
        teacher.reshape(-1, classes),
        flat,
        t,
        hard,
        soft,
        options.get("label_smoothing", 0.0),
        ignore_index,
        reduction,
        divisor,
        options.get("divergence", "forward_kl"),
    )


def _gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student, torch.ones_like(loss))[0]


def _truth(problem: _Problem, rows: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The loss over all rows, and the gradient of some, in float64, a chunk of rows at a time."""
    count, classes = problem.student.shape
    step = max(1, chunk // classes)
    with torch.no_grad():
        parts = [
            problem.take(slice(at, at + step)).truth().reshape(-1)
            for at in range(0, max(1, count), step)
        ]
    loss = torch.cat(parts)
    if problem.reduction != "none":
        loss = loss.sum() / problem.divisor
    gradients = []
    for at in range(0, len(rows), step):
        part = problem.take(rows[at : at + step])
        leaf = part.student.requires_grad_()
        gradients.append(_gradient(part.truth() / problem.divisor, leaf))
    return loss, torch.cat(gradients) if gradients else problem.student.double()


def _distance(there: Tensor, right: Tensor) -> float:
    """||there - right|| / ||right||, equal infinities and NaN in both places being equal."""
    there = there.detach().double().reshape(right.shape)
    same = (there == right) | (there.isnan() & right.isnan())
    off = float(torch.linalg.vector_norm((there - right).masked_fill(same, 0.0)))
    size = float(torch.linalg.vector_norm(right.masked_fill(~right.isfinite(), 0.0)))
    if math.isnan(off):
        return math.inf
    return off / size if size > 0 else off


def _time(calls: tuple[Callable[[], None], ...], repeats: int, cuda: bool) -> list[float]:
    """Median seconds of each call; they take turns."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, taken in zip(calls, samples, strict=True):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if turn:  # the first is for warming up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]
