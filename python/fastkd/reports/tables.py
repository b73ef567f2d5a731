"""Format a report as a table with a row for each measurement and a column for each model."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkd import extras
from fastkd.reports import measure, plots

if TYPE_CHECKING:
    from fastkd.reports import Report

COUNTS = (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
UNKNOWN = "–"
DURATIONS = (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0))


class Row(NamedTuple):
    """Hold one measurement: for each model, a text and a note, such as a ratio to the teacher."""

    label: str
    cells: list[tuple[str, str]]


def _scale(value: float, units: Sequence[tuple[str, float]]) -> tuple[str, str]:
    """Return a value in three digits, and the first unit in which it is below 1000, or the last."""
    unit, scale = next((pair for pair in units if value < 999.5 * pair[1]), units[-1])
    return f"{value / scale:#.3g}".rstrip("."), unit


def format_count(value: float) -> str:
    """Format a number in three digits: 999, 1.23k, 25.6M."""
    digits, unit = _scale(value, COUNTS)
    return f"{digits}{unit}" if unit else f"{value:.0f}"


def format_size(value: int) -> str:
    """Format a number of bytes in three digits: 10.5 MB."""
    digits, unit = _scale(value, COUNTS)
    return f"{digits} {unit}B" if unit else f"{value} B"


def format_duration(seconds: float) -> str:
    """Format a duration in three digits: 42.0 µs, 1.23 ms."""
    return " ".join(_scale(seconds, DURATIONS))


def _format_percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _format_ratio(ratio: float | None, less: str, more: str) -> str:
    """Format a ratio of teacher to student, such as "8.46x less" or "3,650x more"; "" for None."""
    if not ratio:
        return ""
    if 0.995 < ratio < 1.005:
        return "the same"
    times = max(ratio, 1 / ratio)
    digits = f"{times:#.3g}" if times < 99.95 else f"{times:,.0f}"
    return f"{digits}x {less if ratio > 1 else more}"


def _format_memory(value: int | None) -> str:
    """Format a peak of resident memory, which whole pages make inexact below 100 kB."""
    if value is None:
        return UNKNOWN
    return "< 100 kB" if value < 100_000 else format_size(value)


def make_rows(report: Report) -> list[Row]:
    """Make the rows of a report's table, one for each measurement."""
    models = report.models
    answers: list[Any] = [model.answers for model in models]
    rows = []

    def add(label: str, texts: Iterable[str], notes: Iterable[str] = ()) -> None:
        rows.append(Row(label, list(itertools.zip_longest(texts, notes, fillvalue=""))))

    def add_size(label: str, values: Sequence[int | None], text: Any, less: str, more: str) -> None:
        first = values[0] or 0
        notes = [_format_ratio(first / n if n else None, less, more) for n in values[1:]]
        add(label, [UNKNOWN if n is None else text(n) for n in values], ["", *notes])

    add_size("parameters", [m.size.parameters for m in models], format_count, "fewer", "more")
    add_size("bytes on disk", [m.size.bytes for m in models], format_size, "smaller", "larger")
    if any(model.peak_memory is not None for model in models):
        add("peak memory", [_format_memory(model.peak_memory) for model in models])
    if answers[0].accuracy is not None:
        intervals = (f"{100 * a.accuracy_low:.1f} to {100 * a.accuracy_high:.1f}" for a in answers)
        add("accuracy", [_format_percent(a.accuracy) for a in answers], intervals)
        add("cross entropy, nats", [f"{a.cross_entropy:.3f}" for a in answers])
        add("calibration error", [_format_percent(a.calibration_error) for a in answers])
    add("agrees with the teacher", ["", *(_format_percent(a.agreement) for a in answers[1:])])
    for device, by_batch in models[0].latency.items():
        name = measure.name_device(device)
        for batch in by_batch:
            times = [m.latency[device][batch] for m in models]
            label = f"{name}, batch {batch}"
            ratios = [_format_ratio(t.speedup, "faster", "slower") or "withheld" for t in times]
            add(f"{label}: median", [format_duration(t.p50) for t in times], ["", *ratios[1:]])
            add(f"{label}: p95", [format_duration(t.p95) for t in times])
        add(f"{name}: samples a second", [format_count(t.throughput) for t in times])
    return rows


