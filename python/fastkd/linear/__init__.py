"""Compute the loss of linear heads in chunks of logits."""

from fastkd.linear import chunks
from fastkd.linear.loss import compute, compute_routed

__all__ = ["chunks", "compute", "compute_routed"]
