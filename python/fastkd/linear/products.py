"""Compute the matrix products (GEMMs) of linear heads, written into existing memory.

On CUDA, cuBLAS adds products of 16-bit factors to a float32 sum. On a CPU, factors are converted to
float32, at least one of them a block of classes at a time, in two cases:

- The sum is float32. PyTorch has no CPU product whose result is wider than its factors.
- The processor lacks 16-bit instructions. oneDNN's 16-bit products are then much slower than
  float32 products.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd._core.values import Head

_BLOCK_BYTES = 2 * 2**20
_LEAST_BLOCK = 64


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Return True if this processor has instructions for matrix products in ``dtype``."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


@functools.cache
def _has_float32_sum(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if PyTorch adds a product of 16-bit matrices to a float32 matrix directly."""
    total, factor = (torch.zeros(16, 16, dtype=d, device=device) for d in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):  # torch lacks out_dtype
        return False
    return True


def _is_upcast(tensor: Tensor) -> bool:
    """Return True if matrix products of ``tensor`` are computed in float32."""
    return tensor.device.type == "cpu" and not _has_products(tensor.dtype)


def _split_classes(classes: int, width: int) -> Iterator[slice]:
    """Yield slices of the classes, for products block by block.

    A slice has 2 MiB at ``width`` float32 numbers for each class, but at least 64 classes.
    """
    step = max(_LEAST_BLOCK, _BLOCK_BYTES // (4 * max(1, width)))
    for start in range(0, classes, step):
        yield slice(start, start + step)


def compute_scratch_bytes(rows: int, width: int) -> int:
    """Return an upper bound, in bytes, for the temporary memory of 16-bit products on a CPU.

    The memory holds a float32 matrix ``(rows, width)``, and blocks of two matrices, which have
    ``rows`` and ``width`` float32 numbers for each class.
    """
    return 4 * (rows * width + _LEAST_BLOCK * (rows + width)) + _BLOCK_BYTES


def write_logits_(out: Tensor, head: Head, slope: Tensor | None = None) -> Tensor:
    """Write the logits of ``head`` to ``out``, and the soft cap's derivative to ``slope``."""
    hidden, weight = head.hidden.to(out.dtype), head.weight.to(out.dtype)
    bias = None if head.bias is None else head.bias.to(out.dtype)
    scale, cap = head.scale or 1.0, head.softcap
    if out.device.type == "cpu" and out.dtype is torch.bfloat16 and hidden.shape[-1] % 2:
        # oneDNN's product for AMX reads one number beyond each row of odd width, and multiplies
        # that number by 0. The result is NaN if the number is not finite (torch 2.13, 2026-12).
        hidden = F.pad(hidden, (0, 1))[:, :-1]
    if _is_upcast(out):
        wide = hidden.float()
        for block in _split_classes(len(weight), sum(hidden.shape)):
            part = wide @ weight[block].float().t()
            if bias is not None:
                part += bias[block]
            out[:, block] = part.mul_(scale)
            del part  # free the memory before the next block is allocated
    elif bias is not None:
        torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
    else:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
    if cap is not None:
        out.div_(cap)
        if slope is not None:
            # The derivative of tanh is 1 / cosh^2; 1 - tanh^2 would cancel in 16 bits.
            torch.cosh(out, out=slope).pow_(-2)
        out.tanh_().mul_(cap)
    return out


def write_hidden_gradient_(out: Tensor, grad: Tensor, weight: Tensor, scale: float) -> None:
    """Write scale * grad @ weight, ``(rows, width)``, to ``out``."""
    if _is_upcast(grad):
        total = torch.zeros(out.shape)
        for block in _split_classes(len(weight), sum(out.shape)):
            total.addmm_(grad[:, block].float(), weight[block].float())
        out.copy_(total.mul_(scale))
    else:
        torch.addmm(out, grad, weight, beta=0, alpha=scale, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float, first: bool) -> None:
    """Add scale * left @ right to ``total``; with ``first``, overwrite ``total``.

    If ``total`` is wider than the factors, the product is not rounded to the factors' dtype.
    """
    beta, on_cpu = 0 if first else 1, left.device.type == "cpu"
    if total.dtype == left.dtype and not _is_upcast(left):
        torch.addmm(total, left, right, beta=beta, alpha=scale, out=total)
        return
    if not on_cpu and _has_float32_sum(left.dtype, left.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=scale, out=total)
        return
    wide = right.float() if on_cpu else right
    for block in _split_classes(len(total), sum(right.shape)):
        if on_cpu and total.dtype is torch.float32:
            total[block].addmm_(left[block].float(), wide, beta=beta, alpha=scale)
            continue
        if on_cpu:
            part = left[block].float() @ wide
        else:
            part = torch.mm(left[block], wide, out_dtype=total.dtype)
        part.mul_(scale)
        total[block] = part if first else part.add_(total[block])
        del part  # free the memory before the next block is allocated


def scale_and_round(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scale * total in ``dtype``, computed block by block."""
    result = torch.empty_like(total, dtype=dtype)
    for block in _split_classes(len(total), total[:1].numel()):
        torch.mul(total[block], scale, out=result[block])
    return result


def round_in_place(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``total`` to a narrower ``dtype`` in place; the result is the start of its memory."""
    flat = total.view(-1)
    result = flat.view(dtype)[: flat.numel()]
    for block in _split_classes(flat.numel(), 1):  # a block overwrites only numbers that were read
        result[block] = flat[block].to(dtype)
    return result.view(total.shape)
