"""Tools that look at a call of the loss: what it computes, and whether its inputs are right."""

from fastkd.diagnostics.explanation import explain
from fastkd.diagnostics.inputs import check_inputs, check_logits
from fastkd.diagnostics.verification import Verification, verify

__all__ = ["Verification", "check_inputs", "check_logits", "explain", "verify"]
