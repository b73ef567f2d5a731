"""A report as text: a table with one row for each figure and one column for each model."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkd import extras
from fastkd.reports import plots

if TYPE_CHECKING:
    from fastkd.reports import Model, Report

COUNTS = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
UNKNOWN = "-"
DURATIONS = (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0))


class Row(NamedTuple):
    """One figure of every model: a text, and a note such as its ratio to the teacher's."""

    label: str
    cells: list[tuple[str, str]]


def _scale(value: float, units: Sequence[tuple[str, float]]) -> tuple[str, str]:
    """Return three digits of a value and its unit, the largest that keeps it at least 1."""
    unit, scale = next((pair for pair in units if value < 999.5 * pair[1]), units[-1])
    return f"{value / scale:#.3g}".rstrip("."), unit


def format_count(value: float | None) -> str:
    """Format a number in three digits: 999, 1.23k, 25.6M; None is a dash."""
    if value is None:
        return UNKNOWN
    digits, unit = _scale(value, COUNTS)
    return f"{digits}{unit}" if unit else f"{value:.0f}"


def format_size(value: int | None) -> str:
    """Format a number of bytes in three digits: 10.5 MB; None is a dash."""
    if value is None:
        return UNKNOWN
    digits, unit = _scale(value, COUNTS)
    return f"{digits} {unit}B" if unit else f"{value} B"


def format_duration(seconds: float) -> str:
    """Format a duration in three digits: 42.0 µs, 1.23 ms."""
    return " ".join(_scale(seconds, DURATIONS))


def _format_percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _format_ratio(teacher: float | None, student: float | None, less: str, more: str) -> str:
    """Describe how many times less or more the student has; "" if a value is 0 or unknown."""
    if not teacher or not student:
        return ""
    ratio = teacher / student
    if 0.995 < ratio < 1.005:
        return "the same"
    times = max(ratio, 1 / ratio)
    digits = f"{times:#.3g}" if times < 99.95 else f"{times:,.0f}"
    return f"{digits}x {less if ratio > 1 else more}"


def _format_memory(value: int | None) -> str:
    """Format a peak of resident memory, which counts pages: small ones are not measured."""
    return "< 100 kB" if value is not None and value < 100_000 else format_size(value)


def make_rows(report: Report) -> list[Row]:
    """Make the rows of the table."""
    models = report.models
    answers: list[Any] = [model.answers for model in models]
    rows = []

    def add(label: str, texts: Iterable[str], notes: Iterable[str] = ()) -> None:
        rows.append(Row(label, list(zip_longest(texts, notes, fillvalue=""))))

    def compare(
        label: str, values: Sequence[Any], text: Callable[[Any], str], less: str, more: str
    ) -> None:
        ratios = (_format_ratio(values[0], value, less, more) for value in values[1:])
        add(label, map(text, values), ["", *ratios])

    compare("parameters", [m.size.parameters for m in models], format_count, "fewer", "more")
    compare("bytes on disk", [m.size.bytes for m in models], format_size, "smaller", "larger")
    if any(model.peak_memory is not None for model in models):
        add("peak memory", [_format_memory(model.peak_memory) for model in models])
    if answers[0].accuracy is not None:
        intervals = (f"{100 * a.accuracy_low:.1f} to {100 * a.accuracy_high:.1f}" for a in answers)
        add("accuracy", [_format_percent(a.accuracy) for a in answers], intervals)
        add("cross entropy, nats", [f"{a.cross_entropy:.3f}" for a in answers])
        add("calibration error", [_format_percent(a.calibration_error) for a in answers])
    add("agrees with the teacher", ["", *(_format_percent(a.agreement) for a in answers[1:])])
    for device, by_batch in models[0].latency.items():
        name = "CPU" if device == "cpu" else f"GPU {device}"
        for batch in by_batch:
            times = [m.latency[device][batch] for m in models]
            label = f"{name}, batch {batch}"
            medians = [t.p50 for t in times]
            compare(f"{label}: median", medians, format_duration, "faster", "slower")
            add(f"{label}: 95th percentile", [format_duration(t.p95) for t in times])
        add(f"{name}: samples a second", [format_count(t.throughput) for t in times])
    return rows


