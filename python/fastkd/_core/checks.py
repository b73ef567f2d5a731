"""Checks of arguments: every message names the argument, what was given, and what is accepted.

The functions that :func:`fastkd.loss` calls are cheap: they look at shapes, dtypes and numbers, and
where nothing is waited for (:func:`may_look`) at the numbers of rows, never at logits.
:func:`check_inputs` and :func:`check_logits` do, for those who ask.
"""

from __future__ import annotations

import math
import numbers
import os
import pathlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Within this range a temperature, its square and the inverse of either are normal float32 numbers.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-18, 1e18
_TEMPERATURE_RANGE = f"from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


def one_of(name: str, value: object, accepted: Sequence[str]) -> int:
    """The position of ``value`` among the accepted names."""
    if isinstance(value, str) and value in accepted:
        return accepted.index(value)
    listed = ", ".join(repr(option) for option in accepted)
    raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` as a float in [low, high], without the ends that are open; always finite."""
    if type(value) is not float:
        # NumPy's scalars are Real, its booleans and torch's tensors are not.
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        try:
            value = float(value)
        except OverflowError:  # of an int
            value = -math.inf if isinstance(value, int) and value < 0 else math.inf
    above = low < value if open_low else low <= value
    if above and (value < high if open_high else value <= high) and value != math.inf:
        return value
    if high == math.inf:
        accepted = "positive and finite" if open_low else f"finite and at least {low:g}"
    else:
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        accepted = f"in {left}{low:g}, {high:g}{right}"
    raise ValueError(f"{name} must be {accepted}; got {value!r}")


def count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int of at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be an int of at least {least}; got {value!r}")


def folder(name: str, value: object, otherwise: str = "") -> pathlib.Path:
    """A path at which there is a folder, or can be one. ``otherwise``: what else is accepted."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a folder's path{otherwise}; got {type(value).__name__}")
    path = pathlib.Path(value)
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"{name} must be a folder; got {path}, and {there} is a file")
    return path


def ignored_label(value: object) -> None:
    """A label, which may be of any integer dtype."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"ignore_index must be an int; got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must be an int of 64 bits; got {value}")


def dim_and_classes(dim: object, classes: object) -> None:
    """Where the classes are, and how many of them count."""
    if type(dim) is not int or dim not in (-1, 1):
        raise ValueError(
            "dim must be -1, for logits (..., C), or 1, for logits (N, C, d1, ...); got "
            + repr(dim)
        )
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int)):
        raise TypeError(f"classes must be an int or None; got {type(classes).__name__}")
    if classes is not None and classes < 1:
        raise ValueError(f"classes must be at least 1; got {classes}")


def check_dense(name: str, value: Tensor) -> None:
    """Raise TypeError for a sparse, nested or mkldnn tensor, without running an operation on it."""
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor; got a nested one. "
            f"torch.nested.to_padded_tensor({name}, padding) makes it dense"
        )
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor; got layout {value.layout}. "
            f"{name}.to_dense() makes it dense"
        )


def logits(
    student: object, teachers: Sequence[object], dim: int = -1, classes: int | None = None
) -> None:
    """Check that tensors are logits of one shape and device.

    ``dim`` and ``classes`` are checked before.
    """
    if not teachers:
        raise ValueError("teacher_logits must be a tensor, or at least one; got an empty sequence")
    named = [("student_logits", student)]
    for i, teacher in enumerate(teachers):
        named.append(("teacher_logits" if len(teachers) == 1 else f"teacher_logits[{i}]", teacher))
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        check_dense(name, value)
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}"
            )
    assert isinstance(student, Tensor)
    if student.dim() <= max(dim, 0) or student.shape[dim] == 0:
        layout = "(..., classes)" if dim == -1 else "(N, classes, ...)"
        raise ValueError(
            f"student_logits must have shape {layout} with at least one class; got "
            f"{tuple(student.shape)}"
        )
    for name, value in named[1:]:
        assert isinstance(value, Tensor)
        _same_shape(student, name, value, dim, classes)
        if student.device != value.device:
            raise ValueError(
                f"student_logits and {name} must be on the same device; got "
                f"{student.device} and {value.device}"
            )


def _same_shape(student: Tensor, name: str, teacher: Tensor, dim: int, classes: int | None) -> None:
    """The same rows, and the same classes or enough of them."""
    shapes = [list(student.shape), list(teacher.shape)]
    given = f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
    if shapes[0] == shapes[1] and (classes is None or classes <= student.shape[dim]):
        return
    rows = [shape[:dim] + shape[dim:][1:] for shape in shapes]
    if rows[0] != rows[1] or teacher.dim() != student.dim():
        raise ValueError(f"student_logits and {name} must have the same shape; {given}")
    fewest = min(student.shape[dim], teacher.shape[dim])
    if classes is None:
        raise ValueError(
            f"student_logits and {name} must have the same shape; {given}. If the first classes "
            f"are the same and the rest is padding, classes={fewest} takes the first {fewest} of "
            "both"
        )
    if classes > fewest:
        raise ValueError(f"classes must be at most {fewest}, the fewest there are; got {classes}")


def targets(value: object, student: Tensor) -> bool:
    """Check labels: one class index for each row of logits (False), or probabilities (True)."""
    if not isinstance(value, Tensor):
        raise TypeError(
            "labels must be a tensor of class indices or probabilities, or None; got "
            f"{type(value).__name__}"
        )
    check_dense("labels", value)
    if value.is_floating_point() and value.shape == student.shape:
        rows(value[..., 0], "labels", student)
        if value.requires_grad:
            raise ValueError(
                "labels get no gradient; got probabilities that require grad (.detach() them)"
            )
        return True
    if value.is_floating_point():
        raise TypeError(
            f"labels must be class indices of an integer dtype; got {value.dtype}, which would be "
            f"probabilities if the shape were {tuple(student.shape)}, not {tuple(value.shape)}"
        )
    indices(value, student)
    return False


def indices(value: Tensor, student: Tensor) -> None:
    """Class indices, one for each row of logits."""
    if value.dtype not in INTEGERS:
        raise TypeError(f"labels must be class indices of an integer dtype; got {value.dtype}")
    rows(value, "labels", student)


def int64(labels: Tensor) -> Tensor:
    """Class indices as int64: torch wraps what it compares a narrower dtype with, -100 to 156 for
    uint8. What else there is stays as it is."""
    return labels.long() if labels.dtype in INTEGERS else labels


def savable(value: Tensor) -> Tensor:
    """What autograd can save: a copy of a tensor that was made under ``torch.inference_mode()``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return value
    return value.clone() if value.is_inference() else value


def enough_classes(divergence: str, standardize: bool, soft_labels: bool, student: Tensor) -> None:
    """What some options need of the classes and of the labels."""
    if divergence == "dkd" and soft_labels:
        raise ValueError('divergence="dkd" needs class indices as labels; got probabilities')
    what = "standardize=True" if standardize else f"divergence={divergence!r}"
    if (standardize or divergence == "dkd") and student.shape[-1] < 2:
        raise ValueError(f"{what} needs at least two classes; got {student.shape[-1]}")


def rows(value: Tensor, name: str, student: Tensor) -> None:
    """A tensor with one entry for each row of logits, on their device."""
    if value.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have one entry for each row of logits, shape {tuple(student.shape[:-1])} "
            f"for logits of shape {tuple(student.shape)}; got {tuple(value.shape)}"
        )
    _same_device(value, name, student)


def classes(value: Tensor, name: str, student: Tensor) -> None:
    """A tensor with one entry for each class, on the logits' device."""
    if value.shape != student.shape[-1:]:
        raise ValueError(
            f"{name} must have one entry for each class, shape {tuple(student.shape[-1:])}; got "
            f"{tuple(value.shape)}"
        )
    _same_device(value, name, student)


def _same_device(value: Tensor, name: str, student: Tensor) -> None:
    if value.device != student.device:
        raise ValueError(
            f"{name} must be on the logits' device, {student.device}; got {value.device}"
        )


def scalar_temperature(name: str, value: object) -> float:
    """Check that ``value`` is a number from 1e-18 to 1e18, and return it as a float."""
    checked = number(name, value, 0.0, math.inf, open_low=True)
    if not LEAST_TEMPERATURE <= checked <= MOST_TEMPERATURE:
        raise ValueError(f"{name} must be {_TEMPERATURE_RANGE}; got {value!r}")
    return checked


def temperature(name: str, value: object) -> float | Tensor:
    """Check a temperature: a number, or a floating-point tensor, whose data is not read."""
    if not isinstance(value, Tensor):
        return scalar_temperature(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor; got {value.dtype}")
    return value


def _temperature(value: object, student: Tensor) -> None:
    """The same, which has an entry for each row unless it is 0-d."""
    checked = temperature("temperature", value)
    if isinstance(checked, Tensor) and checked.dim() > 0:
        rows(checked, "temperature", student)


def weights(
    alpha: object, hard: object, soft: object, has_labels: bool
) -> tuple[float | Tensor, float | Tensor]:
    """(hard_weight, soft_weight) from the two ways to give them."""
    if hard is None and soft is None:
        if not has_labels:
            if alpha is None:
                return 0.0, 1.0
            raise ValueError(
                f"alpha weighs the hard term, which needs labels; got alpha={alpha!r} and "
                "labels=None. Leave alpha out (the soft term alone), or pass labels"
            )
        share = 0.5 if alpha is None else number("alpha", alpha, 0.0, 1.0)
        return share, 1.0 - share
    if alpha is not None:
        raise ValueError(
            f"alpha cannot be given together with hard_weight or soft_weight; got alpha={alpha!r}, "
            f"hard_weight={hard!r}, soft_weight={soft!r}"
        )
    if not has_labels and hard is not None:
        raise ValueError(f"hard_weight needs labels; got hard_weight={hard!r} and labels=None")
    return _weight("hard_weight", hard), _weight("soft_weight", soft)


def smoothing(value: object, has_labels: bool) -> float:
    """What is taken of a label's weight for all classes."""
    found = number("label_smoothing", value, 0.0, 1.0)
    if found and not has_labels:
        raise ValueError(
            f"label_smoothing is of the labels; got label_smoothing={value!r} and labels=None"
        )
    return found


def _weight(name: str, value: object) -> float | Tensor:
    """A number of at least 0, 1 if not given, or a floating-point tensor."""
    if value is None:
        return 1.0
    if not isinstance(value, Tensor):
        return number(name, value, 0.0, math.inf)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor; got {value.dtype}")
    return value


def class_weight(value: object) -> None:
    """A tensor of one number for each class."""
    if not isinstance(value, Tensor):
        raise TypeError(f"class_weight must be a tensor or None; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"class_weight must be a floating-point tensor; got {value.dtype}")
    constant("class_weight", value)


def constant(name: str, value: Tensor) -> None:
    """A tensor that does not learn."""
    if learns(value):
        raise ValueError(f"{name} gets no gradient; got a tensor that requires grad (.detach() it)")


def learns(value: Tensor) -> bool:
    """Whether a derivative by it may be asked for, backwards or forwards."""
    forward = torch.autograd.forward_ad
    if value.requires_grad or forward._current_level < 0:
        return value.requires_grad
    return forward.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def teacher_weights(value: object, teachers: int | None) -> tuple[float, ...] | None:
    """One positive number for each teacher; how many there are may not be known yet."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"teacher_weights must be a sequence of numbers or None; got {type(value).__name__}"
        )
    if teachers is not None and len(value) != teachers:
        raise ValueError(
            f"teacher_weights must have one number for each teacher in teacher_logits, {teachers}; "
            f"got {len(value)}"
        )
    weights = tuple(
        number(f"teacher_weights[{i}]", weight, 0.0, math.inf, open_low=True)
        for i, weight in enumerate(value)
    )
    if sum(weights) == math.inf:
        raise ValueError(f"teacher_weights must have a finite sum; got {value!r}")
    return weights


def normalizer(value: Tensor, name: str = "normalizer") -> Tensor:
    """Check the tensor that the mean divides by, and return it as a 0-d tensor.

    0 is accepted here; :func:`check_nonzero` decides if it is valid.
    """
    if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
        raise ValueError(
            f"{name} must be a positive number or a real tensor with one element; got "
            f"{value.dtype} of shape {tuple(value.shape)}"
        )
    if may_look(value) and not 0 <= value.item() < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value.item()}")
    return savable(value.detach().reshape(()))


def check_divisor(value: object) -> float:
    """Check the number that the mean divides by, and return it as a float.

    0 is accepted here; :func:`check_nonzero` decides if it is valid.
    """
    is_zero = type(value) in (int, float) and value == 0
    return 0.0 if is_zero else number("normalizer", value, 0.0, math.inf, open_low=True)


def check_nonzero(
    normalizer: float | Tensor,
    labels: Tensor | None,
    ignore_index: int,
    name: str = "normalizer",
) -> float | Tensor:
    """Return the normalizer, or 1 if it is 0 and every row is ignored, so that the mean is 0.

    If the labels may not be read (:func:`may_look`), a 0 is returned as a tensor. Then the mean is
    0 if every row is ignored, and the result of a division by 0 otherwise. A tensor whose own
    number may not be read is returned as it is.

    Raises:
        ValueError: for 0 if some row is not ignored, or without class indices as labels.
    """
    if isinstance(normalizer, Tensor):
        if not may_look(normalizer) or normalizer.item() != 0:
            return normalizer
    elif normalizer != 0:
        return normalizer
    if labels is not None and not labels.is_floating_point():
        if not may_look(labels):
            return torch.zeros((), device=labels.device)
        if not bool((labels != ignore_index).any()):
            return 1.0
    raise ValueError(
        f"{name} must be positive and finite; got 0 (accepted only if every label is ignore_index)"
    )


def has_data(*values: object) -> bool:
    """Return True if no tensor among ``values`` has a released storage.

    FSDP, for one, releases storages of tensors that still exist. PyTorch's operations crash on such
    a tensor, so code that explains an error must not read it.
    """
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_nested]
    return all(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel())


def may_look(value: Tensor) -> bool:
    """Whether the data are there to be looked at, without waiting for a device or for a trace."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and has_data(value)
    )


def check_weight_data(name: str, value: Tensor) -> None:
    """Raise if a row's weight is negative or not finite, and the data may be read."""
    if may_look(value):
        value = value.detach()
        refuse(~((value >= 0) & value.isfinite()), value, f"{name} must be finite and at least 0")


def check_temperature_data(name: str, value: Tensor) -> None:
    """Raise if a row's temperature is out of range, and the data may be read."""
    if may_look(value):
        _check_temperatures(name, value.detach())


def _check_temperatures(name: str, value: Tensor) -> None:
    """Raise unless all temperatures are positive, finite and from 1e-18 to 1e18."""
    bad = ~((value > 0) & value.isfinite())
    refuse(bad, value, f"{name} must be positive and finite")
    # In float64: float16 cannot represent either bound.
    wide = value.double()
    bad = (wide < LEAST_TEMPERATURE) | (wide > MOST_TEMPERATURE)
    refuse(bad, value, f"{name} must be {_TEMPERATURE_RANGE}")


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
            ``ignore_index``, a temperature that is not from 1e-18 to 1e18, or NaN or +inf among the
            logits of a row that counts.
        TypeError: for an argument of a wrong type, and for a tensor with a dtype or layout that is
            not accepted.

    Example:
        >>> import torch, fastkd
        >>> fastkd.check_inputs(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]))
        Traceback (most recent call last):
        ValueError: labels must be in [0, 3) or ignore_index=-100; row 1 has 3
    """
    logits(student_logits, [teacher_logits])
    ignored_label(ignore_index)
    counts = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    if labels is not None and not targets(labels, student_logits):
        labels = int64(labels)
        counts = labels != ignore_index
    _temperature(temperature, student_logits)
    check_rows(student_logits, labels, ignore_index, temperature)
    for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        greatest = value.amax(-1)  # NaN if any is
        refuse(
            counts & ~(greatest < math.inf),
            greatest,
            f"{name} must not hold NaN or +inf",
        )
        refuse(
            counts & (greatest == -math.inf),
            greatest,
            f"{name} must have at least one class above -inf in each row",
        )


def check_rows(
    student: Tensor, labels: Tensor | None, ignore_index: int, temperature: float | Tensor
) -> None:
    """Raise if a row's label or temperature is out of range."""
    if labels is not None and not labels.is_floating_point():
        classes = student.shape[-1]
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        refuse(bad, labels, f"labels must be in [0, {classes}) or ignore_index={ignore_index}")
    if isinstance(temperature, Tensor):
        _check_temperatures("temperature", temperature.detach())


def refuse(bad: Tensor, value: Tensor, message: str) -> None:
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
    check_dense(name, logits)
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
