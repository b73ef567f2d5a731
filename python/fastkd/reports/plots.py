"""Draw a report's figures: accuracy over latency or size, and reliability diagrams."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any

from fastkd import extras
from fastkd.reports import measure

if TYPE_CHECKING:
    from fastkd.reports import Report

CAPTIONS = {
    "tradeoff": "What the models reach, and what they cost. Larger dots take more bytes; vertical "
    "lines are 95 % intervals.",
    "reliability": "Share of correct answers by confidence; a calibrated model's bars end on the "
    "dashed line. Pale bars: fewer than 10 answers.",
}
TEACHER = "#7a8599"
STUDENTS = (
    *("#2f80d0", "#e07b39", "#2a9d74", "#b5539c", "#c9a227", "#6c5bd1"),
    *("#1fa3b8", "#d1495b", "#8c6a4f"),
)
# Color of text and lines, legible on white and on black. render_svg() replaces this color by the
# page's text color.
INK = "#737b86"
WIDE, NARROW = 9.0, 4.2  # widths of figures in inches, for desktops and for phones
FEW = 10  # bins with fewer rows are pale, because their accuracy is mostly chance


def choose_colors(report: Report) -> list[str]:
    """Return one color for each model."""
    return [TEACHER, *(STUDENTS[i % len(STUDENTS)] for i in range(len(report.models) - 1))]


def draw_figures(report: Report, width: float = WIDE) -> dict[str, Any]:
    """Draw the figures, and return them by name; reliability diagrams are drawn if labels exist."""
    figures = {"tradeoff": _draw_tradeoff(report, width)}
    if report.models[0].answers.accuracy is not None:
        figures["reliability"] = _draw_reliability(report, width)
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


def _draw_tradeoff(report: Report, width: float) -> Any:
    figure = _make_figure(width, 3.8)
    axes = figure.add_subplot()
    teacher = report.models[0]
    largest = max(model.size.bytes or 0 for model in report.models) or 1
    is_labeled = teacher.answers.accuracy is not None
    costs, axis = _choose_costs(report)
    points = []
    for model, cost, color in zip(report.models, costs, choose_colors(report), strict=True):
        answers: Any = model.answers
        y = 100 * answers.quality
        if is_labeled:
            low, high = 100 * answers.accuracy_low, 100 * answers.accuracy_high
            axes.vlines(cost, low, high, color=color, linewidth=1.5, alpha=0.7)
        area = max(40.0, 500 * (model.size.bytes or 0) / largest)
        axes.scatter([cost], [y], s=area, color=color, alpha=0.85, linewidths=0, zorder=3)
        points.append((y, cost, model.name, color))
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    _set_ticks(axes, width)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{'accuracy' if is_labeled else 'agreement with the teacher'} [%]")
    _set_style(axes)
    _label_points(axes, points, width)
    return figure


def _choose_costs(report: Report) -> tuple[list[float], str]:
    """Return each model's median latency for the smallest batch, and the label of the axis.

    The device is the first on which no speed ratio is withheld, or the first of all if a size is
    unknown. Without such a device, return kilobytes in place of latencies.
    """
    sizes = [model.size.bytes for model in report.models if model.size.bytes is not None]
    is_size_known = len(sizes) == len(report.models)
    for device, by_batch in report.models[0].latency.items():
        batch = min(by_batch)
        times = [model.latency[device][batch] for model in report.models]
        if all(latency.speedup for latency in times) or not is_size_known:
            place = measure.name_device(device)
            label = f"median latency on {place}, batch {batch} [ms]"
            return [1e3 * latency.p50 for latency in times], label
    return [max(size, 1) / 1e3 for size in sizes], "bytes on disk [kB]"


def _set_ticks(axes: Any, width: float) -> None:
    """Set a few ticks, written as 0.2 and not as 2 x 10^-1, even if the range is narrow."""
    low, high = axes.get_xlim()
    ticker = extras.load("matplotlib.ticker", "report")
    decades = math.log10(high / low)
    locator = ticker.LogLocator(subs=(1, 2, 5) if decades * WIDE < 3 * width else (1,))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4) if decades < 0.7 else locator)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()


def _shorten(name: str, width: float) -> str:
    """Return ``name``, cut if the name is too long for a figure of this width."""
    longest = 24 if width == WIDE else 14
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _label_points(axes: Any, points: list[tuple[float, float, str, str]], width: float) -> None:
    """Write the names in a column right of the axes, with a line from each name to its point.

    ``points``: (y, x, name, color). The names have the order of y. Names are at least 1/12 of the
    axes' height apart, or less if there are more than 12 names.
    """
    points.sort()
    heights = [axes.transLimits.transform((0, y))[1] for y, *_ in points]
    gap = 1 / max(12, len(points))
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        above = heights[i + 1] if i + 1 < len(heights) else 1 + gap
        heights[i] = min(heights[i], above - gap)
    for (y, x, name, color), height in zip(points, heights, strict=True):
        axes.annotate(
            _shorten(name, width), (x, y), xytext=(1.03, height), textcoords="axes fraction",
            va="center", color=INK, fontweight="bold", parse_math=False, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip


def _draw_reliability(report: Report, width: float) -> Any:
    columns = min(round(width / 3), len(report.models))
    lines = -(-len(report.models) // columns)
    figure = _make_figure(width * columns / round(width / 3), 3.1 * lines)
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
        axes.set_title(
            _shorten(model.name, width), fontsize=10, fontweight="bold", parse_math=False
        )
        axes.set_xlabel("confidence")
        if index % columns == 0:
            axes.set_ylabel("accuracy")
        error = 100 * (model.answers.calibration_error or 0.0)
        axes.text(0.04, 0.93, f"error {error:.1f} %", fontsize=9, va="top", color=INK)
        _set_style(axes)
    return figure


def render_png(figure: Any) -> bytes:
    """Render a figure as PNG without a background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
    return buffer.getvalue()


def render_svg(figure: Any, salt: str, kind: str) -> str:
    """Render a figure as an ``<svg>`` whose text and axes have the color of the page's text.

    ``kind``: the CSS class of the ``<svg>``. ``salt``: text that makes the ids in the ``<svg>``
    different from the ids in other figures of the page.
    """
    buffer = io.StringIO()
    with extras.load("matplotlib", "report").rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": salt}
    ):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, bbox_inches="tight")
    text = buffer.getvalue()
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
    text = text.replace("<svg", f'<svg class="{kind}"', 1).replace(INK, "currentColor")
    return text.replace("xlink:href", "href").strip()
