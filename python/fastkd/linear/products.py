"""The matrix products (GEMMs) of a linear head on some rows, written into existing memory.

On CUDA they are cuBLAS's, with 16-bit factors and a float32 result if the sum is float32. On a CPU
PyTorch has no product with a wider result, and without the processor's 16-bit instructions oneDNN
falls back to loops that take fifty times as long as float32. In both cases blocks of classes are
converted to float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

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
def _adds_to_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if PyTorch adds a product of 16-bit matrices to a float32 matrix directly."""
    total, factor = (torch.zeros(16, 16, dtype=d, device=device) for d in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):  # an older torch
        return False
    return True


def _upcasts(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not _has_products(tensor.dtype)


def _blocks(classes: int, width: int) -> Iterator[slice]:
    """Divide classes into blocks of 2 MiB, at ``width`` float32 numbers for each class."""
    step = max(_LEAST_BLOCK, _BLOCK_BYTES // (4 * max(1, width)))
    for start in range(0, classes, step):
        yield slice(start, start + step)


def scratch_bytes(rows: int, width: int) -> int:
    """Return a bound for the memory of 16-bit products on a CPU besides their factors.

    That is one factor in float32, and a block of the other factor and of the product.
    """
    return 4 * (rows * width + _LEAST_BLOCK * (rows + width)) + _BLOCK_BYTES


def logits_(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Write scale * (hidden @ weight.T + bias), ``(rows, classes)``, to ``out``."""
    if _upcasts(out):
        wide = hidden.float()
        for block in _blocks(len(weight), sum(hidden.shape)):
            part = wide @ weight[block].float().t()
            if bias is not None:
                part += bias[block]
            out[:, block] = part.mul_(scale)
            del part  # before the next block is allocated
    elif bias is not None:
        torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
    elif scale != 1.0:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
    else:
        torch.mm(hidden, weight.t(), out=out)
    return out


def hidden_gradient_(out: Tensor, grad: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Write scale * grad @ weight, ``(rows, width)``, to ``out``."""
    if _upcasts(grad):
        total = torch.zeros(out.shape)
        for block in _blocks(len(weight), sum(out.shape)):
            total.addmm_(grad[:, block].float(), weight[block].float())
        out.copy_(total.mul_(scale))
    elif scale != 1.0:
        torch.addmm(out, grad, weight, beta=0, alpha=scale, out=out)
    else:
        torch.mm(grad, weight, out=out)
    return out


def add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float, first: bool) -> Tensor:
    """Add scale * left @ right to ``total``; with ``first``, write it.

    ``total`` may have a wider dtype than the factors; the product is then not rounded to theirs.
    """
    beta = 0 if first else 1
    on_cpu = left.device.type == "cpu"
    if _upcasts(left) or (on_cpu and total.dtype != left.dtype):
        wide = right.float()
        for block in _blocks(len(total), sum(right.shape)):
            block_of_left = left[block].float()
            if total.dtype is torch.float32:
                total[block].addmm_(block_of_left, wide, beta=beta, alpha=scale)
            else:
                part = (block_of_left @ wide).mul_(scale)
                total[block] = part if first else part.add_(total[block])
                del part
            del block_of_left  # before the next block is allocated
    elif total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=scale, out=total)
    elif _adds_to_float32(left.dtype, left.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=scale, out=total)
    else:
        for block in _blocks(len(total), sum(right.shape)):
            part = torch.mm(left[block], right, out_dtype=total.dtype).mul_(scale)
            if first:
                total[block] = part
            else:
                total[block] += part
    return total


def scale_and_round(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scale * total in ``dtype``, computed block by block."""
    result = torch.empty_like(total, dtype=dtype)
    for block in _blocks(len(total), total[:1].numel()):
        torch.mul(total[block], scale, out=result[block])
    return result


def round_in_place(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round ``total`` to a narrower ``dtype``, in the first part of its memory."""
    flat = total.view(-1)
    result = flat.view(dtype)[: flat.numel()]
    for block in _blocks(flat.numel(), 1):  # a block overwrites only what has been read
        result[block] = flat[block].to(dtype)
    return result.view(total.shape)
