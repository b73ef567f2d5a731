"""The loss with a sparse teacher: the log-probabilities of a few classes of each row.

``topk_loss`` runs the fused op where there is a kernel, and :func:`_reference`, plain PyTorch, for
second derivatives, under function transforms and on other devices. docs/maths.md, section 13.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import reference
from fastkd._core import autograd, checks, native, shapes
from fastkd._core.dense import KERNEL_DEVICES
from fastkd._core.fast_path import IMMUTABLE, is_eligible
from fastkd._core.objective import Objective
from fastkd.reference.divergences import weighted

TAILS = ("ghost", "renormalize", "ignore")
# What a row's probabilities may add up to, for rounding: 16-bit log-probabilities are several
# percent off (kMostMass in csrc/topk.h).
_MOST_MASS = 1.1

_topk_loss = torch.ops.fastkd.topk_loss.default


def topk_loss(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: Literal["ghost", "renormalize", "ignore"] = "ghost",
    temperature: float = 1.0,
    alpha: float | None = None,
    hard_weight: float | None = None,
    soft_weight: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Distillation from a teacher's k most probable classes; ``alpha`` weighs the **hard** term.

    ::

        loss = alpha * CE(student, labels) + (1 - alpha) * T^2 * D

    With K the listed classes, p_i = exp(log_probs) the teacher's probabilities and
    q = softmax(student / T) the student's, ``tail`` chooses D:

    - ``"ghost"``: the other classes are one class more, on both sides. D is the forward KL of k + 1
      classes, sum over K of p log(p / q) + p' log(p' / q'), with p' = 1 - sum over K of p, and q'
      the student's probability of everything outside K. So the student learns how much to leave to
      the rest, and not how to divide it. (Model-Optimizer, DistillKit's "symmetric_uniform", and
      TRL's tail bucket.)
    - ``"renormalize"``: both distributions are divided by their sum over K, and D is the forward KL
      of the two. What the student gives to other classes is not looked at. (TRL without tail.)
    - ``"ignore"``: D = sum over K of p log(p / q) as it stands, which may be negative. With
      ``log_probs - log_probs.logsumexp(-1, keepdim=True)`` for ``log_probs`` it is the KL of the
      teacher truncated to K and the student over all classes. (DistillKit's "zero".)

    The objective is that of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
    Network" (2015); T^2 keeps the soft gradients' size independent of T. On the CPU, and on CUDA in
    a build with CUDA kernels, the student is read once and its gradient is written in the same
    pass, and q' is a sum of its own, not what is left of 1. Arithmetic is float32 inside whatever
    the inputs are (float64 if either is). On other devices plain PyTorch operations are used.

    Args:
        student_logits: ``(..., C)`` float64, float32, bfloat16 or float16. Slices such as
            ``logits[:, :-1]`` are used where they are; only non-adjacent classes cost a copy.
        indices: ``(..., k)`` class indices of any integer dtype, in any order, different within a
            row. An entry is padding if its index is negative or its log-probability is -inf; both
            forms are in use, by inference servers and by TRL. Padding lists no class.
        log_probs: ``(..., k)``, any of the same dtypes, not necessarily the student's: natural
            logarithms of the teacher's probabilities at the temperature of the loss, such as
            ``torch.log_softmax(teacher / T, -1).topk(k)`` gives. They are taken as they are,
            neither softened nor normalised, and get no gradient.
        labels: ``(...)`` class indices of any integer dtype. None: the soft term alone, with weight
            1.
        tail: what becomes of the classes that are not listed, as above. Default ``"ghost"``.
        temperature: T, from 1e-18 to 1e18. It softens the student, and must be the temperature of
            ``log_probs``, which the loss cannot soften itself since it does not know the other
            classes. Default 1, as in the log-probabilities that inference servers return.
        alpha: weight of the hard term in [0, 1]; the soft term weighs ``1 - alpha``. Default 0.5
            with labels.
        hard_weight: weight of the hard term, given instead of ``alpha``; 1 if only ``soft_weight``
            is given.
        soft_weight: weight of the soft term, given instead of ``alpha``; 1 if only ``hard_weight``
            is given.
        ignore_index: rows with this label count nothing in **both** terms and get a zero gradient;
            their logits and lists may hold anything. Default -100.
        reduction: ``"mean"`` divides both terms by the number of rows that are not ignored (0 if
            there are none); ``"sum"``; ``"none"`` gives one loss for each row, ``(...)``, and its
            backward pass reads the logits again instead of keeping a gradient. Default ``"mean"``.
        label_smoothing: of the hard term, in [0, 1], as :func:`torch.nn.functional.cross_entropy`
            has it; it needs labels.
        normalizer: what ``"mean"`` divides by instead of the number of rows: a positive number, or
            a tensor with one element (never waited for on CUDA). Pass the global token count under
            gradient accumulation.

    Returns:
        A 0-d tensor, or ``(...)`` with ``reduction="none"``, float32 (float64 if the student's
        logits or ``log_probs`` are float64). Listed classes that the student masks (logits of -inf)
        give +inf with a finite gradient, unless the teacher gives them no probability. There is no
        ghost class where no class above -inf is left for it. Where rounding has brought the listed
        probabilities above 1, p' = 0. In both cases ``"ghost"`` adds the sum of q - p over its
        classes, which is 0 otherwise, so that it is never negative. A row with NaN or +inf among
        its logits gives NaN.

    Raises:
        TypeError, ValueError: for arguments that are not as above; the message names the argument,
            what was given, and what is accepted. A label or an index out of range, an index twice
            in a row, and numbers that are no log-probabilities raise on the CPU; on other devices,
            which are never waited for, they make that row's loss and gradient NaN.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(8, 1000, requires_grad=True), torch.randn(8, 1000)
        >>> log_probs, indices = torch.log_softmax(teacher / 2.0, -1).topk(64)
        >>> fastkd.topk_loss(student, indices, log_probs, temperature=2.0).backward()
        >>> student.grad.shape
        torch.Size([8, 1000])
    """
    try:
        if not native.is_dynamo_compiling() and is_eligible(student_logits, log_probs, labels):
            call = _fast_call(
                student_logits, indices, log_probs, labels is not None, tail, temperature, alpha,
                hard_weight, soft_weight, ignore_index, reduction, label_smoothing, normalizer,
            )  # fmt: skip
            if call is not None:
                return call(student_logits, indices, log_probs, labels)
    except RuntimeError:
        pass  # the slow path checks the call, fails likewise, and explains why
    try:
        return _run(
            student_logits, indices, log_probs, labels, tail, temperature, alpha, hard_weight,
            soft_weight, ignore_index, reduction, label_smoothing, normalizer,
        )  # fmt: skip
    except RuntimeError:
        can_look = checks.has_data(student_logits, indices, log_probs, labels)
        if can_look and not torch.compiler.is_compiling() and student_logits.device.type == "cpu":
            labels = None if labels is None else checks.int64(labels)
            checks.check_rows(student_logits, labels, ignore_index, temperature)
            check_list_data(student_logits, indices, log_probs, labels, ignore_index)
        raise


