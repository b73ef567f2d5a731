"""Implement ``fastkd report``: measure a teacher and its students."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from torch.utils.data import DataLoader

from fastkd import deployment, extras, reports, validation
from fastkd.commands.config import Training, raise_as_config_error
from fastkd.commands.factories import ConfigError, Factories
from fastkd.deployment import writing


def report(
    training: Training,
    factories: Factories,
    model: dict[str, str] = {},  # noqa: B006 - never changed
    title: str = "Distillation report",
    seconds: float = 1.0,
    threads: int | None = None,
    save: str = "",
) -> None:
    """Compare students with their teacher: size, latency, accuracy, calibration.

    The options are those of a distill command. The report compares the command's teacher with the
    student in the output folder, on held-out data. Without --config, modules must be in the working
    directory, or named by --module.

    Args:
        training: the options of the training.
        factories: object that makes the models and the data.
        model: more students, as --model.NAME=module:function@FILE.safetensors, or exported
            students, as --model.NAME=FILE.onnx, FILE.pte or FILE.pt2.
        title: title of the report.
        seconds: duration of each latency measurement.
        threads: number of CPU threads of PyTorch and of the runtimes of exported students;
            PyTorch's choice by default.
        save: folder for report.html, report.md, report.json and pictures.
    """
    training.require("teacher", "validation")
    with raise_as_config_error():
        validation.check_number("seconds", seconds, 0.0, float("inf"))
        validation.check_folder("save", save)
        if threads is not None:
            validation.check_count("threads", threads)
    students: dict[str, Training | str] = {}
    if training.student:
        training.require("output")
        weights = str(pathlib.Path(training.output) / "student.safetensors")
        students["distilled"] = dataclasses.replace(training, student_weights=weights)
    for name, text in model.items():
        if pathlib.Path(text).suffix in writing.SUFFIXES.values():
            students[name] = text
            continue
        function, _, weights = text.partition("@")
        students[name] = Training(student=function, student_weights=weights)
    if not students or "teacher" in students:
        raise ConfigError(
            "report needs at least one student, and none may be named teacher: give student or "
            "--model.NAME=module:function@FILE.safetensors"
        )
    extras.check("report", "rich", "matplotlib.figure")
    if training.teacher_weights or any(not isinstance(each, str) for each in students.values()):
        extras.check("train", "safetensors.torch")
    data = factories.make_data("validation", training)
    models: dict[str, Any] = {}
    # The students are made first, because the teacher's function may train the teacher: errors in
    # the students are raised before that.
    for name, options in students.items():
        if isinstance(options, Training):
            models[name] = factories.make_model("student", options)
            continue
        with raise_as_config_error(f"model.{name}"):
            deployment.load(options)  # a check; reports.report loads the file again
        models[name] = options
    result = reports.report(
        factories.make_model("teacher", training),
        models,
        data if isinstance(data, DataLoader) else DataLoader(data, training.batch_size),
        title=title,
        seconds=seconds,
        threads=threads,
    )
    if save:
        print(f"wrote {result.save(save) / 'report.html'}")
