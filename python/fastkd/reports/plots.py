"""A report's figures: accuracy over latency, and reliability diagrams of the confidence."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from fastkd import extras

if TYPE_CHECKING:
    from fastkd.reports import Report

CAPTIONS = {
    "tradeoff": "Accuracy over latency. Larger dots have more parameters; lines are 95 % "
    "intervals.",
    "reliability": "Share of correct answers by confidence; a calibrated model's bars end on the "
    "dashed line. Pale bars: fewer than 10 answers.",
}
TEACHER = "#7a8599"
STUDENTS = ("#2f80d0", "#e07b39", "#2a9d74", "#b5539c", "#c9a227", "#6c5bd1")
INK = "#1a2b3c"  # text and lines; in the page it becomes the page's text color
FEW = 10  # bins with fewer rows are pale, because their accuracy is mostly chance


def choose_colors(report: Report) -> list[str]:
    """Return one color for each model."""
    return [TEACHER, *(STUDENTS[i % len(STUDENTS)] for i in range(len(report.models) - 1))]


def draw_figures(report: Report) -> dict[str, Any]:
    """Draw the matplotlib figures that the measurements allow, by name."""
    figures = {"tradeoff": _draw_tradeoff(report)} if report.models[0].latency else {}
    if report.models[0].answers.accuracy is not None:
        figures["reliability"] = _draw_reliability(report)
    return figures


def _make_figure(width: float, height: float) -> Any:
    return extras.load("matplotlib.figure", "report").Figure(
        (width, height), layout="constrained", facecolor="none"
    )


def _set_style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
    axes.tick_params(which="both", colors=INK, length=3)
    axes.grid(color=INK, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)


def _draw_tradeoff(report: Report) -> Any:
    device, by_batch = next(iter(report.models[0].latency.items()))
    batch = min(by_batch)
    figure = _make_figure(9, 3.8)
    axes = figure.add_subplot()
    largest = max(model.size.parameters or 0 for model in report.models) or 1
    is_labelled = report.models[0].answers.accuracy is not None
    for model, color in zip(report.models, choose_colors(report), strict=True):
        answers: Any = model.answers
        x = 1e3 * model.latency[device][batch].p50
        y = 100 * (answers.accuracy if is_labelled else answers.agreement)
        if is_labelled:
            low, high = 100 * answers.accuracy_low, 100 * answers.accuracy_high
            axes.vlines(x, low, high, color=color, linewidth=1.5, alpha=0.7)
        area = max(40.0, 700 * (model.size.parameters or 0) / largest)
        axes.scatter([x], [y], s=area, color=color, alpha=0.85, linewidths=0, zorder=3)
        axes.annotate(
            model.name, (x, y), xytext=(6 + area**0.5 / 2, 0), textcoords="offset points",
            va="center", color=INK, fontweight="bold", parse_math=False,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    # A few ticks, written as 0.2 and not as 2 x 10^-1, even if the range is narrow.
    low, high = axes.get_xlim()
    ticker = extras.load("matplotlib.ticker", "report")
    is_narrow = high / low < 5
    locator = ticker.MaxNLocator(5) if is_narrow else ticker.LogLocator(subs=(1, 2, 5))
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    place = "CPU" if device == "cpu" else f"GPU ({device})"
    axes.set_xlabel(f"median latency on {place}, batch {batch} [ms]")
    axes.set_ylabel(f"{'accuracy' if is_labelled else 'agreement with the teacher'} [%]")
    _set_style(axes)
    return figure


def _draw_reliability(report: Report) -> Any:
    columns = min(3, len(report.models))
    lines = -(-len(report.models) // columns)
    figure = _make_figure(3 * columns, 3.1 * lines)
    for index, (model, color) in enumerate(zip(report.models, choose_colors(report), strict=True)):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=1, linestyle="--")
        bins = model.answers.bins
        axes.bar(
            [(number + 0.5) / len(bins) for number in range(len(bins))],
            [part.accuracy for part in bins],
            0.9 / len(bins),
            color=[(color, 0.9 if part.rows >= FEW else 0.3) for part in bins],
        )
        ticks = [0, 0.5, 1]
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=ticks, yticks=ticks)
        axes.set_title(model.name, fontsize=10, fontweight="bold", parse_math=False)
        axes.set_xlabel("confidence")
        if index % columns == 0:
            axes.set_ylabel("accuracy")
        error = 100 * (model.answers.calibration_error or 0.0)
        axes.text(0.04, 0.93, f"error {error:.1f} %", fontsize=9, va="top", color=INK)
        _set_style(axes)
    return figure


def render_png(figure: Any) -> bytes:
    """Render a figure as PNG on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", bbox_inches="tight")
    return buffer.getvalue()


def render_svg(figure: Any, salt: str) -> str:
    """Render a figure as an ``<svg>`` element whose text and lines have the page's color.

    ``salt`` makes the element's ids different from those of the page's other figures.
    """
    buffer = io.StringIO()
    with extras.load("matplotlib", "report").rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt}
    ):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, bbox_inches="tight")
    text = buffer.getvalue()
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    return text.replace("xlink:href", "href").replace(INK, "currentColor").strip()
