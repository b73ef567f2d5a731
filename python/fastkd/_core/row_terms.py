"""Compute the loss from per-row terms, for options whose gradient the fused op does not return.

These are learned temperatures and weights, and standardized logits: logits whose temperature is the
deviation of their row (docs/maths.md, section 15).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import checks, mixture
from fastkd._core.arguments import Call
from fastkd._core.autograd import is_traced, needs_formula
from fastkd._core.dense import DIVERGENCES, Arguments, by_operations
from fastkd._core.objective import Objective
from fastkd._core.rows import Rows, as_rows
from fastkd._core.shapes import REDUCTIONS, Settings

_loss_into = torch.ops.fastkd.loss_into.default
_empty_gradient = torch.ops.fastkd.empty_gradient.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default

# For each divergence the one with student and teacher swapped, and whether `mix` becomes 1 - mix.
# The gradient of the swapped divergence is that of the teacher's temperature.
_SWAPPED = {
    "forward_kl": ("reverse_kl", False),
    "reverse_kl": ("forward_kl", False),
    "symmetric_kl": ("symmetric_kl", True),
    "jsd": ("jsd", True),
    "skewed_forward_kl": ("skewed_reverse_kl", False),
    "skewed_reverse_kl": ("skewed_forward_kl", False),
    "total_variation": ("total_variation", False),
    "mse": ("mse", False),
    "centered_mse": ("centered_mse", False),
    "cosine": ("cosine", False),
}


def _swapped(settings: Settings) -> Settings:
    """Return the settings with student and teacher swapped."""
    name, other_mix = _SWAPPED[DIVERGENCES[settings.divergence]]
    mix = 1 - settings.mix if other_mix else settings.mix
    return settings._replace(divergence=DIVERGENCES.index(name), mix=mix)


def has(objective: Objective, one: bool) -> bool:
    """Return True if :func:`terms` differentiates all that an objective learns.

    ``one``: whether there is a single teacher, given as logits.
    """
    o = objective
    if o.standardize and (o.divergence == "cosine" or not one):
        return False  # a row's mean changes the cosine; each of several teachers has its deviation
    teacher_temperature = o.teacher_temperature
    learns = (
        isinstance(teacher_temperature, Tensor)
        and teacher_temperature.requires_grad
        and torch.is_grad_enabled()
    )
    return not learns or (one and o.divergence in _SWAPPED)


def terms(call: Call) -> reference.Terms:
    """Compute :func:`fastkd.reference.terms`; labels are class indices in range."""
    teachers, objective, acc = call.teachers, call.objective, call.dtype
    if not mixture.needs_no_mixing(teachers, objective):  # the mixture is softened already
        mixed = mixture.mix(teachers, objective._replace(temperature=1.0), acc)
        objective = objective._replace(teacher_temperature=1.0)
        call = call._replace(teachers=(mixed,), objective=objective)
    call = call._replace(student=checks.to_savable(call.student))
    rows, (hard_divisor, soft_divisor) = as_rows(call, acc)
    t = objective.temperature
    if objective.standardize or (isinstance(t, Tensor) and t.requires_grad):
        # The gradients of temperature and deviation are computed from the unrounded gradient.
        rows = rows._replace(student=rows.student.to(acc))
    fields = _of_rows(rows, acc)
    if objective.reduction == "none":
        shape = call.student.shape[:-1]
        return reference.Terms(*(field.reshape(shape) for field in fields))
    loss, hard, *others = (field.sum() for field in fields)
    return reference.Terms(loss, hard / hard_divisor, *(field / soft_divisor for field in others))


def _of_rows(rows: Rows, acc: torch.dtype) -> reference.Terms:
    """Compute the terms of each row, in ``acc``."""
    student, (teacher,), labels, o = rows
    count = len(student)

    def of_rows(number: float | Tensor) -> Tensor:
        return torch.as_tensor(number, dtype=acc, device=student.device).expand(count)

    same = o.teacher_temperature is o.temperature and not o.standardize
    temperature = of_rows(o.temperature)
    teacher_temperature = temperature if same else of_rows(o.teacher_temperature)
    divergence = o.divergence
    if o.standardize:
        if labels is not None and (masked := labels == o.ignore_index).any():
            student = student.masked_fill(masked.unsqueeze(-1), 0)  # it may hold anything
        largest = torch.finfo(acc).max
        temperature = (temperature * _deviation(student)).clamp(max=largest)
        teacher_temperature = (teacher_temperature * _deviation(teacher.to(acc))).clamp(max=largest)
        divergence = "centered_mse" if divergence == "mse" else divergence
    settings = Settings(
        *(1.0, 1.0 if same else 2.0, 1.0, 1.0),  # equal temperatures promise those of rows are
        o.label_smoothing,
        o.ignore_index,
        DIVERGENCES.index(divergence),
        0.5 if o.mix is None else o.mix,
        REDUCTIONS.index("none"),
        normalizer=0.0,
        with_terms=True,
    )
    hard, soft, *logged = _RowTerms.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, temperature, teacher_temperature, settings, o.standardize
    )
    loss = reference.weighted(o.soft_weight * o.temperature**2, soft)
    if labels is not None:
        if o.class_weight is not None:
            weight = o.class_weight[labels.clamp(0, len(o.class_weight) - 1)]
            hard = reference.weighted(weight, hard)
        loss = loss + reference.weighted(o.hard_weight, hard)
    return reference.Terms(loss, hard.detach(), soft.detach(), *logged)


def _deviation(logits: Tensor) -> Tensor:
    """Return each row's deviation, or 1 if a logit is NaN or +inf, whose row becomes NaN anyway."""
    deviation: Tensor = _Deviation.apply(logits)  # type: ignore[no-untyped-call]
    return deviation.where(deviation.isfinite(), torch.ones_like(deviation))


