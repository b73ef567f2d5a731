"""Check the data in the tensors of a call, beyond the checks that each call of the loss makes."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fastkd import validation
from fastkd._core import checks


def check_inputs(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
) -> None:
    """Raise if the data of a call of :func:`fastkd.loss` with logits is not valid.

    Use this function when a loss becomes NaN. The function synchronizes CUDA, reads the data, and
    names the first invalid row. On CUDA, the loss does not synchronize: a label out of range, or a
    temperature that is not positive and finite, makes the loss and the gradient of its row NaN. On
    the CPU, the loss raises an error for a label or a temperature out of range.

    Args:
        student: ``(..., C)``.
        teacher: ``(..., C)``.
        labels: ``(...)`` class indices, ``(..., C)`` probabilities, which are not read, or None.
        ignore_index: the label of rows that are ignored. Default -100.
        temperature: a number, or a tensor, 0-d or of shape ``(...)``. Default 1.

    Raises:
        ValueError: for shapes or devices that differ; for a label outside ``[0, C)`` that is not
            ``ignore_index``; for a temperature that is not from 1e-18 to 1e18.
        ValueError: for logits that are NaN or +inf, or all -inf, in a row that is not ignored.
        TypeError: for an argument of a wrong type, and for a tensor with a dtype or layout that is
            not accepted.

    Example:
        >>> import torch, fastkd
        >>> fastkd.check_inputs(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]))
        Traceback (most recent call last):
        ValueError: labels must be in [0, 3) or ignore_index=-100; row 1 has 3
    """
    checks.check_student(student)
    checks.check_teacher(student, "teacher", teacher)
    validation.check_ignore_index(ignore_index)
    counts = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if labels is not None and not checks.check_labels(labels, student):
        labels = validation.to_int64(labels)
        counts = labels != ignore_index
    checked = checks.check_temperature("temperature", temperature)
    if isinstance(checked, Tensor) and checked.dim() > 0:
        checks.check_entries(checked, "temperature", student)
    checks.check_rows(student, labels, ignore_index, checked)
    for name, value in (("student", student), ("teacher", teacher)):
        greatest = value.amax(-1)  # NaN if any logit of the row is NaN
        checks.raise_for_first(
            counts & ~(greatest < math.inf), greatest, f"{name} must not hold NaN or +inf"
        )
        checks.raise_for_first(
            counts & (greatest == -math.inf),
            greatest,
            f"{name} must have at least one class above -inf in each row",
        )


def check_logits(logits: Tensor, name: str = "logits") -> bool:
    """Warn if ``logits`` look like probabilities, which the loss would soften again.

    Outputs of ``softmax`` in place of logits are a common mistake with distillation losses: nothing
    fails, and the student learns a much flatter distribution. Log-probabilities cause no warning,
    because they are logits of the same distribution.

    Args:
        logits: ``(..., C)``.
        name: the name of the tensor in the warning. Default ``"logits"``.

    Returns:
        False if ``logits`` look like probabilities, else True.

    Raises:
        TypeError: if ``logits`` is not a dense tensor, or ``name`` is not a str.
        ValueError: if ``logits`` are not floating-point, or have no dimension.

    Example:
        >>> import torch, fastkd
        >>> fastkd.check_logits(torch.randn(4, 10))
        True
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str; got {type(name).__name__}")
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(logits).__name__}")
    checks.check_dense(name, logits)
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(
            f"{name} must be floating-point, of shape (..., C); got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
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
