"""Compare the loss with float64 and with eager PyTorch, on the user's tensors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import losses, reference, validation
from fastkd._core.arguments import prepare
from fastkd._core.objective import Objective, Options
from fastkd._core.rows import Rows, as_rows
from fastkd._core.values import Head, TopK
from fastkd.losses import KDLoss

# Float64 gradients are computed for at most this many logits; beyond, for rows spread over the
# tensor.
_CHECKED = {"cpu": 2**24, "cuda": 2**27}
# What float32 arithmetic may cost, next to nothing else: logits far from zero lose digits before
# any loss does.
_FLOOR = {torch.float64: 1e-11}
_FLOOR_OTHERS = 1e-5


class Verification(NamedTuple):
    """The result of :func:`verify`. Errors are relative to float64; for gradients in the 2-norm."""

    agrees: bool
    """True if loss and gradient are as accurate as eager PyTorch's, or as their dtype allows."""
    loss_error: float
    gradient_error: float
    eager_loss_error: float | None
    """None if eager PyTorch ran out of memory, as all fields that begin with ``eager``."""
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
        """Return a short table."""

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


def _eager(rows: Rows) -> Tensor:
    """Compute the loss by the usual PyTorch operations, in the student's dtype."""
    o = rows.objective
    soft_labels = rows.labels is not None and rows.labels.is_floating_point()
    others = soft_labels or o.class_weight is not None or o.standardize or rows.teachers[1:]
    if others or (o.divergence, o.teacher_form) != ("forward_kl", "logits"):
        return rows.terms().loss
    student, teacher = rows.student, rows.teachers[0].to(rows.student.dtype)
    t, t_teacher = (
        reference.column(value.to(student.dtype) if isinstance(value, Tensor) else value)
        for value in (o.temperature, o.teacher_temperature)
    )
    p = F.softmax(teacher / t_teacher, -1)
    soft = F.kl_div(F.log_softmax(student / t, -1), p, reduction="none").sum(-1, keepdim=True)
    total = o.soft_weight * (t**2 * soft).squeeze(-1)
    if rows.labels is not None:
        hard = F.cross_entropy(
            student,
            rows.labels,
            ignore_index=o.ignore_index,
            reduction="none",
            label_smoothing=o.label_smoothing,
        )
        total = total + o.hard_weight * hard
        total = total.where(rows.labels != o.ignore_index, torch.zeros_like(total))
    return total if o.reduction == "none" else total.sum()


def verify(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    repeats: int = 10,
    show: bool = True,
    **options: Any,
) -> Verification:
    """Compare :func:`fastkd.loss` with float64 and with eager PyTorch on your tensors.

    The tensors are not changed and get no gradient. One gradient needs memory, and eager PyTorch a
    few times as much; it is left out if it does not fit.

    Args:
        student: logits, as for :func:`fastkd.loss`.
        teacher: logits, or a sequence of several teachers' logits.
        labels: as for :func:`fastkd.loss`.
        repeats: how often each is timed.
        show: whether to print the result.
        options: those of :func:`fastkd.loss`; ``inplace`` makes no difference.

    Returns:
        A :class:`Verification`; ``print`` shows it as a table, ``.agrees`` is the verdict.

    Raises:
        TypeError, ValueError: as :func:`fastkd.loss` does, and for ``repeats`` below 1.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(64, 1000), torch.randn(64, 1000)
        >>> result = fastkd.verify(student, teacher, torch.randint(1000, (64,)), show=False)
        >>> result.agrees
        True
    """
    validation.check_count("repeats", repeats)
    options = {**KDLoss(**options).options, "inplace": False}
    problem = _rows(student, teacher, labels, options)
    student = student.detach().requires_grad_()
    result = losses.loss(student, teacher, labels, **options)
    ours = _gradient(result, student).movedim(options.get("dim", -1), -1)
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
        _gradient(_eager(eager), leaf)

    try:
        result = _eager(eager)
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


def _rows(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor],
    labels: Tensor | None,
    options: dict[str, Any],
) -> Rows:
    """Check the arguments of :func:`fastkd.loss` and return their rows, with weights as numbers."""
    if isinstance(teacher, (Head, TopK)):
        raise TypeError(
            "teacher must be a tensor of logits or a sequence of tensors; got "
            f"{type(teacher).__name__}"
        )
    call = prepare(student, teacher, labels, Options()._replace(**options))
    rows, _ = as_rows(call._replace(student=call.student.detach()), torch.float64)
    numbers = rows.objective._asdict()
    for name, value in numbers.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            numbers[name] = float(value)
    return rows._replace(objective=Objective(**numbers))


def _gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student, torch.ones_like(loss))[0]


def _truth(problem: Rows, rows: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the loss of all rows and the gradient of some, in float64, in chunks of rows."""
    count, classes = problem.student.shape
    step = max(1, chunk // classes)
    with torch.no_grad():
        parts = [
            problem.take(slice(at, at + step)).double().terms().loss.reshape(-1)
            for at in range(0, max(1, count), step)
        ]
    loss = torch.cat(parts)
    if problem.objective.reduction != "none":
        loss = loss.sum()
    gradients = []
    for at in range(0, len(rows), step):
        part = problem.take(rows[at : at + step]).double()
        leaf = part.student.requires_grad_()
        gradients.append(_gradient(part.terms().loss, leaf))
    return loss, torch.cat(gradients) if gradients else problem.student.double()


def _distance(value: Tensor, exact: Tensor) -> float:
    """Return ||value - exact|| / ||exact||; equal infinities, and NaN in both, have no distance."""
    value = value.detach().double().reshape(exact.shape)
    same = (value == exact) | (value.isnan() & exact.isnan())
    off = float(torch.linalg.vector_norm((value - exact).masked_fill(same, 0.0)))
    size = float(torch.linalg.vector_norm(exact.masked_fill(~exact.isfinite(), 0.0)))
    if math.isnan(off):
        return math.inf
    return off / size if size > 0 else off


def _time(calls: tuple[Callable[[], None], ...], repeats: int, cuda: bool) -> list[float]:
    """Return the median seconds of each call; the calls take turns."""
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