def summarize(report: Report) -> str:
    """Return a sentence about the best distilled student, or about the only student."""
    teacher, *students = report.models
    trained_alone = [m for m in students if re.search("(?<![a-z])alone(?![a-z])", m.name.lower())]
    others = [model for model in students if model not in trained_alone]
    best = max(others or students, key=lambda model: model.answers.quality)
    alone = max(trained_alone, key=lambda model: model.answers.quality, default=None)
    answers: Any = best.answers
    if answers.accuracy is None or not teacher.answers.accuracy:
        text = f"agrees with the teacher on {_format_percent(answers.agreement)} of the rows"
    else:
        share = _format_percent(answers.accuracy / teacher.answers.accuracy)
        text = f"keeps {share} of the teacher's accuracy"
    if teacher.size.bytes and best.size.bytes:
        ratio = teacher.size.bytes / best.size.bytes
        text += f" at {f'1/{ratio:,.0f} of' if ratio >= 1.5 else f'{1 / ratio:.2g}x'} its size"
    for device, by_batch in best.latency.items():
        if speed := _format_ratio(by_batch[min(by_batch)].speedup, "faster", "slower"):
            text += f", {speed.replace('the same', 'as fast')} on {measure.name_device(device)}"
    if alone is not None and alone is not best and answers.accuracy is not None:
        other: Any = alone.answers
        points = 100 * (answers.accuracy - other.accuracy)
        text += f"; {abs(points):.1f} points {'below' if points < 0 else 'above'} training alone"
        low, high = sorted([answers, other], key=lambda each: each.accuracy)
        if low.accuracy_high >= high.accuracy_low:
            text += ", a difference within the intervals"
    return f"{best.name} {text}."


def describe_method(report: Report) -> str:
    """Return sentences about the method of measurement."""
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
    """Print a report; a table that is wider than the console is split by models."""
    console = console or extras.load("rich.console", "report").Console()
    text = extras.load("rich.text", "report").Text  # in a str, Rich would interpret markup
    console.print(text(report.title, "bold"))
    console.print(text(summarize(report)))
    for warning in report.warnings:
        console.print(text(warning, "yellow"))
    rows = make_rows(report)
    cell_width = 2 + max(len(part) for row in rows for cell in row.cells for part in cell)
    label_width = 2 + max(len(row.label) for row in rows)
    columns = max(1, (console.width - label_width) // cell_width)
    for start in range(0, len(report.models), columns):
        part = slice(start, start + columns)
        table = extras.load("rich.table", "report").Table(
            box=extras.load("rich.box", "report").SIMPLE_HEAD
        )
        table.add_column("")
        for model in report.models[part]:
            table.add_column(text(model.name), justify="right", overflow="fold")
        for row in rows:
            cells = [
                text(figure) + text(f"\n{note}".rstrip(), "dim") for figure, note in row.cells[part]
            ]
            table.add_row(text(row.label), *cells)
        console.print(table)
    console.print(text(describe_environment(report), "dim"))


def format_terminal(report: Report) -> str:
    """Return the text that :func:`show` prints on 80 columns, without colors."""
    console = extras.load("rich.console", "report").Console(file=io.StringIO(), width=80)
    show(report, console)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def format_markdown(report: Report) -> str:
    """Return a Markdown document with the table, the pictures and the method."""
    names = [_escape(model.name) for model in report.models]
    lines = [f"# {_escape(report.title)}", "", f"**{_escape(summarize(report))}**", ""]
    lines += [f"> {_escape(warning)}\n" for warning in report.warnings]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in make_rows(report):
        cells = [f"{figure} ({note})" if note else figure for figure, note in row.cells]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in plots.draw_figures(report):
        lines += [f"![{plots.CAPTIONS[name]}]({name}.png)", ""]
    lines += [describe_method(report), "", _escape(describe_environment(report)), ""]
    return "\n".join(lines)


def describe_environment(report: Report) -> str:
    """Return the report's ``environment``, such as CPU, versions and load, as text."""
    return ", ".join(f"{key} {value}" for key, value in report.environment.items())


def _escape(text: str) -> str:
    """Escape the characters that Markdown would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text).replace("\n", " ")
