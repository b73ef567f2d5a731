"""Write a model in the format of ONNX Runtime, ExecuTorch or ``torch.export``."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastkd import batches, extras
from fastkd.deployment import loading

SUFFIXES = {"onnx": ".onnx", "executorch": ".pte", "torch": ".pt2"}
_PARTITIONER = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
_QUANTIZER = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"
_PT2E = "torchao.quantization.pt2e.quantize_pt2e"
# Samples in the traced batch. ATen's convolution has a branch for fewer than 16 samples, and a
# program traced through that branch would accept no larger batches.
_TRACED_SAMPLES = 32


class Logits(nn.Module):
    """Map the input tensors of a student, in the batch's order, to the student's logits.

    :func:`_trace` requires the signature ``forward(*tensors)``.
    """

    def __init__(self, student: nn.Module, inputs: Any) -> None:
        """Store the student; ``inputs`` have the form of a batch's inputs."""
        super().__init__()
        self.student = student
        self._names = list(inputs) if isinstance(inputs, Mapping) else None

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the logits of a batch."""
        inputs = tensors if self._names is None else dict(zip(self._names, tensors, strict=True))
        return batches.logits(self.student, inputs)


class Request(NamedTuple):
    """Hold the properties of a file to write."""

    format: str
    is_quantized: bool
    max_batch: int
    """Largest batch of an ExecuTorch program, and of calibration."""
    names: list[str]
    """Names of the inputs: the keys of a mapping, or ``input_0`` and so on."""
    parameters: int
    """Number of the model's parameters, which :func:`fastkd.deployment.load` reads."""


def check_packages(format: str, is_quantized: bool) -> None:
    """Raise MissingPackageError unless the packages of a format can be imported."""
    packages = {
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "executorch": ["executorch.exir", "executorch.runtime"],
        "torch": [],
    }[format]
    if is_quantized and format != "onnx":
        packages += [_QUANTIZER, _PT2E]
    with loading.silence():
        extras.check("deploy", *packages)


def write(
    path: pathlib.Path, model: nn.Module, inputs: tuple[Tensor, ...], request: Request
) -> None:
    """Trace a model with ``inputs``, and write it; ``inputs`` also calibrate quantization."""
    with loading.silence():
        program = _trace(model, inputs, request)
        if request.format == "onnx":
            _write_onnx(path, program, inputs, request)
            return
        if request.is_quantized:
            with _raise_value_error("student cannot be quantized by PT2E with XNNPACKQuantizer"):
                quantized = _quantize(program, inputs, request)
            program = _trace(quantized, inputs, request)
        for node in program.graph.nodes:  # a stack trace names files of the exporting machine
            node.meta.pop("stack_trace", None)
        names = " ".join(request.names)
        if request.format == "torch":
            program.example_inputs = None  # do not write the caller's data
            extra = {loading.COUNT: str(request.parameters), loading.NAMES: names}
            torch.export.save(program, path, extra_files=extra)
            return
        partitioner = extras.load(_PARTITIONER, "deploy").XnnpackPartitioner()
        lower = extras.load("executorch.exir", "deploy").to_edge_transform_and_lower
        constants = {loading.COUNT: request.parameters, loading.NAMES: names}
        with _raise_value_error("student cannot be lowered to ExecuTorch with XNNPACK"):
            edge = lower(program, partitioner=[partitioner], constant_methods=constants)
            executable = edge.to_executorch()
        with path.open("wb") as file:
            executable.write_to_file(file)


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], request: Request) -> ExportedProgram:
    """Trace a model for batches of any size, or, for ExecuTorch, of up to ``max_batch``."""
    index = torch.arange(min(_TRACED_SAMPLES, request.max_batch)) % len(inputs[0])
    example = tuple(tensor[index] for tensor in inputs)
    limit = request.max_batch if request.format == "executorch" else None
    batch = torch.export.Dim("batch", min=1, max=limit)
    shapes = {0: batch}
    with _raise_value_error("student cannot be traced by torch.export with batches of any size"):
        return torch.export.export(model, example, dynamic_shapes=((shapes,) * len(inputs),))


@contextlib.contextmanager
def _raise_value_error(text: str) -> Iterator[None]:
    """Re-raise exceptions, which may have private types of torch, as ValueError after ``text``."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).partition("Suggested fixes")[0].split())[:500]
        raise ValueError(f"{text}: {reason}") from error


def _write_onnx(
    path: pathlib.Path, program: ExportedProgram, inputs: tuple[Tensor, ...], request: Request
) -> None:
    exported: Any = torch.onnx.export(
        program, dynamo=True, input_names=request.names, output_names=["logits"], verbose=False
    )
    for node in exported.model.graph:  # the metadata names files of the exporting machine
        node.metadata_props.clear()
    exported.model.metadata_props[loading.COUNT] = str(request.parameters)
    if not request.is_quantized:
        exported.save(path, external_data=False)
        return
    quantization = extras.load("onnxruntime.quantization", "deploy")
    quantization.quantize_static(
        exported.model_proto,
        path,
        _CalibrationReader(inputs, request),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # Use weights of 7 bits. Without VNNI, x86 processors add products in 16 bits, which would
        # overflow for weights of 8 bits.
        reduce_range=True,
    )


class _CalibrationReader:
    """Give ONNX Runtime the batches that calibrate a model."""

    def __init__(self, inputs: tuple[Tensor, ...], request: Request) -> None:
        self._names, self._batches = request.names, _split(inputs, request)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch, or None after the last."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {name: part.numpy() for name, part in zip(self._names, batch, strict=True)}


def _quantize(program: ExportedProgram, inputs: tuple[Tensor, ...], request: Request) -> nn.Module:
    """Quantize a program statically by PT2E, with a scale for each output channel of a weight."""
    xnnpack, pt2e = extras.load(_QUANTIZER, "deploy"), extras.load(_PT2E, "deploy")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
    model = pt2e.prepare_pt2e(program.module(), quantizer)
    for batch in _split(inputs, request):
        model(*batch)
    quantized = pt2e.convert_pt2e(model)
    used = {node.target for node in quantized.graph.nodes if node.op == "get_attr"}
    # Delete the float32 weights, which int8 constants replace.
    for name in {name for name, _ in quantized.named_parameters()} - used:
        owner, _, attribute = name.rpartition(".")
        delattr(quantized.get_submodule(owner), attribute)
    return Logits(quantized, inputs)


def _split(inputs: tuple[Tensor, ...], request: Request) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, request.max_batch) for tensor in inputs), strict=True)
