"""Compare the loss with a float64 reference and with eager PyTorch, on the user's tensors."""

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
from fastkd._core.arguments import Call, prepare
from fastkd._core.objective import Options
from fastkd._core.rows import compute_reference_terms, flatten_rows, map_rows
from fastkd._core.values import Head, Routed, Sampled, TopK
from fastkd.losses import KDLoss

# Largest number of logits whose gradients are computed in float64. If a tensor has more logits, the
# gradients of evenly spaced rows are checked.
_MAX_CHECKED_LOGITS = {"cpu": 2**24, "cuda": 2**27}
# Accepted relative error unless the student is float64. Rounding a logit of 64 to 128 to float32
# changes exp(logit) by up to 4e-6.
_LEAST_TOLERANCE = 1e-5


class Verification(NamedTuple):
    """Hold the result of :func:`verify`.

    An error is the 2-norm of the difference from float64, divided by the 2-norm in float64.
    """

    agrees: bool
    """True if loss and gradient are as accurate as in eager PyTorch, or as the dtype allows."""
    loss_error: float
    gradient_error: float
    eager_loss_error: float | None
    """None if eager PyTorch ran out of memory, like all fields of eager PyTorch and ``speedup``."""
    eager_gradient_error: float | None
    rounding_error: float
    """The error of the float64 gradient after rounding to the logits' dtype."""
    seconds: float
    """Median duration of computing the loss and the gradient by fastkd."""
    eager_seconds: float | None
    speedup: float | None
    rows_checked: int
    """The number of rows whose gradients were compared; the loss was compared over all rows."""

    def __str__(self) -> str:
        """Return a table of errors and durations, and the verdict."""
        milliseconds = 1e3 * self.seconds, self.eager_seconds and 1e3 * self.eager_seconds
        lines = [f"{'':<16}{'fastkd':>10}{'eager PyTorch':>16}"]
        for name, ours, eager, form in (
            ("loss error", self.loss_error, self.eager_loss_error, ".1e"),
            ("gradient error", self.gradient_error, self.eager_gradient_error, ".1e"),
            ("milliseconds", *milliseconds, ".3g"),
        ):
            other = "out of memory" if eager is None else format(eager, form)
            lines.append(f"{name:<16}{ours:>10{form}}{other:>16}")
        verdict = "agrees" if self.agrees else "DOES NOT AGREE"
        faster = "" if self.speedup is None else f"; {self.speedup:.1f} x as fast as eager PyTorch"
        lines += [
            "Errors are relative to float64; rounding the gradient costs "
            f"{self.rounding_error:.1e} by itself ({self.rows_checked} rows checked).",
            f"fastkd {verdict} with the float64 reference{faster}.",
        ]
        return "\n".join(lines)


