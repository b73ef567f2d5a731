"""Check the arguments of a loss, and convert them to a ``Call``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference, validation
from fastkd._core import checks
from fastkd._core.autograd import is_transformed
from fastkd._core.heads import compute_teacher_logits
from fastkd._core.objective import PER_ROW_OPTIONS, Objective, Options, resolve
from fastkd._core.shapes import accumulator
from fastkd._core.values import (
    Head,
    Routed,
    Sampled,
    TopK,
    check_routed,
    check_sampled,
    check_topk,
)

Student = Tensor | Head
Teacher = Tensor | Sequence[Tensor] | Head | TopK | Sampled | Routed


class Listed(NamedTuple):
    """Hold a sparse teacher as lists: a :class:`TopK`, or a :class:`Sampled` with k = 1."""

    log_probs: Tensor
    indices: Tensor
    tail: str
    estimator: str | None

    @property
    def name(self) -> str:
        """Return the name of the teacher's field that holds the class indices."""
        return "indices" if self.estimator is None else "tokens"


class Call(NamedTuple):
    """Hold a checked call of the loss for logits, with the classes last."""

    student: Tensor
    teachers: tuple[Tensor, ...]
    labels: Tensor | None
    objective: Objective
    dtype: torch.dtype
    """The dtype of the arithmetic and the loss: float64 if student or teacher is float64, else
    float32."""
    listed: Listed | None = None
    """The sparse teacher, if there is one; ``teachers`` is then empty."""
    inplace: bool = False


SPARSE_DIVERGENCES = tuple(
    name
    for name, divergence in reference.DIVERGENCES.items()
    if divergence.compares == "probabilities" and not divergence.needs_labels
)
_DENSE_OPTIONS = (
    "teacher_temperature", "class_weight", "teacher_form", "teacher_weights", "ensemble",
    "standardize", "dim", "inplace",
)  # fmt: skip


def make_listed(teacher: TopK | Sampled) -> Listed:
    """Return the lists of a sparse teacher; a sampled token becomes a list of length 1."""
    if isinstance(teacher, TopK):
        return Listed(*teacher, None)
    log_probs, tokens, estimator = teacher
    return Listed(log_probs.unsqueeze(-1), tokens.unsqueeze(-1), "ghost", estimator)


def prepare(student: Tensor, teacher: object, labels: Tensor | None, options: Options) -> Call:
    """Check all arguments of a call for logits, and convert them.

    The range of labels, and of a sparse teacher's classes, is not checked here.
    """
    if options.shift:
        checks.check_student(student, options.dim)
        teacher, labels, options = shift_labels(student, teacher, labels, options)
    sparse = teacher if isinstance(teacher, (TopK, Sampled)) else None
    teachers: Any = (teacher,)
    if sparse is None and isinstance(teacher, (list, tuple)):
        teachers = tuple(teacher)
    if options.chunks != "auto":
        raise ValueError(f'chunks must be "auto" unless student is a Head; got {options.chunks!r}')
    if sparse is not None:
        check_sparse_options(sparse, options)
    objective = resolve(
        options,
        has_labels=labels is not None,
        teachers=len(teachers),
        is_sparse=sparse is not None,
    )
    checks.check_student(student, options.dim)
    if sparse is not None:
        teachers = (sparse.log_probs,)
        check_sparse(sparse)
        check_fits_rows(sparse, student)
        checks.check_teacher_has_no_gradient("teacher.log_probs", sparse.log_probs)
    elif not teachers:
        raise ValueError("teacher must have at least one tensor; got an empty sequence")
    else:
        names = ["teacher"]
        if len(teachers) > 1:
            names = [f"teacher[{i}]" for i in range(len(teachers))]
        for name, value in zip(names, teachers, strict=True):
            checks.check_floats(name, value)
        for name, value in zip(names, teachers, strict=True):
            checks.check_teacher(student, name, value, options.dim)
            checks.check_teacher_has_no_gradient(name, value)
    inplace = options.inplace and not is_transformed()
    if inplace:
        _check_inplace(student, teachers, objective.reduction)
    dtype = accumulator(student, *teachers)
    teachers = () if sparse is not None else tuple(checks.to_savable(x.detach()) for x in teachers)
    if options.dim == 1:
        if isinstance(labels, Tensor) and labels.is_floating_point():
            labels = labels.movedim(1, -1) if labels.dim() == student.dim() else labels
        student, *teachers = (x.movedim(1, -1) for x in (student, *teachers))
    soft_labels = labels is not None and checks.check_labels(labels, student)
    if sparse is not None and soft_labels:
        raise TypeError(
            "labels must be class indices of an integer dtype with a "
            f"{type(sparse).__name__} as teacher; got {labels.dtype}"  # type: ignore[union-attr]
        )
    labels = None if labels is None else checks.to_savable(validation.to_int64(labels))
    checks.check_class_count(objective.divergence, objective.standardize, soft_labels, student)
    objective = check_tensors(objective, student, labels, dtype)
    listed = None if sparse is None else make_listed(sparse)
    return Call(student, tuple(teachers), labels, objective, dtype, listed, inplace)


