"""The arguments of :func:`fastkd.linear_loss`: checked, and as the loop takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import losses
from fastkd._core import checks, topk
from fastkd._core.objective import Objective
from fastkd.linear import chunks, row_loop
from fastkd.linear.chunks import ChunkBy
from fastkd.linear.row_loop import Inputs


def resolve(
    options: dict[str, Any], inputs: Inputs, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Inputs, dict[str, Any]]:
    """Rows flattened, and the core's options as tensors of ``Inputs`` and numbers of ``Call``."""
    lead, labels = inputs.hidden.shape[:-1], inputs.labels
    classes = inputs.weight.shape[0]
    if inputs.topk_indices is not None:
        _check_sparse(options, labels)
    # Stand-ins for the logits, without their memory.
    student, teacher = (
        torch.empty((), dtype=dtype, device=inputs.hidden.device).expand(*lead, classes)
        for dtype in dtypes
    )
    given = {**losses.DEFAULTS, **options}
    _, _, labels, objective = losses.prepare(student, teacher, labels, given)
    data = [x for x in (labels, objective.temperature) if isinstance(x, Tensor)]
    if all(checks.may_look(x) for x in data):
        checks.check_rows(student, labels, objective.ignore_index, objective.temperature)
    indices, log_probs = inputs.topk_indices, inputs.topk_log_probs
    if indices is not None and log_probs is not None and checks.may_look(indices):
        ignore_index = objective.ignore_index
        topk.check_list_data(student, indices, log_probs, labels, ignore_index, "topk_")
    denominator = None
    if objective.reduction == "mean":
        objective, denominator = _denominators(
            objective, labels, math.prod(lead), row_loop.acc_dtype(*dtypes), student.device
        )
    if objective.teacher_temperature is objective.temperature:
        objective = objective._replace(teacher_temperature=None)  # type: ignore[arg-type]
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, value in objective._asdict().items():
        if not isinstance(value, Tensor):
            numbers[name] = value
            continue
        if value.requires_grad:
            raise ValueError(
                f"{name} gets no gradient from linear_loss; got a tensor that requires grad "
                "(.detach() it, or use fastkd.loss)"
            )
        tensors[name] = value.reshape(-1) if value.dim() > 0 else value
        numbers[name] = 1.0
    for name in row_loop.OUTPUTS_OF_ROWS:
        value = getattr(inputs, name)
        if value is not None:
            tensors[name] = value.reshape(math.prod(lead), value.shape[-1])
    if labels is not None:
        soft = labels.is_floating_point()
        tensors["labels"] = labels.reshape(-1, classes) if soft else labels.reshape(-1)
    for name in ("class_weight", "normalizer", "teacher_form", "teacher_weights", "ensemble"):
        numbers.pop(name, None)
    return inputs._replace(denominator=denominator, **tensors), numbers


def _denominators(
    objective: Objective,
    labels: Tensor | None,
    rows: int,
    acc: torch.dtype,
    device: torch.device,
) -> tuple[Objective, Tensor]:
    """What "mean" divides by, on the device; the hard term's own becomes part of its weight."""
    normalizer = objective.normalizer
    if normalizer is not None:
        value = torch.as_tensor(normalizer, dtype=acc, device=device)
        return objective._replace(normalizer=None), value
    if labels is None or labels.is_floating_point():
        return objective, torch.full((), max(1, rows), dtype=acc, device=device)
    valid = labels != objective.ignore_index
    count = valid.sum().clamp(min=1).to(acc)
    if objective.class_weight is not None:
        weights = objective.class_weight[labels.where(valid, 0)].where(valid, 0).sum()
        share = count / weights.where(weights != 0, 1.0)
        objective = objective._replace(hard_weight=objective.hard_weight * share)
    return objective, count


