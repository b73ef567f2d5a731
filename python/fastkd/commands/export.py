"""Implement ``fastkd export``: write a trained student as a program for a device."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

from torch.utils.data import DataLoader

from fastkd import batches, deployment, extras, validation
from fastkd.commands.config import Training, raise_as_config_error
from fastkd.commands.factories import ConfigError, Factories
from fastkd.deployment import exporting, writing


def export(
    training: Training,
    factories: Factories,
    path: str = "",
    format: Literal["onnx", "executorch", "torch"] = "onnx",
    quantize: Literal["none", "int8"] = "none",
    samples: int = 256,
    max_batch: int = 32,
) -> None:
    """Export the student of a distill command to ONNX, ExecuTorch or torch.export, also in int8.

    The options are those of the distill command. The weights come from that command's output
    folder, or from student_weights. Before path is written, the file is compared with the student
    on held-out data, or on training data if validation is not set.

    Args:
        training: the options of the training.
        factories: object that makes the models and the data.
        path: file to write, which ends in .onnx, .pte (executorch) or .pt2 (torch); in the output
            folder by default.
        format: format of the file.
        quantize: int8 for weights and activations of 8 bits.
        samples: number of training samples that calibrate int8, and of held-out samples on which
            file and student are compared. Of a DataLoader, the first batch is used.
        max_batch: largest batch of an ExecuTorch program.
    """
    training.require("student", "train", *([] if training.student_weights else ["output"]))
    folder = pathlib.Path(training.output)
    with raise_as_config_error():
        validation.check_count("samples", samples)
        validation.check_count("max_batch", max_batch, 2)
        target = path or folder / f"student{writing.SUFFIXES[format]}"
        exporting.check_path(target, format)
    writing.check_packages(format, quantize == "int8")
    extras.check("train", "safetensors.torch")
    weights = training.student_weights or str(folder / "student.safetensors")
    student = factories.make_model(
        "student", dataclasses.replace(training, student_weights=weights)
    )
    train = factories.make_data("train", training)
    held_out = factories.make_data("validation", training)
    exported = deployment.export(
        student,
        _take_inputs("train", train, samples),
        target,
        format,
        None if quantize == "none" else quantize,
        rows=None if held_out is None else _take_inputs("validation", held_out, samples),
        max_batch=max_batch,
    )
    print(exported)


def _take_inputs(name: str, data: Any, samples: int) -> Any:
    """Return the inputs of a loader's first batch, or of the first ``samples`` of a data set."""
    loader = data if isinstance(data, DataLoader) else DataLoader(data, samples)
    for batch in loader:
        return batches.split(batch).inputs
    raise ConfigError(f"{name} has no samples")