def check_tensors(
    objective: Objective, student: Tensor, labels: Tensor | None, dtype: torch.dtype
) -> Objective:
    """Check the option tensors against the student, and convert them to ``dtype``."""

    def convert(name: str, check_data: Callable[[str, Tensor], None]) -> float | Tensor:
        value: float | Tensor = getattr(objective, name)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0:
            value = value.to(student.device)
        else:
            checks.check_entries(value, name, student)
        if checks.is_readable(value):
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
    temperature = convert("temperature", checks.check_row_temperatures)
    teacher_temperature = temperature
    if objective.teacher_temperature is not objective.temperature:
        teacher_temperature = convert("teacher_temperature", checks.check_row_temperatures)
    return objective._replace(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        hard_weight=convert("hard_weight", checks.check_row_weights),
        soft_weight=convert("soft_weight", checks.check_row_weights),
        normalizer=normalizer,
        class_weight=class_weight,
    )


def shift_rows(value: Tensor, n: int, fill: float, dim: int = -1) -> Tensor:
    """Drop the first ``n`` positions of ``dim``, and append ``n`` positions that hold ``fill``."""
    n = min(n, value.shape[dim])
    remaining = value.narrow(dim, n, value.shape[dim] - n)
    return torch.cat((remaining, torch.full_like(value.narrow(dim, 0, n), fill)), dim)


def shift_labels(
    student: Tensor, teacher: object, labels: Tensor | None, options: Options
) -> tuple[object, Tensor, Options]:
    """Move labels, lists and per-row options to the rows whose logits predict the labels.

    The last rows, which have no label, get ``ignore_index``. Labels and lists with too few
    dimensions are returned unchanged, because later checks raise an error for them.
    """
    validation.check_count("shift", options.shift, 0)
    n, rows = options.shift, student.select(options.dim, 0).shape
    if not rows:
        raise ValueError(
            f"shift={n} needs logits (..., positions, C); got the shape {tuple(student.shape)}"
        )
    if labels is None:
        # shift_rows() below sets the labels of the last rows to ignore_index, which must not be
        # the class 0. The hard term gets weight 0, so the student is not compared with the zeros.
        resolve(options, has_labels=False, teachers=None)
        soft_weight = 1.0 if options.soft_weight is None else options.soft_weight
        options = options._replace(
            alpha=None, hard_weight=0.0, soft_weight=soft_weight, ignore_index=-100
        )
        labels = torch.zeros(rows, dtype=torch.int64, device=student.device)
    elif isinstance(labels, Tensor) and labels.is_floating_point():
        raise TypeError(f"labels must be class indices with shift={n}; got {labels.dtype}")
    if isinstance(labels, Tensor):
        labels = validation.to_int64(labels)
        labels = shift_rows(labels, n, options.ignore_index) if labels.dim() else labels
    if isinstance(teacher, (TopK, Sampled)):
        dim = -2 if isinstance(teacher, TopK) else -1
        if all(value.dim() >= -dim for value in teacher[:2]):
            fields = [
                shift_rows(value, n, fill, dim)
                for value, fill in zip(teacher[:2], (-math.inf, -1), strict=True)
            ]
            teacher = type(teacher)._make((*fields, teacher[2]))
    per_row = {name: getattr(options, name) for name in PER_ROW_OPTIONS}
    shifted: dict[str, Any] = {
        name: shift_rows(value, n, 1.0)
        for name, value in per_row.items()
        if isinstance(value, Tensor) and value.dim()
    }
    return teacher, labels, options._replace(shift=0, **shifted)


