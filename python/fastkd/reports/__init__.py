"""Compare a teacher and its students: size, speed, accuracy and calibration.

:func:`report` measures the models and returns a :class:`Report`, which prints a table and writes
Markdown, JSON and a self-contained page of HTML. ``pip install fastkd[report]`` installs the
required packages.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd import _C, deployment, extras, validation
from fastkd.deployment.loading import check_model, is_model
from fastkd.reports import measure, memory, page, plots, tables


class Model(NamedTuple):
    """Hold the measurements of one model."""

    name: str
    size: measure.Size
    answers: measure.Answers
    latency: dict[str, dict[int, measure.Latency]]
    """Latencies by device, then by batch size."""
    peak_memory: int | None = None
    """Growth of CPU memory in bytes when the model is loaded and called; None if unknown."""


class Report(NamedTuple):
    """Hold the measured models, the teacher first.

    ``print`` shows a report as a table, and :meth:`save` writes the report in all formats.
    """

    title: str
    models: tuple[Model, ...]
    environment: dict[str, str]
    warnings: tuple[str, ...] = ()
    """Sentences about latencies that cannot be trusted, and about withheld ratios."""

    def __str__(self) -> str:
        """Return a table for the terminal."""
        return tables.format_terminal(self)

    def markdown(self) -> str:
        """Return a Markdown document, which shows the pictures that :meth:`save` writes."""
        return tables.format_markdown(self)

    def json(self) -> str:
        """Return all measurements as JSON, in seconds, bytes, nats, and shares from 0 to 1."""
        models = [
            {
                "name": model.name,
                **model.size._asdict(),
                "peak_memory": model.peak_memory,
                **model.answers._asdict(),
                "bins": [part._asdict() for part in model.answers.bins],
                "latency": {
                    device: {batch: times._asdict() for batch, times in by_batch.items()}
                    for device, by_batch in model.latency.items()
                },
            }
            for model in self.models
        ]
        return json.dumps(self._asdict() | {"models": models}, indent=2, allow_nan=False)

    def html(self) -> str:
        """Return the report as one page of HTML, which contains its pictures and loads nothing."""
        return page.make_page(self)

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Write ``report.html``, ``report.md``, ``report.json`` and the pictures.

        If writing fails, as on a full disk, the files of an earlier report remain unchanged.

        Returns:
            The folder.

        Raises:
            TypeError: if ``folder`` is not a path.
            ValueError: if ``folder`` or one of its parents is a file.
            OSError: if a file cannot be written.
        """
        folder = validation.check_folder("folder", folder)
        figures = plots.draw_figures(self)
        files = {f"{name}.png": plots.render_png(figure) for name, figure in figures.items()}
        files["report.html"] = self.html().encode()
        files["report.md"] = self.markdown().encode()
        files["report.json"] = f"{self.json()}\n".encode()
        folder.mkdir(parents=True, exist_ok=True)
        parts = folder / f".{secrets.token_hex(8)}"
        parts.mkdir()
        try:
            for name, data in files.items():
                (parts / name).write_bytes(data)
            for name in files:
                (parts / name).replace(folder / name)
        finally:
            shutil.rmtree(parts)
        return folder


