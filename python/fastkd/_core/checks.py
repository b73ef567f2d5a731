"""Check the arguments of the losses.

Every message names the argument, what was given, and what is accepted. Tensors with one number for
each row are read if reading them needs no synchronization (:func:`is_readable`). Logits are not
read; :func:`fastkd.check_inputs` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import mistakes
from fastkd.validation import FLOATS, INTEGERS, check_number, to_int64

# For a temperature T in this range, T, T^2, 1 / T and 1 / T^2 are normal float32 numbers.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-18, 1e18
_TEMPERATURE_RANGE = f"from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"


def check_dense(name: str, value: Tensor) -> None:
    """Raise TypeError for a sparse, nested or mkldnn tensor."""
    if value.is_nested:
        kind, convert = "a nested one", f"torch.nested.to_padded_tensor({name}, padding)"
    elif value.layout is not torch.strided:
        kind, convert = f"layout {value.layout}", f"{name}.to_dense()"
    else:
        return
    raise TypeError(f"{name} must be a dense tensor; got {kind}. {convert} makes it dense")


def check_floats(name: str, value: object) -> None:
    """Raise unless ``value`` is a dense tensor of a supported floating-point dtype."""
    if not isinstance(value, Tensor):
        hint = mistakes.hint_for_type(name, value)
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}{hint}")
    check_dense(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}"
            + mistakes.hint_for_type(name, value)
        )


def check_student(value: Tensor, dim: int = -1) -> None:
    """Raise unless ``value`` is a tensor of logits with at least one class in ``dim``."""
    check_floats("student", value)
    if value.dim() <= max(dim, 0) or value.shape[dim] == 0:
        layout = "(..., classes)" if dim == -1 else "(N, classes, ...)"
        raise ValueError(
            f"student must have shape {layout} with at least one class; got {tuple(value.shape)}"
        )


def check_teacher(student: Tensor, name: str, value: Tensor, dim: int = -1) -> None:
    """Raise unless ``value`` is a tensor of logits with the student's shape and device.

    If only the numbers of classes differ, the message names slices that fit.
    """
    check_floats(name, value)
    if student.shape != value.shape:
        message = (
            f"student and {name} must have the same shape; got {tuple(student.shape)} and "
            f"{tuple(value.shape)}"
        )
        if value.shape[1:] == student.shape:
            message += f". list({name}) passes {value.shape[0]} teachers"
        rows = [list(each.shape) for each in (student, value)]
        if value.dim() == student.dim():
            fewest = min(each.pop(dim) for each in rows)
            if rows[0] == rows[1] and fewest > 0:
                some = f"[..., :{fewest}]" if dim == -1 else f"[:, :{fewest}]"
                message += (
                    ". If the first classes are the same and the others are padding, "
                    f"student{some} and {name}{some} are the first {fewest} of both, without a copy"
                )
        raise ValueError(message)
    if student.device != value.device:
        raise ValueError(
            f"student and {name} must be on the same device; got {student.device} and "
            f"{value.device}. {name}.to(student.device) moves it"
        )


def check_labels(value: object, student: Tensor) -> bool:
    """Check labels; return True for probabilities, False for class indices."""
    if not isinstance(value, Tensor):
        raise TypeError(
            "labels must be a tensor of class indices or probabilities, or None; got "
            f"{type(value).__name__}. torch.as_tensor(labels) converts a list or an array"
        )
    check_dense("labels", value)
    if value.is_floating_point() and value.shape == student.shape:
        check_entries(value[..., 0], "labels", student)
        if value.requires_grad:
            raise ValueError(
                "labels get no gradient; got probabilities that require grad (.detach() them)"
            )
        return True
    if value.is_floating_point():
        raise TypeError(
            f"labels must be class indices of an integer dtype; got {value.dtype}, which would be "
            f"probabilities if the shape were {tuple(student.shape)}, not {tuple(value.shape)}. "
            "labels.long() converts them to indices"
        )
    if value.dtype not in INTEGERS:
        raise TypeError(
            f"labels must be class indices of an integer dtype; got {value.dtype}. labels.long() "
            "converts them to indices"
        )
    check_entries(value, "labels", student)
    return False


def to_savable(value: Tensor) -> Tensor:
    """Return ``value``; copy a tensor of ``torch.inference_mode()``, which autograd cannot save."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return value
    return value.clone() if value.is_inference() else value


def check_class_count(
    divergence: str, standardize: bool, soft_labels: bool, student: Tensor
) -> None:
    """Raise if the call lacks the two classes, or the class-index labels, that an option needs."""
    if divergence == "dkd" and soft_labels:
        raise ValueError('divergence="dkd" needs class indices as labels; got probabilities')
    option = "standardize=True" if standardize else f"divergence={divergence!r}"
    if (standardize or divergence == "dkd") and student.shape[-1] < 2:
        raise ValueError(f"{option} needs at least two classes; got {student.shape[-1]}")


