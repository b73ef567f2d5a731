"""Compute Keras' LogitsDistillation and Distiller, for models that return torch tensors.

A model may be a Keras model on the torch backend or a :class:`torch.nn.Module`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastkd import losses, validation
from fastkd.compat.convention import check_none, check_positive


class LogitsDistillation:
    """Compute T^2 times the mean over rows of KL(teacher || student).

    **The teacher is the first argument** of ``compute_loss``.

    Args:
        temperature: T > 0. Default 3.
        loss: ``"kl_divergence"``, the only supported loss.

    Example:
        >>> import torch
        >>> from fastkd.compat.keras import LogitsDistillation
        >>> teacher, student = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> LogitsDistillation(temperature=1.0).compute_loss(teacher, student)
        tensor(0.4621)
    """

    def __init__(self, temperature: float = 3.0, loss: str = "kl_divergence") -> None:
        """Check and store the options."""
        validation.check_one_of("loss", loss, ("kl_divergence",))
        self.temperature = check_positive("temperature", temperature)

    def compute_loss(
        self, teacher_outputs: Tensor, student_outputs: Tensor, **kwargs: Any
    ) -> Tensor:
        """Compute the loss of logits ``(..., classes)``; ``kwargs`` are ignored, as in Keras."""
        return losses.loss(student_outputs, teacher_outputs, temperature=self.temperature)


class Distiller(nn.Module):
    """Compute student_loss_weight * CE + (1 - student_loss_weight) * T^2 * KL(teacher || student).

    Args:
        teacher: returns logits ``(N, C)`` of C classes; frozen, and always in evaluation mode.
        student: returns logits ``(N, C)``.
        distillation_losses: a :class:`LogitsDistillation`.
        distillation_loss_weights: must be None.
        student_loss_weight: weight of the **hard** term, in [0, 1]. If 1, the teacher is not
            called. Default 0.5.
        name: has no effect.

    Example:
        >>> import torch
        >>> from fastkd.compat.keras import Distiller
        >>> teacher, student = torch.nn.Linear(2, 4), torch.nn.Linear(2, 4)
        >>> distiller = Distiller(teacher, student, LogitsDistillation(), student_loss_weight=0.1)
        >>> distiller.compute_loss(torch.zeros(3, 2), torch.tensor([0, 1, 2])).backward()
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        distillation_losses: LogitsDistillation,
        distillation_loss_weights: None = None,
        student_loss_weight: float = 0.5,
        name: str = "distiller",
    ) -> None:
        """Check and store the options."""
        super().__init__()
        if not isinstance(distillation_losses, LogitsDistillation):
            raise TypeError(
                "distillation_losses must be one fastkd.compat.keras.LogitsDistillation; got "
                f"{type(distillation_losses).__name__}"
            )
        reason = "the one loss has weight 1"
        check_none("distillation_loss_weights", distillation_loss_weights, reason)
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student
        self.distillation_losses = distillation_losses
        self.student_loss_weight = validation.check_number(
            "student_loss_weight", student_loss_weight, 0.0, 1.0
        )

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor, training: bool | None = None) -> Tensor:
        """Return the student's logits."""
        return _call(self.student, x, training)

    def compute_loss(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        y_pred: Tensor | None = None,
        sample_weight: None = None,
        training: bool = True,
    ) -> Tensor:
        """Compute the loss for inputs ``x`` and labels ``y``: class indices or probabilities.

        Without ``y``, the loss is the weighted soft term alone. ``y_pred`` are the student's
        logits; if None, the student is called. ``training`` is passed to a student that is a Keras
        model.
        """
        check_none("sample_weight", sample_weight, "Keras' Distiller does not use it either")
        student_logits = _call(self.student, x, training) if y_pred is None else y_pred
        teacher_logits = student_logits.detach()  # without effect if the soft term has weight 0
        if self.student_loss_weight < 1:
            with torch.no_grad():
                teacher_logits = _call(self.teacher, x, training=False)
        return losses.loss(
            student_logits, teacher_logits, y, temperature=self.distillation_losses.temperature,
            hard_weight=None if y is None else self.student_loss_weight,
            soft_weight=1.0 - self.student_loss_weight,
        )  # fmt: skip


def _call(model: nn.Module, x: Tensor | None, training: bool | None) -> Tensor:
    """Call a model, and pass ``training`` to a Keras model, which has the attribute ``call``."""
    logits: Tensor = model(x, training=training) if hasattr(model, "call") else model(x)
    return logits
