"""Check the tensors of a head, and compute the logits of a teacher's head."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._core.checks import check_teacher_has_no_gradient
from fastkd._core.values import Head, check_head


def get_autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, or None if autocast is off; "meta" counts as CUDA."""
    kind = "cuda" if device.type == "meta" else device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def check_head_tensors(head: Head, owner: str, device: torch.device | None = None) -> None:
    """Raise unless a head is valid, its tensors are on the student's ``device`` (None: the head is
    the student) and, without autocast, have one dtype."""
    check_head(head, owner)
    device = head.hidden.device if device is None else device
    for name in ("hidden", "weight", "bias"):
        value = getattr(head, name)
        if value is None:
            continue
        if value.device != device:
            raise ValueError(
                f"{owner}.{name} must be on the student's device, {device}; got {value.device}"
            )
        if value.dtype != head.hidden.dtype and get_autocast_dtype(device) is None:
            raise ValueError(
                f"{owner}.{name} must have the dtype of {owner}.hidden, {head.hidden.dtype}, "
                f"unless autocast is on; got {value.dtype}"
            )


def compute_teacher_logits(head: Head, name: str, device: torch.device) -> Tensor:
    """Check the head of a teacher, and compute its logits without gradients."""
    check_head_tensors(head, name, device)
    check_teacher_has_no_gradient(f"{name}.hidden", head.hidden)
    with torch.no_grad():
        return head.logits()
