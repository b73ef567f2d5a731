"""Check the arguments of a call whose student is a head, and convert them for the loops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._core import checks
from fastkd._core.arguments import (
    Teacher,
    check_options_are_default,
    check_teacher_has_no_gradient,
    prepare,
)
from fastkd._core.objective import Objective, Options
from fastkd._core.values import Head, TopK, check_head, check_topk
from fastkd.linear.call import OUTPUTS_OF_ROWS, Inputs, LinearCall, acc_dtype

_LOGITS_OPTIONS = ("teacher_form", "teacher_weights", "ensemble", "dim", "inplace")


def prepare_heads(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, with_terms: bool
) -> tuple[Inputs, LinearCall]:
    """Check all arguments and flatten the rows, without choosing chunks yet."""
    _check_head(student, "student", student.hidden.device)
    check_options_are_default(options, _LOGITS_OPTIONS, "a Head as student")
    if isinstance(teacher, Head):
        _check_teacher_head(student, teacher)
        outputs = teacher.hidden
    elif isinstance(teacher, TopK):
        check_topk(teacher, "teacher")
        outputs = teacher.log_probs
    elif isinstance(teacher, Tensor):
        outputs = teacher
    else:
        raise TypeError(
            "teacher must be a Head, a TopK or a tensor of logits if student is a Head; got "
            f"{type(teacher).__name__}"
        )
    dtype, teacher_dtype = _compute_dtypes(student.hidden, outputs, isinstance(teacher, Head))
    objective, labels = _check_with_stand_ins(student, teacher, labels, options, dtype)
    lead = student.hidden.shape[:-1]
    denominator = None
    if objective.reduction == "mean":
        objective, denominator = _denominators(
            objective, labels, math.prod(lead), acc_dtype(dtype, teacher_dtype), outputs.device
        )
    tensors, numbers = _split(objective)
    tensors["denominator"] = denominator
    if labels is not None:
        is_distribution = labels.is_floating_point()
        tensors["labels"] = (
            labels.reshape(-1, labels.shape[-1]) if is_distribution else labels.reshape(-1)
        )
    tensors.update(hidden=student.hidden, weight=student.weight, bias=student.bias)
    head = teacher if isinstance(teacher, Head) else None
    if isinstance(teacher, Head):
        tensors.update(teacher_hidden=teacher.hidden)
        tensors.update(teacher_weight=teacher.weight, teacher_bias=teacher.bias)
    elif isinstance(teacher, TopK):
        tensors.update(topk_indices=teacher.indices, topk_log_probs=teacher.log_probs)
    else:
        tensors.update(teacher_logits=teacher)
    for name, value in tensors.items():
        if value is not None:
            if name in OUTPUTS_OF_ROWS:
                value = value.reshape(math.prod(lead), value.shape[-1])
            is_student = name in ("hidden", "weight", "bias")
            tensors[name] = checks.to_savable(value if is_student else value.detach())
    tracked = torch.is_grad_enabled()
    wants = [tracked and value is not None and value.requires_grad for value in student[:3]]
    return Inputs(**{name: tensors.get(name) for name in Inputs._fields}), LinearCall(  # type: ignore[arg-type]
        **numbers,
        tail=teacher.tail if isinstance(teacher, TopK) else "ghost",
        student_softcap=student.softcap,
        teacher_softcap=None if head is None else head.softcap,
        student_scale=student.scale or 1.0,
        teacher_scale=1.0 if head is None else head.scale or 1.0,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        accumulate=student.weight.dtype,
        chunk=1,
        by_classes=False,
        hidden_grad=wants[0],
        weight_grad=wants[1],
        bias_grad=wants[2],
        with_terms=with_terms,
    )


def _check_with_stand_ins(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, dtype: torch.dtype
) -> tuple[Objective, Tensor | None]:
    """Check labels and options against a zero-stride stand-in for the logits, and return them."""
    shape = (*student.hidden.shape[:-1], student.weight.shape[0])
    logits = torch.empty((), dtype=dtype, device=student.hidden.device).expand(shape)
    call = prepare(
        logits,
        logits if isinstance(teacher, Head) else teacher,
        labels,
        options._replace(chunks="auto"),
    )
    labels, objective = call.labels, call.objective
    data = [x for x in (labels, objective.temperature) if isinstance(x, Tensor)]
    if all(checks.may_look(x) for x in data):
        checks.check_rows(logits, labels, objective.ignore_index, objective.temperature)
    if isinstance(teacher, TopK) and checks.may_look(teacher.indices):
        checks.check_lists(logits, *teacher[:2], labels, objective.ignore_index)
    return objective, labels


def _split(objective: Objective) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Return the tensors of ``Inputs`` and the numbers of ``LinearCall``."""
    if objective.teacher_temperature is objective.temperature:
        objective = objective._replace(teacher_temperature=None)  # type: ignore[arg-type]
    tensors: dict[str, Tensor | None] = {}
    numbers: dict[str, Any] = {}
    for name, value in objective._asdict().items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(
                    f"{name} gets no gradient if student is a Head; got a tensor that requires "
                    f"grad. Pass student.logits() instead of the Head, or .detach() {name}"
                )
            tensors[name] = value.reshape(-1) if value.dim() > 0 else value
            value = 1.0
        numbers[name] = value
    for name in ("class_weight", "normalizer", "teacher_form", "teacher_weights", "ensemble"):
        del numbers[name]
    return tensors, numbers