class Settings(NamedTuple):
    """The numbers of a call, in the order of the ops' schemas (csrc/torch/topk.cpp)."""

    temperature: float
    hard_weight: float
    soft_weight: float
    label_smoothing: float
    ignore_index: int
    tail: int
    reduction: int
    normalizer: float


# ---- arguments


def _fast_call(
    student: Tensor, indices: Tensor, log_probs: Tensor, *options: Any
) -> Callable[..., Tensor] | None:
    """Return the op with these options bound (:func:`_prepare`), or None for the slow path."""
    eligible = (
        type(indices) is Tensor
        and indices.dtype is torch.int64
        and not indices.is_nested
        and indices.shape == log_probs.shape
        and indices.shape[:-1] == student.shape[:-1]
        and indices.dim() == student.dim()
        and indices.shape[-1] > 0
        and indices.device == student.device
        and indices.layout is torch.strided
        and log_probs.dtype is shapes.accumulator(student, log_probs)
        and not (torch.is_grad_enabled() and indices.is_inference())
        and IMMUTABLE.issuperset(map(type, options))
    )
    try:
        return _prepare(native.EAGER, *options) if eligible else None
    except TypeError:  # an option of a wrong type, which the slow path reports
        return None


@functools.lru_cache(maxsize=128, typed=True)
def _prepare(_eager: Any, has_labels: bool, *options: Any) -> Callable[..., Tensor] | None:
    """Check the options and bind them to the op; return None if the fast path lacks one of them.

    ``_eager`` is only part of the cache key: autograd in C++ and in Python have different calls.
    """
    settings = _settings(has_labels, *options)
    *_, normalizer = options
    if settings.reduction == shapes.REDUCTIONS.index("none") or normalizer == 0:
        return None
    arguments = (None, None, None, None, None, *settings)
    return autograd.prepare_call("topk_loss", arguments, [0, 1, 2, 3])


def _check_mean(reduction: str) -> None:
    """Raise unless the reduction is "mean", the only one that a normalizer applies to."""
    if reduction != "mean":
        raise ValueError(f'normalizer goes with reduction="mean"; got reduction={reduction!r}')


