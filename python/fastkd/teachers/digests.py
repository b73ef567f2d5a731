"""What tells one teacher's weights, or one sample's inputs, from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import batches


def fingerprint(teacher: nn.Module) -> str:
    """The SHA-256 of a module's parameters and buffers: dtypes, shapes and bytes, in their order.

    Quantized ones too, packed or not. Names are left out, so that ``torch.compile`` and wrappers
    for many GPUs make no difference.

    Raises:
        TypeError: for anything but a module.

    Example:
        >>> import torch, fastkd
        >>> fastkd.teachers.fingerprint(torch.nn.ReLU())[:15]
        'sha256:e3b0c442'
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher must be one torch.nn.Module; got {type(teacher).__name__}. Put a function "
            "into a module, and give each of several teachers a cache of its own"
        )
    digest = hashlib.sha256()
    for value in batches.tensors(teacher.state_dict()):
        for tensor in _plain(value):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(raw_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def inputs_digests(inputs: Any, count: int, lengths: list[int] | None) -> Tensor:
    """``(B,)`` int64: a digest of each of ``count`` samples' inputs, to notice swapped data.

    Of sequences, only as much as each one's length, so that padding makes no difference. A 0-d
    tensor is no sample's, and left out.
    """
    tensors = list(_tensors(inputs))
    found = []
    for row in range(count):
        digest = hashlib.blake2b(digest_size=8)
        for tensor in tensors:
            part = tensor[row]
            if lengths is not None and part.dim():
                part = part[: lengths[row]]
            digest.update(raw_bytes(part))
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(found, dtype=torch.int64)


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """What a tensor is made of: integers and their scales, or those that a subclass wraps."""
    if tensor.is_quantized:
        yield tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        else:
            yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        if inputs.dim():
            yield inputs.detach().cpu()
    elif isinstance(inputs, Mapping):
        for key in sorted(inputs):
            yield from _tensors(inputs[key])
    elif isinstance(inputs, (tuple, list)):
        for item in inputs:
            yield from _tensors(item)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's entries, copied only if they are not contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