def check_head(
    owner: str, hidden: object, weight: object, bias: object, like: Tensor | None = None
) -> None:
    """A head's tensors; ``like``: the other head's weight, which has as many classes."""
    names = (f"{owner}_hidden", f"{owner}_weight", f"{owner}_bias")
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if value is None and name == names[2]:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        checks.check_dense(name, value)
        if value.dtype not in checks.FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}"
            )
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[0]} must have shape (..., width) and {names[1]} (classes, width); got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{names[1]} must have at least one class; got {tuple(weight.shape)}")
    if isinstance(bias, Tensor) and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[2]} must have shape {tuple(weight.shape[:1])}, one number for each class; got "
            f"{tuple(bias.shape)}"
        )
    device = hidden.device if like is None else like.device
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if not isinstance(value, Tensor):
            continue
        if value.device != device:
            raise ValueError(
                f"{name} must be on the student's device, {device}; got {value.device}"
            )
        if value.dtype != hidden.dtype and not torch.is_autocast_enabled(device.type):
            raise ValueError(
                f"{name} must have {names[0]}'s dtype, {hidden.dtype}, unless autocast is on; got "
                f"{value.dtype}"
            )
    if like is not None and weight.shape[0] != like.shape[0]:
        raise ValueError(
            "teacher_weight and student_weight must have the same number of classes; got "
            f"{weight.shape[0]} and {like.shape[0]}"
        )


# What a sparse teacher goes with, of the options that it does not go with otherwise.
_SPARSE = {
    **dict.fromkeys(("teacher_temperature", "class_weight", "mix")),
    **{"divergence": "forward_kl", "standardize": False},
}


def _check_sparse(options: dict[str, Any], labels: Tensor | None) -> None:
    """Refuses what :func:`fastkd.topk_loss` does not have."""
    for name, accepted in _SPARSE.items():
        if options[name] is not accepted and options[name] != accepted:
            raise ValueError(
                f"{name} must be {accepted!r} with topk_indices; got {options[name]!r}"
            )
    for name in ("temperature", "hard_weight", "soft_weight"):
        if isinstance(options[name], Tensor):
            raise TypeError(f"{name} must be a number with topk_indices; got a tensor")
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise TypeError(f"labels must be class indices with topk_indices; got {labels.dtype}")


def check_teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    indices: Tensor | None,
    log_probs: Tensor | None,
    lead: torch.Size,
    like: Tensor,
) -> None:
    """One of the three ways to give the teacher."""
    has_head = hidden is not None or weight is not None or bias is not None
    is_sparse = indices is not None or log_probs is not None
    for name, given, others in (
        ("teacher_logits takes", logits is not None, has_head),
        ("topk_indices and topk_log_probs take", is_sparse, has_head or logits is not None),
    ):
        if given and others:
            raise ValueError(
                f"{name} the place of teacher_hidden, teacher_weight and teacher_bias, or of any "
                "other teacher; got both"
            )
    stand_in = like.new_empty(()).detach().expand(*lead, like.shape[0])
    if logits is not None:
        if isinstance(logits, Tensor):
            checks.check_dense("teacher_logits", logits)
            if logits.shape != stand_in.shape:
                raise ValueError(
                    "teacher_logits must have student_hidden's rows and student_weight's classes, "
                    f"shape {tuple(stand_in.shape)}; got {tuple(logits.shape)}"
                )
        checks.logits(stand_in, [logits])
        return
    if is_sparse:
        topk.check_lists(indices, log_probs, stand_in, "topk_")
        return
    if hidden is None or weight is None:
        raise ValueError(
            "the teacher needs teacher_hidden and teacher_weight, or teacher_logits, or "
            "topk_indices and topk_log_probs; got "
            f"teacher_hidden={_kind(hidden)}, teacher_weight={_kind(weight)}, no other"
        )
    check_head("teacher", hidden, weight, bias, like)
    if hidden.shape[:-1] != lead:
        raise ValueError(
            "teacher_hidden and student_hidden must have the same rows; got "
            f"{tuple(hidden.shape[:-1])} and {tuple(lead)}"
        )


