"""The loss of linear heads, whose logits exist in part at a time."""

from fastkd.linear import chunks
from fastkd.linear.loss import LinearKDLoss, linear_loss

__all__ = ["LinearKDLoss", "chunks", "linear_loss"]
