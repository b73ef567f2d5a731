"""Write docs/choosing.md, which compares options of the loss: ``python -m benchmarks.choosing``.

sweep.py trains the students.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.plots import STYLE
from benchmarks.sweep import (
    ALONE,
    ALPHAS,
    DATA,
    DIVERGENCES,
    PATIENCE,
    SEEDS,
    SHARES,
    STEPS,
    STUDENT_WIDTH,
    TEACHERS,
    TEMPERATURES,
    USUAL,
    Cell,
    Setting,
    list_cells,
    run_cells,
)

ROOT = pathlib.Path(__file__).parents[1]


class Results:
    """Compute percentages, and gains in percentage points, from the results of a sweep."""

    def __init__(self, results: list[dict[str, Any]], scale: int) -> None:
        """Index the results by cell; ``scale`` divides the numbers of steps in a quick run."""
        self.cells = {Cell(*result["cell"]): result for result in results}
        self.scale = scale
        self.cpu_minutes = sum(result["cpu_seconds"] for result in results) / 60
        self.students = sum(len(r["settings"]) * len(r["teacher"]) for r in results)

    def get(
        self,
        data: str,
        share: float,
        setting: Setting | str,
        teacher: str = "128",
        steps: int = STEPS,
        measure: str = "test",
    ) -> Tensor:
        """Return each seed's accuracy, or the agreement with the teacher (``measure``), in %."""
        result = self.cells[Cell(data, share, teacher, steps // self.scale)]
        if isinstance(setting, str):
            hits = result[setting]
        else:
            settings = [Setting(*each) for each in result["settings"]]
            hits = result[measure][settings.index(setting)]
        return 100 * torch.tensor(hits, dtype=torch.float64) / result["rows"]

    def get_gain(self, data: str, share: float, setting: Setting, **options: Any) -> Tensor:
        """Return each seed's gain over training on labels alone, in percentage points."""
        return self.get(data, share, setting, **options) - self.get(data, share, ALONE, **options)

    def get_gain_when_chosen(self, data: str, share: float) -> Tensor:
        """Return each seed's gain with the setting that is best on the seed's validation rows."""
        result = self.cells[Cell(data, share, "128", STEPS // self.scale)]
        best = torch.tensor(result["validation"][1:]).argmax(0) + 1
        test = torch.tensor(result["test"], dtype=torch.float64)
        return 100 * (test.gather(0, best[None])[0] - test[0]) / result["rows"]


def format_interval(values: Tensor, sign: str = "+") -> str:
    """Return the mean ± two standard errors; with a sign, in bold if the interval is above 0."""
    mean, error = summarize(values)
    text = f"{mean:{sign}.1f} ± {error:.1f}"
    return f"**{text}**" if sign and mean > error else text


def summarize(values: Tensor) -> tuple[float, float]:
    """Return the mean and twice the standard error."""
    return values.mean().item(), 2 * values.std().item() / len(values) ** 0.5


def pool(results: Results, setting: Setting) -> str:
    """Return the mean gain over the data sets and the two smaller shares, ± two standard errors."""
    gains = [
        torch.stack([results.get_gain(data, share, setting) for share in SHARES[:-1]]).mean(0)
        for data in DATA
    ]
    means, errors = zip(*map(summarize, gains), strict=True)
    # The data sets are independent, so the squares of their errors add up.
    mean, error = sum(means) / len(means), sum(e**2 for e in errors) ** 0.5 / len(errors)
    return f"{mean:+.1f} ± {error:.1f}"


def tabulate(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns except the first are right-aligned."""
    lines = [heads, ["-", *["-:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(results: Results) -> dict[str, str]:
    """Return the generated parts of the page, by the names of their markers."""
    places = list(itertools.product(DATA, SHARES))
    heads = ["data, share", "rows", "teacher, %", "alone, %", "distilled, %", "gain, points"]
    heads += ["gain if chosen on validation rows", "agreement with the teacher, %: alone"]
    table = [
        [
            f"{data}, {share:.0%}",
            str(results.cells[Cell(data, share, "128", STEPS // results.scale)]["trained_on"]),
            f"{results.get(data, share, 'teacher').mean():.1f}",
            format_interval(results.get(data, share, ALONE), ""),
            format_interval(results.get(data, share, USUAL), ""),
            format_interval(results.get_gain(data, share, USUAL)),
            format_interval(results.get_gain_when_chosen(data, share)),
            f"{results.get(data, share, ALONE, measure='agreement').mean():.1f}",
            f"{results.get(data, share, USUAL, measure='agreement').mean():.1f}",
        ]
        for data, share in places
    ]
    parts = {"share": tabulate([*heads, "distilled"], table)}
    parts["divergence"] = tabulate(
        ["T", *DIVERGENCES],
        [
            [f"{t:g}", *(pool(results, Setting(name, t, 0.1)) for name in DIVERGENCES)]
            for t in TEMPERATURES
        ],
    )
    parts["alpha"] = tabulate(
        ["T", *(f"alpha {alpha:g}" for alpha in ALPHAS)],
        [
            [f"{t:g}", *(pool(results, Setting("forward_kl", t, alpha)) for alpha in ALPHAS)]
            for t in TEMPERATURES
        ],
    )
    teachers = [
        [f"{data}, {share:.0%}"]
        + [
            f"{format_interval(results.get_gain(data, share, USUAL, teacher=name))} "
            f"({results.get(data, share, 'teacher', name).mean():.1f})"
            for name in TEACHERS
        ]
        for data, share in places
    ]
    parts["teacher"] = tabulate(["data, share", *TEACHERS], teachers)
    patience = [
        [f"{data}, {share:.0%}"]
        + [format_interval(results.get_gain(data, share, USUAL, steps=steps)) for steps in PATIENCE]
        for data, share in places
    ]
    parts["steps"] = tabulate(["data, share", *(f"{steps} steps" for steps in PATIENCE)], patience)
    soft = Setting("forward_kl", 4.0, 0.0)
    unlabeled = [
        [
            data,
            *(format_interval(results.get(data, SHARES[0], each), "") for each in (ALONE, USUAL)),
            format_interval(results.get(data, 1.0, soft), ""),
            format_interval(results.get(data, 1.0, soft) - results.get(data, SHARES[0], USUAL)),
        ]
        for data in DATA
    ]
    heads = [
        "data",
        f"{SHARES[0]:.0%} of the labels, alone, %",
        f"distilled on these {SHARES[0]:.0%}, %",
    ]
    heads += ["distilled on all rows without labels, %", "gain over the column before, points"]
    parts["unlabeled"] = tabulate(heads, unlabeled)
    parts["run"] = (
        f"{results.students:,} students of {STUDENT_WIDTH} hidden units, "
        f"{len(results.get('digits', 1.0, ALONE))} seeds; {results.cpu_minutes:.0f} minutes of CPU "
        f"time. Python {platform.python_version()}, whose docstrings are the text."
    )
    return parts


def draw(results: Results, file: pathlib.Path) -> None:
    """Plot the gains over temperature, share and teacher, and the accuracies over steps."""
    matplotlib.rcParams.update(STYLE)
    figure = Figure((12, 13), layout="constrained")
    grid = figure.subplots(4, len(DATA))

    def line(axes: Any, x: Sequence[float], values: list[Tensor], label: str) -> None:
        means, errors = zip(*map(summarize, values), strict=True)
        axes.errorbar(x, means, errors, capsize=3, label=label)

    few = SHARES[0]
    for data, column in zip(DATA, grid.T, strict=True):
        for alpha in ALPHAS:
            settings = [Setting("forward_kl", t, alpha) for t in TEMPERATURES]
            gains = [results.get_gain(data, few, setting) for setting in settings]
            line(column[0], TEMPERATURES, gains, f"alpha {alpha:g}")
        column[0].set(title=f"{data}\nforward_kl, {few:.0%} of the rows", xlabel="temperature")
        for name in DIVERGENCES:
            gains = [results.get_gain(data, few, Setting(name, t, 0.1)) for t in TEMPERATURES]
            line(column[1], TEMPERATURES, gains, name)
        column[1].set(title=f"alpha 0.1, {few:.0%} of the rows", xlabel="temperature")
        for name in TEACHERS:
            gains = [results.get_gain(data, share, USUAL, teacher=name) for share in SHARES]
            line(column[2], [100 * share for share in SHARES], gains, f"teacher {name}")
        column[2].set(title="forward_kl, T=4, alpha 0.1", xlabel="% of the training rows")
        for share, setting in itertools.product((few, 1.0), (ALONE, USUAL)):
            values = [results.get(data, share, setting, steps=steps) for steps in PATIENCE]
            name = "alone" if setting == ALONE else "distilled"
            line(column[3], PATIENCE, values, f"{name}, {share:.0%}")
        column[3].set(xlabel="training steps", title="accuracy, %")
        for axes in column:
            axes.set_xscale("log")
            axes.set_xticks(axes.get_lines()[0].get_xdata(), minor=False)
            axes.set_xticklabels([f"{x:g}" for x in axes.get_lines()[0].get_xdata()])
            axes.minorticks_off()
        for axes in column[:3]:
            axes.axhline(0, color="gray", linewidth=1)
    for axes in grid[:3, 0]:
        axes.set_ylabel("gain over training alone, points")
    for axes in grid[:, 0]:
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=90)


def write(parts: dict[str, str], page: pathlib.Path) -> None:
    """Replace the text between the page's markers."""
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- choosing:{name} -->\n", "<!-- choosing:end -->"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise SystemExit(f"{page} must have {begin.strip()} and {end}")
        text = f"{before}{begin}{part}\n{end}{after}"
    page.write_text(text)


def main() -> None:
    """Run the cells that the results file lacks, and write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "choosing.md")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "build" / "choosing.jsonl")
    parser.add_argument("--quick", action="store_true", help="2 seeds, a fiftieth of the steps")
    options = parser.parse_args()
    seeds, scale = (2, 50) if options.quick else (SEEDS, 1)
    results = Results(run_cells(list_cells(scale), seeds, scale, options.results), scale)
    write(describe(results), options.page)
    draw(results, options.page.with_suffix(".png"))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