class _RowTerms(torch.autograd.Function):
    """The unweighted terms of each row, whose gradients reach the logits and both temperatures."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        teacher_temperature: Tensor,
        settings: Settings,
        standardized: bool,
    ) -> Any:
        of_rows = torch.cat(
            (temperature, teacher_temperature, temperature.new_ones(2 * len(temperature)))
        )
        call = Arguments((teacher,), None, None, labels, of_rows, None, settings)
        (_, hard, soft, *logged), stats = _loss_into(None, student, *call.flat(), True)
        ctx.settings, ctx.standardized = settings, standardized
        ctx.save_for_backward(student, teacher, labels, temperature, teacher_temperature, stats)
        ctx.mark_non_differentiable(*logged)
        return hard, soft, *logged

    @staticmethod
    def backward(ctx: Any, of_hard: Tensor, of_soft: Tensor, *_: Any) -> Any:
        student, teacher, labels, temperature, teacher_temperature, stats = ctx.saved_tensors
        needs, settings, standardized = ctx.needs_input_grad, ctx.settings, ctx.standardized
        of_terms = (student, teacher, labels, temperature, teacher_temperature)
        if needs_formula(of_soft):
            return _formula(*of_terms, of_hard, of_soft, settings, needs)
        results: list[Tensor | None] = [None] * len(needs)
        # The ops multiply the divergence by the square of the temperature.
        weights, nothing = of_soft / temperature.square(), torch.zeros_like(of_hard)
        if needs[3]:
            gradient = _gradient(*of_terms, nothing, weights, stats, settings)
            results[3] = _by_scale(student, gradient, temperature, standardized)
        if needs[0]:
            results[0] = _gradient(*of_terms, of_hard, weights, stats, settings)
        if needs[4]:
            of_rows = torch.cat(
                (teacher_temperature, temperature, nothing, of_soft / teacher_temperature.square())
            )
            summed = _swapped(settings)._replace(
                reduction=REDUCTIONS.index("sum"), with_terms=False
            )
            wide = teacher.to(teacher_temperature.dtype)
            gradient = _empty_gradient(wide, True)
            call = Arguments((student,), None, None, labels, of_rows, None, summed)
            _loss_into(gradient, wide, *call.flat(), False)
            results[4] = _by_scale(teacher, gradient, teacher_temperature, standardized)
        return tuple(results)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    teacher_temperature: Tensor,
    hard_weight: Tensor,
    soft_weight: Tensor,
    stats: Tensor,
    settings: Settings,
) -> Tensor:
    """Compute the gradient in the logits of the sum of the terms with these weights."""
    gradient: Tensor = _empty_gradient(student, True)
    of_rows = torch.cat((temperature, teacher_temperature, hard_weight, soft_weight))
    # With reduction sum, a row's gradient has no factor but the row's weights.
    summed = settings._replace(reduction=REDUCTIONS.index("sum"), with_terms=False)
    call = Arguments((teacher,), None, None, labels, of_rows, None, summed)
    _loss_backward_(gradient, stats.new_ones(()), stats, student, *call.flat(), False)
    return gradient


def _by_scale(logits: Tensor, gradient: Tensor, temperature: Tensor, standardized: bool) -> Tensor:
    """Compute the gradient in the temperature from that in the logits, which is overwritten.

    The loss must depend on logits / temperature alone. Masked classes contribute nothing.
    """
    values = logits.to(gradient.dtype)
    if standardized:
        centered = _centered(values)
        # Masked classes, which the mean must leave out, give NaN. A trace cannot look for them.
        if is_traced() or bool(centered.isnan().any()):
            centered, _ = reference.deviation(values)
        values = centered
    return gradient.mul_(values.nan_to_num(neginf=0.0)).sum(-1).div_(temperature).neg_()


def _formula(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    teacher_temperature: Tensor,
    of_hard: Tensor,
    of_soft: Tensor,
    settings: Settings,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the backward pass by differentiable PyTorch operations."""
    with torch.enable_grad():
        # Aliases, so that no gradient goes from one to another, as from a temperature that is a
        # deviation to the logits: the graph outside has that.
        student, temperature, teacher_temperature = (
            x.view_as(x) for x in (student, temperature, teacher_temperature)
        )

        zeros, ones = torch.zeros_like(temperature), torch.ones_like(temperature)

        def rows(hard_weight: Tensor, soft_weight: Tensor) -> Tensor:
            of_rows = torch.cat((temperature, teacher_temperature, hard_weight, soft_weight))
            alone = settings._replace(with_terms=False)
            return by_operations(student, teacher, labels, of_rows, None, alone)

        # The factors are no part of what is differentiated: they may be a batch.
        out, factors = [rows(zeros, 1 / temperature.square())], [of_soft]
        if labels is not None:
            out.append(rows(ones, zeros))
            factors.append(of_hard)
        inputs = {0: student, 3: temperature, 4: teacher_temperature}
        inputs = {i: tensor for i, tensor in inputs.items() if needs[i]}
        gradients = torch.autograd.grad(
            out, list(inputs.values()), factors, create_graph=True, materialize_grads=True
        )
    results: list[Tensor | None] = [None] * len(needs)
    for i, gradient in zip(inputs, gradients, strict=True):
        results[i] = gradient
    return tuple(results)


