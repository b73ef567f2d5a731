"""Export a student: check the arguments, write the file, and compare file and student."""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd import batches, validation
from fastkd.deployment import loading, writing

_COMPARED = 64  # samples in each call of student and exported model
_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit of 2 GiB, less 1 MiB for the graph


@dataclasses.dataclass(frozen=True)
class Exported:
    """Describe the file that :func:`fastkd.export` wrote, and how it differs from the student."""

    path: pathlib.Path
    bytes: int
    rows: int
    """Number of rows of logits on which file and student were compared."""
    difference: float
    """Largest absolute difference between a logit of the file and of the student."""
    agreement: float
    """Share of rows on which file and student have the same most probable class."""

    def __str__(self) -> str:
        """Return all fields as text."""
        return (
            f"{self.path}: {self.bytes:,} bytes. On {self.rows:,} rows the largest difference of a "
            f"logit is {self.difference:.2g}, and the class is the same on {self.agreement:.1%}"
        )


def export(
    student: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    format: Literal["onnx", "executorch", "torch"] = "onnx",
    quantize: Literal["int8"] | None = None,
    *,
    rows: Any = None,
    max_batch: int = 32,
    dim: int = -1,
) -> Exported:
    """Write ``student`` as a program without Python code, and compare program and student.

    The program takes batches of any size (an ExecuTorch program: up to ``max_batch``), and returns
    the logits. The file is written under a temporary name, loaded, compared with the student, and
    renamed, so ``path`` never is an incomplete or wrong file. The student is copied, and not
    changed.

    ``quantize="int8"`` quantizes weights and activations statically to 8 bits, and weights of
    ``"onnx"`` programs to 7. ONNX Runtime quantizes ``"onnx"`` programs, and PT2E with ExecuTorch's
    ``XNNPACKQuantizer`` quantizes ``"executorch"`` and ``"torch"`` programs. A quantized
    ``"torch"`` program is smaller, but PyTorch alone does not run the program faster.

    Args:
        student: module that returns logits ``(B, ..., C)`` of B samples and C classes, or an output
            that has ``.logits``.
        example: inputs of the student: a tensor, a tuple of tensors, or a mapping of keyword
            arguments, each ``(B, ...)``. With ``quantize`` the inputs also calibrate the ranges of
            the activations; pass a few hundred training samples.
        path: the file, which ends in ``.onnx``, ``.pte`` or ``.pt2`` for the formats below.
        format: ``"onnx"`` for ONNX Runtime, ``"executorch"`` for ExecuTorch with XNNPACK, or
            ``"torch"`` for ``torch.export.load``. Default ``"onnx"``.
        quantize: ``"int8"``, or None for the student's dtype. Default None.
        rows: inputs on which to compare, in the form of ``example``. Default ``example``.
        max_batch: largest batch of an ExecuTorch program, which reserves memory for such a batch.
            Default 32.
        dim: dimension of the classes in the logits. Default -1.

    Returns:
        The path, the file's size, and the differences between program and student.

    Raises:
        ImportError: before the student is traced, if a package is missing; the message names the
            extra, ``fastkd[deploy]``.
        TypeError: for arguments of a wrong type, such as an ``example`` without tensors.
        ValueError: for invalid arguments, such as a ``path`` that does not fit the format, or a
            student that returns no logits; if the student cannot be traced with batches of any
            size, quantized by PT2E, or lowered to ExecuTorch; or if the program's logits are wrong.
            A logit is wrong if it is not finite. Without ``quantize``, a logit is also wrong if it
            differs from the student's by more than sqrt(eps) times the largest absolute logit,
            where eps is the dtype's machine epsilon. In these cases ``path`` is not written.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile, torch, fastkd
        >>> student, images = torch.nn.Linear(64, 10), torch.randn(256, 64)
        >>> exported = fastkd.export(
        ...     student, images, f"{tempfile.mkdtemp()}/student.pt2", format="torch"
        ... )
        >>> exported.rows, exported.agreement
        (256, 1.0)
    """
    path = _check_arguments(student, path, format, quantize, max_batch)
    writing.check_packages(format, quantize is not None)
    # ExecuTorch computes wrong logits, or none, for weights and inputs in channels_last.
    student = copy.deepcopy(student).cpu()
    student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    example = _check_inputs("example", example, student)
    rows = example if rows is None else _check_inputs("rows", rows, student)
    tensors = tuple(batches.tensors(example))
    names = [f"input_{index}" for index in range(len(tensors))] if len(tensors) > 1 else ["input"]
    request = writing.Request(
        format,
        quantize is not None,
        max_batch,
        list(example) if isinstance(example, Mapping) else names,
        sum(parameter.numel() for parameter in student.parameters()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        with batches.evaluating(student):
            for inputs in (example, rows):
                _check_logits(student, inputs, dim)
            writing.write(temporary, writing.Logits(student, example), tensors, request)
            figures = _compare(student, loading.load(temporary), rows, dim, quantize is not None)
        size = temporary.stat().st_size
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, size, *figures)


def _check_arguments(
    student: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    quantize: str | None,
    max_batch: int,
) -> pathlib.Path:
    """Check the arguments other than the inputs and ``dim``, and return the path to write."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a module; got {type(student).__name__}")
    validation.check_one_of("format", format, tuple(writing.SUFFIXES))
    if quantize is not None:
        hints = dict.fromkeys(("none", "fp32", "float32"), "None keeps the student's dtype")
        validation.check_one_of("quantize", quantize, ("int8",), hints)
    validation.check_count("max_batch", max_batch, 2)
    path = check_path(path, format)
    dtype = batches.dtype_of(student)
    if quantize is not None and dtype in (torch.bfloat16, torch.float64):
        raise ValueError(
            f"student has the dtype {dtype}, and int8 is made from float32 or float16; give "
            "student.float()"
        )
    if format == "onnx":
        size = sum(tensor.nbytes for tensor in batches.tensors(student.state_dict()))
        if size > _ONNX_BYTES:
            raise ValueError(
                f"student has {size:,} bytes of weights, and one .onnx file holds at most 2 GB"
            )
        if dtype is torch.bfloat16:
            raise ValueError(
                "student has the dtype torch.bfloat16, in which ONNX Runtime does not compute on "
                "CPUs; give student.float()"
            )
    return path


def check_path(path: str | os.PathLike[str], format: str) -> pathlib.Path:
    """Return ``path`` as a ``pathlib.Path``; raise if ``path`` does not fit the format."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file's path; got {type(path).__name__}")
    path, suffix = pathlib.Path(path), writing.SUFFIXES[format]
    if path.suffix != suffix or path.is_dir():
        raise ValueError(
            f"path must be a file that ends in {suffix} for format={format!r}; got {path}"
        )
    return path


