"""Run the loop over chunks of rows or of classes, as a function and as an op."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastkd._core import shapes
from fastkd.linear import class_loop, row_loop
from fastkd.linear.call import Inputs, LinearCall, Outputs, counted_rows, empty_outputs


def run(inputs: Inputs, call: LinearCall) -> Outputs:
    """Compute the loss, and its gradients for a grad_output of 1.

    With ``defers_mean_division()`` the gradients lack the division by the denominator.
    """
    if call.chunk < 1:
        raise ValueError(f"chunk must be 1 or more; got {call.chunk}")
    with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):
        counted = counted_rows(inputs.labels, call.ignore_index)
        rows = inputs.hidden.shape[0] if counted is None else counted.numel()
        if rows == 0:
            return Outputs(*(value.zero_() for value in empty_outputs(inputs, call)))
        loop = class_loop.run if call.by_classes else row_loop.run
        return loop(inputs, call, counted)


# ---- the op linear_loss, which torch.compile does not trace into

_AUTOGRAD_KEYS = ("AutogradFunctionality", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA")


def _op(inputs: list[Tensor | None], *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the loop. The dispatcher has switched autograd off, and the loss of a chunk needs it."""
    with contextlib.ExitStack() as stack:
        for name in _AUTOGRAD_KEYS:
            key = getattr(torch._C.DispatchKey, name)
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        return run(Inputs(*inputs), LinearCall(*call))  # type: ignore[arg-type]


def _fake_op(inputs: list[Tensor | None], *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes.check_devices(inputs)
    return empty_outputs(Inputs(*inputs), LinearCall(*call))  # type: ignore[arg-type]


_SCHEMA = (
    "linear_loss(Tensor?[] inputs, float temperature, float? teacher_temperature, "
    "float hard_weight, float soft_weight, int ignore_index, str reduction, "
    "float label_smoothing, str divergence, float? mix, bool standardize, "
    "str tail, float? student_softcap, float? teacher_softcap, float student_scale, "
    "float teacher_scale, ScalarType dtype, ScalarType teacher_dtype, ScalarType accumulate, "
    "SymInt chunk, bool by_classes, bool hidden_grad, bool weight_grad, bool bias_grad, "
    "bool with_terms) "
    "-> (Tensor loss, Tensor hidden, Tensor weight, Tensor bias)"
)
LIBRARY: Any = torch.library.Library("fastkd", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(_SCHEMA)
LIBRARY.impl("linear_loss", _op, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::linear_loss", _fake_op, lib=LIBRARY)


def compiled(inputs: Inputs, call: LinearCall) -> Outputs:
    """Run the loop as the op ``linear_loss``."""
    return Outputs(*torch.ops.fastkd.linear_loss(list(inputs), *call))