def _compute_eager(rows: Call) -> Tensor:
    """Compute the loss by ``F.kl_div`` and ``F.cross_entropy``, or by :mod:`fastkd.reference`.

    The functions of PyTorch compute the forward KL with the logits of one teacher, without
    ``standardize``, and labels that are class indices, without ``class_weight``. The reference
    computes all other calls.
    """
    o = rows.objective
    soft_labels = rows.labels is not None and rows.labels.is_floating_point()
    needs_reference = (
        soft_labels or o.class_weight is not None or o.standardize or rows.teachers[1:]
    )
    if needs_reference or (o.divergence, o.teacher_form) != ("forward_kl", "logits"):
        return compute_reference_terms(rows).loss
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
    """Compare :func:`fastkd.loss` on your tensors with a float64 reference and eager PyTorch.

    The tensors are not changed and get no gradient. fastkd needs the memory of one gradient, and
    eager PyTorch needs a few times that memory. If eager PyTorch runs out of memory, eager PyTorch
    is skipped. The reference keeps the float64 gradients of at most 2^24 logits on a CPU, or 2^27
    logits on CUDA.

    Args:
        student: logits, as for :func:`fastkd.loss`.
        teacher: logits, or a sequence of several teachers' logits.
        labels: as for :func:`fastkd.loss`.
        repeats: how often fastkd and eager PyTorch are timed. Default 10.
        show: print the result. Default True.
        options: the options of :func:`fastkd.loss`; ``inplace`` is ignored.

    Returns:
        A :class:`Verification`, whose ``agrees`` is the verdict.

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
    if isinstance(teacher, (Head, Routed, Sampled, TopK)):
        raise TypeError(
            "teacher must be a tensor of logits or a sequence of tensors; got "
            f"{type(teacher).__name__}"
        )
    options = {**KDLoss(**options).options, "inplace": False}
    call = prepare(student, teacher, labels, Options()._replace(**options))
    problem, _ = flatten_rows(call._replace(student=call.student.detach(), dtype=torch.float64))
    problem.student.requires_grad_()
    student = student.detach().requires_grad_()
    dim = options.get("dim", -1)
    count, classes = problem.student.shape
    limit = _MAX_CHECKED_LOGITS["cuda" if student.is_cuda else "cpu"]
    checked = min(count, max(1, limit // classes))
    rows = torch.linspace(0, max(0, count - 1), checked, device=student.device).round().long()
    true_loss, true_gradient = _compute_exact(problem, rows, limit // 8)

    def run_ours() -> tuple[Tensor, Tensor]:
        loss = losses.loss(student, teacher, labels, **options)
        return loss, _compute_gradient(loss, student)

    def run_eager() -> tuple[Tensor, Tensor]:
        loss = _compute_eager(problem)
        return loss, _compute_gradient(loss, problem.student)

    loss, gradient = run_ours()
    gradient = gradient.movedim(dim, -1).reshape(count, classes)[rows]
    loss_error, gradient_error = (
        _compute_error(loss, true_loss),
        _compute_error(gradient, true_gradient),
    )
    rounding_error = _compute_error(true_gradient.to(student.dtype), true_gradient)
    eager_loss_error = eager_gradient_error = eager_seconds = None
    try:
        loss, gradient = run_eager()
        errors = _compute_error(loss, true_loss), _compute_error(gradient[rows], true_gradient)
        seconds, eager_seconds = _time_calls((run_ours, run_eager), repeats, student.is_cuda)
        eager_loss_error, eager_gradient_error = errors
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        (seconds,) = _time_calls((run_ours,), repeats, student.is_cuda)

    floor = 1e-11 if student.dtype is torch.float64 else _LEAST_TOLERANCE
    agrees = loss_error <= max(floor, eager_loss_error or 0.0) and gradient_error <= max(
        floor + 1.5 * rounding_error, eager_gradient_error or 0.0
    )
    result = Verification(
        agrees,
        loss_error,
        gradient_error,
        eager_loss_error,
        eager_gradient_error,
        rounding_error,
        seconds,
        eager_seconds,
        eager_seconds and eager_seconds / seconds,
        checked if count else 0,
    )
    if show:
        dtype = str(student.dtype).removeprefix("torch.")
        print(f"fastkd.verify: {count} x {classes}, {dtype}, {student.device}\n{result}")
    return result


def _compute_gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student, torch.ones_like(loss))[0]


def _compute_exact(problem: Call, rows: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Compute the loss of all rows, and the gradient of ``rows``, in float64 and in chunks."""
    count, classes = problem.student.shape
    step = max(1, chunk // classes)

    def compute(part: Tensor | slice) -> tuple[Tensor, Tensor]:
        call = map_rows(problem, lambda x: x[part].double() if x.is_floating_point() else x[part])
        leaf = call.student.detach().requires_grad_()
        return compute_reference_terms(call._replace(student=leaf)).loss, leaf

    with torch.no_grad():
        starts = range(0, max(1, count), step)
        loss = torch.cat([compute(slice(at, at + step))[0].reshape(-1) for at in starts])
    if problem.objective.reduction != "none":
        loss = loss.sum()
    gradients = [_compute_gradient(*compute(part)) for part in rows.split(step)]  # type: ignore[no-untyped-call]
    return loss, torch.cat(gradients)


def _compute_error(value: Tensor, exact: Tensor) -> float:
    """Compute ||value - exact|| / ||exact||; equal infinities have no error, nor do two NaNs."""
    value = value.detach().double().reshape(exact.shape)
    same = (value == exact) | (value.isnan() & exact.isnan())
    error = float(torch.linalg.vector_norm((value - exact).masked_fill(same, 0.0)))
    size = float(torch.linalg.vector_norm(exact.masked_fill(~exact.isfinite(), 0.0)))
    if math.isnan(error):
        return math.inf
    return error / size if size > 0 else error


def _time_calls(calls: tuple[Callable[[], object], ...], repeats: int, cuda: bool) -> list[float]:
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
            if turn:  # the first turn warms up the caches
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]