def check_entries(value: Tensor, name: str, student: Tensor, each: str = "row of logits") -> None:
    """Raise unless ``value`` has one entry for each row or class, on the logits' device."""
    shape, logits = student.shape[:-1], f" for logits of shape {tuple(student.shape)}"
    if each == "class":
        shape, logits = student.shape[-1:], ""
    if value.shape != shape:
        raise ValueError(
            f"{name} must have one entry for each {each}, shape {tuple(shape)}{logits}; got "
            f"{tuple(value.shape)}"
            + (mistakes.hint_for_labels(value.shape, student.shape) if name == "labels" else "")
        )
    if value.device != student.device:
        raise ValueError(
            f"{name} must be on the logits' device, {student.device}; got {value.device}. "
            f"{name}.to(student.device) moves it"
        )


def check_scalar_temperature(name: str, value: object) -> float:
    """Check that ``value`` is a number from 1e-18 to 1e18, and return it as a float."""
    checked = check_number(name, value, 0.0, math.inf, open_low=True)
    if not LEAST_TEMPERATURE <= checked <= MOST_TEMPERATURE:
        raise ValueError(f"{name} must be {_TEMPERATURE_RANGE}; got {value!r}")
    return checked


def _as_float_tensor(name: str, value: object) -> Tensor | None:
    """Return ``value`` if it is a floating-point tensor, or None if it is no tensor; else raise."""
    if not isinstance(value, Tensor):
        return None
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating-point tensor; got {value.dtype}")
    return value


def check_temperature(name: str, value: object) -> float | Tensor:
    """Check a temperature: a number, or a floating-point tensor. The tensor's data is not read."""
    tensor = _as_float_tensor(name, value)
    return check_scalar_temperature(name, value) if tensor is None else tensor


def _check_weight(name: str, value: object) -> float | Tensor:
    """Check a weight: a number of at least 0, or a floating-point tensor. None becomes 1."""
    if value is None:
        return 1.0
    tensor = _as_float_tensor(name, value)
    return check_number(name, value, 0.0, math.inf) if tensor is None else tensor


def resolve_weights(
    alpha: object, hard: object, soft: object, has_labels: bool
) -> tuple[float | Tensor, float | Tensor]:
    """Return (hard_weight, soft_weight) from ``alpha``, or from the two weights."""
    weights: tuple[float | Tensor, float | Tensor]
    name, value = "hard_weight", hard
    if hard is not None or soft is not None:
        if alpha is not None:
            raise ValueError(
                "alpha cannot be given together with hard_weight or soft_weight; got "
                f"alpha={alpha!r}, hard_weight={hard!r}, soft_weight={soft!r}"
            )
        weights = _check_weight("hard_weight", hard), _check_weight("soft_weight", soft)
    elif alpha is None:
        return (0.5, 0.5) if has_labels else (0.0, 1.0)
    else:
        share = check_number("alpha", alpha, 0.0, 1.0)
        name, value, weights = "alpha", alpha, (share, 1.0 - share)
    if has_labels:
        return weights
    if value is not None and (isinstance(value, Tensor) or weights[0] != 0.0):
        raise ValueError(
            f"{name} weighs the hard term, which needs labels; got {name}={value!r} and "
            f"labels=None. Pass labels, or {name}=0.0 for the soft term alone"
        )
    return 0.0, weights[1]


def check_no_gradient(name: str, value: Tensor) -> None:
    """Raise if ``value`` requires grad, or has a tangent of forward-mode AD."""
    if is_differentiated(value):
        raise ValueError(f"{name} gets no gradient; got a tensor that requires grad (.detach() it)")


def check_teacher_has_no_gradient(name: str, value: Tensor) -> None:
    """Raise if ``value``, an output of the teacher, requires grad or has a forward-mode tangent."""
    if is_differentiated(value):
        raise ValueError(
            f"{name} requires grad, but the loss gives the teacher none: compute it under "
            "torch.no_grad(), or .detach() it. The student is the first argument"
        )


def is_differentiated(value: Tensor) -> bool:
    """Return True if ``value`` requires grad, or has a tangent of forward-mode AD."""
    forward = torch.autograd.forward_ad
    if value.requires_grad or forward._current_level < 0:
        return value.requires_grad
    return forward.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def check_teacher_weights(value: object, teachers: int | None) -> tuple[float, ...] | None:
    """Check that there is a positive number for each teacher, and return a tuple; None stays None.

    ``teachers``: the number of teachers, or None if the number is not known yet.
    """
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"teacher_weights must be a sequence of numbers or None; got {type(value).__name__}"
        )
    if teachers is not None and len(value) != teachers:
        raise ValueError(
            f"teacher_weights must have one number for each teacher, {teachers}; got {len(value)}"
        )
    weights = tuple(
        check_number(f"teacher_weights[{i}]", weight, 0.0, math.inf, open_low=True)
        for i, weight in enumerate(value)
    )
    if sum(weights) == math.inf:
        raise ValueError(f"teacher_weights must have a finite sum; got {value!r}")
    return weights