def _settings(
    has_labels: bool,
    tail: str,
    temperature: float,
    alpha: float | None,
    hard_weight: float | None,
    soft_weight: float | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    normalizer: float | None,
) -> Settings:
    """Check the options, and return them in the form that the op takes."""
    hard, soft = checks.weights(alpha, hard_weight, soft_weight, has_labels)
    if isinstance(hard, Tensor) or isinstance(soft, Tensor):
        name = "hard_weight" if isinstance(hard, Tensor) else "soft_weight"
        raise TypeError(f"{name} must be a number; got Tensor")
    reduction_index = checks.one_of("reduction", reduction, shapes.REDUCTIONS)
    if normalizer is not None:
        _check_mean(reduction)
        normalizer = checks.check_divisor(normalizer)
    checks.ignored_label(ignore_index)
    return Settings(
        checks.scalar_temperature("temperature", temperature),
        hard,
        soft,
        checks.smoothing(label_smoothing, has_labels),
        ignore_index,
        checks.one_of("tail", tail, TAILS),
        reduction_index,
        normalizer or 0.0,
    )


def check_lists(indices: object, log_probs: object, student: Tensor, prefix: str = "") -> None:
    """Check that both tensors have k entries for each row of logits; ``prefix``: of their names."""
    names = (f"{prefix}indices", f"{prefix}log_probs")
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"{names[0]} must be a tensor of class indices; got {type(indices).__name__}"
        )
    checks.check_dense(names[0], indices)
    if indices.dtype not in checks.INTEGERS:
        raise TypeError(
            f"{names[0]} must be class indices of an integer dtype; got {indices.dtype}"
        )
    if not isinstance(log_probs, Tensor):
        raise TypeError(f"{names[1]} must be a tensor; got {type(log_probs).__name__}")
    checks.check_dense(names[1], log_probs)
    if log_probs.dtype not in checks.FLOATS:
        raise TypeError(
            f"{names[1]} must be float64, float32, bfloat16 or float16; got {log_probs.dtype}"
        )
    rows = student.shape[:-1]
    for name, value in zip(names, (indices, log_probs), strict=True):
        if value.dim() != student.dim() or value.shape[:-1] != rows or value.shape[-1] == 0:
            raise ValueError(
                f"{name} must have k >= 1 entries for each row of logits, shape "
                f"{(*rows, 'k')} for logits of shape {tuple(student.shape)}; got "
                f"{tuple(value.shape)}".replace("'k'", "k")
            )
        if value.device != student.device:
            raise ValueError(
                f"{name} must be on the logits' device, {student.device}; got {value.device}"
            )
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape; got "
            f"{tuple(indices.shape)} and {tuple(log_probs.shape)}"
        )


def _mark_padding(indices: Tensor, log_probs: Tensor) -> Tensor:
    """Return the class indices, with -1 where the log-probability is -inf."""
    return indices.masked_fill(log_probs == -math.inf, -1)


def _twice(indices: Tensor) -> Tensor:
    """Of each row, a class that it lists twice, or -1."""
    ordered = indices.sort(-1).values
    if ordered.shape[-1] == 1:
        return torch.full_like(ordered[..., 0], -1)
    again, minus_one = ordered[..., 1:], torch.full_like(ordered[..., 1:], -1)
    return again.where((again >= 0) & (again == ordered[..., :-1]), minus_one).amax(-1)


def _mass(indices: Tensor, log_probs: Tensor) -> Tensor:
    """The teacher's probability of a row's list."""
    return log_probs.exp().masked_fill(indices < 0, 0).sum(-1)


