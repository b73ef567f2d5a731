"""Compute digests of a teacher's weights and of samples' inputs, to detect changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import batches


def fingerprint(teacher: nn.Module) -> str:
    """Compute the SHA-256 of the tensors in a module's ``state_dict()``: dtypes, shapes and bytes.

    Packed and unpacked quantized weights are included. Names are not included, so that
    ``torch.compile`` and wrappers such as ``DataParallel`` do not change the fingerprint.

    Raises:
        TypeError: if ``teacher`` is not a module.

    Example:
        >>> import torch, fastkd
        >>> fastkd.teachers.fingerprint(torch.nn.ReLU())[:15]
        'sha256:e3b0c442'
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher must be one torch.nn.Module; got {type(teacher).__name__}. Put a function "
            "into a module, and give each of several teachers its own cache"
        )
    digest = hashlib.sha256()
    for value in batches.tensors(teacher.state_dict()):
        for tensor in _unpack(value):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(view_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def digest_inputs(inputs: Any, count: int, lengths: list[int] | None) -> Tensor:
    """Compute a digest of each sample's inputs, as int64 ``(count,)``.

    With ``lengths``, only the first ``lengths[i]`` positions of sample i are read, so that padding
    makes no difference. A 0-d tensor belongs to no sample and is ignored.
    """
    if isinstance(inputs, Mapping):
        inputs = dict(sorted(inputs.items()))
    tensors = [tensor.detach().cpu() for tensor in batches.tensors(inputs) if tensor.dim()]
    digests = []
    for row in range(count):
        digest = hashlib.blake2b(digest_size=8)
        for tensor in tensors:
            part = tensor[row]
            if lengths is not None and part.dim():
                part = part[: lengths[row]]
            digest.update(view_bytes(part))
        digests.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def _unpack(tensor: Tensor) -> Iterator[Tensor]:
    """Yield ``tensor``, or the plain tensors inside a quantized tensor or a wrapper subclass."""
    if tensor.is_quantized:
        yield from (tensor.int_repr(), tensor.dequantize())
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _unpack(getattr(tensor, name))
    else:
        yield tensor


def view_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if the tensor is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
