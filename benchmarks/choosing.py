"""``python -m benchmarks.choosing``: the sweep behind docs/choosing.md, and the page's figures.

Small students learn from teachers of several sizes on three data sets: every combination of
divergence, temperature, alpha, share of the training rows and teacher. All students of a
combination of data, share and teacher train side by side, as batched matrices. Each combination is
a line of the results file as soon as it is done, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import pathlib
import platform
import sysconfig
import time
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastkd

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("email", "asyncio", "xml", "logging", "unittest")
PACKAGES += ("importlib", "http", "urllib", "typing", "inspect")
SEEDS, BATCH, STUDENT_WIDTH, STEPS = 10, 32, 16, 500
SHARES = (0.05, 0.2, 1.0)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
ALPHAS = (0.0, 0.1, 0.5)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
# Hidden units and training steps. The last is that of Cho and Hariharan, stopped early.
TEACHERS = {"16": (16, 500), "128": (128, 500), "1024": (1024, 500), "1024 early": (1024, 60)}
PATIENCE = (50, 150, 500, 1500)


class Setting(NamedTuple):
    """Hold the options of a loss."""

    divergence: str
    temperature: float
    alpha: float


ALONE = Setting("forward_kl", 1.0, 1.0)  # alpha=1: the labels alone
USUAL = Setting("forward_kl", 4.0, 0.1)
GRID = [ALONE, *(Setting(*each) for each in itertools.product(DIVERGENCES, TEMPERATURES, ALPHAS))]


class Cell(NamedTuple):
    """Name what students have in common that train side by side."""

    data: str
    share: float
    teacher: str
    steps: int


def list_cells(scale: int) -> dict[Cell, list[Setting]]:
    """Return all cells, and the settings of their students; ``scale`` divides all steps."""
    grid = itertools.product(DATA, SHARES, TEACHERS)
    cells = {Cell(*each, STEPS // scale): GRID for each in grid}
    patience = itertools.product(DATA, SHARES, ["128"], PATIENCE)
    short = {Cell(*each, steps // scale): [ALONE, USUAL] for *each, steps in patience}
    return short | cells


# ---- data


def read_digits() -> tuple[Any, Any]:
    """Return the 1,797 images of 8 x 8 pixels of scikit-learn, and their digits."""
    images, labels = load_digits(return_X_y=True)
    return images / 16, labels


def read_cancer() -> tuple[Any, Any]:
    """Return 30 measurements of each of 569 tumors, and whether they are benign."""
    table, labels = load_breast_cancer(return_X_y=True)
    return (table - table.mean(0)) / table.std(0), labels


def read_docstrings() -> tuple[Any, Any]:
    """Return 64 features of each docstring line of ten packages of Python, and the package."""
    lines: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        place = pathlib.Path(sysconfig.get_path("stdlib")) / package
        for file in sorted(place.rglob("*.py")) or [place.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or ""
                    lines |= {line: label for line in text.splitlines() if len(line.split()) >= 5}
    words = TfidfVectorizer(min_df=2, sublinear_tf=True).fit_transform(lines)
    features = TruncatedSVD(64, random_state=0).fit_transform(words)
    return features / features.std(), list(lines.values())


DATA = {"digits": read_digits, "cancer": read_cancer, "docstrings": read_docstrings}


class Rows(NamedTuple):
    """Hold rows of each seed's own split."""

    inputs: Tensor  # [seeds, rows, features]
    labels: Tensor  # [seeds, rows]


def split(data: str, seeds: int) -> list[Rows]:
    """Return 60 % of the rows to train on, 20 % to choose by, and 20 % to test on."""
    inputs, labels = DATA[data]()
    inputs, labels = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    orders = [torch.randperm(len(labels), generator=generate(seed)) for seed in range(seeds)]
    edges = [round(0.6 * len(labels)), round(0.8 * len(labels))]
    return [Rows(inputs[i], labels[i]) for i in torch.stack(orders).tensor_split(edges, 1)]


# ---- training


def generate(seed: int) -> torch.Generator:
    """Return a random number generator."""
    return torch.Generator().manual_seed(seed)


