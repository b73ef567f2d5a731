"""Train students with many options of the loss, for the tables of docs/choosing.md.

``python -m benchmarks.choosing`` runs this sweep and writes the page.

Small students learn from teachers of several sizes on three data sets. The students of the teacher
"128" try every combination of divergence, temperature and alpha. The students of the other teachers
try only the forward KL. Students of the teacher "128" also train for 50 to 1,500 steps, with two
settings of the loss. A ``Cell`` is a combination of data, share of the training rows, teacher and
steps. All students of a cell train together, as batched matrices. The results of a cell are written
when the cell is done, so that a stopped run can continue.
"""

from __future__ import annotations

import ast
import itertools
import json
import pathlib
import sysconfig
import time
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastkd

PACKAGES = ("email", "asyncio", "xml", "logging", "unittest")
PACKAGES += ("importlib", "http", "urllib", "typing", "inspect")
SEEDS, BATCH, STUDENT_WIDTH, STEPS = 10, 32, 16, 500
SHARES = (0.05, 0.2, 1.0)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
ALPHAS = (0.0, 0.1, 0.5)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
# Hidden units and training steps of each teacher. Cho and Hariharan (2019) propose to stop the
# teacher early.
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
    """Identify a group of students that train together."""

    data: str
    share: float
    teacher: str
    steps: int


def list_cells(scale: int) -> dict[Cell, list[Setting]]:
    """Return all cells and the settings of their students; ``scale`` divides the steps."""
    forward = [setting for setting in GRID if setting.divergence == "forward_kl"]
    cells = {
        Cell(data, share, teacher, STEPS // scale): GRID if teacher == "128" else forward
        for data, share, teacher in itertools.product(DATA, SHARES, TEACHERS)
    }
    patience = itertools.product(DATA, SHARES, ["128"], PATIENCE)
    short = {Cell(*each, steps // scale): [ALONE, USUAL] for *each, steps in patience}
    return short | cells


# ---- data


def read_digits() -> tuple[Any, Any]:
    """Return the 1,797 images of 8 x 8 pixels of scikit-learn, and their digits."""
    images, labels = load_digits(return_X_y=True)
    return images / 16, labels


def read_cancer() -> tuple[Any, Any]:
    """Return 30 standardized measurements of each of 569 tumors, and labels: 1 for benign."""
    table, labels = load_breast_cancer(return_X_y=True)
    return (table - table.mean(0)) / table.std(0), labels


def read_docstrings() -> tuple[Any, Any]:
    """Return 64 features of docstring lines of ten packages, and each line's package index."""
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
    """Hold inputs and labels of one part of the data, for each seed."""

    inputs: Tensor  # [seeds, rows, features]
    labels: Tensor  # [seeds, rows]


def split(data: str, seeds: int) -> list[Rows]:
    """Return each seed's training rows (60 %), validation rows (20 %) and test rows (20 %)."""
    inputs, labels = DATA[data]()
    inputs, labels = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    orders = [torch.randperm(len(labels), generator=make_generator(seed)) for seed in range(seeds)]
    edges = [round(0.6 * len(labels)), round(0.8 * len(labels))]
    return [Rows(inputs[i], labels[i]) for i in torch.stack(orders).tensor_split(edges, 1)]


# ---- training


def make_generator(seed: int) -> torch.Generator:
    """Return a random number generator with this seed."""
    return torch.Generator().manual_seed(seed)


class Networks(nn.Module):
    """Hold, for each seed, ``count`` networks of one hidden layer with equal initial weights."""

    def __init__(self, seeds: int, count: int, features: int, width: int, classes: int) -> None:
        """Draw the initial weights of each seed."""
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
    """Return the mean loss over seeds and rows, summed over settings with one divergence."""
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
    """Train a network for each seed and setting; without teacher logits, train on the labels."""
    seeds, number, features = rows.inputs.shape
    networks = Networks(seeds, len(settings), features, width, int(rows.labels.max()) + 1)
    optimizer = torch.optim.Adam(networks.parameters(), 0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = make_generator(seeds)
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
    """Train a cell's students, and count the correct predictions of each setting and seed."""
    training, validation, test = parts
    number = max(BATCH // 8, round(cell.share * training.labels.shape[1]))
    few = Rows(*(part[:, :number] for part in training))
    soft = teacher(few.inputs)[0]
    with torch.enable_grad():
        students = train(STUDENT_WIDTH, few, cell.steps, settings, soft)
    answers, teacher_answers = students(test.inputs).argmax(-1), teacher(test.inputs)[0].argmax(-1)
    chosen = students(validation.inputs).argmax(-1)
    return {
        "cell": cell,
        "settings": settings,
        "rows": test.labels.shape[1],
        "trained_on": number,
        "teacher": (teacher_answers == test.labels).sum(1).tolist(),
        "validation": (chosen == validation.labels).sum(2).tolist(),
        "test": (answers == test.labels).sum(2).tolist(),
        "agreement": (answers == teacher_answers).sum(2).tolist(),
    }


def run_cells(
    cells: dict[Cell, list[Setting]], seeds: int, scale: int, file: pathlib.Path
) -> list[dict[str, Any]]:
    """Run the cells that the file lacks, and return the results of all cells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("\n")]
    file.write_text("".join(line for line in lines if line.endswith("\n")))
    done = {Cell(*result["cell"]) for result in results}
    parts: dict[str, list[Rows]] = {}
    teachers: dict[tuple[str, str], Networks] = {}
    for cell in tqdm([cell for cell in cells if cell not in done], desc="cells"):
        start, cpu = time.perf_counter(), time.process_time()
        if cell.data not in parts:
            parts[cell.data] = split(cell.data, seeds)
        if (cell.data, cell.teacher) not in teachers:
            width, steps = TEACHERS[cell.teacher]
            teachers[cell.data, cell.teacher] = train(
                width, parts[cell.data][0], steps // scale, [ALONE]
            )
        teacher = teachers[cell.data, cell.teacher]
        results.append(run(cell, cells[cell], parts[cell.data], teacher))
        results[-1]["seconds"] = time.perf_counter() - start
        results[-1]["cpu_seconds"] = time.process_time() - cpu
        with file.open("a") as stream:
            stream.write(json.dumps(results[-1]) + "\n")
    return results
