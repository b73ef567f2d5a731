"""The loss of linear heads, whose logits exist in part at a time."""

from fastkd.linear import chunks
from fastkd.linear.loss import compute

__all__ = ["chunks", "compute"]