class Networks(nn.Module):
    """Hold networks of one hidden layer: ``count`` for each seed, all with the same weights."""

    def __init__(self, seeds: int, count: int, features: int, width: int, classes: int) -> None:
        """Draw the first weights of each seed."""
        super().__init__()
        layers = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            layers.append((nn.Linear(features, width), nn.Linear(width, classes)))
        first, second = zip(*layers, strict=True)

        def stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([tensor.detach() for tensor in tensors])

        hidden = stack([layer.weight.T for layer in first])
        self.hidden = nn.Parameter(hidden.repeat(1, 1, count))  # [seeds, features, count * width]
        bias = stack([layer.bias for layer in first])[:, None]
        self.hidden_bias = nn.Parameter(bias.repeat(1, 1, count))
        output = stack([layer.weight.T for layer in second])[:, None]
        self.output = nn.Parameter(output.repeat(1, count, 1, 1))  # [seeds, count, width, classes]
        bias = stack([layer.bias for layer in second])[:, None, None]
        self.output_bias = nn.Parameter(bias.repeat(1, count, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[count, seeds, rows, classes]`` of inputs ``[seeds, rows, features]``."""
        hidden = torch.baddbmm(self.hidden_bias, inputs, self.hidden).relu()
        hidden = hidden.unflatten(2, (self.output.shape[1], -1)).transpose(1, 2)
        return (hidden @ self.output + self.output_bias).transpose(0, 1).contiguous()


def compute_loss(logits: Tensor, group: list[Setting], teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses of students whose settings have the same divergence."""
    temperatures = torch.tensor([setting.temperature for setting in group])
    alphas = torch.tensor([setting.alpha for setting in group])
    rows = logits.shape[:-1]
    temperatures, alphas = (each[:, None, None].expand(rows) for each in (temperatures, alphas))
    return fastkd.loss(
        logits,
        teacher.expand_as(logits),
        labels.expand(rows),
        divergence=group[0].divergence,
        temperature=temperatures,
        hard_weight=alphas,
        soft_weight=1 - alphas,
        normalizer=labels.numel(),
    )


def train(
    width: int, rows: Rows, steps: int, settings: list[Setting], teacher: Tensor | None = None
) -> Networks:
    """Train a network for each seed and setting; without a teacher's logits, on the labels."""
    seeds, number, features = rows.inputs.shape
    networks = Networks(seeds, len(settings), features, width, int(rows.labels.max()) + 1)
    optimizer = torch.optim.Adam(networks.parameters(), 0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = generate(seeds)
    names = list(dict.fromkeys(setting.divergence for setting in settings))
    groups = [[each for each in settings if each.divergence == name] for name in names]
    for _ in range(steps):
        index = torch.randint(number, (BATCH,), generator=generator)
        labels, logits = rows.labels[:, index], networks(rows.inputs[:, index])
        if teacher is None:
            loss = F.cross_entropy(logits[0].mT, labels)
        else:
            parts = logits.split([len(group) for group in groups])
            losses = map(compute_loss, parts, groups, repeat(teacher[:, index]), repeat(labels))
            loss = torch.stack(list(losses)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return networks


@torch.no_grad()
def run(
    cell: Cell, settings: list[Setting], parts: list[Rows], teacher: Networks
) -> dict[str, Any]:
    """Train a cell's students, and count right answers: for each setting, one of each seed."""
    training, validation, test = parts
    number = max(BATCH // 8, round(cell.share * training.labels.shape[1]))
    few = Rows(*(part[:, :number] for part in training))
    soft = teacher(few.inputs)[0]
    with torch.enable_grad():
        students = train(STUDENT_WIDTH, few, cell.steps, settings, soft)
    answers, taught = students(test.inputs).argmax(-1), teacher(test.inputs)[0].argmax(-1)
    chosen = students(validation.inputs).argmax(-1)
    return {
        "cell": cell,
        "settings": settings,
        "rows": test.labels.shape[1],
        "trained_on": number,
        "teacher": (taught == test.labels).sum(1).tolist(),
        "validation": (chosen == validation.labels).sum(2).tolist(),
        "test": (answers == test.labels).sum(2).tolist(),
        "agreement": (answers == taught).sum(2).tolist(),
    }


def sweep(
    cells: dict[Cell, list[Setting]], seeds: int, scale: int, file: pathlib.Path
) -> list[dict[str, Any]]:
    """Run the cells that the file lacks, and return the results of all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    file.write_text("".join(line for line in lines if line.endswith("\n")))
    done = {Cell(*result["cell"]) for result in results}
    parts: dict[str, list[Rows]] = {}
    teachers: dict[tuple[str, str], Networks] = {}
    for cell in tqdm([cell for cell in cells if cell not in done], desc="cells"):
        began, cpu = time.perf_counter(), time.process_time()
        if cell.data not in parts:
            parts[cell.data] = split(cell.data, seeds)
        if (cell.data, cell.teacher) not in teachers:
            width, steps = TEACHERS[cell.teacher]
            teachers[cell.data, cell.teacher] = train(
                width, parts[cell.data][0], steps // scale, [ALONE]
            )
        teacher = teachers[cell.data, cell.teacher]
        results.append(run(cell, cells[cell], parts[cell.data], teacher))
        results[-1]["seconds"] = time.perf_counter() - began
        results[-1]["cpu_seconds"] = time.process_time() - cpu
        with file.open("a") as stream:
            stream.write(json.dumps(results[-1]) + "\n")
    return results


# ---- the page


class Results:
    """Answer questions about the results, in percent and points."""

    def __init__(self, results: list[dict[str, Any]], scale: int) -> None:
        """Index the results; ``scale`` divides the numbers of steps in a quick run."""
        self.cells = {Cell(*result["cell"]): result for result in results}
        self.scale = scale
        self.cpu_minutes = sum(result["cpu_seconds"] for result in results) / 60
        self.students = sum(len(r["settings"]) * len(r["teacher"]) for r in results)

    def of(
        self,
        data: str,
        share: float,
        setting: Setting | str,
        teacher: str = "128",
        steps: int = STEPS,
        measure: str = "test",
    ) -> Tensor:
        """Return the percentage of test rows of each seed, for a setting or the teacher."""
        result = self.cells[Cell(data, share, teacher, steps // self.scale)]
        if isinstance(setting, str):
            hits = result[setting]
        else:
            hits = result[measure][result["settings"].index(list(setting))]
        return 100 * torch.tensor(hits, dtype=torch.float64) / result["rows"]

    def gain(self, data: str, share: float, setting: Setting, **options: Any) -> Tensor:
        """Return the points of each seed above training alone."""
        return self.of(data, share, setting, **options) - self.of(data, share, ALONE, **options)

    def gain_when_chosen(self, data: str, share: float) -> Tensor:
        """Return the points of the setting that is best on each seed's validation rows."""
        result = self.cells[Cell(data, share, "128", STEPS // self.scale)]
        best = torch.tensor(result["validation"][1:]).argmax(0) + 1
        test = torch.tensor(result["test"], dtype=torch.float64)
        return 100 * (test.gather(0, best[None])[0] - test[0]) / result["rows"]


def interval(values: Tensor, sign: str = "+") -> str:
    """Return the mean and two standard errors over the seeds; bold if the interval is above 0."""
    mean, error = summarize(values)
    text = f"{mean:{sign}.1f} ± {error:.1f}"
    return f"**{text}**" if sign and mean > error else text


def summarize(values: Tensor) -> tuple[float, float]:
    """Return the mean and two standard errors."""
    return values.mean().item(), 2 * values.std().item() / len(values) ** 0.5


def pool(results: Results, setting: Setting) -> str:
    """Return the mean gain over the data sets and the two smaller shares, with its interval."""
    gains = [
        torch.stack([results.gain(data, share, setting) for share in SHARES[:-1]]).mean(0)
        for data in DATA
    ]
    means, errors = zip(*map(summarize, gains), strict=True)  # the data sets are independent
    mean, error = sum(means) / len(means), sum(e**2 for e in errors) ** 0.5 / len(errors)
    return f"{mean:+.1f} ± {error:.1f}"


def tabulate(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with numbers to the right."""
    lines = [heads, ["-", *["-:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe(results: Results) -> dict[str, str]:
    """Return the generated parts of the page."""
    places = list(itertools.product(DATA, SHARES))
    heads = ["data, share", "rows", "teacher, %", "alone, %", "distilled, %", "gain, points"]
    heads += ["gain if chosen on validation rows", "agreement with the teacher, %: alone"]
    table = [
        [
            f"{data}, {share:.0%}",
            str(results.cells[Cell(data, share, "128", STEPS // results.scale)]["trained_on"]),
            f"{results.of(data, share, 'teacher').mean():.1f}",
            interval(results.of(data, share, ALONE), ""),
            interval(results.of(data, share, USUAL), ""),
            interval(results.gain(data, share, USUAL)),
            interval(results.gain_when_chosen(data, share)),
            f"{results.of(data, share, ALONE, measure='agreement').mean():.1f}",
            f"{results.of(data, share, USUAL, measure='agreement').mean():.1f}",
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
            f"{interval(results.gain(data, share, USUAL, teacher=name))} "
            f"({results.of(data, share, 'teacher', name).mean():.1f})"
            for name in TEACHERS
        ]
        for data, share in places
    ]
    parts["teacher"] = tabulate(["data, share", *TEACHERS], teachers)
    patience = [
        [f"{data}, {share:.0%}"]
        + [interval(results.gain(data, share, USUAL, steps=steps)) for steps in PATIENCE]
        for data, share in places
    ]
    parts["steps"] = tabulate(["data, share", *(f"{steps} steps" for steps in PATIENCE)], patience)
    soft = Setting("forward_kl", 4.0, 0.0)
    unlabeled = [
        [
            data,
            *(interval(results.of(data, SHARES[0], each), "") for each in (ALONE, USUAL)),
            interval(results.of(data, 1.0, soft), ""),
            interval(results.of(data, 1.0, soft) - results.of(data, SHARES[0], USUAL)),
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
        f"{len(results.of('digits', 1.0, ALONE))} seeds; {results.cpu_minutes:.0f} minutes of CPU "
        f"time. Python {platform.python_version()}, whose docstrings are the text."
    )
    return parts


def draw(results: Results, file: pathlib.Path) -> None:
    """Plot the gains over temperature, share and teacher, and the accuracies over steps."""
    figure = Figure((12, 13), layout="constrained", facecolor="white")  # readable on dark pages
    grid = figure.subplots(4, len(DATA))

    def line(axes: Any, x: Sequence[float], values: list[Tensor], label: str) -> None:
        means, errors = zip(*map(summarize, values), strict=True)
        axes.errorbar(x, means, errors, capsize=3, label=label)

    few = SHARES[0]
    for data, column in zip(DATA, grid.T, strict=True):
        for alpha in ALPHAS:
            settings = [Setting("forward_kl", t, alpha) for t in TEMPERATURES]
            gains = [results.gain(data, few, setting) for setting in settings]
            line(column[0], TEMPERATURES, gains, f"alpha {alpha:g}")
        column[0].set(title=f"{data}\nforward_kl, {few:.0%} of the rows", xlabel="temperature")
        for name in DIVERGENCES:
            gains = [results.gain(data, few, Setting(name, t, 0.1)) for t in TEMPERATURES]
            line(column[1], TEMPERATURES, gains, name)
        column[1].set(title=f"alpha 0.1, {few:.0%} of the rows", xlabel="temperature")
        for name in TEACHERS:
            gains = [results.gain(data, share, USUAL, teacher=name) for share in SHARES]
            line(column[2], [100 * share for share in SHARES], gains, f"teacher {name}")
        column[2].set(title="forward_kl, T=4, alpha 0.1", xlabel="% of the training rows")
        for share, setting in itertools.product((few, 1.0), (ALONE, USUAL)):
            values = [results.of(data, share, setting, steps=steps) for steps in PATIENCE]
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
    """Replace what is between the page's markers."""
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- choosing:{name} -->\n", "\n<!-- choosing:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"{page} must have {begin.strip()} and {end.strip()}")
        text = f"{before}{begin}{part}{end}{after}"
    page.write_text(text)


def main() -> None:
    """Run the sweep, or what is left of it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=pathlib.Path, default=ROOT / "docs" / "choosing.md")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "build" / "choosing.jsonl")
    parser.add_argument("--quick", action="store_true", help="2 seeds, a fiftieth of the steps")
    options = parser.parse_args()
    seeds, scale = (2, 50) if options.quick else (SEEDS, 1)
    results = Results(sweep(list_cells(scale), seeds, scale, options.results), scale)
    write(describe(results), options.page)
    draw(results, options.page.with_suffix(".png"))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
