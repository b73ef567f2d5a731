"""Check the arguments of a call, once, and convert them to what the kernels and formulas take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import validation
from fastkd._core import checks
from fastkd._core.autograd import is_transformed
from fastkd._core.objective import Objective, Options, resolve
from fastkd._core.shapes import accumulator
from fastkd._core.values import Head, TopK, check_topk

Student = Tensor | Head
Teacher = Tensor | Sequence[Tensor] | Head | TopK


class Call(NamedTuple):
    """A checked call of the loss for logits, with the classes last."""

    student: Tensor
    teachers: tuple[Tensor, ...]
    labels: Tensor | None
    objective: Objective
    dtype: torch.dtype
    """The dtype of the arithmetic and of the loss: float64 if any logits are, else float32."""
    topk: TopK | None = None
    """A sparse teacher, instead of ``teachers``."""
    inplace: bool = False


_DENSE_OPTIONS = (
    "teacher_temperature", "class_weight", "divergence", "mix", "teacher_form", "teacher_weights",
    "ensemble", "standardize", "dim", "inplace",
)  # fmt: skip


def prepare(student: Tensor, teacher: object, labels: Tensor | None, options: Options) -> Call:
    """Check all arguments of a call for logits: types, shapes, devices, and how options combine.

    Kernels detect bad indices and labels; :func:`raise_for_kernel_error` then explains the error.
    """
    topk = teacher if isinstance(teacher, TopK) else None
    teachers: Any = (teacher,)
    if topk is None and isinstance(teacher, (list, tuple)):
        teachers = tuple(teacher)
    if options.chunks != "auto":
        raise ValueError(f'chunks must be "auto" unless student is a Head; got {options.chunks!r}')
    if topk is not None:
        check_sparse_options(options)
    objective = resolve(
        options,
        has_labels=labels is not None,
        teachers=len(teachers),
        default_temperature=2.0 if topk is None else 1.0,
    )
    checks.check_student(student, options.dim)
    if topk is not None:
        teachers = (topk.log_probs,)
        check_topk(topk, "teacher")
        _check_lists_fit(student, topk)
        check_teacher_has_no_gradient("teacher.log_probs", topk.log_probs)
    elif not teachers:
        raise ValueError("teacher must be a tensor, or at least one; got an empty sequence")
    else:
        for i, value in enumerate(teachers):
            name = "teacher" if len(teachers) == 1 else f"teacher[{i}]"
            checks.check_teacher(student, name, value, options.dim)
            check_teacher_has_no_gradient(name, value)
    inplace = options.inplace and not is_transformed()
    if inplace:
        _check_inplace(student, teachers, objective.reduction)
    dtype = accumulator(student, *teachers)
    teachers = () if topk is not None else tuple(checks.to_savable(x.detach()) for x in teachers)
    if options.dim == 1:
        if isinstance(labels, Tensor) and labels.is_floating_point():
            labels = labels.movedim(1, -1) if labels.dim() == student.dim() else labels
        student, *teachers = (x.movedim(1, -1) for x in (student, *teachers))
    soft_labels = labels is not None and checks.check_labels(labels, student)
    if topk is not None and soft_labels:
        raise TypeError(
            "labels must be class indices of an integer dtype with a TopK as teacher; got "
            f"{labels.dtype}"  # type: ignore[union-attr]
        )
    labels = None if labels is None else checks.to_savable(validation.to_int64(labels))
    checks.check_class_count(objective.divergence, objective.standardize, soft_labels, student)
    objective = check_tensors(objective, student, labels, dtype)
    return Call(student, tuple(teachers), labels, objective, dtype, topk, inplace)


def check_tensors(
    objective: Objective, student: Tensor, labels: Tensor | None, dtype: torch.dtype
) -> Objective:
    """Check the tensors of an objective against the student, and convert them.

    Per-row options become ``(...)`` in ``dtype``; 0-d tensors stay 0-d.
    """

    def rows(name: str, check_data: Callable[[str, Tensor], None]) -> float | Tensor:
        value: float | Tensor = getattr(objective, name)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0:
            value = value.to(student.device)
        else:
            checks.check_entries(value, name, student)
        if checks.may_look(value):
            check_data(name, value.detach())
        return checks.to_savable(value.to(dtype))

    normalizer, class_weight = objective.normalizer, objective.class_weight
    if normalizer is not None:
        normalizer = checks.check_nonzero(normalizer, labels, objective.ignore_index)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(device=student.device, dtype=dtype)
    if class_weight is not None:
        checks.check_entries(class_weight, "class_weight", student, "class")
        class_weight = checks.to_savable(class_weight.detach().to(dtype))
    temperature = rows("temperature", checks.check_row_temperatures)
    teacher_temperature = temperature
    if objective.teacher_temperature is not objective.temperature:
        teacher_temperature = rows("teacher_temperature", checks.check_row_temperatures)
    return objective._replace(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        hard_weight=rows("hard_weight", checks.check_row_weights),
        soft_weight=rows("soft_weight", checks.check_row_weights),
        normalizer=normalizer,
        class_weight=class_weight,
    )


def check_teacher_has_no_gradient(name: str, value: Tensor) -> None:
    """Raise if an output of the teacher requires grad; ``name``: the argument, for the message."""
    if checks.is_differentiated(value):
        raise ValueError(
            f"{name} requires grad, but the loss gives the teacher none: compute it under "
            "torch.no_grad(), or .detach() it"
        )


def check_sparse_options(options: Options) -> None:
    """Raise if an option is given that a sparse teacher does not support."""
    check_options_are_default(options, _DENSE_OPTIONS, "a TopK as teacher")
    for name in ("temperature", "hard_weight", "soft_weight"):
        if isinstance(getattr(options, name), Tensor):
            raise TypeError(f"{name} must be a number with a TopK as teacher; got a tensor")


def check_options_are_default(options: Options, names: Sequence[str], context: str) -> None:
    """Raise if an option in ``names`` is not its default.

    ``context``: what does not support these options, for the message.
    """
    for name in names:
        value, default = getattr(options, name), options._field_defaults[name]
        if isinstance(value, Tensor) or value != default:
            shown = repr(value)
            if isinstance(value, Tensor):
                shown = f"a tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name} must be {default!r} with {context}; got {shown}")


# ---- sparse teachers


def _check_lists_fit(student: Tensor, topk: TopK) -> None:
    """Raise unless the lists have k entries for each row of logits, on the logits' device."""
    rows = student.shape[:-1]
    for name in ("log_probs", "indices"):
        value = getattr(topk, name)
        if value.shape[:-1] != rows:
            shape = ", ".join([*map(str, rows), "k"])
            raise ValueError(
                f"teacher.{name} must have k >= 1 entries for each row of logits, shape ({shape}) "
                f"for logits of shape {tuple(student.shape)}; got {tuple(value.shape)}"
            )
        if value.device != student.device:
            raise ValueError(
                f"teacher.{name} must be on the logits' device, {student.device}; got "
                f"{value.device}"
            )


