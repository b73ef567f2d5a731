"""Compute torchdistill's KDLoss and LogitStdKDLoss of logits that forward hooks store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastkd import losses, validation
from fastkd.compat.convention import check_positive, check_weight, convert_reduction


class KDLoss(nn.Module):
    """Compute alpha * CE + beta * T^2 * KL of logits ``(N, C, ...)`` and targets ``(N, ...)``.

    Args:
        student_module_path, teacher_module_path: the key of the module in the dictionary of the
            student or of the teacher.
        student_module_io, teacher_module_io: ``"input"`` or ``"output"`` of the module.
        temperature: T > 0.
        alpha: weight of the **hard** term. If None or 0, or without targets, the loss is the KL
            alone, without ``beta`` and T^2.
        beta: weight of the soft term. Default ``1 - alpha``.
        reduction: ``"batchmean"``, ``"mean"`` or ``"sum"``, as in :class:`torch.nn.KLDivLoss`.
            The hard term is a mean over rows, but a sum for ``"sum"``. Default ``"batchmean"``.
        weight: weights of the C classes in the hard term, ``(C,)``.
        ignore_index: rows with this target are ignored, unless the loss is the KL alone.
            Default -100.
        label_smoothing: smoothing of the labels in the hard term. Default 0.

    Example:
        >>> import torch
        >>> from fastkd.compat.torchdistill import KDLoss
        >>> criterion = KDLoss("fc", "output", "fc", "output", temperature=4.0, alpha=0.1)
        >>> outputs = {"fc": {"output": torch.zeros(2, 3)}}
        >>> criterion(outputs, outputs, torch.tensor([0, 2]))
        tensor(0.1099)
    """

    standardize = False

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        if alpha is None and beta is None:
            raise TypeError("alpha and beta must not both be None: give one of them")
        validation.check_one_of("reduction", reduction, ("batchmean", "mean", "sum"))
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io
        self.temperature = check_positive("temperature", temperature)
        self.alpha = 0.0 if alpha is None else check_weight("alpha", alpha)
        if beta is None:
            self.beta = check_weight("beta, by default 1 - alpha,", 1 - self.alpha)
        else:
            self.beta = check_weight("beta", beta)
        self.reduction = reduction
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss; ``args`` and ``kwargs`` are ignored, as in torchdistill."""
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        reduction, factor = convert_reduction(self.reduction, student, dim=1)
        if self.alpha and targets is not None:
            hard: dict[str, Any] = dict(
                labels=targets, hard_weight=self.alpha, ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing, class_weight=self.weight,
            )  # fmt: skip
            soft_weight = factor * self.beta
        else:
            hard, soft_weight = {}, factor / self.temperature**2
        return losses.loss(
            student, teacher, temperature=self.temperature, soft_weight=soft_weight,
            reduction=reduction, standardize=self.standardize, dim=1, **hard,
        )  # fmt: skip


class LogitStdKDLoss(KDLoss):
    """Compute :class:`KDLoss` with standardized logits in the soft term.

    Each row of logits is shifted and scaled to mean 0 and standard deviation 1. The loss comes from
    Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024). Arguments are those
    of :class:`KDLoss`, and ``eps``, which must be 1e-7, after ``temperature``.

    Example:
        >>> import torch
        >>> from fastkd.compat.torchdistill import LogitStdKDLoss
        >>> criterion = LogitStdKDLoss("fc", "output", "fc", "output", 2.0, alpha=0.5, beta=9.0)
        >>> student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 30.0]])
        >>> criterion({"fc": {"output": student}}, {"fc": {"output": teacher}}, torch.tensor([1]))
        tensor(0.1566)
    """

    standardize = True

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        """Check and store the options."""
        if eps != 1e-7:
            raise ValueError(f"eps must be 1e-7; got {eps!r}")
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io,
            temperature, alpha, beta, reduction, **kwargs,
        )  # fmt: skip
