"""Compute the outputs of teachers for training, or read the outputs from a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd import batches, losses
from fastkd._core import checks
from fastkd._core.arguments import check_tail
from fastkd._core.objective import Options, resolve
from fastkd._core.values import TopK
from fastkd.teachers import TeacherCache
from fastkd.training.hints import Features

Forward = Callable[[nn.Module, Any], Tensor]
"""A function of (model, batch) that returns logits."""


def compute_logits(model: nn.Module, batch: Any) -> Tensor:
    """Return a model's logits for a batch in one of the forms of :mod:`fastkd.batches`."""
    return batches.logits(model, batches.split(batch).inputs)


class TeacherOutputs(NamedTuple):
    """Hold the outputs of a teacher for a batch."""

    logits: Any
    """A tensor ``(..., classes)``, a list of tensors, or a function of the student's logits."""
    features: list[Tensor]


class ModuleTeacher:
    """Run one or several frozen teachers in evaluation mode, each in its own dtype."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        student: nn.Module,
        hints: Sequence[str],
        forward: Forward,
        devices: tuple[torch.device | str, torch.device],
    ) -> None:
        """Freeze the teachers; ``devices``: the device of the modules, and that of the outputs."""
        root = nn.ModuleList(modules)
        student_names = {parameter: name for name, parameter in student.named_parameters()}
        for parameter in root.parameters():
            if parameter in student_names:
                raise ValueError(
                    "teacher is frozen, but the student shares its parameter "
                    f"{student_names[parameter]!r}; use a copy.deepcopy of the teacher"
                )
        self.features = Features(root if len(root) > 1 else root[0], hints, "teacher")
        self._device, self._output_device = map(torch.device, devices)
        root.requires_grad_(False).eval().to(self._device)
        self._teachers, self._forward = root, forward

    @torch.no_grad()
    def compute_logits(self, batch: Any) -> Any:
        """Return the logits of the teacher, or a list with the logits of each teacher."""
        logits = []
        for teacher in self._teachers:
            moved = batches.to(batch, self._device, batches.dtype_of(teacher))
            logits.append(self._forward(teacher, moved).to(self._output_device))
        return logits[0] if len(logits) == 1 else logits

    def __call__(self, batch: Any) -> TeacherOutputs:
        """Return logits and features; call inside the context manager ``self.features``."""
        logits = self.compute_logits(batch)
        return TeacherOutputs(logits, [f.to(self._output_device) for f in self.features.pop()])


class CachedTeacher:
    """Read the outputs of a teacher from disk, by the sample ids of a batch."""

    features = contextlib.nullcontext()

    def __init__(self, cache: TeacherCache, loss: losses.KDLoss, device: torch.device) -> None:
        """Check that the loss can use the cache; ``device``: the device of the outputs."""
        self._cache, self._device = cache, device
        self._dim = loss.dim
        if cache.top_k is not None:
            options = Options()._replace(**loss.options)
            check_tail("ghost", options)
            t = resolve(options, has_labels=True, teachers=1, is_sparse=True).temperature
            cache.check(temperature=checks.check_scalar_temperature("temperature", t))
        elif loss.teacher_form != "logits":
            raise ValueError(
                "loss must have teacher_form='logits' with a cache: the cache stores "
                f"log-probabilities and converts them to logits; got {loss.teacher_form!r}"
            )

    def compute_logits(self, batch: Any) -> Callable[[Tensor], Any]:
        """Return a function of the student's logits that looks up the teacher's outputs.

        The shape of the student's logits gives the length of sequences.
        """
        ids = batches.split(batch).ids
        if ids is None:
            raise ValueError(
                "a cached teacher is read by sample ids, and this batch has none: wrap the "
                "dataset in fastkd.teachers.WithIds"
            )

        def look_up(student_logits: Tensor) -> Any:
            shape = student_logits.movedim(self._dim, -1).shape
            self._cache.check(classes=shape[-1])
            values = batches.to(self._cache.lookup(ids, tuple(shape[1:-1])), self._device)
            if isinstance(values, TopK):
                return values
            # The temperature times log-probabilities are logits, up to a constant in each row.
            return (values.float() * self._cache.temperature).movedim(-1, self._dim)

        return look_up

    def __call__(self, batch: Any) -> TeacherOutputs:
        """Return the result of :meth:`compute_logits`, without features."""
        return TeacherOutputs(self.compute_logits(batch), [])
