"""The matrix products of a linear head on some rows, written into memory that is there already.

On CUDA they are cuBLAS's, 16-bit in and float32 out where a sum is float32. On a CPU torch has no
such products, and where oneDNN lacks the processor's instructions it falls back to loops that take
fifty times as long as float32; in both cases blocks of classes go through float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK_BYTES = 2 * 2**20
_LEAST_BLOCK = 64
_HALF = (torch.bfloat16, torch.float16)


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of that dtype fast."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


@functools.cache
def _adds_to_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds a product of 16-bit matrices to a float32 one in one go."""
    total, factor = (torch.zeros(16, 16, dtype=d, device=device) for d in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):  # an older torch
        return False
    return True


def _upcasts(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not _has_products(tensor.dtype)


def _blocks(classes: int, width: int) -> Iterator[slice]:
    """Rows of which ``width`` float32 numbers each take two MiB."""
    step = max(_LEAST_BLOCK, _BLOCK_BYTES // (4 * max(1, width)))
    for start in range(0, classes, step):
        yield slice(start, start + step)


def scratch_bytes(rows: int, width: int) -> int:
    """What products of 16-bit numbers of ``rows`` rows take beside them on a CPU, at most: one
    factor in float32, and a block of the other and of the product."""
    return 4 * (rows * width + _LEAST_BLOCK * (rows + width)) + _BLOCK_BYTES


def logits_(
    out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """out = scale * (hidden @ weight.T + bias): ``(rows, classes)``."""
    if _upcasts(out):
        wide = hidden.float()
        for block in _blocks(len(weight), sum(hidden.shape)):
            part = wide @ weight[block].float().t()
            if bias is not None:
                part += bias[block]
            out[:, block] = part.mul_(scale)
            del part  # before the next block's
    elif bias is not None:
        torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=out)
    elif scale != 1.0:
        torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)
    else:
        torch.mm(hidden, weight.t(), out=out)
    return out


def hidden_gradient_(out: Tensor, grad: Tensor, weight: Tensor, scale: float) -> Tensor:
    """out = scale * grad @ weight: ``(rows, width)``."""
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
    """total += scale * left @ right; ``first``: and total was 0.

    ``total`` may be of a wider dtype than the factors: what is added to it has not been rounded.
    """
    beta = 0 if first else 1
    on_cpu = left.device.type == "cpu"
    if _upcasts(left) or (on_cpu and total.dtype != left.dtype):
        wide = right.float()
        for block in _blocks(len(total), sum(right.shape)):
            narrow = left[block].float()
            if total.dtype is torch.float32:
                total[block].addmm_(narrow, wide, beta=beta, alpha=scale)
            else:
                part = (narrow @ wide).mul_(scale)
                total[block] = part if first else part.add_(total[block])
                del part
            del narrow  # before the next block's
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


def finished(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * total, rounded to ``dtype`` block by block."""
    result = torch.empty_like(total, dtype=dtype)
    for block in _blocks(len(total), total[:1].numel()):
        torch.mul(total[block], scale, out=result[block])
    return result


def narrowed(total: Tensor, dtype: torch.dtype) -> Tensor:
    """``total`` rounded to ``dtype``, in the first part of its own memory."""
    flat = total.view(-1)
    result = flat.view(dtype)[: flat.numel()]
    for block in _blocks(flat.numel(), 1):  # what it overwrites has been read
        result[block] = flat[block].to(dtype)
    return result.view(total.shape)