def check_divisor(value: object, name: str = "normalizer") -> float | Tensor:
    """Check the divisor of a mean, and return a float or a 0-d tensor.

    A divisor of 0 is accepted, since it is valid if every row is ignored (:func:`check_nonzero`).
    """
    if not isinstance(value, Tensor):
        is_zero = type(value) in (int, float) and value == 0
        return 0.0 if is_zero else check_number(name, value, 0.0, math.inf, open_low=True)
    if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
        raise ValueError(
            f"{name} must be a positive number or a real tensor with one element; got "
            f"{value.dtype} of shape {tuple(value.shape)}"
        )
    if is_readable(value) and not 0 <= value.item() < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value.item()}")
    return to_savable(value.detach().reshape(()))


def check_nonzero(
    normalizer: float | Tensor,
    labels: Tensor | None,
    ignore_index: int,
    name: str = "normalizer",
) -> float | Tensor:
    """Raise for a normalizer of 0 unless every row is ignored; else return the mean's divisor.

    The divisor is 1 in place of a normalizer of 0, so that the mean over ignored rows is 0. If the
    labels are not readable (:func:`is_readable`), a tensor of 0 is returned, and nothing is raised.
    A normalizer that is not readable is returned unchanged.
    """
    if isinstance(normalizer, Tensor):
        if not is_readable(normalizer) or normalizer.item() != 0:
            return normalizer
    elif normalizer != 0:
        return normalizer
    if labels is not None and not labels.is_floating_point():
        if not is_readable(labels):
            return torch.zeros((), device=labels.device)
        if not bool((labels != ignore_index).any()):
            return 1.0
    raise ValueError(
        f"{name} must be positive and finite; got 0 (accepted only if every label is ignore_index)"
    )


def has_data(*values: object) -> bool:
    """Return True if no tensor among ``values`` has a released storage.

    FSDP, for example, releases storages of tensors that still exist. PyTorch's operations crash on
    a released storage, so code that explains an error must not read one.
    """
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_nested]
    return all(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.numel())


def is_readable(value: Tensor) -> bool:
    """Return True if ``value`` has data, and reading the data breaks no trace and needs no
    synchronization."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and has_data(value)
    )


def check_row_weights(name: str, value: Tensor) -> None:
    """Raise unless all weights are finite and at least 0."""
    bad = ~((value >= 0) & value.isfinite())
    raise_for_first(bad, value, f"{name} must be finite and at least 0")


def check_row_temperatures(name: str, value: Tensor) -> None:
    """Raise unless all temperatures are from 1e-18 to 1e18."""
    bad = ~((value > 0) & value.isfinite())
    raise_for_first(bad, value, f"{name} must be positive and finite")
    # Compare in float64, because float16 cannot represent either bound.
    wide = value.double()
    bad = (wide < LEAST_TEMPERATURE) | (wide > MOST_TEMPERATURE)
    raise_for_first(bad, value, f"{name} must be {_TEMPERATURE_RANGE}")


def check_rows(
    student: Tensor, labels: Tensor | None, ignore_index: int, temperature: float | Tensor
) -> None:
    """Raise if a row's label or temperature is out of range."""
    if labels is not None and not labels.is_floating_point():
        classes = student.shape[-1]
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        message = f"labels must be in [0, {classes}) or ignore_index={ignore_index}"
        raise_for_first(bad, labels, message, mistakes.hint_for_label)
    if isinstance(temperature, Tensor):
        check_row_temperatures("temperature", temperature.detach())


def raise_for_first(
    bad: Tensor, value: Tensor, message: str, hint: Callable[[float], str] = lambda _: ""
) -> None:
    """Raise for the first row where ``bad`` is True; the message has the row and its value."""
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        first = value.flatten()[row].item()
        raise ValueError(f"{message}; row {row} has {first}{hint(first)}")


def check_lists(
    student: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    name: str = "indices",
) -> None:
    """Raise if a row has an invalid list; messages call the class indices ``name``."""
    counts = torch.ones_like(indices[..., 0], dtype=torch.bool)
    if labels is not None:
        counts = labels != ignore_index
    classes, k = student.shape[-1], indices.shape[-1]
    # Blocks of rows bound the memory of the copies in float64.
    blocks = (torch.split(x.reshape(-1, k), 1 + 2**14 // k) for x in (log_probs, indices))
    columns = []
    for logs, listed in zip(*blocks, strict=True):
        listed = reference.topk.mark_padding(to_int64(listed), logs)
        mass = reference.topk.mass(listed, logs.double())
        columns.append((listed.amax(-1), reference.topk.find_duplicate(listed), mass))
    greatest, duplicate, mass = (
        torch.cat(column).view(counts.shape) for column in zip(*columns, strict=True)
    )
    raise_for_first(
        counts & (greatest >= classes),
        greatest,
        f"teacher.{name} must be in [0, {classes}), or negative for padding",
    )
    raise_for_first(
        counts & (duplicate >= 0), duplicate, "teacher.indices must not list a class twice"
    )
    limit = reference.topk.MOST_MASS
    raise_for_first(
        counts & ~(mass <= limit),
        mass,
        "teacher.log_probs must be logarithms of probabilities at the temperature of the loss, "
        f"which add up to at most 1 ({limit} with rounding) in each row",
        lambda _: ". torch.log_softmax(logits / temperature, -1).topk(k) has such values",
    )