def _centered(logits: Tensor) -> Tensor:
    """Return each row minus its mean. Subtracting the mean twice removes its rounding error."""
    centered = logits - logits.mean(-1, keepdim=True)
    return centered.sub_(centered.mean(-1, keepdim=True))


class _Deviation(torch.autograd.Function):
    """:func:`fastkd.reference.deviation` of each row, in few passes where no class is masked."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Any:
        squares = _centered(logits).square_().sum(-1)  # torch.std takes ten times as long
        deviation = (squares / (logits.shape[-1] - 1)).sqrt_()
        ctx.plain = bool(deviation.isfinite().all())
        ctx.save_for_backward(logits, deviation)
        return deviation + reference.LEAST_DEVIATION if ctx.plain else _of_unmasked(logits)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        logits, deviation = ctx.saved_tensors
        again = needs_formula(factor)  # to be differentiated in turn
        if again or not ctx.plain:
            with torch.enable_grad():
                leaf = logits if again else logits.detach().requires_grad_()
                return torch.autograd.grad(_of_unmasked(leaf), leaf, factor, create_graph=again)[0]
        scale = (factor / (deviation * (logits.shape[-1] - 1))).masked_fill_(deviation == 0, 0)
        return _centered(logits).mul_(scale.unsqueeze(-1))


def _of_unmasked(logits: Tensor) -> Tensor:
    """Return the deviation of unmasked classes; float64 holds the square of any finite float32."""
    _, deviation = reference.deviation(logits.double())
    return deviation.squeeze(-1).to(logits.dtype)
