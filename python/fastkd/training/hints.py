"""Train intermediate features of a student to match features of a teacher: hints (FitNets)."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import batches, validation


@dataclass(frozen=True, kw_only=True)
class Hint:
    """Compare the output of a module of the student with the output of a module of the teacher.

    The outputs, called features, have B samples and C channels: ``(B, C)``, ``(B, L, C)`` with L
    positions, or ``(B, C, d1, d2, ...)``, which Conv2d and Conv3d return. If a module returns a
    tuple, the feature is the first item. For a Conv1d, name a module that transposes the output
    ``(B, C, L)``. Each loss is a mean over the entries of a sample, then over samples, in float32
    or float64:

    - ``"mse"``: (student - teacher)^2, after Romero et al., "FitNets: Hints for Thin Deep Nets"
      (2015);
    - ``"cosine"``: 1 minus the cosine of the angle between two vectors of channels, which
      DistilBERT uses for hidden states (Sanh et al. 2019);
    - ``"attention"``: (a_student - a_teacher)^2, where a is the sum of squares over channels,
      divided by the norm of this sum over positions. From Zagoruyko and Komodakis, "Paying More
      Attention to Attention" (2017). The numbers of channels may differ. Features ``(B, C)``, which
      have no positions, raise an error.

    Args:
        student: name of a module in ``student.named_modules()``.
        teacher: name of a module in ``teacher.named_modules()``. With several teachers, the name
            begins with the index of a teacher, as in ``"0.layer4"``.
        weight: factor of the hint in the total loss, > 0. Default 1.
        loss: ``"mse"``, ``"cosine"`` or ``"attention"``. Default ``"mse"``.
        project: module that maps the student's feature to the teacher's shape, trained with the
            student: ``torch.nn.Conv2d(4, 32, 1)`` for images (the regressor of FitNets),
            ``torch.nn.Linear(4, 32)`` for ``(B, C)`` and ``(B, L, C)``. Default None.

    Raises:
        TypeError: if ``weight`` is not a number.
        ValueError: if ``weight`` is not positive and finite, or ``loss`` is no accepted name.

    Example:
        >>> import fastkd
        >>> fastkd.Hint(student="layer3", teacher="layer4", weight=0.1, loss="cosine")
        Hint(student='layer3', teacher='layer4', weight=0.1, loss='cosine', project=None)
    """

    student: str
    teacher: str
    weight: float = 1.0
    loss: Literal["mse", "cosine", "attention"] = "mse"
    project: nn.Module | None = None

    def __post_init__(self) -> None:
        """Check ``weight`` and ``loss``."""
        validation.check_number("weight", self.weight, 0.0, math.inf, open_low=True)
        validation.check_one_of("loss", self.loss, ("mse", "cosine", "attention"))


class Features:
    """Record the outputs of named modules by forward hooks, inside a ``with`` statement."""

    def __init__(self, model: nn.Module, names: Sequence[str], role: str) -> None:
        """Find the modules; ``role`` is "student" or "teacher", for messages."""
        self._names, self._role = names, role
        modules = dict(model.named_modules())
        for name in names:
            if name not in modules:
                similar = difflib.get_close_matches(name, filter(None, modules), n=5, cutoff=0.0)
                suggestion = f"the most similar names are {', '.join(similar)}"
                raise ValueError(
                    f"hints: the {role} has no module {name!r}; "
                    f"{suggestion if similar else 'it has no submodules'}"
                )
        self._modules = {name: modules[name] for name in names}
        self._outputs: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Features:
        """Register the hooks."""
        for name, module in self._modules.items():
            hook = functools.partial(self._record, name)
            self._hooks.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks, and delete the recorded outputs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._outputs.clear()

    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(feature, Tensor) or feature.dim() < 2:
            raise TypeError(
                f"hints: {self._role} module {name!r} must return a tensor (B, ...) of two or more "
                "dimensions, or a tuple that begins with one; got "
                f"{type(feature).__name__}"
            )
        self._outputs[name] = feature

    def pop(self) -> list[Tensor]:
        """Return the features of the last forward pass, and delete the recorded outputs."""
        for name in self._names:
            if name not in self._outputs:
                raise RuntimeError(
                    f"hints: the forward pass did not call the {self._role} module {name!r}"
                )
        features = [self._outputs[name] for name in self._names]
        self._outputs.clear()
        return features


class HintLoss(nn.Module):
    """Compute the weighted losses of hints; the projections are submodules."""

    def __init__(self, hints: Sequence[Hint]) -> None:
        """Register the projections."""
        super().__init__()
        self.hints = tuple(hints)
        self.projections = nn.ModuleList(hint.project or nn.Identity() for hint in hints)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Return the loss of each sample, ``(B,)``, for each hint."""
        losses = []
        for hint, project, *features in zip(
            self.hints, self.projections, student, teacher, strict=True
        ):
            features[0] = project(features[0].to(batches.dtype_of(project)))
            features = [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features]
            # Move the channels of (B, C, d1, d2, ...) to the end, as in (B, L, C).
            features = [f.movedim(1, -1) if f.dim() > 3 else f for f in features]
            _check_shapes(hint, *features)
            losses.append(hint.weight * _compute_distance(hint.loss, *features))
        return losses


def _check_shapes(hint: Hint, student: Tensor, teacher: Tensor) -> None:
    """Raise if the shapes of two features ``(B, ..., C)`` do not fit the hint's loss."""
    shapes = tuple(student.shape), tuple(teacher.shape)
    attention = hint.loss == "attention"
    if shapes[0][:-1] != shapes[1][:-1] or (not attention and shapes[0] != shapes[1]):
        raise ValueError(
            f"hints: {hint.student!r} of the student and {hint.teacher!r} of the teacher must have "
            f"the same shape (samples, positions..., channels); got {shapes[0]} and {shapes[1]}. "
            "Map the first to the second by Hint(project=...): torch.nn.Conv2d(c1, c2, 1) for "
            "images, torch.nn.Linear(c1, c2) for other features"
        )
    if attention and student.dim() < 3:
        raise ValueError(
            "hints: loss='attention' compares positions, and the output of "
            f"{hint.student!r} has none: its shape is {shapes[0]}. Use features (B, L, C) or "
            "(B, C, d1, d2, ...), or another loss"
        )


def _compute_distance(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Compute each sample's distance ``(B,)`` between two features ``(B, ..., C)``."""
    if kind == "mse":
        distance = (student - teacher).square()
    elif kind == "cosine":
        distance = 1 - F.cosine_similarity(student, teacher, dim=-1).unsqueeze(-1)
    else:
        maps = [F.normalize(f.square().sum(-1).flatten(1), dim=1) for f in (student, teacher)]
        distance = (maps[0] - maps[1]).square()
    return distance.flatten(1).mean(1)
