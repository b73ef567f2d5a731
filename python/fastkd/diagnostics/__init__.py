"""Describe what a call of the loss computes, and check its inputs and its result."""

from fastkd.diagnostics.explanation import explain
from fastkd.diagnostics.inputs import check_inputs, check_logits
from fastkd.diagnostics.verification import Verification, verify

__all__ = ["Verification", "check_inputs", "check_logits", "explain", "verify"]
