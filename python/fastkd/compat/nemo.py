"""Compute NeMo AutoModel's KDLoss: T^2 times the forward KL of the rows that labels select."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd import losses
from fastkd.compat.convention import (
    check_none,
    check_normalizer,
    check_positive,
    mask_rows,
)


class KDLoss(nn.Module):
    """Compute T^2 times the mean over rows of KL(teacher || student).

    Args:
        ignore_index: rows with this label are ignored. Default -100.
        temperature: T > 0. Default 1.
        fp32_upcast, chunk_size: have no effect.
        tp_group: must be None.

    Example:
        >>> import torch
        >>> from fastkd.compat.nemo import KDLoss
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> KDLoss()(student, teacher, torch.tensor([0]))
        tensor(0.4621)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: None = None,
        chunk_size: int = 0,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        check_none("tp_group", tp_group, "logits must not be sharded over classes")
        self.ignore_index = ignore_index
        self.temperature = check_positive("temperature", temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """Compute the loss of logits ``(..., C)`` and labels ``(...)``.

        ``num_batch_labels``: divisor of the mean. Default: the number of rows that are not ignored.
        """
        for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if hasattr(value, "full_tensor"):
                raise TypeError(
                    f"{name} must be a tensor that holds every class; got {type(value).__name__} "
                    "(.full_tensor() it)"
                )
        options = mask_rows(labels, self.ignore_index)
        if num_batch_labels is not None:
            options["normalizer"] = check_normalizer(
                "num_batch_labels", num_batch_labels, labels, self.ignore_index
            )
        return losses.loss(student_logits, teacher_logits, temperature=self.temperature, **options)
