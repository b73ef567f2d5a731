"""Draw overview.png (times relative to fastkd) and scaling.png (times in each scaling series)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

from benchmarks import report

Results = dict[str, Any]

INK = "#7d8590"  # readable on white and on the dark backgrounds of GitHub and of the docs
COLORS = {
    "fastkd": "#2a9d6f",
    "eager": "#8d99ae",
    "eager fp32": "#67748e",
    "torch.compile": "#e09f3e",
    "torch.compile best": "#b5651d",
    "Liger KL + CE": "#9d8189",
}
LABELS = {
    "eager": "eager PyTorch",
    "eager fp32": "eager, float32 inside",
    "torch.compile best": "torch.compile, best mode",
}
OVERVIEW = ("imagenet-1k", "llama-2", "gpt-2", "llama-3", "qwen", "gemma")
NAMES = {
    "imagenet-1k": "ImageNet-1k",
    "llama-2": "Llama-2",
    "gpt-2": "GPT-2",
    "llama-3": "Llama-3",
    "qwen": "Qwen",
    "gemma": "Gemma",
}


# Settings of matplotlib for pictures that are readable on light and on dark pages.
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
    "savefig.dpi": 160,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


def _select_overview(results: Results) -> list[Results]:
    """Return at most six cases, one for each model and dtype."""
    wanted: tuple[str, ...] = OVERVIEW
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    if results["environment"]["kind"] == "cuda":
        wanted = ("imagenet-1k", "llama-2", "llama-3", "gemma")
        dtypes = ("bf16",)
    firsts: dict[tuple[str, str], Results] = {}
    for case in results["cases"]:
        name = case["name"].split(",")[0]
        small = case["name"].endswith("small batch")
        usable = case["gradient"] and report.compute_ratio(case, "fastkd") and not small
        if name in wanted and usable and case["dtype"] in dtypes:
            firsts.setdefault((name, case["dtype"]), case)
    compiled = [case for case in firsts.values() if report.compute_ratio(case, "torch.compile")]
    chosen = compiled if len(compiled) >= 3 else list(firsts.values())
    chosen.sort(
        key=lambda case: (OVERVIEW.index(case["name"].split(",")[0]), case["dtype"] == "bf16")
    )
    return chosen[:6]


def draw_overview(results: Results, path: Path) -> None:
    """Draw times of the baselines in ``COLORS`` relative to fastkd, for at most six cases."""
    cases = _select_overview(results)
    if not cases:
        return
    plt.rcParams.update(STYLE)
    names = [name for name in COLORS if any(report.compute_ratio(case, name) for case in cases)]
    lines: list[tuple[float, Results, str]] = []
    ticks, labels, y = [], [], 0.0
    for case in cases:
        present = [name for name in names if report.compute_ratio(case, name)]
        ticks.append(y + (len(present) - 1) / 2)
        name = NAMES[case["name"].split(",")[0]]
        labels.append(f"{name}\n{case['rows']} x {case['classes']} {case['dtype']}")
        for name in present:
            lines.append((y, case, name))
            y += 1
        y += 0.9
    figure, axes = plt.subplots(figsize=(9, 1.7 + 0.23 * y), layout="constrained")
    longest = max(report.compute_ratio(case, name) or 0 for _, case, name in lines)
    for y, case, name in lines:
        value = report.compute_ratio(case, name) or 0
        axes.barh(y, value, height=0.86, color=COLORS[name])
        seconds = report.format_duration(case["lanes"][name]["times"]["median"])
        text = f"{value:.1f}x  ({seconds})"
        if name == "fastkd":
            share = case["lanes"][name].get("share")
            text = f"{seconds}" + (f", {100 * share:.0f} % of memory bandwidth" if share else "")
        weight = "bold" if name == "fastkd" else "normal"
        axes.text(value + longest * 0.008, y, text, va="center", fontsize=9, weight=weight)
    axes.invert_yaxis()
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, longest * 1.2)
    axes.xaxis.set_major_locator(MultipleLocator(5))
    axes.set_xlabel("time relative to fastkd (shorter is better)")
    handles = [Patch(color=COLORS[name]) for name in names]
    figure.legend(
        handles,
        [LABELS.get(name, name) for name in names],
        loc="outside upper center",
        ncols=len(names) if len(names) < 5 else 3,
        fontsize=10,
        columnspacing=1.4,
        handlelength=1.2,
    )
    axes.set_title("How long one distillation loss takes, gradient included", pad=2, fontsize=13)
    _add_caption(figure, results)
    figure.savefig(path)
    plt.close(figure)


def _add_caption(figure: Any, results: Results) -> None:
    figure.supxlabel(report.describe_run(results), fontsize=7.5)


def _draw_series(
    axes: Axes, points: list[Results], along: str, label: str = "", style: str = "-"
) -> None:
    for name in ("fastkd", "eager"):
        pairs = [
            (point[along], point["lanes"][name]["times"]["median"] * 1e3)
            for point in points
            if report.compute_ratio(point, name)
        ]
        if pairs:
            x, y = zip(*pairs, strict=True)
            text = LABELS.get(name, name) + label
            axes.plot(x, y, style, marker="o", markersize=4, color=COLORS[name], label=text)


def _draw_bandwidth(axes: Axes, results: Results, points: list[Results], along: str) -> None:
    """Draw the time to read two tensors and write one at the measured memory bandwidth."""
    if not results["streams"]:
        return
    _, speed = next(iter(results["streams"].values()))
    sizes = {"fp32": 4, "bf16": 2, "fp16": 2}
    x = [point[along] for point in points]
    y = [3 * p["rows"] * p["classes"] * sizes[p["dtype"]] / speed * 1e3 for p in points]
    axes.plot(x, y, ":", color=INK, label="memory bandwidth")


def draw_scaling(results: Results, path: Path) -> None:
    """Plot the times over rows, classes and threads."""
    series = results["scaling"]
    if not series:
        return
    plt.rcParams.update(STYLE)
    figure, panels = plt.subplots(
        1, len(series), figsize=(4.6 * len(series), 4.2), layout="constrained"
    )
    for axes, (name, points) in zip(
        list(getattr(panels, "flat", [panels])), series.items(), strict=True
    ):
        if name == "threads":
            for style, classes in zip(
                ("-", "--", ":"), sorted({p["classes"] for p in points}), strict=False
            ):
                chosen = [point for point in points if point["classes"] == classes]
                _draw_series(axes, chosen, "threads", f", {chosen[0]['rows']} x {classes}", style)
            axes.set_xticks(sorted({point["threads"] for point in points}))
        else:
            _draw_series(axes, points, name)
            _draw_bandwidth(axes, results, points, name)
            axes.set_xscale("log")
        axes.set_yscale("log")
        if name == "threads":  # the lines cross the whole panel, so the legend is below them
            axes.set_ylim(bottom=axes.get_ylim()[0] / 6)
        axes.grid(True, which="major", color=INK, alpha=0.3, linewidth=0.6)
        axes.set_xlabel(_describe_axis(name, points))
        axes.set_ylabel("ms for a loss and its gradient")
        axes.legend(fontsize=8, loc="lower left" if name == "threads" else "best")
    _add_caption(figure, results)
    figure.savefig(path)
    plt.close(figure)


def _describe_axis(name: str, points: list[Results]) -> str:
    first = points[0]
    if name == "rows":
        return f"rows, of {first['classes']} classes, {first['dtype']}"
    if name == "classes":
        return f"classes, {first['rows']} rows, {first['dtype']}"
    return f"threads, {first['dtype']}"


def draw(results: Results, folder: Path) -> None:
    """Draw overview.png and scaling.png in a folder."""
    draw_overview(results, folder / "overview.png")
    draw_scaling(results, folder / "scaling.png")