def check_sparse_options(teacher: TopK | Sampled, options: Options) -> None:
    """Raise if an option is set that a sparse teacher does not support."""
    if isinstance(teacher, TopK):
        return check_tail(teacher.tail, options)
    context = "a Sampled as teacher"
    check_options_are_default(options, _DENSE_OPTIONS, context)
    check_options_are_default(options, ("divergence", "mix"), f"{context}, which has an estimator")


def check_tail(tail: str, options: Options) -> None:
    """Raise if an option is given that a TopK with this tail does not support."""
    context = "a TopK as teacher"
    check_options_are_default(options, _DENSE_OPTIONS, context)
    if options.divergence in reference.DIVERGENCES and options.divergence not in SPARSE_DIVERGENCES:
        raise ValueError(
            f"divergence must be one of {', '.join(map(repr, SPARSE_DIVERGENCES))} with {context}, "
            f"which lists probabilities of some classes; got {options.divergence!r}"
        )
    if tail == "ignore" and options.divergence != "forward_kl":
        raise ValueError(
            "divergence must be 'forward_kl' with tail=\"ignore\": a sum over the listed classes "
            "alone is not a divergence, and that of the reverse KL falls as the student leaves "
            f'them; got {options.divergence!r}. Use tail="ghost" or tail="renormalize".'
        )


def check_options_are_default(options: Options, names: Sequence[str], context: str) -> None:
    """Raise if an option in ``names`` is not its default.

    ``context``: a phrase for the message that names what does not support the options.
    """
    for name in names:
        value, default = getattr(options, name), options._field_defaults[name]
        if isinstance(value, Tensor) or value != default:
            shown = repr(value)
            if isinstance(value, Tensor):
                shown = f"a tensor of shape {tuple(value.shape)}"
            raise ValueError(f"{name} must be {default!r} with {context}; got {shown}")


# ---- sparse teachers


def check_sparse(teacher: TopK | Sampled) -> None:
    """Raise unless the fields of a sparse teacher are valid."""
    if isinstance(teacher, TopK):
        check_topk(teacher, "teacher")
    else:
        check_sampled(teacher, "teacher")


def check_fits_rows(teacher: TopK | Sampled, logits: Tensor) -> None:
    """Raise unless a sparse teacher has entries for each row of logits, on the logits' device."""
    rows = logits.shape[:-1]
    entries, suffix = ("k >= 1 entries", ("k",)) if isinstance(teacher, TopK) else ("one entry", ())
    for name in teacher._fields[:2]:
        value = getattr(teacher, name)
        if value.shape[: value.dim() - len(suffix)] != rows:
            dims = [*map(str, rows), *suffix]
            shape = ", ".join(dims) + ("," if len(dims) == 1 else "")
            raise ValueError(
                f"teacher.{name} must have {entries} for each row of logits, shape ({shape}) "
                f"for logits of shape {tuple(logits.shape)}; got {tuple(value.shape)}"
            )
        if value.device != logits.device:
            raise ValueError(
                f"teacher.{name} must be on the logits' device, {logits.device}; got {value.device}"
            )


# ---- routed teachers


def find_teacher_rows(routed: Routed, rows: torch.Size, device: torch.device) -> list[Tensor]:
    """Check a routed teacher; return the indices of each teacher's rows in the flattened rows."""
    check_routed(routed, "teacher")
    teachers, indices = routed
    for name, shape in [("indices", indices.shape)] + [
        (f"teachers[{i}]", (x.hidden if isinstance(x, Head) else x).shape[:-1])
        for i, x in enumerate(teachers)
    ]:
        if shape != rows:
            raise ValueError(
                f"teacher.{name} must have the student's rows, {tuple(rows)}; got {tuple(shape)}"
            )
    if indices.device != device:
        raise ValueError(
            f"teacher.indices must be on the student's device, {device}; got {indices.device}"
        )
    if torch.compiler.is_compiling():  # a traced program cannot branch on data
        in_range = (indices >= 0) & (indices < len(teachers))
        torch._assert_async(in_range.all(), f"teacher.indices must be in [0, {len(teachers)})")
    elif indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(teachers):
        raise ValueError(
            f"teacher.indices must be in [0, {len(teachers)}), the positions of the teachers; got "
            f"{int(indices.min())} to {int(indices.max())}"
        )
    return [(indices.flatten() == i).nonzero().squeeze(1) for i in range(len(teachers))]