def report(
    teacher: Any,
    students: Any,
    loader: Iterable[Any],
    *,
    title: str = "Distillation report",
    devices: Sequence[str | torch.device] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 1.0,
    threads: int | None = None,
    ignore_index: int = -100,
    dim: int = -1,
    show: bool = True,
) -> Report:
    """Measure a teacher and its students on the same data.

    A model is a module or a deployed program. A program is a ``torch.export`` program, an ONNX
    Runtime session, an ExecuTorch program, or the path of an ``.onnx``, ``.pte`` or ``.pt2`` file.
    :func:`fastkd.deployment.load` has the details. Programs may be quantized, and run on the CPU.

    - **Size**: parameters, and bytes of the file, or of a module's weights and buffers; shared
      tensors count once. An unknown figure is a dash in tables, and null in JSON.
    - **Peak memory**: the growth of resident memory on the CPU while the model is loaded (a module
      is copied) and called with the largest batch. Linux only.
    - **Answers**, over all rows of the loader that are not ignored: accuracy with its 95 % Wilson
      interval, cross entropy in nats, agreement and expected calibration error. The agreement is
      the share of rows on which model and teacher have the same most probable class. The
      calibration error is ``sum_b n_b / n |accuracy_b - confidence_b|`` over 15 equal bins b of
      confidence, with n_b of the n rows (Guo et al., "On Calibration of Modern Neural Networks",
      2017). Each model runs on its own device.
    - **Latency** of a forward pass on each device, on the loader's first inputs: median and 95th
      percentile. Models take turns, so that changes of the machine's speed affect all models.
      Throughput is the batch size divided by the median latency; tables show the throughput of the
      last of ``batch_sizes``. A ratio to the teacher's latency is withheld if two estimates of the
      ratio differ by more than 1.5x. On Linux, ratios are also withheld if the process often waited
      for a processor. ``warnings`` reports withheld ratios.

    The models run without gradients in evaluation mode, and are not changed. On another device than
    the model's, a copy of the model is measured. If a student's name has the word "alone", the
    report assumes that the student was trained without a teacher.

    Args:
        teacher: model that returns logits ``(B, ..., C)`` of B samples and C classes, or an output
            that has ``.logits``.
        students: a model, or a mapping of names to models, such as
            ``{"alone": module, "int8": "student.onnx"}``.
        loader: held-out batches in a form that :mod:`fastkd.batches` lists, with labels
            ``(B, ...)``. Without labels there is no accuracy, cross entropy or calibration error.
        title: heading. Default "Distillation report".
        devices: where to measure latency. Default: the CPU, and the GPU if the machine has a GPU
            and all models are modules.
        batch_sizes: batch sizes at which to measure latency. Default 1 and 32.
        seconds: duration of timing for each model, device and batch size. Default 1.
        threads: number of CPU threads of PyTorch and of runtimes that load files. Default:
            ``torch.get_num_threads()``.
        ignore_index: rows with this label are ignored. Default -100.
        dim: dimension of the classes in the logits. Default -1.
        show: print the table. Default True.

    Returns:
        A :class:`Report`, with the teacher as the first of ``models``.

    Raises:
        ImportError: before anything is measured, if matplotlib, Rich with ``show``, or the runtime
            of a program is not installed.
        TypeError: for arguments of a wrong type, such as models of unsupported types, or names that
            are not text.
        ValueError: for numbers out of range, no student, a student named ``teacher``, a file that
            does not exist, or a program with a device other than the CPU. For a loader without
            rows, labels that do not fit the logits, or models whose logits differ in their number
            of rows. For logits or a cross entropy that are not finite.

    Example:
        >>> import torch, fastkd
        >>> data = [(torch.randn(64, 16), torch.randint(4, (64,)))]
        >>> report = fastkd.report(
        ...     torch.nn.Linear(16, 4), torch.nn.Linear(16, 4), data, seconds=0.01, show=False
        ... )
        >>> [model.name for model in report.models]
        ['teacher', 'student']
    """
    named = _name_models(teacher, students)
    if not isinstance(title, str):
        raise TypeError(f"title must be text; got {type(title).__name__}")
    for name, value in (("devices", devices or ()), ("batch_sizes", batch_sizes)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a list or tuple; got {value!r}")
    if not batch_sizes or any(type(n) is not int or n < 1 for n in batch_sizes):
        raise ValueError(f"batch_sizes must be positive integers; got {batch_sizes!r}")
    validation.check_number("seconds", seconds, 0.0, math.inf)
    validation.check_ignore_index(ignore_index)
    if threads is not None:
        validation.check_count("threads", threads)
    # Report.save() needs matplotlib, and ``show`` needs Rich.
    extras.check("report", "matplotlib.figure", *(["rich"] if show else []))
    previous = torch.get_num_threads()
    torch.set_num_threads(threads or previous)
    try:
        models = {name: deployment.load(model) for name, model in named.items()}
        sizes = {name: measure.measure_size(model) for name, model in models.items()}
        resolved = _choose_devices(models, devices)
        environment = _describe_environment(resolved)
        answers, inputs = measure.measure_answers(models, loader, ignore_index, dim)
        latencies, warnings = measure.measure_latencies(
            models, inputs, resolved, batch_sizes, seconds
        )
        samples = measure.resize(inputs, max(batch_sizes))
        peaks = {n: memory.measure_peak_memory(model, samples) for n, model in models.items()}
    finally:
        torch.set_num_threads(previous)
    rows = (
        Model(name, sizes[name], answers[name], latencies[name], peaks[name]) for name in models
    )
    result = Report(title, tuple(rows), environment, tuple(warnings))
    if show:
        tables.show(result)
    return result


def _name_models(teacher: Any, students: Any) -> dict[str, Any]:
    """Return the models by name, the teacher first; raise for a model of an unsupported type."""
    named = {"student": students} if is_model(students) else students
    if not isinstance(named, Mapping):
        raise TypeError(
            "students must be a module, or a mapping of names to modules such as "
            f"{{'distilled': module}}; got {type(students).__name__}"
        )
    if not named:
        raise ValueError("students must be a module, or at least one by its name; got none")
    if "teacher" in named:
        raise ValueError("students: no student may be named 'teacher'")
    models = {"teacher": teacher, **named}
    for name, model in models.items():
        if not isinstance(name, str):
            raise TypeError(f"students must have names that are text; got {name!r}")
        check_model(name, model)
    return models


def _choose_devices(
    models: Mapping[str, nn.Module], devices: Sequence[str | torch.device] | None
) -> list[torch.device]:
    """Return the devices on which to measure latency; programs run on the CPU alone."""
    programs = [name for name, m in models.items() if isinstance(m, deployment.DeployedModel)]
    if devices is None:
        has_gpu = torch.cuda.is_available() and not programs
        devices = ["cpu", "cuda"] if has_gpu else ["cpu"]
    resolved = [torch.empty(0, device=device).device for device in devices]  # "cuda" becomes cuda:0
    if programs and any(device.type != "cpu" for device in resolved):
        raise ValueError(
            f"devices must be ['cpu'], where the program {programs[0]} runs; got {list(devices)}"
        )
    return resolved


def _describe_environment(devices: Sequence[torch.device]) -> dict[str, str]:
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", info.read_text(), re.M) if info.exists() else []
    processor = next(iter(names), platform.processor() or platform.machine())
    environment = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "fastkd": _C.version,
        "torch": torch.__version__,
        "CPU": processor,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if hasattr(os, "getloadavg"):  # Windows has no load average
        environment["load average at the start"] = f"{os.getloadavg()[0]:.2f}"
    for device in devices:
        if device.type == "cuda":
            environment[f"GPU ({device})"] = torch.cuda.get_device_name(device)
    return environment
