"""What a trainer minimises: the teacher's side of a batch, and the student with its loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastkd import batches, losses
from fastkd._core import checks
from fastkd._core.arguments import check_sparse_options
from fastkd._core.objective import Options
from fastkd.reference import Terms
from fastkd.training import hints

Forward = Callable[[nn.Module, Any], Tensor]
"""``forward(model, batch)``: logits."""
Labels = Callable[[Any], "Tensor | None"]
"""``labels(batch)``: a label for each row of the logits."""


@runtime_checkable
class Cache(Protocol):
    """What is asked of an offline teacher; :class:`fastkd.teachers.TeacherCache` is one."""

    temperature: float
    top_k: int | None

    def lookup(self, ids: Tensor, shape: tuple[int, ...]) -> Any:
        """Log-probabilities ``(B, *shape, C)`` of samples, or a pair ``(indices, log_probs)``."""

    def check(self, *, classes: int | None = None, temperature: float | None = None) -> None:
        """Refuses, by a ValueError, what it does not fit."""


def forward(model: nn.Module, batch: Any) -> Tensor:
    """Logits for a batch of one of the forms of :mod:`fastkd.batches`."""
    return batches.logits(model, batches.split(batch).inputs)


def labels(batch: Any) -> Tensor | None:
    """Its labels, if it has any."""
    found = batches.split(batch).labels
    if found is not None and not isinstance(found, Tensor):
        raise TypeError(
            f"a batch's labels must be a tensor; got {type(found).__name__}. For batches of "
            "another form there are the trainer's forward= and labels="
        )
    return found


class Lesson(NamedTuple):
    """What the teacher says to a batch."""

    logits: Any  # (..., C), a list of them, or a function of the student's that looks them up
    features: list[Tensor]


class Modules:
    """One teacher or several: frozen, in evaluation mode, where and in the dtype that they are."""

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        student: nn.Module,
        forward: Forward,
        device: torch.device,
        home: torch.device,
        names: Sequence[str],
    ) -> None:
        """``device``: where the teachers run; ``home``: where the student wants the answers."""
        several = isinstance(teacher, (list, tuple, nn.ModuleList))
        teachers: list[Any] = list(teacher) if several else [teacher]  # type: ignore[arg-type]
        if not teachers or not all(isinstance(item, nn.Module) for item in teachers):
            kinds = ", ".join(type(item).__name__ for item in teachers)
            raise TypeError(
                "teacher must be a module, a list of modules or a TeacherCache; got "
                f"{f'[{kinds}]' if several else kinds}"
            )
        own = {parameter: name for name, parameter in student.named_parameters()}
        for parameter in itertools.chain.from_iterable(item.parameters() for item in teachers):
            if parameter in own:
                raise ValueError(
                    "teacher is frozen, but the student shares its parameter "
                    f"{own[parameter]!r}; give a copy.deepcopy of the teacher"
                )
        root = teachers[0] if len(teachers) == 1 else nn.ModuleList(teachers)
        self.features = hints.Features(root, names, "teacher")
        root.requires_grad_(False).eval().to(device)
        self._teachers, self._forward, self._device, self._home = teachers, forward, device, home
        self._names = names

    @torch.no_grad()
    def answer(self, batch: Any) -> Any:
        """The logits of the one, or a list of those of each."""
        answers = [
            self._forward(teacher, batches.to(batch, self._device, batches.dtype_of(teacher))).to(
                self._home
            )
            for teacher in self._teachers
        ]
        return answers[0] if len(answers) == 1 else answers

    def __call__(self, batch: Any) -> Lesson:
        """The same, and the features that hints want."""
        answer = self.answer(batch)
        features = [f.to(self._home) for f in self.features.take()] if self._names else []
        return Lesson(answer, features)


class Cached:
    """An offline teacher, asked by the batch's ids."""

    features = contextlib.nullcontext()

    def __init__(self, cache: Cache, loss: losses.KDLoss, home: torch.device) -> None:
        """``home``: where the student wants the answers."""
        self._cache, self._home = cache, home
        options = {**Options._field_defaults, **loss.options}
        self._dim = options["dim"]
        if cache.top_k is not None:
            _check_topk(cache, loss)
        elif options["teacher_form"] != "logits":
            raise ValueError("loss: what form a cache has, it knows; leave out teacher_form")

    def answer(self, batch: Any) -> Callable[[Tensor], Any]:
        """Looks these samples up once the student's logits tell how long the batch is."""
        ids = batches.split(batch).ids
        if ids is None:
            raise ValueError(
                "a cached teacher is asked by sample ids, and this batch has none: wrap the "
                "dataset in fastkd.teachers.WithIds"
            )
        return functools.partial(self._look_up, ids)

    def _look_up(self, ids: Tensor, student_logits: Tensor) -> Any:
        """What the cache has for these samples, in the shape of the student's logits."""
        shape = student_logits.movedim(self._dim, -1).shape
        self._cache.check(classes=shape[-1])
        found = batches.to(self._cache.lookup(ids, tuple(shape[1:-1])), self._home)
        if not isinstance(found, Tensor):
            return found
        # the teacher's logits, up to a constant in each row
        return (found.float() * self._cache.temperature).movedim(-1, self._dim)

    def __call__(self, batch: Any) -> Lesson:
        """The same; there are no features."""
        return Lesson(self.answer(batch), [])


Teacher = Modules | Cached


def _check_topk(cache: Cache, loss: losses.KDLoss) -> None:
    """Raise if the loss has an option that a sparse teacher does not support."""
    options = Options()._replace(**loss.options)
    check_sparse_options(options)
    temperature = 1.0 if options.temperature is None else options.temperature
    cache.check(temperature=checks.number("temperature", temperature, 0.0, math.inf))


