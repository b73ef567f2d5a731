"""Objectives whose gradient also goes through numbers of the rows, by the kernels: temperatures and
weights that are learned, and standardized logits, which are logits whose temperature is their rows'
deviation (docs/maths.md, section 15).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import checks, mixture, reference
from fastkd.derivatives import DIVERGENCES, wants_formula
from fastkd.objective import Objective
from fastkd.rows import Rows, as_rows
from fastkd.shapes import REDUCTIONS, accumulator, empty_gradient

_loss = torch.ops.fastkd.loss.default
_loss_backward_ = torch.ops.fastkd.loss_backward_.default

# The divergence that is the same once student and teacher change places, and whether `mix` becomes
# 1 - mix: its gradient is what the teacher's temperature learns by.
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


class _Numbers(NamedTuple):
    """The numbers of a call that are no tensors."""

    label_smoothing: float
    ignore_index: int
    divergence: str
    mix: float | None
    same_temperature: bool
    standardize: bool

    def op(self) -> tuple[float, int, int, float]:
        """As the ops take them, after temperatures and weights."""
        mix = 0.5 if self.mix is None else self.mix
        return self.label_smoothing, self.ignore_index, DIVERGENCES.index(self.divergence), mix

    def temperatures(self) -> tuple[float, float]:
        """In the place of those of rows: whether these are equal (csrc/kernels.h)."""
        return 1.0, 1.0 if self.same_temperature else 2.0

    def swapped(self) -> _Numbers:
        """Of the same divergence with student and teacher in each other's place."""
        name, other_mix = _SWAPPED[self.divergence]
        mix = 1 - self.mix if other_mix and self.mix is not None else self.mix
        return self._replace(divergence=name, mix=mix)


def has(objective: Objective, one: bool) -> bool:
    """Whether :func:`terms` has all that an objective learns; ``one`` teacher, as logits."""
    o = objective
    if o.standardize and (o.divergence == "cosine" or not one):
        return False  # a row's mean changes the cosine; each of several teachers has its deviation
    own = o.teacher_temperature
    learns = isinstance(own, Tensor) and own.requires_grad and torch.is_grad_enabled()
    return not learns or (one and o.divergence in _SWAPPED)


def terms(
    student: Tensor, teachers: tuple[Tensor, ...], labels: Tensor | None, objective: Objective
) -> reference.Terms:
    """:func:`fastkd.reference.terms`; labels are indices, in range."""
    acc = accumulator(student, *teachers)
    if not mixture.is_one(teachers, objective):  # their mixture, softened already
        teachers = (mixture.as_one(teachers, objective._replace(temperature=1.0), acc),)
        objective = objective._replace(teacher_temperature=1.0)
    rows, (of_hard, of_soft) = as_rows(checks.savable(student), teachers, labels, objective, acc)
    t = objective.temperature
    if objective.standardize or (isinstance(t, Tensor) and t.requires_grad):
        # What else depends on the logits' gradient should know it unrounded.
        rows = rows._replace(student=rows.student.to(acc))
    fields = _of_rows(rows, acc)
    if objective.reduction == "none":
        shape = student.shape[:-1]
        return reference.Terms(*(field.reshape(shape) for field in fields))
    loss, hard, *others = (field.sum() for field in fields)
    return reference.Terms(loss, hard / of_hard, *(field / of_soft for field in others))


def _of_rows(rows: Rows, acc: torch.dtype) -> reference.Terms:
    """The terms of each row, in ``acc``."""
    student, (teacher,), labels, o = rows
    count = len(student)

    def of_rows(number: float | Tensor) -> Tensor:
        return torch.as_tensor(number, dtype=acc, device=student.device).expand(count)

    same = o.teacher_temperature is o.temperature and not o.standardize
    temperature = of_rows(o.temperature)
    own = temperature if same else of_rows(o.teacher_temperature)
    divergence = o.divergence
    if o.standardize:
        if labels is not None and (masked := labels == o.ignore_index).any():
            student = student.masked_fill(masked.unsqueeze(-1), 0)  # it may hold anything
        largest = torch.finfo(acc).max
        temperature = (temperature * _deviation(student)).clamp(max=largest)
        own = (own * _deviation(teacher.to(acc))).clamp(max=largest)
        divergence = "centered_mse" if divergence == "mse" else divergence
    numbers = _Numbers(o.label_smoothing, o.ignore_index, divergence, o.mix, same, o.standardize)
    hard, soft, *logged = _RowTerms.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, temperature, own, numbers
    )
    loss = reference.weighted(o.soft_weight * o.temperature**2, soft)
    if labels is not None:
        if o.class_weight is not None:
            weight = o.class_weight[labels.clamp(0, len(o.class_weight) - 1)]
            hard = reference.weighted(weight, hard)
        loss = loss + reference.weighted(o.hard_weight, hard)
    return reference.Terms(loss, hard.detach(), soft.detach(), *logged)


def _deviation(logits: Tensor) -> Tensor:
    """Of each row, but 1 where a logit is NaN or +inf: such a row will be NaN by itself."""
    found: Tensor = _Deviation.apply(logits)  # type: ignore[no-untyped-call]
    return found.where(found.isfinite(), torch.ones_like(found))