def check_list_data(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    prefix: str = "",
) -> None:
    """Raise for the first row with an invalid list; name the row."""
    counts = torch.ones_like(indices[..., 0], dtype=torch.bool)
    if labels is not None:
        counts = labels != ignore_index
    classes, k = student.shape[-1], indices.shape[-1]
    lists = (torch.split(x.reshape(-1, k), 1 + 2**14 // k) for x in (indices, log_probs))
    blocks = []  # of a few rows, since their numbers are copied
    for some, logs in zip(*lists, strict=True):
        some = _mark_padding(checks.int64(some), logs)
        blocks.append((some.amax(-1), _twice(some), _mass(some, logs.double())))
    greatest, twice, mass = (torch.cat(x).view(counts.shape) for x in zip(*blocks, strict=True))
    checks.refuse(
        counts & (greatest >= classes),
        greatest,
        f"{prefix}indices must be in [0, {classes}), or negative where there is nothing",
    )
    checks.refuse(counts & (twice >= 0), twice, f"{prefix}indices must not list a class twice")
    checks.refuse(
        counts & ~(mass <= _MOST_MASS),
        mass,
        f"{prefix}log_probs must be logarithms of probabilities, which add up to at most 1 "
        f"({_MOST_MASS} with rounding)",
    )


def _run(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    tail: str,
    temperature: float,
    alpha: float | None,
    hard_weight: float | None,
    soft_weight: float | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Check the arguments, but not the numbers in the lists, and run the op."""
    checks.logits(student, [student])
    check_lists(indices, log_probs, student)
    if log_probs.requires_grad:
        raise ValueError(
            "log_probs requires grad, but the loss gives the teacher none: compute it under "
            "torch.no_grad(), or .detach() it"
        )
    if labels is not None:
        if checks.targets(labels, student):
            raise TypeError(f"labels must be class indices of an integer dtype; got {labels.dtype}")
        labels = checks.savable(checks.int64(labels))
    acc = shapes.accumulator(student, log_probs)
    denominator = None
    if isinstance(normalizer, Tensor):
        checks.constant("normalizer", normalizer)
        normalizer = checks.normalizer(normalizer)
    number = None if isinstance(normalizer, Tensor) else normalizer
    settings = _settings(
        labels is not None, tail, temperature, alpha, hard_weight, soft_weight, ignore_index,
        reduction, label_smoothing, number,
    )  # fmt: skip
    if normalizer is not None:
        _check_mean(reduction)
        normalizer = checks.check_nonzero(normalizer, labels, ignore_index)
    if isinstance(normalizer, Tensor):
        denominator = normalizer.to(device=student.device, dtype=acc)
    lists = checks.savable(indices.long()), checks.savable(log_probs.to(acc))
    out = _apply(student, *lists, labels, denominator, settings)
    if reduction == "none" and student.dim() != 2:
        out = out.reshape(student.shape[:-1])
    return out


def is_fused(student: Tensor) -> bool:
    """Return True if there is a kernel for a call."""
    return student.device.type in KERNEL_DEVICES and not autograd.is_transformed()


def compute(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    objective: Objective,
    tail: str,
) -> Tensor:
    """The loss of checked rows, ``(rows, C)``; the objective's normalizer is a tensor or None."""
    settings = Settings(
        objective.temperature,  # type: ignore[arg-type]
        objective.hard_weight,  # type: ignore[arg-type]
        objective.soft_weight,  # type: ignore[arg-type]
        objective.label_smoothing,
        objective.ignore_index,
        TAILS.index(tail),
        shapes.REDUCTIONS.index(objective.reduction),
        0.0,
    )
    denominator = objective.normalizer
    assert denominator is None or isinstance(denominator, Tensor)
    acc = shapes.accumulator(student, log_probs)
    return _apply(student, indices.long(), log_probs.to(acc), labels, denominator, settings)


def _apply(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Run the op, or the formula where there is no kernel, on checked arguments."""
    arguments = (student, indices, log_probs, labels, denominator)
    if not is_fused(student):
        return _reference(*arguments, settings)
    return _topk_loss(*arguments, *settings)  # type: ignore[no-any-return]


# ---- shapes for tracing, and derivatives


def _fake_out(student: Tensor, log_probs: Tensor, reduction: int) -> Tensor:
    per_row = shapes.REDUCTIONS[reduction] == "none"
    shape = [student.numel() // student.shape[-1]] if per_row else []
    return student.new_empty(shape, dtype=torch.promote_types(log_probs.dtype, torch.float32))


@torch.library.register_fake("fastkd::topk_loss")  # type: ignore[untyped-decorator]
def _(student: Tensor, indices: Tensor, log_probs: Tensor, *arguments: Any) -> Tensor:
    shapes.check_devices(student, indices, log_probs, *arguments)
    return _fake_out(student, log_probs, arguments[-2])


@torch.library.register_fake("fastkd::topk_loss_into")  # type: ignore[untyped-decorator]
def _(grad: Tensor, student: Tensor, indices: Tensor, log_probs: Tensor, *arguments: Any) -> Tensor:
    shapes.check_devices(grad, student, indices, log_probs, *arguments)
    return _fake_out(student, log_probs, arguments[-2])


@torch.library.register_fake("fastkd::topk_loss_backward_")  # type: ignore[untyped-decorator]
def _(grad: Tensor, *arguments: Any) -> None:
    shapes.check_devices(grad, *arguments)


def _gradient(grad_output: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    """Compute grad_output times the gradient by differentiable operations."""
    indices, log_probs, labels, denominator = arguments[:4]
    settings = Settings(*arguments[4:])
    with torch.enable_grad():
        leaf = student if student.requires_grad else student.detach().requires_grad_()
        out = _reference(leaf, indices, log_probs, labels, denominator, settings)
        (gradient,) = torch.autograd.grad(out, leaf, grad_output, create_graph=True)
    return gradient


autograd.register("topk_loss", strided=False, gradient=_gradient)


# ---- the formula


def _log_sum(log_q: Tensor, present: Tensor) -> Tensor:
    """log of the sum of exp(log_q) where ``present``; -inf, with no gradient, for an empty sum."""
    present = present & (log_q > -math.inf)
    none = ~present.any(-1, keepdim=True)
    kept = log_q.masked_fill(~present, -math.inf).masked_fill(none, 0)
    return kept.logsumexp(-1).masked_fill(none.squeeze(-1), -math.inf)


def _log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log_p - log_q), 0 where p is; inf where q is 0, and p has underflowed but is not."""
    absent = p == 0
    ratio = p * (log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0))
    return ratio.masked_fill(absent & (log_p > -math.inf) & (log_q == -math.inf), math.inf)


def _divergence(log_q: Tensor, indices: Tensor, log_probs: Tensor, tail: str) -> Tensor:
    """D of each row of student log-probabilities, by its definition."""
    listed = indices >= 0
    log_p = log_probs.masked_fill(~listed, -math.inf)
    log_q_listed = log_q.gather(-1, indices.clamp(0, log_q.shape[-1] - 1))
    mass = log_p.exp().sum(-1)
    if tail == "renormalize":
        total = _log_sum(log_q_listed, listed).unsqueeze(-1)
        log_q_listed = log_q_listed - total.masked_fill(total == -math.inf, 0)
        log_p = log_p - mass.log().unsqueeze(-1).masked_fill(mass.unsqueeze(-1) == 0, 0)
    p = log_p.exp()
    value = _log_ratio(p, log_p, log_q_listed).sum(-1)
    if tail != "ghost":
        return value
    # One place more than there are classes, for what is none.
    places = indices.masked_fill(~listed, log_q.shape[-1]).clamp(max=log_q.shape[-1])
    others = torch.ones((*log_q.shape[:-1], log_q.shape[-1] + 1), device=log_q.device).bool()
    others = others.scatter(-1, places, False)[..., :-1]
    log_rest = _log_sum(log_q, others)
    rest = (1 - mass).clamp(min=0).masked_fill(log_rest == -math.inf, 0)
    value = value + _log_ratio(rest, rest.log(), log_rest)
    # Where p adds up to 1, as it should, this adds nothing.
    q = log_q_listed.exp().masked_fill(~listed, 0).sum(-1) + log_rest.exp()
    return value + q - (mass + rest)


def _reference(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    denominator: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Compute the loss by differentiable PyTorch operations."""
    student = student_logits.to(log_probs.dtype)
    indices = _mark_padding(indices, log_probs)
    valid = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if labels is not None:
        valid = labels != settings.ignore_index
        # Masked rows are taken out before anything is computed, so that a NaN in them stays out.
        student = student.where(valid.unsqueeze(-1), torch.zeros_like(student))
        indices = indices.where(valid.unsqueeze(-1), torch.full_like(indices, -1))
    log_q = F.log_softmax(student / settings.temperature, -1)
    soft = _divergence(log_q, indices, log_probs, TAILS[settings.tail])
    soft_weight = settings.soft_weight * settings.temperature**2
    total = weighted(soft_weight, soft)
    good = (indices < student.shape[-1]).all(-1) & (_twice(indices) < 0)
    if labels is not None:
        in_range = (labels >= 0) & (labels < student.shape[-1])
        index = labels.where(in_range, torch.zeros_like(labels))
        hard = reference.cross_entropy(student, index, None, settings.label_smoothing)
        total = total + weighted(settings.hard_weight, hard)
        good = good & in_range
    good = good & (_mass(indices, log_probs) <= _MOST_MASS)
    good = (
        good & ~log_q[..., 0].isnan()
    )  # all are, where a logit is NaN or +inf, or none is above -inf
    total = total * torch.ones_like(total).masked_fill(valid & ~good, math.nan)
    total = total.where(valid, torch.zeros_like(total))
    reduction = shapes.REDUCTIONS[settings.reduction]
    if reduction == "none":
        return total.flatten()
    if reduction == "sum":
        return total.sum()
    count: Tensor | float = valid.sum().clamp(min=1)
    if denominator is not None:  # 1 if every row is ignored, since the denominator may then be 0
        count = denominator.where(valid.any(), torch.ones_like(denominator))
    return total.sum() / (settings.normalizer or count)