class Values(NamedTuple):
    """What one forward pass gives: 0-d tensors, of which the loss alone carries a gradient."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    agreement: Tensor
    hint: Tensor


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a step's sums are divided by, 0-d: a process's share of those over all of them.

    No tuple: mixed precision under FSDP would round the tensors in it to 16 bits.
    """

    rows: Tensor
    samples: Tensor
    weight: Tensor
    """The sum of the class weights of the rows' labels; the rows without ``class_weight``."""


class Sums(NamedTuple):
    """Over rows, 0-d."""

    loss: Tensor
    hard: Tensor
    soft: Tensor
    agreement: Tensor
    hits: Tensor
    rows: Tensor
    weight: Tensor
    """As in :class:`Counts`."""


WEIGHTS = ("alpha", "hard_weight", "soft_weight")


class StudentLoss(nn.Module):
    """The student and the loss as one module, so that no logits leave what Accelerate wraps.

    It would convert them to float32, and DistributedDataParallel has to see the hints' projections.
    """

    def __init__(
        self, student: nn.Module, loss: losses.KDLoss, forward: Forward, labels: Labels
    ) -> None:
        """``self.hints`` is set once the widths of the features are known."""
        super().__init__()
        self.student, self.loss = student, loss
        self.hints: hints.HintLoss | None = None
        self.features: hints.Features | None = None
        self._forward, self._labels = forward, labels

    def forward(self, batch: Any, lesson: Lesson, counts: Counts) -> Values:
        """``counts``: what sums over the batch's rows and samples are divided by.

        Without labels ``rows`` counts samples too: each then weighs the same, and each of its rows.
        """
        logits = self.forward_student(batch)
        targets = self.labels_of(batch)
        rows, options = counts.rows, {}
        if targets is None:
            rows = rows * rows_of(logits, self.dim) / len(logits) if len(logits) else rows
        elif self._class_weight is not None:  # so that the hard term's divisor is their sum
            options["class_weight"] = self._class_weight * (rows / counts.weight)
        terms = self.terms(logits, lesson.logits, targets, normalizer=rows, **options)
        hint = torch.zeros_like(terms.loss)
        if self.hints is not None and self.features is not None:
            hint = self.hints(self.features.take(), lesson.features).sum() / counts.samples
        return Values(terms.loss + hint, terms.hard, terms.soft, terms.agreement, hint.detach())

    def labels_of(self, batch: Any) -> Tensor | None:
        """The batch's labels, class indices as int64."""
        found = self._labels(batch)
        return None if found is None else checks.to_int64(found)

    def forward_student(self, batch: Any) -> Tensor:
        """The student's logits."""
        return self._forward(self.student, batch)

    def terms(self, logits: Tensor, teacher: Any, targets: Tensor | None, **options: Any) -> Terms:
        """The distillation loss and its terms."""
        given = {**self.loss.options, **options}
        if callable(teacher):
            teacher = teacher(logits)
        return losses.terms(logits, teacher, targets, **given)

    def sums(self, model: nn.Module, batch: Any, teacher: Any) -> Sums:
        """Over a batch's rows; 0-d float64 tensors."""
        logits = self._forward(model, batch)
        targets = self.labels_of(batch)
        terms = self.terms(logits, teacher, targets, reduction="sum", normalizer=None)
        if targets is None:
            hits = torch.full((), math.nan, device=logits.device)
            rows = weight = torch.tensor(rows_of(logits, self.dim), device=logits.device)
        else:
            rows, weight = self.counted(targets)
            if targets.is_floating_point():
                targets = targets.argmax(self.dim)
            counted = logits.movedim(self.dim, -1)
            hits = (counted.argmax(-1) == targets).sum()
        parts = (terms.loss, terms.hard, terms.soft, terms.agreement, hits, rows, weight)
        return Sums(*(part.double() for part in parts))

    def means(self, sums: Sums) -> list[float]:
        """Of loss, hard, soft, agreement and hits, from sums over a whole data set."""
        loss, hard, soft, agreement, hits, rows, weight = (float(value) for value in sums)
        if self._class_weight is not None and weight:
            ratio = rows / weight
            alpha, hard_weight, soft_weight = map(self._option, WEIGHTS)
            weighs, _ = checks.resolve_weights(alpha, hard_weight, soft_weight, True)
            loss += float(weighs) * hard * (ratio - 1)
            hard *= ratio
        return [value / rows for value in (loss, hard, soft, agreement, hits)]

    def _option(self, name: str) -> Any:
        return self.loss.options.get(name, Options._field_defaults[name])

    @property
    def _class_weight(self) -> Tensor | None:
        weight: Tensor | None = self._option("class_weight")
        return weight

    @property
    def dim(self) -> int:
        """That of the classes."""
        return int(self._option("dim"))

    def counted(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows a batch's labels do not ignore, and the sum of their class weights; 0-d."""
        if targets.is_floating_point():  # probabilities
            rows = torch.tensor(rows_of(targets, self.dim), device=targets.device)
            return rows, rows
        valid = targets != self._option("ignore_index")
        if self._class_weight is None:
            return valid.sum(), valid.sum()
        classes = targets.clamp(0, len(self._class_weight) - 1)
        weights = self._class_weight.to(targets.device)[classes]
        return valid.sum(), weights.where(valid, 0).sum(dtype=torch.float64)


def rows_of(logits: Tensor, dim: int) -> int:
    """The number of rows."""
    return logits.numel() // logits.shape[dim]
