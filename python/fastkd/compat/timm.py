"""Compute timm's LogitDistillationTask, which returns a dictionary of losses and logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import losses, validation
from fastkd.compat.convention import check_none, check_positive, check_weight


class LogitDistillationTask(nn.Module):
    """Compute task_loss_weight * criterion + distill_loss_weight * T^2 * KL(teacher || student).

    Args:
        student_model: the model to train, which returns logits ``(N, C)`` of C classes.
        teacher_model: returns logits ``(N, C)``; called without gradient, always in evaluation
            mode.
        criterion: called with logits and targets. Default: cross entropy, in one pass with
            the soft term.
        criterion_kwargs, teacher_pretrained_path, teacher_pretrained_cfg_overlay: must be None.
        loss_type: ``"kl"``, the only supported type.
        distill_loss_weight: weight of the soft term. Default ``1 - task_loss_weight``, or 1 if
            ``task_loss_weight`` is None.
        task_loss_weight: weight of the hard term. Default 1.
        temperature: T > 0. Default 1.
        device, dtype, verbose: have no effect.

    Example:
        >>> import torch
        >>> from fastkd.compat.timm import LogitDistillationTask
        >>> student, teacher = torch.nn.Linear(2, 4), torch.nn.Linear(2, 4)
        >>> task = LogitDistillationTask(student, teacher, task_loss_weight=0.3, temperature=4.0)
        >>> task(torch.zeros(3, 2), torch.tensor([0, 1, 2]))["loss"].backward()
    """

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        criterion_kwargs: None = None,
        teacher_pretrained_path: None = None,
        teacher_pretrained_cfg_overlay: None = None,
        loss_type: str = "kl",
        distill_loss_weight: float | None = None,
        task_loss_weight: float | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        check_none("criterion_kwargs", criterion_kwargs, "pass a criterion instead")
        reason = "teacher_model is a module that has its weights"
        check_none("teacher_pretrained_path", teacher_pretrained_path, reason)
        check_none("teacher_pretrained_cfg_overlay", teacher_pretrained_cfg_overlay, reason)
        validation.check_one_of("loss_type", loss_type, ("kl",))
        if isinstance(teacher_model, str):
            raise TypeError(
                f"teacher_model must be a torch.nn.Module; got the name {teacher_model!r}. Load it "
                f"first: timm.create_model({teacher_model!r}, pretrained=True, num_classes=...)"
            )
        name = "distill_loss_weight"
        if distill_loss_weight is None:
            name += ", by default 1 - task_loss_weight,"
            distill_loss_weight = 1.0 if task_loss_weight is None else 1.0 - task_loss_weight
        if task_loss_weight is None:
            task_loss_weight = 1.0
        self.trainable_module = student_model
        self.teacher = teacher_model.eval()
        self.criterion = criterion
        self.distill_loss_weight = check_weight(name, distill_loss_weight)
        self.task_loss_weight = check_weight("task_loss_weight", task_loss_weight)
        self.temperature = check_positive("temperature", temperature)

    def train(self, mode: bool = True) -> LogitDistillationTask:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return ``loss``, ``output`` (the student's logits), ``task_loss`` and ``kd_loss``."""
        output = self.trainable_module(input)
        with torch.no_grad():
            teacher = self.teacher(input)
        is_fused = self.criterion is None
        terms = losses.terms(
            output, teacher, target if is_fused else None, temperature=self.temperature,
            hard_weight=self.task_loss_weight if is_fused else None,
            soft_weight=self.distill_loss_weight,
        )  # fmt: skip
        loss, task_loss = terms.loss, terms.hard
        if self.criterion is not None:
            task_loss = self.criterion(output, target)
            loss = self.task_loss_weight * task_loss + loss
        kd_loss = terms.soft * self.temperature**2
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}
