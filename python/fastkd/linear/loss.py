"""Compute the loss of a Head student in chunks of logits, and differentiate the loss."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastkd._core import autograd, dense, dispatch, shapes
from fastkd._core.arguments import Teacher, find_teacher_rows, shift_labels
from fastkd._core.objective import PER_ROW_OPTIONS, Options
from fastkd._core.values import Head, Routed, check_head
from fastkd.linear import chunks, class_loop, products, row_loop
from fastkd.linear.arguments import prepare_heads
from fastkd.linear.call import (
    Inputs,
    LinearCall,
    Outputs,
    allocate_outputs,
    compute_power,
    find_counted_rows,
    is_mean_division_deferred,
    make_call,
    make_heads,
    make_objective,
)
from fastkd.validation import to_int64


def compute(
    student: Head, teacher: Teacher, labels: Tensor | None, options: Options, with_terms: bool
) -> Tensor:
    """Check the arguments, plan the chunks, and compute the loss, or all terms stacked."""
    inputs, call = prepare_heads(student, teacher, labels, options, with_terms)
    plan = chunks.choose_plan(options.chunks, inputs, call)
    call = call._replace(
        accumulate=plan.accumulate,
        chunk=max(1, plan.chunk),
        by_classes=plan.chunk_by == "classes",
    )
    if autograd.is_transformed():
        out = _compute_by_operations(inputs, call)
    elif call.has_grads and not autograd.is_traced():  # a traced op has its own autograd kernel
        out = _LinearLoss.apply(call, *inputs)  # type: ignore[no-untyped-call]
    else:
        out = _compute_in_chunks(inputs, call).loss
    if call.reduction != "none":
        return out
    return out.reshape((*out.shape[:-1], *student.hidden.shape[:-1]))


def compute_routed(
    student: Head, teacher: Routed, labels: Tensor | None, options: Options, with_terms: bool
) -> Tensor:
    """Compute the loss with a Routed teacher by one call for the rows of each teacher."""
    check_head(student, "student")
    lead, device = student.hidden.shape[:-1], student.hidden.device
    rows_of = find_teacher_rows(teacher, lead, device)
    if options.class_weight is not None:
        raise ValueError(
            "class_weight must be None with a Head as student and a Routed teacher; got "
            f"{type(options.class_weight).__name__}"
        )
    for each in teacher.teachers:  # check shapes and labels before the rows are split
        prepare_heads(student, each, labels, options, with_terms)
    logits = student.hidden[..., :1]  # shift_labels() reads only shape and device
    if options.shift:
        _, labels, options = shift_labels(logits, None, labels, options)
    counted = torch.ones(lead, dtype=torch.bool, device=device)
    if labels is not None and not labels.is_floating_point():
        counted = to_int64(labels) != options.ignore_index
    if options.reduction == "mean" and options.normalizer is None:
        options = options._replace(normalizer=counted.sum().clamp(min=1))
    results = []
    for each, rows in zip(teacher.teachers, rows_of, strict=True):

        def select_rows(value: Tensor, trailing: int, rows: Tensor = rows) -> Tensor:
            """Return this teacher's rows of ``value``; ``trailing``: dimensions after the rows."""
            return value.reshape(-1, *value.shape[value.dim() - trailing :])[rows]

        teacher_part: Any = (
            select_rows(each, 1)
            if isinstance(each, Tensor)
            else each._replace(hidden=select_rows(each.hidden, 1))
        )
        per_row = {name: getattr(options, name) for name in PER_ROW_OPTIONS}
        selected: dict[str, Any] = {
            name: select_rows(value, 0)
            for name, value in per_row.items()
            if isinstance(value, Tensor) and value.dim()
        }
        classes = 1 if labels is not None and labels.is_floating_point() else 0
        results.append(
            compute(
                student._replace(hidden=select_rows(student.hidden, 1)),
                teacher_part,
                None if labels is None else select_rows(labels, classes),
                options._replace(**selected),
                with_terms,
            )
        )
    if options.reduction != "none":
        return torch.stack(results).sum(0)
    order = torch.cat(rows_of).argsort()
    return torch.cat(results, -1)[..., order].reshape(*results[0].shape[:-1], *lead)