# ---- inplace


def _check_inplace(student: Tensor, teachers: Sequence[Tensor], reduction: str) -> None:
    """Raise unless the student's logits may be overwritten by their gradient."""
    if reduction == "none":
        raise ValueError(
            'inplace=True needs reduction="mean" or "sum"; got "none", which keeps no gradient'
        )
    compiling = torch.compiler.is_compiling()
    owner = student._base if not compiling and student._is_view() else student
    if owner is not None and owner.requires_grad and owner.is_leaf:
        raise ValueError(
            "inplace=True writes the gradient over student, which cannot be a leaf that requires "
            "grad, or a view of one"
        )
    if compiling:
        return  # torch.compile ignores inplace
    if student.is_neg():
        raise ValueError(
            "inplace=True writes the gradient over student, whose memory must hold the logits; got "
            "a view of their negatives (.resolve_neg() it)"
        )
    if _overlaps(student):
        raise ValueError(
            "inplace=True writes the gradient over student, whose rows must not share memory; got "
            f"strides {student.stride()} of shape {tuple(student.shape)} (.contiguous() them)"
        )
    memory = student.untyped_storage().data_ptr()
    if memory and any(teacher.untyped_storage().data_ptr() == memory for teacher in teachers):
        raise ValueError("inplace=True needs student and teacher in different memory")


def _overlaps(tensor: Tensor) -> bool:
    """Return True if entries may share memory: a stride is within the reach of smaller strides."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


# ---- errors of kernels


def raise_for_kernel_error(error: RuntimeError, call: Call) -> None:
    """Raise a Python exception that explains a kernel error; return if unrecognized.

    Recognized causes are a bad label, temperature or list, an unsupported layout, and no memory.
    """
    student, labels, objective = call.student, call.labels, call.objective
    tensors: list[Any] = [student, labels, objective.temperature]
    if call.topk is not None:
        tensors += call.topk[:2]
    if torch.compiler.is_compiling() or not checks.has_data(*tensors):
        return
    if "inplace needs" in str(error):
        raise ValueError(
            "inplace=True needs student to be laid out row by row, or class by class, and to lie "
            f"at a multiple of its {student.element_size()} bytes; got strides {student.stride()} "
            f"of shape {tuple(student.shape)}, the classes last, at {student.data_ptr():#x}"
        )
    if "API call failed" in str(error):
        # The stable ABI drops the type and the message of an exception. Asking for as much memory
        # again raises torch's own OutOfMemoryError, which trainers catch to halve their batches.
        torch.empty((3, *student.shape), dtype=student.dtype, device=student.device)
    if student.device.type == "cpu":
        checks.check_rows(student, labels, objective.ignore_index, objective.temperature)
        if call.topk is not None:
            checks.check_lists(student, *call.topk[:2], labels, objective.ignore_index)