class _RowTerms(torch.autograd.Function):
    """The unweighted terms of each row, whose gradients reach the logits and both temperatures."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        temperature: Tensor,
        own: Tensor,
        numbers: _Numbers,
    ) -> Any:
        settings = torch.cat((temperature, own, temperature.new_ones(2 * len(temperature))))
        options = (*numbers.temperatures(), 1.0, 1.0, *numbers.op(), REDUCTIONS.index("none"), 0.0)
        (_, hard, soft, *logged), _, stats = _loss(
            student, teacher, labels, settings, None, *options, True, True
        )
        ctx.numbers = numbers
        ctx.save_for_backward(student, teacher, labels, temperature, own, stats)
        ctx.mark_non_differentiable(*logged)
        return hard, soft, *logged

    @staticmethod
    def backward(ctx: Any, of_hard: Tensor, of_soft: Tensor, *_: Any) -> Any:
        student, teacher, labels, temperature, own, stats = ctx.saved_tensors
        needs, numbers = ctx.needs_input_grad, ctx.numbers
        if wants_formula(of_soft):
            tensors = (student, teacher, labels, temperature, own, of_hard, of_soft)
            return _formula(*tensors, numbers, needs)
        results: list[Tensor | None] = [None] * len(needs)
        # The ops multiply the divergence by the square of the temperature.
        weights, nothing = of_soft / temperature.square(), torch.zeros_like(of_hard)
        of_terms = (student, teacher, labels, temperature, own, stats, numbers)
        if needs[3]:
            gradient = _gradient(*of_terms, nothing, weights)
            results[3] = _by_scale(student, gradient, temperature, numbers.standardize)
        if needs[0]:
            results[0] = _gradient(*of_terms, of_hard, weights)
        if needs[4]:
            numbers = numbers.swapped()
            settings = torch.cat((own, temperature, nothing, of_soft / own.square()))
            options = (*numbers.temperatures(), 1.0, 1.0, *numbers.op(), REDUCTIONS.index("sum"))
            _, gradient, _ = _loss(
                *(teacher.to(own.dtype), student, labels, settings, None),
                *(*options, 0.0, False, True),
            )
            results[4] = _by_scale(teacher, gradient, own, numbers.standardize)
        return tuple(results)


def _gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    own: Tensor,
    stats: Tensor,
    numbers: _Numbers,
    hard_weight: Tensor,
    soft_weight: Tensor,
) -> Tensor:
    """That of the terms' sum with these weights, in the logits."""
    gradient = empty_gradient(student)
    settings = torch.cat((temperature, own, hard_weight, soft_weight))
    options = (*numbers.temperatures(), 1.0, 1.0, *numbers.op(), False)
    one = stats.new_ones(())
    _loss_backward_(gradient, one, stats, student, teacher, labels, settings, *options)
    return gradient


def _by_scale(logits: Tensor, gradient: Tensor, temperature: Tensor, standardized: bool) -> Tensor:
    """The gradient in the temperature of what depends on logits / temperature alone; masked classes
    say nothing about it. Takes the logits' gradient for its own.
    """
    values = logits.to(gradient.dtype)
    if standardized:
        centered = _centered(values)
        if bool(centered.isnan().any()):  # of masked classes, which have no part in the mean
            centered, _ = reference.deviation(values)
        values = centered
    return gradient.mul_(values.nan_to_num(neginf=0.0)).sum(-1).div_(temperature).neg_()


def _formula(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: Tensor,
    own: Tensor,
    of_hard: Tensor,
    of_soft: Tensor,
    numbers: _Numbers,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The backward pass by differentiable PyTorch operations."""
    with torch.enable_grad():
        # Aliases, so that no gradient goes from one to another, as from a temperature that is a
        # deviation to the logits: the graph outside has that.
        student, temperature, own = (x.view_as(x) for x in (student, temperature, own))

        def rows(hard_weight: float, soft_weight: float | Tensor) -> Tensor:
            return reference.terms(
                student,
                teacher,
                labels,
                temperature=temperature,
                teacher_temperature=own,
                hard_weight=hard_weight,
                soft_weight=soft_weight,
                label_smoothing=numbers.label_smoothing,
                ignore_index=numbers.ignore_index,
                reduction="none",
                divergence=numbers.divergence,
                mix=numbers.mix,
            ).loss

        # The factors are no part of what is differentiated: they may be a batch.
        out, factors = [rows(0.0, 1 / temperature.square())], [of_soft]
        if labels is not None:
            out.append(rows(1.0, 0.0))
            factors.append(of_hard)
        inputs = {0: student, 3: temperature, 4: own}
        inputs = {i: tensor for i, tensor in inputs.items() if needs[i]}
        found = torch.autograd.grad(
            out, list(inputs.values()), factors, create_graph=True, materialize_grads=True
        )
    results: list[Tensor | None] = [None] * len(needs)
    for i, gradient in zip(inputs, found, strict=True):
        results[i] = gradient
    return tuple(results)


def _centered(logits: Tensor) -> Tensor:
    """Each row minus its mean. The mean of what is left is what the mean was rounded by."""
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
        again = wants_formula(factor)  # to be differentiated in turn
        if again or not ctx.plain:
            with torch.enable_grad():
                leaf = logits if again else logits.detach().requires_grad_()
                return torch.autograd.grad(_of_unmasked(leaf), leaf, factor, create_graph=again)[0]
        scale = (factor / (deviation * (logits.shape[-1] - 1))).masked_fill_(deviation == 0, 0)
        return _centered(logits).mul_(scale.unsqueeze(-1))


def _of_unmasked(logits: Tensor) -> Tensor:
    """In float64, where no square of a finite float32 is infinite."""
    _, deviation = reference.deviation(logits.double())
    return deviation.squeeze(-1).to(logits.dtype)
