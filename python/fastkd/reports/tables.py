"""A report as text: one row for each figure, one column for each model."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkd import extras

if TYPE_CHECKING:
    from fastkd.reports import Model, Report


class Cell(NamedTuple):
    """A figure, and how it compares with the teacher's."""

    text: str
    note: str = ""


class Row(NamedTuple):
    """A figure of every model."""

    label: str
    cells: tuple[Cell, ...]


def count(value: float) -> str:
    """A number of things, in three digits.

    Example:
        >>> count(999), count(1234), count(25_600_000)
        ('999', '1.23k', '25.6M')
    """
    for unit, scale in (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if value < 999.5 * scale or unit == "T":
            break
    return f"{value:.0f}" if not unit else f"{_digits(value / scale)}{unit}"


def size(value: int) -> str:
    """Bytes, in three digits.

    Example:
        >>> size(10_500_000)
        '10.5 MB'
    """
    text = count(value)
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def duration(seconds: float) -> str:
    """A time, in three digits.

    Example:
        >>> duration(0.00123), duration(4.2e-5)
        ('1.23 ms', '42.0 µs')
    """
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if seconds < 0.9995e3 * scale or unit == "s":
            break
    return f"{_digits(seconds / scale)} {unit}"


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def percent(share: float) -> str:
    """A share with one decimal.

    Example:
        >>> percent(0.9642)
        '96.4 %'
    """
    return f"{100 * share:.1f} %"


def _times(teacher: float, student: float, less: str, more: str) -> str:
    """How many times less or more the student has; nothing where one of them has nothing."""
    if not teacher or not student:
        return ""
    ratio = teacher / student
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{_digits(ratio)}x {less}" if ratio > 1 else f"{_digits(1 / ratio)}x {more}"


def rows(report: Report) -> list[Row]:
    """The table."""
    teacher, models = report.models[0], report.models

    def ratios(label: str, values: list[float], text: Any, less: str, more: str) -> Row:
        notes = [_times(values[0], value, less, more) for value in values]
        cells = zip(values, ["", *notes[1:]], strict=True)
        return Row(label, tuple(Cell(text(value), note) for value, note in cells))

    found = [
        ratios("parameters", [m.size.parameters for m in models], count, "fewer", "more"),
        ratios("bytes on disk", [m.size.bytes for m in models], size, "smaller", "larger"),
    ]
    if teacher.answers.accuracy is not None:
        found += _labelled(models)
    agreement = [Cell(percent(model.answers.agreement)) for model in models[1:]]
    found.append(Row("agrees with the teacher", (Cell(""), *agreement)))
    for device, by_batch in teacher.latency.items():
        name = device.upper() if device == "cpu" else f"GPU {device}"
        for batch in by_batch:
            times = [m.latency[device][batch] for m in models]
            label = f"{name}, batch {batch}"
            medians = [t.p50 for t in times]
            found.append(ratios(f"{label}: median", medians, duration, "faster", "slower"))
            found.append(
                Row(f"{label}: 95th percentile", tuple(Cell(duration(t.p95)) for t in times))
            )
        found.append(
            Row(f"{name}: samples a second", tuple(Cell(count(t.throughput)) for t in times))
        )
    return found


def _labelled(models: tuple[Model, ...]) -> list[Row]:
    """The figures that need labels."""
    answers = [model.answers for model in models]
    accuracy, entropy, error = [], [], []
    for a in answers:
        assert a.accuracy is not None and a.accuracy_low is not None
        assert a.accuracy_high is not None and a.cross_entropy is not None
        assert a.calibration_error is not None
        low, high = 100 * a.accuracy_low, 100 * a.accuracy_high
        accuracy.append(Cell(percent(a.accuracy), f"{low:.1f} to {high:.1f}"))
        entropy.append(Cell(f"{a.cross_entropy:.3f}"))
        error.append(Cell(percent(a.calibration_error)))
    return [
        Row("accuracy", tuple(accuracy)),
        Row("cross entropy, nats", tuple(entropy)),
        Row("calibration error", tuple(error)),
    ]


def headline(report: Report, model: Model) -> str:
    """What a model saves, in a few words; of the teacher, how large and slow it is."""
    teacher = report.models[0]
    parameters = model.size.parameters
    fewer = ""
    if model is not teacher:
        fewer = _times(teacher.size.parameters, parameters, "fewer", "more")
    found = [f"{fewer.replace('the same', 'as many') or count(parameters)} parameters"]
    for device, by_batch in teacher.latency.items():
        batch = min(by_batch)
        seconds = model.latency[device][batch].p50
        speed = duration(seconds)
        if model is not teacher:
            speed = _times(by_batch[batch].p50, seconds, "faster", "slower")
            speed = speed.replace("the same", "as fast")
        found.append(f"{speed} on {'CPU' if device == 'cpu' else 'GPU'}")
    return ", ".join(found)


def quality(model: Model) -> tuple[str, str]:
    """The figure that a model is judged by, and its name."""
    if model.answers.accuracy is None:
        return percent(model.answers.agreement), "agreement with the teacher"
    return percent(model.answers.accuracy), "accuracy"


def headlines(report: Report) -> list[str]:
    """A line for each model."""
    found = []
    for model in report.models:
        share, name = quality(model)
        found.append(f"{model.name}: {share} {name}, {headline(report, model)}")
    return found


METHOD = (
    "{rows} rows. Accuracy with its 95 % Wilson interval; expected calibration error over 15 bins "
    "of confidence. Latency of a forward pass: models took turns in one process, {calls} calls or "
    "more each."
)


def method(report: Report) -> str:
    """How it was measured, in a sentence or two."""
    calls = [
        times.calls
        for model in report.models
        for by_batch in model.latency.values()
        for times in by_batch.values()
    ]
    return METHOD.format(rows=f"{report.models[0].answers.rows:,}", calls=min(calls, default=0))


def _table(report: Report) -> Any:
    text = extras.load("rich.text", "report").Text  # unlike str, it is shown without markup
    table = extras.load("rich.table", "report").Table(
        title=text(report.title, style="table.title"),
        box=extras.load("rich.box", "report").SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("")
    for model in report.models:
        table.add_column(text(model.name), justify="right")
    for row in rows(report):
        cells = [
            text(cell.text) + text(f"\n{cell.note}" if cell.note else "", style="dim")
            for cell in row.cells
        ]
        table.add_row(text(row.label), *cells)
    return table


def show(report: Report) -> None:
    """Prints the table, in colours where the terminal has them."""
    console = extras.load("rich.console", "report").Console()
    console.print(_table(report))
    for line in headlines(report):
        console.print(line, markup=False, emoji=False, highlight=False)


def terminal(report: Report) -> str:
    """What :func:`show` prints, without colours."""
    console = extras.load("rich.console", "report").Console(file=io.StringIO(), width=100)
    console.print(_table(report))
    text: str = console.file.getvalue()
    return "\n".join([*(line.rstrip() for line in text.splitlines()), *headlines(report)])


def markdown(report: Report) -> str:
    """A document with the table, the pictures and how it was measured."""
    from fastkd.reports import plots

    names = [_escaped(model.name) for model in report.models]
    lines = [f"# {_escaped(report.title)}", ""]
    lines += [f"- {_escaped(line)}" for line in headlines(report)]
    lines += ["", "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in rows(report):
        cells = [f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row.cells]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in plots.figures(report):
        lines += [f"![{plots.CAPTIONS[name]}]({name}.png)", ""]
    lines += [method(report), ""]
    lines += [", ".join(f"{key} {value}" for key, value in report.environment.items()), ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")
