"""Checks of arguments: every message names the argument, what was given, and what is accepted.

The functions that :func:`fastkd.loss` calls are cheap: they look at shapes, dtypes and numbers,
never at a tensor's data. :func:`check_inputs` and :func:`check_logits` do look at data, for those
who ask.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def one_of(name: str, value: object, accepted: Sequence[str]) -> int:
    """The position of ``value`` among the accepted names."""
    if isinstance(value, str) and value in accepted:
        return accepted.index(value)
    listed = ", ".join(repr(option) for option in accepted)
    raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """``value`` as a float in [low, high], or (low, high] with ``open_low``; always finite."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        value = float(value)
    if (low < value if open_low else low <= value) and value <= high and value != math.inf:
        return value
    if high == math.inf:
        accepted = "positive and finite" if open_low else f"finite and at least {low:g}"
    else:
        accepted = f"in {'(' if open_low else '['}{low:g}, {high:g}]"
    raise ValueError(f"{name} must be {accepted}; got {value!r}")


def logits(student: object, teacher: object) -> None:
    """Two tensors of logits that belong together."""
    for name, value in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}"
            )
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor; got layout {value.layout}")
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(
            "student_logits must have shape (..., classes) with at least one class; got "
            f"{tuple(student.shape)}"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            "student_logits and teacher_logits must be on the same device; got "
            f"{student.device} and {teacher.device}"
        )


def indices(value: object, student: Tensor) -> None:
    """Class indices, one for each row of logits."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"labels must be a tensor of class indices, or None; got {type(value).__name__}"
        )
    if value.dtype not in INTEGERS:
        raise TypeError(f"labels must be class indices of an integer dtype; got {value.dtype}")
    rows(value, "labels", student)


def rows(value: Tensor, name: str, student: Tensor) -> None:
    """A tensor with one entry for each row of logits, on their device."""
    if value.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have one entry for each row of logits, shape {tuple(student.shape[:-1])} "
            f"for logits of shape {tuple(student.shape)}; got {tuple(value.shape)}"
        )
    if value.device != student.device:
        raise ValueError(
            f"{name} must be on the logits' device, {student.device}; got {value.device}"
        )


def check_inputs(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
) -> None:
    """Raises if the data of a call to :func:`fastkd.loss` is not what it accepts.

    On CUDA the loss never waits for the device, so a label that is out of range, or a temperature
    that is not positive, cannot raise there: it makes its row's loss and gradient NaN. This
    function waits, looks, and names the first offender. Use it when a loss turns NaN. On the CPU
    the loss makes the same checks itself.

    Args:
        student_logits: ``(..., C)``.
        teacher_logits: ``(..., C)``.
        labels: ``(...)`` class indices, or None.
        ignore_index: the label of rows that are left out.
        temperature: a number, or a tensor of shape ``(...)``.

    Raises:
        ValueError: for shapes or devices that differ, a label outside ``[0, C)`` that is not
            ``ignore_index``, a temperature that is not positive and finite, or NaN or +inf among
            the logits of a row that counts.
        TypeError: for dtypes that are not accepted.

    Example:
        >>> import torch, fastkd
        >>> fastkd.check_inputs(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]))
        Traceback (most recent call last):
        ValueError: labels must be in [0, 3) or ignore_index=-100; row 1 has 3
    """
    logits(student_logits, teacher_logits)
    counts = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    if labels is not None:
        indices(labels, student_logits)
        counts = labels != ignore_index
    if not isinstance(temperature, Tensor):
        number("temperature", temperature, 0.0, math.inf, open_low=True)
    check_rows(student_logits, labels, ignore_index, temperature)
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        greatest = value.amax(-1)  # NaN if any is
        _refuse(
            counts & ~(greatest < math.inf),
            greatest,
            f"{name} must not hold NaN or +inf",
        )
        _refuse(
            counts & (greatest == -math.inf),
            greatest,
            f"{name} must have at least one class above -inf in each row",
        )


def check_rows(
    student: Tensor, labels: Tensor | None, ignore_index: int, temperature: float | Tensor
) -> None:
    """Looks for a label out of range, or a row's temperature that is not positive and finite."""
    if labels is not None:
        classes = student.shape[-1]
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        _refuse(bad, labels, f"labels must be in [0, {classes}) or ignore_index={ignore_index}")
    if isinstance(temperature, Tensor):
        bad = ~((temperature > 0) & temperature.isfinite())
        _refuse(bad, temperature, "temperature must be positive and finite")


def _refuse(bad: Tensor, value: Tensor, message: str) -> None:
    """Raises for the first row that is bad; the message ends with the row and its value."""
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(f"{message}; row {row} has {value.flatten()[row].item()}")


def check_logits(logits: Tensor, name: str = "logits") -> bool:
    """Warns if ``logits`` look like probabilities, which the loss would soften again.

    Passing ``softmax`` outputs where logits belong is the commonest mistake with distillation
    losses: nothing fails, the student just learns a much flatter teacher. Log-probabilities are
    harmless (softmax undoes them at any temperature) and not warned about.

    Args:
        logits: ``(..., C)``.
        name: how the warning calls them.

    Returns:
        Whether they look like logits.

    Example:
        >>> import torch, fastkd
        >>> fastkd.check_logits(torch.randn(4, 10))
        True
    """
    values = logits.detach()
    if values.numel() == 0 or values.shape[-1] < 2:
        return True
    sums = values.double().sum(-1)
    probable = (values >= 0).all() and (values <= 1).all() and ((sums - 1).abs() < 1e-2).all()
    if probable:
        warnings.warn(
            f"{name} look like probabilities (every entry in [0, 1], every row sums to 1). fastkd "
            "expects logits: pass what goes into softmax, not what comes out of it.",
            UserWarning,
            stacklevel=2,
        )
    return not bool(probable)
