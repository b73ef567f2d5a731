"""A report's pictures: is confidence to be trusted, and what does accuracy cost?"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from fastkd import extras

if TYPE_CHECKING:
    from fastkd.reports import Report

CAPTIONS = {
    "tradeoff": "What accuracy costs. Larger dots have more parameters; lines are 95 % intervals.",
    "reliability": "How often answers of each confidence are right; on the dashed line, confidence "
    "can be taken at its word. Pale bars: fewer than 10 answers.",
}
TEACHER = "#7a8599"
STUDENTS = ("#2f80d0", "#e07b39", "#2a9d74", "#b5539c", "#c9a227", "#6c5bd1")
INK = "#1a2b3c"  # text and lines; on the page, the page's own colour
FEW = 10  # bins of fewer rows are pale: chance


def colours(report: Report) -> list[str]:
    """One for each model."""
    return [TEACHER, *(STUDENTS[i % len(STUDENTS)] for i in range(len(report.models) - 1))]


def figures(report: Report) -> dict[str, Any]:
    """matplotlib Figures by name, those that the data allow."""
    found = {"tradeoff": _tradeoff(report)} if report.models[0].latency else {}
    if report.models[0].answers.accuracy is not None:
        found["reliability"] = _reliability(report)
    return found


def _figure(width: float, height: float) -> Any:
    return extras.load("matplotlib.figure", "report").Figure(
        (width, height), layout="constrained", facecolor="none"
    )


def _style(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=INK, alpha=0.4)
    axes.tick_params(which="both", colors=INK, length=3)
    axes.grid(color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)


def _tradeoff(report: Report) -> Any:
    device, by_batch = next(iter(report.models[0].latency.items()))
    batch = min(by_batch)
    figure = _figure(9, 3.8)
    axes = figure.add_subplot()
    largest = max(model.size.parameters for model in report.models) or 1
    labelled = report.models[0].answers.accuracy is not None
    for model, colour in zip(report.models, colours(report), strict=True):
        answers, x = model.answers, 1e3 * model.latency[device][batch].p50
        y = 100 * (answers.agreement if answers.accuracy is None else answers.accuracy)
        if answers.accuracy_low is not None and answers.accuracy_high is not None:
            axes.plot(
                [x, x],
                [100 * answers.accuracy_low, 100 * answers.accuracy_high],
                color=colour,
                linewidth=1.5,
                alpha=0.7,
            )
        area = max(40.0, 700 * model.size.parameters / largest)
        axes.scatter([x], [y], s=area, color=colour, alpha=0.85, linewidths=0, zorder=3)
        axes.annotate(
            model.name,
            (x, y),
            xytext=(6 + area**0.5 / 2, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontweight="bold",
            parse_math=False,
        )
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    _plain_ticks(axes)
    where = "CPU" if device == "cpu" else f"GPU ({device})"
    axes.set_xlabel(f"median latency on {where}, batch {batch} [ms]")
    axes.set_ylabel(f"{'accuracy' if labelled else 'agreement with the teacher'} [%]")
    _style(axes)
    return figure


def _plain_ticks(axes: Any) -> None:
    """0.2, not 2 times 10 to the minus 1; a few of them, however narrow the range."""
    ticker = extras.load("matplotlib.ticker", "report")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    low, high = axes.get_xlim()
    if high / low < 5:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def _reliability(report: Report) -> Any:
    columns = min(3, len(report.models))
    lines = -(-len(report.models) // columns)
    figure = _figure(3 * columns, 3.1 * lines)
    for place, (model, colour) in enumerate(zip(report.models, colours(report), strict=True)):
        axes = figure.add_subplot(lines, columns, place + 1)
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=1, linestyle="--")
        bins = model.answers.bins
        width = 1 / len(bins)
        for number, one in enumerate(bins):
            if one.rows:
                axes.bar(
                    (number + 0.5) * width,
                    one.accuracy,
                    0.9 * width,
                    color=colour,
                    alpha=0.9 if one.rows >= FEW else 0.3,
                )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_title(model.name, fontsize=10, fontweight="bold", parse_math=False)
        axes.set_xlabel("confidence")
        if place % columns == 0:
            axes.set_ylabel("share that is right")
        error = 100 * (model.answers.calibration_error or 0.0)
        axes.text(0.04, 0.93, f"error {error:.1f} %", fontsize=9, va="top", color=INK)
        _style(axes)
    return figure


def png(figure: Any) -> bytes:
    """A picture on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


def svg(figure: Any, salt: str) -> str:
    """An element to put into a page, whose text and lines have the page's colour.

    ``salt`` keeps the names in it apart from another picture's on the same page.
    """
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with extras.load("matplotlib", "report").rc_context(settings):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, bbox_inches="tight")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: (?:(\w+) )?([\d.]+px)[^;\"]*", _font, text)
    return text.replace("xlink:href", "href").replace(INK, "currentColor").strip()


def _font(found: re.Match[str]) -> str:
    weight = found[1] or "normal"
    return f"font-size: {found[2]}; font-weight: {weight}"