def _check_inputs(name: str, inputs: Any, student: nn.Module) -> Any:
    """Check ``inputs``, and return contiguous copies on the CPU in the student's dtype."""
    values: Any = inputs.values() if isinstance(inputs, Mapping) else inputs
    values = [inputs] if isinstance(inputs, Tensor) else values
    values = list(values) if isinstance(values, (tuple, list, type({}.values()))) else []
    if not values or not all(isinstance(value, Tensor) and value.dim() for value in values):
        raise TypeError(
            f"{name} must be a tensor (B, ...), or a tuple or mapping of such tensors; got "
            f"{type(inputs).__name__}"
        )
    if len({len(value) for value in values}) > 1 or not len(values[0]):
        raise ValueError(
            f"{name} must have at least one sample, and tensors with as many samples as one "
            f"another; got the shapes {[tuple(value.shape) for value in values]}"
        )
    moved = batches.to(inputs, torch.device("cpu"), batches.dtype_of(student))
    return batches.map_tensors(Tensor.contiguous, moved)


def _check_logits(student: nn.Module, inputs: Any, dim: int) -> None:
    """Call the student on the first samples, and raise unless the student returns logits."""
    first = torch.arange(min(_COMPARED, batches.size(inputs, None)))
    logits = batches.logits(student, loading.take_samples(inputs, first))
    accepted = (*range(1, logits.dim()), *range(1 - logits.dim(), 0))
    if not logits.is_floating_point() or dim not in accepted:
        raise ValueError(
            "student must return floating-point logits (B, ..., C) with classes in "
            f"dim={dim}; got {logits.dtype} of shape {tuple(logits.shape)}"
        )


def _compare(
    student: nn.Module, exported: nn.Module, rows: Any, dim: int, is_quantized: bool
) -> tuple[int, float, float]:
    """Return the fields ``rows``, ``difference`` and ``agreement`` of :class:`Exported`.

    Raises:
        ValueError: if logits are not finite, have another shape than the student's, or, without
            quantization, differ too much from the student's.
    """
    count = agreeing = 0
    difference = largest = 0.0
    for index in torch.split(torch.arange(batches.size(rows, None)), _COMPARED):
        part = loading.take_samples(rows, index)
        expected = batches.logits(student, part).movedim(dim, -1)
        logits = batches.logits(exported, part).movedim(dim, -1)
        if logits.shape != expected.shape or not logits.isfinite().all():
            raise ValueError(
                "student: the exported model's logits must be finite and have the shape "
                f"{tuple(expected.shape)} of the student's; got {tuple(logits.shape)}, "
                f"{int(logits.isfinite().sum())} of {logits.numel()} finite. Nothing was written"
            )
        count += logits[..., 0].numel()
        agreeing += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        difference = max(difference, float((logits - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    bound = torch.finfo(expected.dtype).eps ** 0.5 * largest
    if not is_quantized and difference > bound:
        raise ValueError(
            f"student: the exported model's logits differ from the student's by {difference:.3g}, "
            f"more than {bound:.3g}, half of the digits of {expected.dtype}. Nothing was written"
        )
    return count, difference, agreeing / count
