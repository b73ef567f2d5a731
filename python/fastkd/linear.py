"""Distillation from hidden states: two linear heads and the loss, without keeping their logits."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import checks, heads, losses, ops, products, reference
from fastkd.chunks import AccumulateDtype, plan
from fastkd.heads import Call, Inputs
from fastkd.objective import Objective

Pair = float | tuple[float | None, float | None] | None
"""A number for both heads, or one for the student's and one for the teacher's."""


def linear_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: float | Tensor = 2.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | None = None,
    hard_weight: float | Tensor | None = None,
    soft_weight: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
    mix: float | None = None,
    standardize: bool = False,
    softcap: Pair = None,
    logit_scale: Pair = None,
    chunk_size: int | Literal["auto"] = "auto",
    max_workspace: int | None = None,
    accumulate_dtype: AccumulateDtype = "auto",
    teacher_grad: Literal["error", "ignore"] = "error",
) -> Tensor:
    """:func:`fastkd.loss` of two linear heads, whose logits exist for some rows at a time.

    ::

        student_logits = student_hidden @ student_weight.T + student_bias
        teacher_logits = teacher_hidden @ teacher_weight.T + teacher_bias
        loss = fastkd.loss(student_logits, teacher_logits, labels, ...)

    The gradients of ``student_hidden``, ``student_weight`` and ``student_bias`` are computed along
    with the loss, chunk by chunk; what does not require grad costs nothing. Rows whose label is
    ``ignore_index`` take part in no matrix product: counting the others waits for a GPU, once a
    call (not while a CUDA graph is captured; all rows are computed then, and ignored ones must be
    finite). Without labels nothing is waited for.

    Args:
        student_hidden: ``(..., D)`` float64, float32, bfloat16 or float16.
        student_weight: ``(C, D)`` of the same dtype. Under autocast both are cast, and the gradient
            of the weight is summed in its own dtype.
        teacher_hidden: ``(..., E)``; E need not be D. Gets no gradient.
        teacher_weight: ``(C, E)`` of its dtype. Gets no gradient, whether it requires one or not;
            ``student_weight`` itself will do.
        labels: as in :func:`fastkd.loss`, ``(...)`` class indices or ``(..., C)`` probabilities.
        student_bias: ``(C,)``.
        teacher_bias: ``(C,)``.
        teacher_logits: ``(..., C)``, in place of ``teacher_hidden`` and ``teacher_weight``.
        temperature: as in :func:`fastkd.loss`, like all options down to ``standardize``; here none
            of them gets a gradient. Numbers for each row have the shape ``(...)``.
        teacher_temperature: the teacher's own.
        alpha: weight of the **hard** term.
        hard_weight: given instead of ``alpha``.
        soft_weight: given instead of ``alpha``.
        ignore_index: the label of rows that are left out.
        reduction: ``"none"`` gives ``(...)``, and its backward pass computes the logits again.
        label_smoothing: of the hard term.
        class_weight: ``(C,)``, of the hard term.
        normalizer: what ``"mean"`` divides by instead of the number of rows that are not ignored.
        divergence: one of :func:`fastkd.divergences`. What has no kernel is differentiated by
            PyTorch, chunk by chunk.
        mix: the mixture weight of the divergences that have one.
        standardize: whether each row of logits is standardized first.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2). A number for both, or
            a pair ``(student's, teacher's)`` of which either may be None. It does not apply to
            ``teacher_logits``.
        logit_scale: logits are multiplied by it, before the soft cap (Cohere). As ``softcap``.
        chunk_size: rows of a chunk. ``"auto"`` leaves it to :func:`fastkd.chunks.plan`, which
            ``max_workspace`` bounds.
        max_workspace: bytes that may be in use at a time beyond the inputs, gradients included.
        accumulate_dtype: what the gradient of the weight is summed in over chunks. ``"auto"`` is
            float32 for 16-bit weights; the weight's own dtype takes half of that memory, and rounds
            once more for each chunk (docs/linear.md has the errors).
        teacher_grad: what to do if ``teacher_hidden`` or ``teacher_logits`` requires grad:
            ``"error"`` or ``"ignore"``.

    Returns:
        As :func:`fastkd.loss`. Second derivatives, function transforms (``torch.func``) and devices
        without kernels are right too, but keep all logits.

    Raises:
        TypeError, ValueError: for arguments that are not as above, before anything is computed.

    Example:
        >>> import torch, fastkd
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.nn.Linear(8, 50)
        >>> teacher_hidden, teacher_weight = torch.randn(6, 16), torch.randn(50, 16)
        >>> labels = torch.tensor([3, 1, -100, 4, 1, 5])
        >>> loss = fastkd.linear_loss(
        ...     hidden, head.weight, teacher_hidden, teacher_weight, labels, student_bias=head.bias
        ... )
        >>> loss.backward()
        >>> head.weight.grad.shape, hidden.grad[2].abs().sum()
        (torch.Size([50, 8]), tensor(0.))
    """
    return _linear_loss(**locals())


class LinearKDLoss(nn.Module):
    """:func:`fastkd.linear_loss` as a module.

    Options are those of :func:`fastkd.linear_loss`, checked when they are used. ``forward`` takes
    the tensors: ``(student_hidden, student_weight, teacher_hidden=None, teacher_weight=None,
    labels=None, *, student_bias=None, teacher_bias=None, teacher_logits=None)``. It owns none of
    them, so a weight that is tied to an embedding, or sharded and gathered by the module that owns
    it, gets its gradient as from any other layer.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.LinearKDLoss(temperature=4.0, alpha=0.1, softcap=30.0)
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> criterion(hidden, weight, hidden, weight, torch.tensor([0, 2]))
        tensor(0.1099)
    """

    def __init__(self, **options: Any) -> None:
        """Keeps the options."""
        super().__init__()
        accepted = inspect.signature(linear_loss).parameters
        for name in options:
            if name not in accepted or name in _TENSORS:
                listed = ", ".join(sorted(accepted.keys() - _TENSORS))
                raise TypeError(f"LinearKDLoss has no option {name!r}; it has {listed}")
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        **tensors: Tensor | None,
    ) -> Tensor:
        """The loss of :func:`fastkd.linear_loss`; without labels, the soft term alone."""
        options = {**self.options, **({} if labels is not None else losses.HARD)}
        return linear_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            **tensors,  # type: ignore[arg-type]
            **options,
        )

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# The arguments of linear_loss that LinearKDLoss.forward takes.
_TENSORS = {
    *("student_hidden", "student_weight", "student_bias", "labels"),
    *("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits"),
}


# ---- what a call means


def _linear_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    softcap: Pair,
    logit_scale: Pair,
    chunk_size: int | Literal["auto"],
    max_workspace: int | None,
    accumulate_dtype: AccumulateDtype,
    teacher_grad: str,
    **options: Any,
) -> Tensor:
    """Checks the arguments, plans the chunks, and runs."""
    _check_head("student", student_hidden, student_weight, student_bias)
    classes, lead = student_weight.shape[0], student_hidden.shape[:-1]
    given = (teacher_hidden, teacher_weight, teacher_bias, teacher_logits)
    _check_teacher(*given, lead, student_weight)
    outputs = teacher_hidden if teacher_logits is None else teacher_logits
    assert outputs is not None
    if outputs.requires_grad and not checks.one_of("teacher_grad", teacher_grad, _TEACHER_GRADS):
        raise ValueError(
            f"{'teacher_logits' if outputs is teacher_logits else 'teacher_hidden'} requires grad, "
            "but the loss gives the teacher none: compute it under torch.no_grad(), .detach() it, "
            'or pass teacher_grad="ignore"'
        )
    dtype, teacher_dtype = _compute_dtypes(student_hidden, outputs, teacher_logits is not None)
    if accumulate_dtype not in ("auto", torch.float32, student_weight.dtype):
        raise ValueError(
            f"accumulate_dtype must be 'auto', torch.float32 or the student_weight's dtype, "
            f"{student_weight.dtype}; got {accumulate_dtype!r}"
        )
    inputs, core = _resolve(
        options,
        Inputs(
            student_hidden,
            student_weight,
            student_bias,
            *(None if value is None else value.detach() for value in given),
            labels,
            *(None,) * 7,  # type: ignore[call-arg]
        ),
        (dtype, teacher_dtype),
    )
    student_cap, teacher_cap = _pair("softcap", softcap)
    student_scale, teacher_scale = _pair("logit_scale", logit_scale)
    tracked = torch.is_grad_enabled()
    wants = [tracked and t is not None and t.requires_grad for t in inputs[:3]]
    chosen = plan(
        inputs.hidden.shape[0],
        classes,
        student_weight.shape[1],
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        weight_dtype=student_weight.dtype,
        device=student_hidden.device.type,
        logits_per_row=2.0 + (student_cap is not None and any(wants)),
        other_bytes=sum(
            0 if weight is None or weight.dtype == to else weight.numel() * to.itemsize
            for weight, to in ((student_weight, dtype), (teacher_weight, teacher_dtype))
        ),
        weight_grad=wants[1],
        chunk_size=_chunk_size(chunk_size),
        max_workspace=max_workspace,
        accumulate_dtype=accumulate_dtype,
    )
    call = Call(
        **core,
        student_softcap=student_cap,
        teacher_softcap=teacher_cap,
        student_scale=1.0 if student_scale is None else student_scale,
        teacher_scale=1.0 if teacher_scale is None else teacher_scale,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        accumulate=chosen.accumulate,
        chunk=max(1, chosen.chunk),
        hidden_grad=wants[0],
        weight_grad=wants[1],
        bias_grad=wants[2],
    )
    if ops._is_transformed():
        out = plain(inputs, call)
    elif any(wants):
        out = _LinearLoss.apply(call, *inputs)  # type: ignore[no-untyped-call]
    else:
        out = _compute(inputs, call).loss
    return out.reshape(lead) if call.reduction == "none" else out


def _resolve(
    options: dict[str, Any], inputs: Inputs, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[Inputs, dict[str, Any]]:
    """Rows flattened, and the core's options as tensors of ``Inputs`` and numbers of ``Call``."""
    lead, labels = inputs.hidden.shape[:-1], inputs.labels
    classes = inputs.weight.shape[0]
    # Stand-ins for the logits, without their memory.
    student, teacher = (
        torch.empty((), dtype=dtype, device=inputs.hidden.device).expand(*lead, classes)
        for dtype in dtypes
    )
    given = {**losses.DEFAULTS, **options}
    objective = losses.prepare(student, teacher, labels, given).objective
    if labels is not None and checks.may_look(labels):
        checks.check_rows(student, labels, objective.ignore_index, objective.temperature)
    denominator = None
    if objective.reduction == "mean":
        objective, denominator = _denominators(
            objective, labels, math.prod(lead), heads.acc_dtype(*dtypes), student.device
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
    for name in ("hidden", "teacher_hidden", "teacher_logits"):
        value = getattr(inputs, name)
        if value is not None:
            tensors[name] = value.reshape(math.prod(lead), value.shape[-1])
    if labels is not None:
        soft = labels.is_floating_point()
        tensors["labels"] = labels.reshape(-1, classes) if soft else labels.long().reshape(-1)
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
        weights = objective.class_weight[labels.long().where(valid, 0)].where(valid, 0).sum()
        share = count / weights.where(weights != 0, 1.0)
        objective = objective._replace(hard_weight=objective.hard_weight * share)
    return objective, count


def _check_head(
    owner: str, hidden: object, weight: object, bias: object, like: Tensor | None = None
) -> None:
    """A head's tensors; ``like``: the other head's weight, which has as many classes."""
    names = (f"{owner}_hidden", f"{owner}_weight", f"{owner}_bias")
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if value is None and name == names[2]:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
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


def _check_teacher(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    lead: torch.Size,
    like: Tensor,
) -> None:
    """One of the two ways to give the teacher."""
    if logits is not None:
        if hidden is not None or weight is not None or bias is not None:
            raise ValueError(
                "teacher_logits takes the place of teacher_hidden, teacher_weight and "
                "teacher_bias; got both"
            )
        checks.logits(like.new_empty(()).detach().expand(*lead, like.shape[0]), [logits])
        return
    if hidden is None or weight is None:
        raise ValueError(
            "the teacher needs teacher_hidden and teacher_weight, or teacher_logits; got "
            f"teacher_hidden={_kind(hidden)}, teacher_weight={_kind(weight)}, teacher_logits=None"
        )
    _check_head("teacher", hidden, weight, bias, like)
    if hidden.shape[:-1] != lead:
        raise ValueError(
            "teacher_hidden and student_hidden must have the same rows; got "
            f"{tuple(hidden.shape[:-1])} and {tuple(lead)}"
        )


def _kind(value: object) -> str:
    return "None" if value is None else "a tensor"


def _compute_dtypes(
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


def _pair(name: str, value: object) -> tuple[float | None, float | None]:
    """The student's and the teacher's, from one number or two."""
    pair = value if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a number or a pair (student's, teacher's); got {value!r}")
    student, teacher = (
        None if one is None else checks.number(name, one, 0.0, math.inf, open_low=True)
        for one in pair
    )
    return student, teacher


def _chunk_size(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'chunk_size must be a positive number of rows or "auto"; got {value!r}')
    return value


# ---- derivatives


def _compute(inputs: Inputs, call: Call) -> heads.Outputs:
    """The loop, or, in a compiled graph, the op that stands for it."""
    return (heads.compiled if torch.compiler.is_compiling() else heads.run)(inputs, call)


def plain(inputs: Inputs, call: Call) -> Tensor:
    """The same by differentiable operations on all rows at once: for second derivatives and
    function transforms."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        hidden, teacher_hidden = inputs.hidden, inputs.teacher_hidden
        if inputs.labels is not None:  # an ignored row may hold anything
            ignored = (inputs.labels == call.ignore_index).unsqueeze(1)
            hidden = hidden.masked_fill(ignored, 0)
        student = _plain_logits(
            hidden, inputs.weight, inputs.bias, call.dtype, call.student_scale, call.student_softcap
        )
        teacher = inputs.teacher_logits
        if teacher_hidden is not None:
            assert inputs.teacher_weight is not None
            teacher = _plain_logits(
                teacher_hidden,
                inputs.teacher_weight,
                inputs.teacher_bias,
                call.teacher_dtype,
                call.teacher_scale,
                call.teacher_softcap,
            )
        assert teacher is not None
        objective = heads.objective_of(inputs, call)
        return reference.loss(student, teacher, inputs.labels, **objective._asdict())


def _plain_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    cap: float | None,
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), bias) * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _LinearLoss(torch.autograd.Function):
    """The loop, whose forward pass has made the gradients already unless the reduction is
    "none"."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor | None) -> Any:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        later = call.reduction == "none"
        now = call._replace(hidden_grad=False, weight_grad=False, bias_grad=False)
        out, *grads = _compute(inputs, now if later else call)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        # Not saved like the others: backward scales them in place and gives them away.
        ctx.grads = None if later else tuple(grads)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        call, inputs = ctx.call, Inputs(*ctx.saved_tensors)
        if torch.is_grad_enabled():  # create_graph=True: this will be differentiated in turn
            return (None, *_differentiable(inputs, call, grad_output), *[None] * len(inputs[3:]))
        scale: Tensor | None = grad_output
        if call.reduction == "none":
            inputs = inputs._replace(grad_rows=grad_output.contiguous())
            _, *grads = _compute(inputs, call._replace(reduction="sum"))
            scale = None
        else:
            grads = ctx.grads
            if not torch.compiler.is_compiling():
                ctx.grads = None
            if grads is None:  # retain_graph=True: the first call gave them away
                _, *grads = _compute(inputs, call)
            if call.scales_late:
                assert inputs.denominator is not None
                scale = grad_output / inputs.denominator
        wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
        finished = [
            _finished(grad, scale, of.dtype) if want and of is not None else None
            for grad, of, want in zip(grads, inputs, wanted, strict=False)
        ]
        return (None, *finished, *[None] * len(inputs[3:]))


def _finished(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * grad in ``dtype``; ``grad`` is not used again."""
    if scale is None:
        return grad.to(dtype)
    if torch.compiler.is_compiling():
        return (grad * scale).to(dtype)
    if grad.dtype == dtype:
        return ops.scale_(grad, scale)
    return products.finished(grad, scale, dtype)


def _differentiable(inputs: Inputs, call: Call, grad_output: Tensor) -> list[Tensor | None]:
    """The gradients of hidden states, weight and bias, differentiable in turn."""
    wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
    of = [t for t, want in zip(inputs, wanted, strict=False) if want and t is not None]
    grads = iter(torch.autograd.grad(plain(inputs, call), of, grad_output, create_graph=True))
    return [next(grads) if want else None for want in wanted]


_TEACHER_GRADS = ("error", "ignore")