def _denominators(
    objective: Objective,
    labels: Tensor | None,
    rows: int,
    acc: torch.dtype,
    device: torch.device,
) -> tuple[Objective, Tensor]:
    """Return the objective and the mean's divisor, a 0-d tensor on ``device``.

    The loops divide both terms by the soft term's divisor. Class weights are therefore multiplied
    by the ratio of the soft to the hard divisor.
    """
    normalizer = objective.normalizer
    if normalizer is not None:
        value = torch.as_tensor(normalizer, dtype=acc, device=device)
        return objective._replace(normalizer=None), value
    if labels is None or labels.is_floating_point():
        return objective, torch.full((), max(1, rows), dtype=acc, device=device)
    valid = labels != objective.ignore_index
    count = valid.sum().clamp(min=1).to(acc)
    if objective.class_weight is not None:
        # A label out of range makes its row NaN whatever it weighs.
        classes = labels.clamp(0, len(objective.class_weight) - 1)
        total = objective.class_weight[classes].where(valid, 0).sum()
        share = count / total.where(total != 0, 1.0)
        objective = objective._replace(class_weight=objective.class_weight * share)
    return objective, count


def _check_head(head: Head, owner: str, device: torch.device) -> None:
    """Raise unless the tensors of a head have one device and, without autocast, one dtype."""
    check_head(head, owner)
    for name in ("hidden", "weight", "bias"):
        value = getattr(head, name)
        if value is None:
            continue
        if value.device != device:
            raise ValueError(
                f"{owner}.{name} must be on the device of student.hidden, {device}; got "
                f"{value.device}"
            )
        if value.dtype != head.hidden.dtype and _autocast_dtype(device) is None:
            raise ValueError(
                f"{owner}.{name} must have the dtype of {owner}.hidden, {head.hidden.dtype}, "
                f"unless autocast is on; got {value.dtype}"
            )


def _check_teacher_head(student: Head, teacher: Head) -> None:
    """Raise unless the teacher's head has the student's rows and classes and needs no gradient."""
    _check_head(teacher, "teacher", student.hidden.device)
    for name, mine, other in (
        ("classes", student.weight.shape[:1], teacher.weight.shape[:1]),
        ("rows", student.hidden.shape[:-1], teacher.hidden.shape[:-1]),
    ):
        if mine != other:
            tensor = "weight" if name == "classes" else "hidden"
            raise ValueError(
                f"teacher.{tensor} and student.{tensor} must have the same {name}; got "
                f"{tuple(other)} and {tuple(mine)}"
            )
    check_teacher_has_no_gradient("teacher.hidden", teacher.hidden)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, or None if it is off; tensors on meta stand for CUDA's."""
    kind = "cuda" if device.type == "meta" else device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _compute_dtypes(
    hidden: Tensor, outputs: Tensor, is_head: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the student's and the teacher's logits: under autocast, its dtype.

    Autocast does not change float64, nor the teacher's logits if they are given.
    """
    fast, double = _autocast_dtype(hidden.device), torch.float64
    if fast is None:
        return hidden.dtype, outputs.dtype
    student = double if hidden.dtype is double else fast
    return student, fast if is_head and outputs.dtype is not double else outputs.dtype


# ---- inputs of the chunk planner


def cast_per_class(inputs: Inputs, call: LinearCall) -> int:
    """Return the bytes of autocast's copies of the weights, for each class."""
    return sum(
        0 if weight is None or weight.dtype == dtype else weight.shape[1] * dtype.itemsize
        for weight, dtype in (
            (inputs.weight, call.dtype),
            (inputs.teacher_weight, call.teacher_dtype),
        )
    )


def copied_per_row(inputs: Inputs, call: LinearCall) -> int:
    """Return the bytes of copied hidden states, for each row, if all rows are computed at once.

    Rows that are not ignored are copied, and autocast copies to another dtype.
    """
    labels = inputs.labels
    ignores = labels is not None and not labels.is_floating_point()
    return sum(
        hidden.shape[1] * (ignores * hidden.itemsize + (hidden.dtype != dtype) * dtype.itemsize)
        for hidden, dtype in (
            (inputs.hidden, call.dtype),
            (inputs.teacher_hidden, call.teacher_dtype),
        )
        if hidden is not None
    )