def _compute_in_chunks(inputs: Inputs, call: LinearCall) -> Outputs:
    """Run the loop over chunks; while operations are traced, call the op ``linear_loss``."""
    if autograd.is_traced():
        return Outputs(*torch.ops.fastkd.linear_loss(list(inputs), *call))
    return _run(inputs, call)


def _run(inputs: Inputs, call: LinearCall) -> Outputs:
    """Compute the loss, and its gradients for a grad_output of 1 or of ``inputs.grad_rows``.

    If ``is_mean_division_deferred()``, the caller must divide the gradients by the denominator.
    """
    with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):
        counted = find_counted_rows(inputs.labels, call.ignore_index)
        rows = inputs.hidden.shape[0] if counted is None else counted.numel()
        if rows == 0:
            return Outputs(*(value.zero_() for value in allocate_outputs(inputs, call)))
        power, factors = None, inputs.grad_rows
        if factors is not None:
            power = compute_power(factors if counted is None else factors[counted])
        loop = class_loop.run if call.by_classes else row_loop.run
        out = loop(inputs, call, counted, power)
        if power is not None:
            out.weight.mul_(power)
            out.bias.mul_(power)
        return out


def _compute_by_operations(inputs: Inputs, call: LinearCall) -> Tensor:
    """Compute the loss, or all terms stacked, by differentiable operations on all rows at once."""
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        labels, teacher = inputs.labels, inputs.teacher_logits
        student_head, teacher_head = make_heads(inputs, call)
        if labels is not None and not labels.is_floating_point():
            ignored = (labels == call.ignore_index).unsqueeze(1)  # ignored rows may hold NaN
            student_head = student_head._replace(hidden=inputs.hidden.masked_fill(ignored, 0))
        student = _cast(student_head, call.dtype).logits()
        if teacher_head is not None:
            teacher = _cast(teacher_head, call.teacher_dtype).logits()
        core = make_call(student, teacher, inputs, make_objective(inputs, call), call)
        return dispatch.compute(core, call.with_terms)


def _cast(head: Head, dtype: torch.dtype) -> Head:
    return Head(*(x.to(dtype) if isinstance(x, Tensor) else x for x in head))  # type: ignore[arg-type]


class _LinearLoss(torch.autograd.Function):
    """Compute the loss in chunks, and its gradients in forward unless the reduction is "none"."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, *tensors: Tensor | None) -> Any:
        """Compute the loss, or all terms stacked; ``tensors`` are the fields of ``Inputs``."""
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        in_backward = call.reduction == "none"
        no_grads = call._replace(hidden_grad=False, weight_grad=False, bias_grad=False)
        out, *grads = _compute_in_chunks(inputs, no_grads if in_backward else call)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        # save_for_backward() forbids changes, and backward scales the gradients in place.
        ctx.grads = None if in_backward else tuple(grads)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        call, inputs = ctx.call, Inputs(*ctx.saved_tensors)
        wanted = (call.hidden_grad, call.weight_grad, call.bias_grad)
        others = [None] * len(inputs[3:])
        if call.with_terms:  # only the first term, the loss, has a gradient
            grad_output, call = grad_output[0], call._replace(with_terms=False)
        if autograd.is_formula_needed(grad_output):
            leaves = [t for t, want in zip(inputs, wanted, strict=False) if want and t is not None]
            with torch.enable_grad():
                loss = _compute_by_operations(inputs, call)
                gradients = iter(torch.autograd.grad(loss, leaves, grad_output, create_graph=True))
            return (None, *(next(gradients) if want else None for want in wanted), *others)
        scale: Tensor | None = grad_output
        if call.reduction == "none":
            inputs = inputs._replace(grad_rows=grad_output.contiguous())
            _, *grads = _compute_in_chunks(inputs, call._replace(reduction="sum"))
            scale = None
        else:
            grads = ctx.grads
            if not autograd.is_traced():
                ctx.grads = None
            if grads is None:  # a second backward pass (retain_graph=True)
                _, *grads = _compute_in_chunks(inputs, call)
            if is_mean_division_deferred(call):
                assert inputs.denominator is not None
                divisor = inputs.denominator
                # The divisor may be 0 if every row is ignored; the gradient is then 0.
                scale = grad_output / divisor.where(divisor != 0, 1)
        scaled = [
            _scale_gradient(grad, scale, leaf.dtype) if want and leaf is not None else None
            for grad, leaf, want in zip(grads, inputs, wanted, strict=False)
        ]
        return (None, *scaled, *others)


def _scale_gradient(grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return scale * grad in ``dtype``; ``grad`` may be overwritten."""
    if scale is None:
        return grad.to(dtype)
    if autograd.is_traced():
        return (grad * scale).to(dtype)
    if grad.dtype == dtype:
        return dense.scale_(grad, scale)
    return products.scale_and_round(grad, scale, dtype)


