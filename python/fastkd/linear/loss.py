"""Distillation from hidden states: two linear heads and the loss, without keeping their logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd import losses
from fastkd._core import autograd, checks, topk
from fastkd._core.module import OptionsModule
from fastkd._core.objective import TEACHER_GRADS, resolve
from fastkd.linear import arguments as head_arguments
from fastkd.linear import autograd as head_gradients
from fastkd.linear import class_loop, row_loop
from fastkd.linear.chunks import AccumulateDtype, ChunkBy, check_accumulate_dtype, plan
from fastkd.linear.row_loop import Call, Inputs

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
    topk_indices: Tensor | None = None,
    topk_log_probs: Tensor | None = None,
    tail: Literal["ghost", "renormalize", "ignore"] = "ghost",
    temperature: float | Tensor | None = None,
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
    chunk_by: ChunkBy = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    max_workspace: int | None = None,
    accumulate_dtype: AccumulateDtype = "auto",
    teacher_grad: Literal["error", "ignore"] = "error",
) -> Tensor:
    """:func:`fastkd.loss` of two linear heads, whose logits exist in part at a time.

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
        topk_indices: ``(..., k)`` classes that a sparse teacher lists, in place of the others: the
            loss is :func:`fastkd.topk_loss`, with its options (``temperature`` and weights are
            numbers, ``labels`` class indices, and ``divergence`` is ``"forward_kl"``).
        topk_log_probs: ``(..., k)`` of any dtype of logits: log-probabilities of these classes at
            the temperature of the loss, taken as they are.
        tail: what becomes of the classes that are not listed, as in :func:`fastkd.topk_loss`.
        temperature: as in :func:`fastkd.loss`, like all options down to ``standardize``; here none
            of them gets a gradient. Numbers for each row have the shape ``(...)``. Default 2; with
            ``topk_log_probs``, the temperature at which they were taken, default 1.
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
            PyTorch, in smaller chunks, since that takes many buffers of a chunk's size.
        mix: the mixture weight of the divergences that have one.
        standardize: whether each row of logits is standardized first.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2). A number for both, or
            a pair ``(student's, teacher's)`` of which either may be None. It applies to no
            teacher but one that is a head: of any other the pair has None.
        logit_scale: logits are multiplied by it, before the soft cap (Cohere). As ``softcap``.
        chunk_by: what of the logits exists at a time: some ``"rows"``, or some ``"classes"`` of all
            rows, which takes the least memory, computes the logits twice, and does not have
            everything (docs/linear.md): of divergences ``"forward_kl"``, ``"reverse_kl"`` and
            ``"soft_cross_entropy"``. ``"auto"``: classes where ``max_workspace`` leaves room for a
            few rows only, if they have what the call needs.
        chunk_size: rows of a chunk, or most classes with ``chunk_by="classes"``. ``"auto"`` leaves
            it to :func:`fastkd.chunks.plan`, which ``max_workspace`` bounds.
        max_workspace: bytes that may be in use at a time beyond the inputs, gradients included.
        accumulate_dtype: what the gradient of the weight is summed in over chunks. ``"auto"`` is
            float32 for 16-bit weights; torch.bfloat16, for weights that are, takes half of that
            memory and rounds once for each chunk (docs/linear.md has the errors).
        teacher_grad: what to do if ``teacher_hidden``, ``teacher_logits`` or ``topk_log_probs``
            requires grad: ``"error"`` or ``"ignore"``.

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
    return _linear_loss(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias,
        teacher_bias, teacher_logits, topk_indices, topk_log_probs, tail, softcap, logit_scale,
        chunk_by, chunk_size, max_workspace, accumulate_dtype, teacher_grad,
        temperature=temperature, teacher_temperature=teacher_temperature, alpha=alpha,
        hard_weight=hard_weight, soft_weight=soft_weight, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing, class_weight=class_weight,
        normalizer=normalizer, divergence=divergence, mix=mix, standardize=standardize,
    )  # fmt: skip


