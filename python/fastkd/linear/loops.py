"""The two loops behind :func:`fastkd.linear_loss`, as a function and as an op."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastkd._core import shapes
from fastkd.linear import class_loop, row_loop
from fastkd.linear.row_loop import Call, Inputs, Outputs


def run(inputs: Inputs, call: Call) -> Outputs:
    """The loss, and its gradients for a grad_output of 1.

    With ``heads.scales_late()`` the gradients lack the division by the denominator.
    """
    if call.chunk < 1:
        raise ValueError(f"chunk must be 1 or more; got {call.chunk}")
    with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):
        counted = row_loop.counted_rows(inputs.labels, call.ignore_index)
        rows = inputs.hidden.shape[0] if counted is None else counted.numel()
        if rows == 0:
            return Outputs(*(value.zero_() for value in row_loop.empty_outputs(inputs, call)))
        loop = class_loop.run if call.by_classes else row_loop.run_by_rows
        return loop(inputs, call, counted)


# ---- the same as an op, which torch.compile takes as it is

_AUTOGRAD_KEYS = ("AutogradFunctionality", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA")


def _op(inputs: list[Tensor | None], *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whoever calls an op has switched off what the loss of a chunk is differentiated by."""
    with contextlib.ExitStack() as stack:
        for name in _AUTOGRAD_KEYS:
            key = getattr(torch._C.DispatchKey, name)
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        return run(Inputs(*inputs), Call(*call))  # type: ignore[arg-type]


def _fake_op(inputs: list[Tensor | None], *call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes.check_devices(inputs)
    return row_loop.empty_outputs(Inputs(*inputs), Call(*call))  # type: ignore[arg-type]


_SCHEMA = (
    "linear_loss(Tensor?[] inputs, float temperature, float? teacher_temperature, "
    "float hard_weight, float soft_weight, int ignore_index, str reduction, "
    "float label_smoothing, str divergence, float? mix, bool standardize, "
    "str tail, float? student_softcap, float? teacher_softcap, float student_scale, "
    "float teacher_scale, ScalarType dtype, ScalarType teacher_dtype, ScalarType accumulate, "
    "SymInt chunk, bool by_classes, bool hidden_grad, bool weight_grad, bool bias_grad) "
    "-> (Tensor loss, Tensor hidden, Tensor weight, Tensor bias)"
)
LIBRARY: Any = torch.library.Library("fastkd", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(_SCHEMA)
LIBRARY.impl("linear_loss", _op, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::linear_loss", _fake_op, lib=LIBRARY)


def compiled(inputs: Inputs, call: Call) -> Outputs:
    """:func:`run`, as an op."""
    return Outputs(*torch.ops.fastkd.linear_loss(list(inputs), *call))
