"""Choose how a checked call is computed: by the kernels, or by :mod:`fastkd.reference`.

The reference computes options without a kernel, calls under function transforms, and calls on
devices without kernels.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import checks, dense, topk
from fastkd._core.arguments import Call, check_values
from fastkd._core.autograd import is_transformed
from fastkd._core.dense import DIVERGENCES, KERNEL_DEVICES, MOST_TEACHERS_ON_CUDA
from fastkd._core.objective import Objective
from fastkd._core.rows import compute_checkpointed, compute_divisor_ratio, compute_reference_terms

_warned: set[str] = set()
_loss_into = torch.ops.fastkd.loss_into.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default

IN_TWO_PASSES = frozenset({"labels of probabilities", "class_weight= with label_smoothing="})
"""Features that the kernels compute in two passes on CPUs, without ``inplace``."""


def list_missing_features(
    student: Tensor, labels: Tensor | None, objective: Objective
) -> list[str]:
    """Return the features of a call that one pass of the kernels lacks, as named in messages."""
    o = objective
    if student.device.type not in KERNEL_DEVICES:
        return [f"logits on {student.device.type}"]
    numbers = (o.temperature, o.teacher_temperature, o.hard_weight, o.soft_weight)
    needs_gradient = any(isinstance(x, Tensor) and x.requires_grad for x in numbers)
    lacks = {
        f'divergence="{o.divergence}"': o.divergence not in DIVERGENCES,
        "gradients of temperatures and of weights": needs_gradient and torch.is_grad_enabled(),
        "class_weight= with label_smoothing=": o.class_weight is not None and o.label_smoothing,
        "labels of probabilities": labels is not None and labels.is_floating_point(),
        "standardize=True": o.standardize,
    }
    return [name for name, is_lacking in lacks.items() if is_lacking]


def is_fused(student: Tensor, labels: Tensor | None, objective: Objective) -> bool:
    """Return True if one pass of the kernels computes the call."""
    return not is_transformed() and not list_missing_features(student, labels, objective)


def compute(call: Call, with_terms: bool) -> Tensor:
    """Compute the loss, or all terms stacked, by kernels or by the reference."""
    student, device = call.student, call.student.device.type
    if device not in KERNEL_DEVICES:
        _warn_once(device)
    if call.listed is not None:
        return _compute_sparse(call, with_terms)
    transformed = is_transformed()
    if device in KERNEL_DEVICES and not transformed:
        missing = list_missing_features(student, call.labels, call.objective)
        if device == "cuda" and len(call.teachers) > MOST_TEACHERS_ON_CUDA:
            missing.append(f"more than {MOST_TEACHERS_ON_CUDA} teachers on cuda")
        if not missing:
            return _compute_fused(call, with_terms)
        if call.inplace:
            raise ValueError(
                f"inplace must be False with {', '.join(missing)}: no single-pass kernel computes "
                f"this call on {device}"
            )
        if checks.is_readable(student):
            check_values(call)
            out = (
                _compute_in_two_passes(call, with_terms)
                if IN_TWO_PASSES.issuperset(missing)
                else None
            )
            if out is not None:
                return out
    if transformed or torch.compiler.is_compiling():
        terms = compute_reference_terms(call)
    else:
        terms = compute_checkpointed(call)
    return terms.stacked() if with_terms else terms.loss


def _compute_sparse(call: Call, with_terms: bool) -> Tensor:
    """Compute the loss with a sparse teacher, or all its terms stacked."""
    if not is_fused(call.student, call.labels, call.objective):
        if checks.is_readable(call.student):
            check_values(call)
        terms = topk.compute_by_operations(call)
        return terms.stacked() if with_terms else terms.loss
    return topk.compute(call, with_terms)


def _compute_fused(call: Call, with_terms: bool) -> Tensor:
    """Compute a call by the kernels, with class weights as row weights."""
    o, hard = call.objective, None
    if o.class_weight is not None:
        assert call.labels is not None
        weight = o.class_weight[
            call.labels.clamp(0, len(o.class_weight) - 1)
        ] * compute_divisor_ratio(call)
        o = o._replace(class_weight=None)
        if with_terms:  # the hard term that the op returns lacks the class weights
            hard_only = o._replace(hard_weight=weight, soft_weight=0.0)
            with torch.no_grad():
                hard = _compute_fused(call._replace(objective=hard_only, inplace=False), False)
        o = o._replace(hard_weight=o.hard_weight * weight)
    out = dense.compute(call._replace(objective=o), with_terms)
    return out if hard is None else torch.cat((out[:1], hard.unsqueeze(0), out[2:]))


def _compute_in_two_passes(call: Call, with_terms: bool) -> Tensor | None:
    """Compute the divergence, then the cross entropy with probabilities by a second pass.

    The second pass computes the soft cross entropy with a teacher at temperature 1, whose
    probabilities are the smoothed and weighted labels. Return None if a probability is negative or
    a row of probabilities sums to 0, because the kernels do not accept such probabilities.
    """
    assert call.labels is not None
    labels, o, student = call.labels, call.objective, call.student.to(call.dtype)
    target, indices = labels.to(call.dtype), None
    if not labels.is_floating_point():
        indices = labels  # class indices also mask rows
        classes = labels.clamp(0, student.shape[-1] - 1).unsqueeze(-1)
        target = torch.zeros_like(student).scatter_(-1, classes, 1.0)
    if o.label_smoothing:
        target = (1 - o.label_smoothing) * target + o.label_smoothing / student.shape[-1]
    if o.class_weight is not None:
        target = target * o.class_weight
    total = target.sum(-1)
    if target.numel() and not bool((target.amin() >= 0) & (total > 0).all()):
        return None
    total = total * compute_divisor_ratio(call)
    o = o._replace(hard_weight=0.0, class_weight=None, label_smoothing=0.0)
    # The student was converted to float32 or float64. So autograd adds the gradients of both passes
    # and then rounds the sum to the dtype of the logits.
    divergence = call._replace(student=student, labels=indices, objective=o)
    out = dense.compute(divergence, with_terms)

    def compute_hard(weight: float | Tensor) -> Tensor:
        objective = o._replace(
            temperature=1.0,
            teacher_temperature=1.0,
            soft_weight=weight * total,
            divergence="soft_cross_entropy",
            mix=None,
            teacher_form="probs",
            teacher_weights=None,
            ensemble="probs",
        )
        return dense.compute(divergence._replace(teachers=(target,), objective=objective), False)

    weight = call.objective.hard_weight
    if not with_terms:
        return out + compute_hard(weight)
    with torch.no_grad():
        hard_only = compute_hard(1.0)
    return torch.cat((out[:1] + compute_hard(weight), hard_only.unsqueeze(0), out[2:]))


def compute_statistics(call: Call) -> tuple[Tensor, Tensor]:
    """Return each row's divergence, and the statistics for its gradient (csrc/kernels.h: Stat)."""
    assert call.objective.reduction == "none"
    terms, stats = _loss_into(None, call.student, *dense.make_arguments(call, True), True)
    return terms[reference.Terms._fields.index("soft")], stats


def write_gradient_(call: Call, stats: Tensor) -> None:
    """Write the gradient over the student's logits, from ``stats`` (csrc/kernels.h: Stat)."""
    arguments = dense.make_arguments(call, False)
    _loss_backward_(call.student, stats.new_ones(()), stats, call.student, *arguments, False)


def _warn_once(device_type: str) -> None:
    """Warn, once for each type of device, that this build has no kernels for it."""
    if device_type in _warned:
        return
    _warned.add(device_type)
    remedy = (
        "install fastkd where nvcc and a CUDA build of torch are found"
        if device_type == "cuda"
        else "move the logits to a CPU or CUDA device"
    )
    warnings.warn(
        f"this build of fastkd has no {device_type} kernels: plain PyTorch operations are used "
        f"instead, which are slower and take more memory. To get the kernels, {remedy}.",
        RuntimeWarning,
        stacklevel=5,
    )