# ---- the op linear_loss, which torch.compile does not trace into

_AUTOGRAD_KEYS = ("AutogradFunctionality", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA")


def _run_op(inputs: list[Tensor | None], *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the loop with autograd, which a chunk's loss needs and the dispatcher turned off."""
    tensors, numbers = Inputs(*inputs), LinearCall(*call)  # type: ignore[arg-type]
    has_teacher = tensors.teacher_logits is not None or tensors.teacher_hidden is not None
    if numbers.chunk < 1 or (numbers.by_classes and not has_teacher):
        raise ValueError(
            "linear_loss needs a chunk of at least 1, and by_classes needs a dense teacher; got "
            f"chunk={numbers.chunk}, by_classes={numbers.by_classes}"
        )
    with contextlib.ExitStack() as stack:
        for name in _AUTOGRAD_KEYS:
            key = getattr(torch._C.DispatchKey, name)
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        return _run(tensors, numbers)


def _run_fake_op(inputs: list[Tensor | None], *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes.check_devices(inputs)
    return allocate_outputs(Inputs(*inputs), LinearCall(*call))  # type: ignore[arg-type]


def _compute_traced(inputs: list[Tensor | None], *arguments: Any) -> tuple[Tensor, ...]:
    """Compute the loss, as the autograd kernel of the op ``linear_loss`` in traced programs."""
    tensors, call = Inputs(*inputs), LinearCall(*arguments)  # type: ignore[arg-type]
    needs_grad = [t is not None and t.requires_grad for t in tensors[:3]]
    if torch.is_grad_enabled() and any(needs_grad):
        hidden, weight, bias = needs_grad
        call = call._replace(hidden_grad=hidden, weight_grad=weight, bias_grad=bias)
        loss = _LinearLoss.apply(call, *tensors)  # type: ignore[no-untyped-call]
        # _LinearLoss returns the gradients to autograd, so the op's other results are empty.
        return (loss, *(loss.new_empty(0) for _ in needs_grad))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastkd.linear_loss(inputs, *arguments)  # type: ignore[no-any-return]


_SCHEMA = (
    "linear_loss(Tensor?[] inputs, float temperature, float? teacher_temperature, "
    "float hard_weight, float soft_weight, int ignore_index, str reduction, "
    "float label_smoothing, str divergence, float? mix, bool standardize, str tail, "
    "str? estimator, float? student_softcap, float? teacher_softcap, float student_scale, "
    "float teacher_scale, ScalarType dtype, ScalarType teacher_dtype, ScalarType accumulate, "
    "SymInt chunk, bool by_classes, bool hidden_grad, bool weight_grad, bool bias_grad, "
    "bool with_terms) "
    "-> (Tensor loss, Tensor hidden, Tensor weight, Tensor bias)"
)
_LIBRARY: Any = torch.library.Library("fastkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("linear_loss", _run_op, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::linear_loss", _run_fake_op, lib=_LIBRARY)
_LIBRARY.impl("linear_loss", _compute_traced, "Autograd")
