"""Hints: a student's inner features taught by its teacher's, found by module names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd._core import checks

LOSSES = ("mse", "cosine", "attention")


@dataclass(frozen=True)
class Hint:
    """One pair of modules, of which the student's output learns to be like the teacher's.

    Features are ``(B, C, d1, d2, ...)`` as convolutions on images give them, ``(B, L, C)`` or
    ``(B, C)``; of a module that returns a tuple, the first item. Where the channels ``C`` differ, a
    linear map of the student's to the teacher's channels is learned along with the student (the
    regressor of FitNets), and thrown away with the trainer. All else has to agree.

    Each loss is a mean over everything but the samples, then over the samples, in float32 or wider:

    - ``"mse"``: (student - teacher)^2, after Romero et al., "FitNets: Hints for Thin Deep Nets"
      (2015);
    - ``"cosine"``: 1 - cos of the angle between the channels, as DistilBERT aligns hidden states
      (Sanh et al. 2019);
    - ``"attention"``: (a_student - a_teacher)^2, where a is the sum of squares over channels,
      divided by its norm over positions: Zagoruyko and Komodakis, "Paying More Attention to
      Attention" (2017). Channels may differ; nothing is projected. ``(B, C)`` has no positions.

    Args:
        student: name of a module of the student, as ``student.named_modules()`` has it.
        teacher: name of a module of the teacher; of several teachers, with the number of the
            teacher in front, such as ``"0.layer4"``.
        weight: what the loss is multiplied by before it is added to the distillation loss, > 0.
            Default 1.
        loss: ``"mse"``, ``"cosine"`` or ``"attention"``. Default ``"mse"``.

    Raises:
        TypeError, ValueError: for arguments that are not as above.

    Example:
        >>> import fastkd
        >>> fastkd.Hint("layer3", "layer4", weight=0.1, loss="cosine")
        Hint(student='layer3', teacher='layer4', weight=0.1, loss='cosine')
    """

    student: str
    teacher: str
    weight: float = 1.0
    loss: Literal["mse", "cosine", "attention"] = "mse"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        for name in ("student", "teacher"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise TypeError(f"{name} must be the name of a module; got {value!r}")
        checks.number("weight", self.weight, 0.0, math.inf, open_low=True)
        checks.one_of("loss", self.loss, LOSSES)


class Features:
    """What named modules of a model put out, caught by hooks while this context is entered.

    Raises:
        ValueError: if the model has no module of such a name; the message suggests some.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], whose: str) -> None:
        """``whose``: the model's name in messages."""
        self._names, self._whose = names, whose
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, filter(None, modules), n=5, cutoff=0.0)
                has = f"the nearest names it has are {', '.join(near)}" if near else "it has none"
                raise ValueError(f"hints: the {whose} has no module {name!r}; {has}")
        self._modules = [modules[name] for name in names]
        self._caught: dict[int, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Features:
        """Registers the hooks."""
        for index, module in enumerate(self._modules):
            self._hooks.append(module.register_forward_hook(self._catch(index)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes them, whatever happened."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._caught.clear()

    def _catch(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            feature = output[0] if isinstance(output, (tuple, list)) else output
            if not isinstance(feature, Tensor) or feature.dim() < 2:
                raise TypeError(
                    f"hints: {self._whose} module {self._names[index]!r} must give a tensor "
                    f"(B, ...) of two or more dimensions, or a tuple that begins with one; got "
                    f"{type(feature).__name__}"
                )
            self._caught[index] = feature

        return hook

    def take(self) -> list[Tensor]:
        """The features of the last forward pass, which are forgotten.

        Raises:
            RuntimeError: if a module took no part in it.
        """
        for index, name in enumerate(self._names):
            if index not in self._caught:
                raise RuntimeError(
                    f"hints: {self._whose} module {name!r} took no part in the forward pass"
                )
        return [self._caught.pop(index) for index in range(len(self._names))]


def channels_last(feature: Tensor) -> Tensor:
    """``(B, ..., C)`` from the layouts that :class:`Hint` names."""
    return feature.movedim(1, -1) if feature.dim() > 3 else feature


def widths(features: Sequence[Tensor]) -> list[int]:
    """C of each feature."""
    return [channels_last(feature).shape[-1] for feature in features]


class HintLoss(nn.Module):
    """The weighted sum of hints, with the projections that are learned for them."""

    def __init__(
        self, hints: Sequence[Hint], student_widths: Sequence[int], teacher_widths: Sequence[int]
    ) -> None:
        """Makes a projection for each hint that needs one."""
        super().__init__()
        self.hints = tuple(hints)
        self.widths = list(student_widths), list(teacher_widths)
        self.projections = nn.ModuleList(
            nn.Identity() if ours == theirs or hint.loss == "attention" else nn.Linear(ours, theirs)
            for hint, ours, theirs in zip(hints, student_widths, teacher_widths, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of each sample, ``(B,)``, float32 or wider."""
        total: Tensor | None = None
        for hint, project, ours, theirs in zip(
            self.hints, self.projections, student, teacher, strict=True
        ):
            ours, theirs = channels_last(ours), channels_last(theirs)
            if ours.shape[:-1] != theirs.shape[:-1]:
                raise ValueError(
                    f"hints: {hint.student!r} of the student and {hint.teacher!r} of the teacher "
                    "may differ in channels alone; got (samples, positions..., channels) "
                    f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
                )
            if hint.loss == "attention" and ours.dim() < 3:
                raise ValueError(
                    "hints: loss='attention' compares positions, and the output of "
                    f"{hint.student!r} has none: its shape is {tuple(ours.shape)}; "
                    "(B, L, C) or (B, C, d1, d2, ...) is accepted, or another loss"
                )
            wide = torch.promote_types(ours.dtype, torch.float32)
            loss = hint.weight * _distance(hint.loss, project(ours.to(wide)), theirs.to(wide))
            total = loss if total is None else total + loss
        assert total is not None
        return total


def _distance(kind: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """``(B,)`` from two ``(B, ..., C)``."""
    if kind == "mse":
        each = (ours - theirs).square()
    elif kind == "cosine":
        each = 1 - F.cosine_similarity(ours, theirs, dim=-1).unsqueeze(-1)
    else:
        maps = [F.normalize(f.square().sum(-1).flatten(1), dim=1) for f in (ours, theirs)]
        each = (maps[0] - maps[1]).square()
    return each.flatten(1).mean(1)