def _kind(value: object) -> str:
    return "None" if value is None else "a tensor"


def outputs_of(
    hidden: Tensor | None, logits: Tensor | None, log_probs: Tensor | None
) -> tuple[str, Tensor]:
    """What is known of the teacher's outputs, and its name; one of them is given."""
    names = ("teacher_hidden", "teacher_logits", "topk_log_probs")
    return next(
        (name, value)
        for name, value in zip(names, (hidden, logits, log_probs), strict=True)
        if value is not None
    )


def compute_dtypes(
    hidden: Tensor, outputs: Tensor, are_logits: bool
) -> tuple[torch.dtype, torch.dtype]:
    """What the student's and the teacher's logits are computed in: under autocast, its dtype."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden.dtype, outputs.dtype
    fast = torch.get_autocast_dtype(device)
    double = torch.float64  # which autocast leaves alone
    student = double if hidden.dtype is double else fast
    return student, outputs.dtype if are_logits or outputs.dtype is double else fast


def pair_of(
    name: str, value: object, teacher_is_head: bool = True
) -> tuple[float | None, float | None]:
    """The student's and the teacher's, from one number or two."""
    pair = value if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or a pair (student's, teacher's); got {value!r}")
    student, teacher = (
        None if one is None else checks.number(name, one, 0.0, math.inf, open_low=True)
        for one in pair
    )
    if isinstance(value, Sequence) and teacher is not None and not teacher_is_head:
        raise ValueError(
            f"{name} must be a number or a pair (student's, None) for a teacher that is no head; "
            f"got {value!r}"
        )
    return student, teacher


def check_numbers(options: Mapping[str, Any]) -> None:
    """What a head adds to the core's options, as far as it needs no tensors."""
    for name in ("softcap", "logit_scale"):
        pair_of(name, options.get(name))
    checks.one_of("tail", options.get("tail", "ghost"), topk.TAILS)
    chunk_by(options.get("chunk_by", "auto"), [])
    chunks.check_room(options.get("chunk_size", "auto"), options.get("max_workspace"))
    dtype = options.get("accumulate_dtype", "auto")
    if dtype != "auto" and dtype not in checks.FLOATS:
        raise ValueError(
            f"accumulate_dtype must be 'auto' or a floating-point dtype; got {dtype!r}"
        )


def cast_per_class(inputs: Inputs, dtype: torch.dtype, teacher_dtype: torch.dtype) -> int:
    """Bytes of autocast's copies of the weights, for each class."""
    return sum(
        0 if weight is None or weight.dtype == to else weight.shape[1] * to.itemsize
        for weight, to in ((inputs.weight, dtype), (inputs.teacher_weight, teacher_dtype))
    )


def copied_per_row(inputs: Inputs, dtype: torch.dtype, teacher_dtype: torch.dtype) -> int:
    """Bytes of the hidden states that are copied if all rows are computed at once, at most: without
    those that are ignored, and in another dtype."""
    labels = inputs.labels
    ignores = labels is not None and not labels.is_floating_point()
    return sum(
        hidden.shape[1] * (ignores * hidden.itemsize + (hidden.dtype != to) * to.itemsize)
        for hidden, to in ((inputs.hidden, dtype), (inputs.teacher_hidden, teacher_dtype))
        if hidden is not None
    )


def chunk_by(value: object, missing: list[str]) -> ChunkBy:
    """``"rows"`` where chunks of classes lack what a call has, unless they are asked for."""
    chosen = chunks.CHUNK_BY[checks.one_of("chunk_by", value, chunks.CHUNK_BY)]
    if not missing:
        return chosen
    if chosen == "classes":
        raise ValueError(
            f'chunk_by must be "auto" or "rows" with {" and ".join(missing)}; got "classes"'
        )
    return "rows"
