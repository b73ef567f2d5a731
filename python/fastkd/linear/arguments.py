"""Check a call whose student is a Head; convert it to ``Inputs`` and a ``LinearCall``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._core import checks
from fastkd._core.arguments import (
    Teacher,
    check_options_are_default,
    check_values,
    prepare,
)
from fastkd._core.heads import check_head_tensors, get_autocast_dtype
from fastkd._core.objective import Options
from fastkd._core.rows import compute_mean_divisors
from fastkd._core.values import Head, Sampled, TopK
from fastkd.linear.call import OUTPUTS_OF_ROWS, Inputs, LinearCall, promote_loss_dtype

_TEACHER_HEAD = ("teacher_hidden", "teacher_weight", "teacher_bias")
_LOGITS_OPTIONS = ("teacher_form", "teacher_weights", "ensemble", "dim", "inplace")


def prepare_heads(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, with_terms: bool
) -> tuple[Inputs, LinearCall]:
    """Check all arguments and flatten the rows.

    The fields ``accumulate``, ``chunk`` and ``by_classes`` of the ``LinearCall`` are placeholders.
    """
    check_head_tensors(student, "student")
    device, lead = student.hidden.device, student.hidden.shape[:-1]
    check_options_are_default(options, _LOGITS_OPTIONS, "a Head as student")
    if isinstance(teacher, Head):
        _check_teacher_head(student, teacher)
    elif not isinstance(teacher, (TopK, Sampled, Tensor)):
        raise TypeError(
            "teacher must be a Head, TopK, Sampled or a tensor of logits if student is a Head, or "
            f"a Routed in fastkd.loss and fastkd.terms; got {type(teacher).__name__}"
        )
    dtype = _get_logits_dtype(student.hidden)
    # prepare() checks labels, options and lists against logits, in whose place a tensor with
    # strides of 0 takes no memory.
    logits = torch.empty((), dtype=dtype, device=device).expand(*lead, len(student.weight))
    stand_in = logits if isinstance(teacher, Head) else teacher
    checked = prepare(logits, stand_in, labels, options._replace(chunks="auto"))
    labels, objective = checked.labels, checked.objective
    data = [labels, objective.temperature, *(checked.listed or ())]
    if all(checks.is_readable(x) for x in data if isinstance(x, Tensor)):
        check_values(checked)
    tensors: dict[str, Tensor | None] = {}
    if isinstance(teacher, Head):
        teacher_dtype = _get_logits_dtype(teacher.hidden)
        tensors.update(zip(_TEACHER_HEAD, teacher[:3], strict=True))
    elif checked.listed is not None:
        log_probs, indices = checked.listed[:2]
        teacher_dtype = log_probs.dtype
        tensors.update(topk_indices=indices, topk_log_probs=log_probs)
    else:
        assert isinstance(teacher, Tensor)
        teacher_dtype = teacher.dtype
        tensors["teacher_logits"] = teacher
    if objective.reduction == "mean":
        acc = promote_loss_dtype(dtype, teacher_dtype)
        hard, soft = compute_mean_divisors(math.prod(lead), labels, objective, acc)
        if not isinstance(soft, Tensor):
            soft = torch.full((), soft, device=device, dtype=acc)
        tensors["denominator"] = soft.to(acc)
        # row_loop.py and class_loop.py divide both terms by the soft term's divisor.
        if objective.class_weight is not None and objective.normalizer is None:
            weight = objective.class_weight * (soft / hard)
            objective = objective._replace(class_weight=weight)
    if objective.teacher_temperature is objective.temperature:
        objective = objective._replace(teacher_temperature=None)  # type: ignore[arg-type]
    numbers: dict[str, Any] = {}
    for name, value in objective._replace(normalizer=None)._asdict().items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise ValueError(
                    f"{name} gets no gradient if student is a Head; got a tensor that requires "
                    f"grad. Pass student.logits() instead of the Head, or .detach() {name}"
                )
            tensors[name], value = value.reshape(-1) if value.dim() > 0 else value, 1.0
        if name in LinearCall._fields:
            numbers[name] = value
    if labels is not None:
        classes = labels.shape[-1:] if labels.is_floating_point() else ()
        tensors["labels"] = labels.reshape(-1, *classes)
    tensors = {name: None if x is None else x.detach() for name, x in tensors.items()}
    tensors.update(zip(("hidden", "weight", "bias"), student[:3], strict=True))
    for name, x in tensors.items():
        if x is not None:
            if name in OUTPUTS_OF_ROWS:
                x = x.reshape(math.prod(lead), x.shape[-1])
            tensors[name] = checks.to_savable(x)
    tracked = torch.is_grad_enabled()
    needs_grad = [tracked and x is not None and x.requires_grad for x in student[:3]]
    return Inputs(**{name: tensors.get(name) for name in Inputs._fields}), LinearCall(  # type: ignore[arg-type]
        **numbers,
        tail=getattr(teacher, "tail", "ghost"),
        estimator=getattr(teacher, "estimator", None),
        student_softcap=student.softcap,
        teacher_softcap=getattr(teacher, "softcap", None),
        student_scale=student.scale or 1.0,
        teacher_scale=getattr(teacher, "scale", None) or 1.0,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        accumulate=student.weight.dtype,
        chunk=1,
        by_classes=False,
        hidden_grad=needs_grad[0],
        weight_grad=needs_grad[1],
        bias_grad=needs_grad[2],
        with_terms=with_terms,
    )


def _check_teacher_head(student: Head, teacher: Head) -> None:
    """Raise unless rows and classes are the student's, and teacher.hidden needs no gradient."""
    check_head_tensors(teacher, "teacher", student.hidden.device)
    for name, student_size, teacher_size in (
        ("classes", student.weight.shape[:1], teacher.weight.shape[:1]),
        ("rows", student.hidden.shape[:-1], teacher.hidden.shape[:-1]),
    ):
        if student_size != teacher_size:
            tensor = "weight" if name == "classes" else "hidden"
            raise ValueError(
                f"teacher.{tensor} and student.{tensor} must have the same {name}; got "
                f"{tuple(teacher_size)} and {tuple(student_size)}"
            )
    checks.check_teacher_has_no_gradient("teacher.hidden", teacher.hidden)


def _get_logits_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of autocast if it is on and ``hidden`` is not float64, else hidden.dtype."""
    autocast = get_autocast_dtype(hidden.device)
    return hidden.dtype if autocast is None or hidden.dtype is torch.float64 else autocast