def gather_routed_logits(student: Tensor, routed: Routed, dim: int) -> Tensor:
    """Return the logits of each row's teacher as one tensor of the student's shape."""
    check_routed(routed, "teacher")
    checks.check_student(student, dim)
    if dim != -1:
        moved = [x if isinstance(x, Head) else x.movedim(dim, -1) for x in routed.teachers]
        routed, student = Routed(tuple(moved), routed.indices), student.movedim(dim, -1)
    classes, parts = student.shape[-1], []
    teacher_rows = find_teacher_rows(routed, student.shape[:-1], student.device)
    for i, (teacher, rows) in enumerate(zip(routed.teachers, teacher_rows, strict=True)):
        name = f"teacher.teachers[{i}]"
        if isinstance(teacher, Head):
            hidden = teacher.hidden.reshape(-1, teacher.hidden.shape[-1])[rows]
            part = compute_teacher_logits(teacher._replace(hidden=hidden), name, student.device)
        else:
            checks.check_teacher_has_no_gradient(name, teacher)
            part = teacher.detach().reshape(-1, teacher.shape[-1])[rows]
        parts.append(part)
        if parts[-1].shape[-1] != classes:
            raise ValueError(f"{name} must have {classes} classes; got {parts[-1].shape[-1]}")
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    out = torch.empty(student.shape, dtype=dtype, device=student.device)
    for part, rows in zip(parts, teacher_rows, strict=True):
        out.view(-1, classes)[rows] = part.to(dtype)
    return out.movedim(-1, dim)


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
    if _has_overlap(student):
        raise ValueError(
            "inplace=True writes the gradient over student, whose rows must not share memory; got "
            f"strides {student.stride()} of shape {tuple(student.shape)} (.contiguous() them)"
        )
    memory = student.untyped_storage().data_ptr()
    if memory and any(teacher.untyped_storage().data_ptr() == memory for teacher in teachers):
        raise ValueError("inplace=True needs student and teacher in different memory")


def _has_overlap(tensor: Tensor) -> bool:
    """Return True if two entries may share memory, judged by shape and strides alone."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


# ---- values of tensors, and errors of kernels


def check_values(call: Call) -> None:
    """Raise if a label, a temperature or a list of a call is invalid."""
    student, labels, objective = call.student, call.labels, call.objective
    checks.check_rows(student, labels, objective.ignore_index, objective.temperature)
    if call.listed is not None:
        log_probs, indices = call.listed[:2]
        ignored, name = objective.ignore_index, call.listed.name
        checks.check_lists(student, log_probs, indices, labels, ignored, name)


def raise_for_kernel_error(error: RuntimeError, call: Call) -> None:
    """Raise a Python exception that explains a kernel error; return if no cause is recognized.

    Recognized causes: a bad label, temperature or list, an unsupported layout, lack of memory.
    """
    student, labels, objective = call.student, call.labels, call.objective
    tensors: list[Any] = [student, labels, objective.temperature]
    if call.listed is not None:
        tensors += call.listed[:2]
    if torch.compiler.is_compiling() or not checks.has_data(*tensors):
        return
    if "inplace needs" in str(error):
        raise ValueError(
            "inplace=True needs student to be laid out row by row, or class by class, and to lie "
            f"at a multiple of its {student.element_size()} bytes; got strides {student.stride()} "
            f"of shape {tuple(student.shape)}, the classes last, at {student.data_ptr():#x}"
        )
    if "API call failed" in str(error):
        # torch's stable ABI drops the type and the message of an exception. If memory ran out on
        # CUDA, this allocation raises torch's OutOfMemoryError, which trainers catch to halve
        # batches.
        torch.empty((3, *student.shape), dtype=student.dtype, device=student.device)
    if student.device.type == "cpu":
        check_values(call)