class LinearKDLoss(OptionsModule):
    """:func:`fastkd.linear_loss` as a module.

    Options are those of :func:`fastkd.linear_loss`, checked when the module is made, as far as they
    can be without the tensors. ``forward`` takes these: ``(student_hidden, student_weight,
    teacher_hidden=None, teacher_weight=None, labels=None, *, student_bias=None, teacher_bias=None,
    teacher_logits=None, topk_indices=None, topk_log_probs=None)``. It owns none of them, so a
    weight that is tied to an embedding, or sharded and gathered by the module that owns it, gets
    its gradient as from any other layer. Options are kept as those of :class:`fastkd.KDLoss` are.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.LinearKDLoss(temperature=4.0, alpha=0.1, softcap=30.0)
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> criterion(hidden, weight, hidden, weight, torch.tensor([0, 2]))
        tensor(0.1099)
    """

    def __init__(self, **options: Any) -> None:
        """Keeps the options, having checked them."""
        super().__init__(options)

    @staticmethod
    def default_options() -> Mapping[str, Any]:
        """Those of :func:`fastkd.linear_loss`."""
        return _DEFAULTS

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises as :func:`fastkd.linear_loss` does, as far as it can without tensors."""
        for name in options:
            if name not in _DEFAULTS:
                listed = ", ".join(sorted(_DEFAULTS))
                raise TypeError(f"LinearKDLoss has no option {name!r}; it has {listed}")
        shared = {**losses.DEFAULTS, **{k: v for k, v in options.items() if k in losses.DEFAULTS}}
        if shared["temperature"] is None:  # a valid default: linear_loss chooses it by the teacher
            shared["temperature"] = losses.DEFAULTS["temperature"]
        resolve(shared, has_labels=True, teachers=None)
        head_arguments.check_numbers(options)

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


# The arguments of linear_loss that LinearKDLoss.forward takes.
_TENSORS = {
    *("student_hidden", "student_weight", "student_bias", "labels"),
    *("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits"),
    *("topk_indices", "topk_log_probs"),
}
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_loss).parameters.items()
    if name not in _TENSORS
}


# ---- what a call means


def _estimate_rows(hidden: Tensor) -> int:
    """Return the number of rows, or an estimate if a trace does not know it.

    After a boolean mask, the number of rows depends on the data.
    """
    rows = hidden.shape[0]
    if not autograd.is_traced():
        return rows
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return rows if statically_known_true(rows > 0) else _TYPICAL_ROWS


_TYPICAL_ROWS = 4096  # sets the size of chunks only


def _linear_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    topk_indices: Tensor | None,
    topk_log_probs: Tensor | None,
    tail: str,
    softcap: Pair,
    logit_scale: Pair,
    chunk_by: ChunkBy,
    chunk_size: int | Literal["auto"],
    max_workspace: int | None,
    accumulate_dtype: AccumulateDtype,
    teacher_grad: str,
    **options: Any,
) -> Tensor:
    """Check the arguments, plan the chunks, and compute the loss."""
    head_arguments.check_head("student", student_hidden, student_weight, student_bias)
    classes, lead = student_weight.shape[0], student_hidden.shape[:-1]
    lists = (topk_indices, topk_log_probs)
    if options["temperature"] is None:
        options["temperature"] = 2.0 if topk_indices is None else 1.0
    given = (teacher_hidden, teacher_weight, teacher_bias, teacher_logits, *lists)
    head_arguments.check_teacher(*given, lead, student_weight)
    if checks.one_of("tail", tail, topk.TAILS) and topk_indices is None:
        raise ValueError(f"tail belongs to topk_indices; got tail={tail!r} without them")
    name, outputs = head_arguments.outputs_of(teacher_hidden, teacher_logits, topk_log_probs)
    checks.one_of("teacher_grad", teacher_grad, TEACHER_GRADS)
    if checks.learns(outputs) and teacher_grad == "error":
        raise ValueError(
            f"{name} requires grad, but the loss gives the teacher none: compute it under "
            'torch.no_grad(), .detach() it, or pass teacher_grad="ignore"'
        )
    dtype, teacher_dtype = head_arguments.compute_dtypes(
        student_hidden, outputs, teacher_hidden is None
    )
    check_accumulate_dtype(accumulate_dtype, student_weight.dtype)
    inputs, core = head_arguments.resolve(
        options,
        Inputs(
            checks.savable(student_hidden),
            checks.savable(student_weight),
            None if student_bias is None else checks.savable(student_bias),
            *(None if value is None else checks.savable(value.detach()) for value in given),
            labels,
            *(None,) * 7,  # type: ignore[call-arg]
        ),
        (dtype, teacher_dtype),
    )
    is_head = teacher_hidden is not None
    student_cap, teacher_cap = head_arguments.pair_of("softcap", softcap, is_head)
    student_scale, teacher_scale = head_arguments.pair_of("logit_scale", logit_scale, is_head)
    tracked = torch.is_grad_enabled()
    wants = [tracked and t is not None and t.requires_grad for t in inputs[:3]]
    call = Call(
        **core,
        tail=tail,
        student_softcap=student_cap,
        teacher_softcap=teacher_cap,
        student_scale=1.0 if student_scale is None else student_scale,
        teacher_scale=1.0 if teacher_scale is None else teacher_scale,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        accumulate=student_weight.dtype,
        chunk=1,
        by_classes=False,
        hidden_grad=wants[0],
        weight_grad=wants[1],
        bias_grad=wants[2],
    )
    if autograd.is_transformed():
        out = head_gradients.plain(inputs, call)
        return out.reshape(lead) if call.reduction == "none" else out
    chosen = plan(
        _estimate_rows(inputs.hidden),
        classes,
        student_weight.shape[1],
        dtype=dtype,
        teacher_dtype=teacher_dtype if topk_indices is None else dtype,
        weight_dtype=student_weight.dtype,
        teacher_width=0 if teacher_weight is None else teacher_weight.shape[1],
        device="cuda" if student_hidden.is_cuda else "cpu",
        logits_per_row=row_loop.logits_per_row(inputs, call),
        cast_per_class=head_arguments.cast_per_class(inputs, dtype, teacher_dtype),
        copied_per_row=head_arguments.copied_per_row(inputs, dtype, teacher_dtype),
        weight_grad=wants[1],
        chunk_by=head_arguments.chunk_by(chunk_by, class_loop.missing(inputs, call)),
        chunk_size=chunk_size,
        max_workspace=max_workspace,
        accumulate_dtype=accumulate_dtype,
    )
    call = call._replace(
        accumulate=chosen.accumulate,
        chunk=max(1, chosen.chunk),
        by_classes=chosen.chunk_by == "classes",
    )
    if any(wants) and not autograd.is_traced():  # a traced op has its own autograd kernel
        out = head_gradients.LinearLoss.apply(call, *inputs)  # type: ignore[no-untyped-call]
    else:
        out = head_gradients.compute(inputs, call).loss
    return out.reshape(lead) if call.reduction == "none" else out