def summarize_cost(report: Report, model: Model) -> str:
    """Describe a student's size and latency relative to the teacher, or the teacher's own."""
    teacher = report.models[0]
    parameters, is_student = model.size.parameters, model is not teacher
    ratio = _format_ratio(teacher.size.parameters, parameters, "fewer", "more")
    count = ratio.replace("the same", "as many") if is_student else ""
    parts = [f"{count or format_count(parameters)} parameters"]
    if parameters is None:
        parts = [format_size(model.size.bytes)]
    for device, by_batch in teacher.latency.items():
        batch = min(by_batch)
        seconds = model.latency[device][batch].p50
        speed = format_duration(seconds)
        if is_student:
            speed = _format_ratio(by_batch[batch].p50, seconds, "faster", "slower")
            speed = speed.replace("the same", "as fast")
        parts.append(f"{speed} on {'CPU' if device == 'cpu' else 'GPU'}")
    return ", ".join(parts)


def summarize_quality(model: Model) -> tuple[str, str]:
    """Return a model's accuracy, or without labels its agreement, and the figure's name."""
    if model.answers.accuracy is None:
        return _format_percent(model.answers.agreement), "agreement with the teacher"
    return _format_percent(model.answers.accuracy), "accuracy"


def summarize(report: Report) -> list[str]:
    """Return a line for each model: its quality and its cost."""
    return [
        f"{model.name}: {' '.join(summarize_quality(model))}, {summarize_cost(report, model)}"
        for model in report.models
    ]


def describe_method(report: Report) -> str:
    """Describe how the figures were measured."""
    calls = [
        times.calls
        for model in report.models
        for by_batch in model.latency.values()
        for times in by_batch.values()
    ]
    return (
        f"{report.models[0].answers.rows:,} rows. Accuracy with its 95 % Wilson interval; expected "
        "calibration error over 15 bins of confidence. Latency of a forward pass: models took "
        f"turns in one process, {min(calls, default=0)} calls or more each."
    )


def show(report: Report, console: Any = None) -> None:
    """Print the table and the summary to a Rich console, by default the terminal's."""
    text = extras.load("rich.text", "report").Text  # Rich would read markup in a str
    table = extras.load("rich.table", "report").Table(
        title=text(report.title, style="table.title"),
        box=extras.load("rich.box", "report").SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("")
    for model in report.models:
        table.add_column(text(model.name), justify="right")
    for row in make_rows(report):
        cells = [text(figure) + text(f"\n{note}".rstrip(), "dim") for figure, note in row.cells]
        table.add_row(text(row.label), *cells)
    console = console or extras.load("rich.console", "report").Console()
    console.print(table)
    for line in summarize(report):
        console.print(text(line), soft_wrap=True)


def format_terminal(report: Report) -> str:
    """Return what :func:`show` prints, without colors."""
    console = extras.load("rich.console", "report").Console(file=io.StringIO(), width=100)
    show(report, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def format_markdown(report: Report) -> str:
    """Return a Markdown document with the table, the pictures and the method."""
    names = [_escape(model.name) for model in report.models]
    lines = [f"# {_escape(report.title)}", ""]
    lines += [f"- {_escape(line)}" for line in summarize(report)]
    lines += ["", "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in make_rows(report):
        cells = [f"{figure} ({note})" if note else figure for figure, note in row.cells]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in plots.draw_figures(report):
        lines += [f"![{plots.CAPTIONS[name]}]({name}.png)", ""]
    lines += [describe_method(report), ""]
    lines += [", ".join(f"{key} {value}" for key, value in report.environment.items()), ""]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Escape what Markdown would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text).replace("\n", " ")
