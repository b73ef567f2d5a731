"""Implement ``fastkd sweep``: compare students of many losses with training on labels alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from fastkd import extras, losses, validation
from fastkd.commands import distill
from fastkd.commands.config import Training, raise_as_config_error
from fastkd.commands.factories import ConfigError, Factories
from fastkd.training import arguments, student_loss


class Run(NamedTuple):
    """Identify one training of a sweep."""

    share: float
    divergence: str
    """Empty for training on the labels alone."""
    temperature: float
    alpha: float
    seed: int


_ALONE = ("", 1.0, 1.0)
Accuracies = dict[Run, float]


def sweep(
    training: Training,
    factories: Factories,
    temperature: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
    alpha: tuple[float, ...] = (0.1, 0.5),
    divergence: tuple[str, ...] = ("forward_kl",),
    share: tuple[float, ...] = (1.0,),
    seeds: int = 5,
) -> None:
    """Train students with many losses, and compare each loss with training on labels alone.

    The configuration is that of distill. The output folder gets the table sweep.md, the plot
    sweep.png, and sweep.jsonl, which has the configuration and a line for each training. Running
    the command again continues a sweep that was stopped, and adds the trainings of new values and
    seeds.

    Args:
        training: the options of the training.
        factories: object that makes the models and the data.
        temperature: temperatures, such as [2,4,8].
        alpha: weights of the labels' term.
        divergence: names of divergences, such as [forward_kl,jsd].
        share: shares of the training samples, in (0, 1]. A smaller share has more epochs, so that
            all shares have about equally many steps.
        seeds: number of trainings of each combination, with the seeds from --seed on.
    """
    training.require("student", "train", "validation", "output")
    if not training.teacher_cache:
        training.require("teacher")
    if training.teacher_top_k:
        raise ConfigError("teacher_top_k: a cache of a few classes has one temperature; leave it 0")
    extras.check("train", "safetensors.torch", "numpy", "accelerate", "tqdm")
    extras.check("report", "matplotlib.figure")
    with raise_as_config_error():
        validation.check_count("seeds", seeds)
        lists = {"temperature": temperature, "alpha": alpha, "divergence": divergence}
        for name, values in {**lists, "share": share}.items():
            if not values:
                raise ValueError(f"{name} must have at least one value; got []")
        for each in share:
            validation.check_number("share", each, 0.0, 1.0, open_low=True)
    objectives = [_ALONE, *itertools.product(divergence, temperature, alpha)]
    loss_of = {objective: _make_loss(training, *objective) for objective in objectives}
    runs = [
        Run(fraction, *objective, seed)
        for seed in range(training.seed, training.seed + seeds)
        for fraction, objective in itertools.product(share, objectives)
    ]
    folder = pathlib.Path(training.output)
    done = _read(folder / "sweep.jsonl", training)
    distill.make_optimizer(training.optimizer, factories.make_model("student", training))
    accelerator = arguments.make_accelerator(mixed_precision=training.mixed_precision)
    if accelerator.num_processes > 1:
        raise ConfigError("sweep runs in one process; start it without accelerate launch")
    torch.manual_seed(training.seed)
    teacher, data, held_out = distill.make_teacher_and_data(
        training, factories, loss_of[objectives[-1]], accelerator
    )
    if share != (1.0,) and isinstance(data, (DataLoader, IterableDataset)):
        raise ConfigError("share: train must return a data set with __getitem__ to take a share of")
    held_out = distill.make_loader(held_out, training, shuffle=False)
    if student_loss.get_labels(next(iter(held_out))) is None:
        raise ConfigError("validation must have labels, by which the students are compared")
    bar = extras.load("tqdm", "train").tqdm(runs, desc="trainings")
    for run in bar:
        bar.set_postfix_str(_describe(run))
        if run in done:
            continue
        samples = data if run.share == 1 else _draw_samples(data, run)
        options = dataclasses.replace(
            training, seed=run.seed, epochs=math.ceil(training.epochs / run.share)
        )
        torch.manual_seed(run.seed)
        student = factories.make_model("student", options)
        optimizer = distill.make_optimizer(options.optimizer, student)
        loss = loss_of[run.divergence, run.temperature, run.alpha]
        loader = distill.make_loader(samples, options, shuffle=True)
        trainer = distill.make_trainer(
            options, student, optimizer, loader, loss, teacher, accelerator, progress=False
        )
        torch.manual_seed(run.seed)  # so that the data come in the same order as in distill()
        trainer.fit(loader, options.epochs)
        done[run] = trainer.evaluate(held_out).accuracy
        with (folder / "sweep.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([*run, done[run]]) + "\n")
        accelerator.free_memory()
    rows = {run: done[run] for run in runs}
    table = "\n".join(_tabulate(rows))
    (folder / "sweep.md").write_text(table + "\n", encoding="utf-8")
    _draw(rows).savefig(folder / "sweep.png", dpi=120)
    print(f"{table}\n\nwrote {folder / 'sweep.md'} and sweep.png")


def _draw_samples(data: Any, run: Run) -> Any:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed))
    return Subset(data, order[: math.ceil(run.share * len(data))].tolist())


def _make_loss(
    training: Training, divergence: str, temperature: float, alpha: float
) -> losses.KDLoss:
    """Make the configuration's loss with these options; "" as divergence sets ``alpha`` alone."""
    options: Any = {**training.loss, "alpha": alpha}
    if divergence:
        options |= {"divergence": divergence, "temperature": temperature}
    with raise_as_config_error("loss"):
        loss = losses.KDLoss(**options)
    with raise_as_config_error():
        arguments.check_loss(loss, teachers=1)
    return loss


def _read(file: pathlib.Path, training: Training) -> Accuracies:
    """Return the accuracies in the file, and prepare the file for appending accuracies.

    The first line of the file is the configuration. An incomplete last line, which a killed process
    may leave, is removed.
    """
    options = dataclasses.asdict(training)
    for name in ("output", "seed", "checkpoints"):
        del options[name]
    header = json.dumps(options, default=str) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    lines = [line for line in lines if line.endswith("\n")] or [header]
    if lines[0] != header:
        raise ConfigError(
            f"output: {file} holds a sweep of another configuration; choose another --output"
        )
    file.write_text("".join(lines), encoding="utf-8")
    values = [json.loads(line) for line in lines[1:]]
    return {Run(*run): accuracy for *run, accuracy in values}


def _describe(run: Run) -> str:
    loss = f"{run.divergence}, T={run.temperature:g}, alpha={run.alpha:g}"
    return (loss if run.divergence else "alone") + f", {run.share:.0%}, seed {run.seed}"


def _summarize(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error in percent; the error of a single value is NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return 100 * statistics.mean(values), 100 * error


def _format(values: list[float], sign: str = "") -> str:
    """Return mean and standard error in percent as text; a single value has no error."""
    mean, error = _summarize(values)
    return f"{mean:{sign}.2f}" + (f" ± {error:.2f}" if len(values) > 1 else "")


def _compare(rows: Accuracies) -> Iterator[tuple[Run, list[float], list[float]]]:
    """Yield each combination's first run, accuracies, and gains over training on labels alone."""
    for combination in dict.fromkeys(run[:-1] for run in rows):
        runs = [run for run in rows if run[:-1] == combination]
        gains = [rows[run] - rows[Run(run.share, *_ALONE, run.seed)] for run in runs]
        yield runs[0], [rows[run] for run in runs], gains


def _tabulate(rows: Accuracies) -> Iterator[str]:
    """Yield the lines of the table, and a paragraph about the largest gain."""
    yield "| share | divergence | T | alpha | accuracy, % | gain over training alone, points |"
    yield "|-:|-|-:|-:|-:|-:|"
    best = (-math.inf, "", "")
    for run, accuracies, gains in _compare(rows):
        share, name = f"{run.share:.0%}", run.divergence or "alone"
        options = f"{run.temperature:g} | {run.alpha:g}" if run.divergence else " | "
        gain = _format(gains, "+") if run.divergence else ""
        yield f"| {share} | {name} | {options} | {_format(accuracies)} | {gain} |"
        if run.divergence:
            best = max(best, (statistics.mean(gains), gain, _describe(run).rpartition(",")[0]))
    yield ""
    yield (
        f"Mean{' ± standard error' * (len(accuracies) > 1)} over {len(accuracies)} seed(s); gains "
        f"are of equal seeds. The largest gain, {best[1]}, is that of {best[2]}. The largest of "
        "many gains is too high by chance: measure it again, on samples that were not used to "
        "choose."
    )


def _draw(rows: Accuracies) -> Any:
    """Draw the gains over the temperature: a row for each divergence, a column for each share."""
    summaries = [(run, *_summarize(gains)) for run, _, gains in _compare(rows) if run.divergence]
    names, shares, alphas = (
        list(dict.fromkeys(getattr(run, name) for run, *_ in summaries))
        for name in ("divergence", "share", "alpha")
    )
    figure = extras.load("matplotlib.figure", "report").Figure(
        (4 * len(shares), 3 * len(names)), layout="constrained"
    )
    grid = figure.subplots(len(names), len(shares), sharex=True, sharey="col", squeeze=False)
    for (i, name), (j, share) in itertools.product(enumerate(names), enumerate(shares)):
        axes = grid[i][j]
        axes.axhline(0, color="gray")
        for alpha in alphas:
            key = (share, name, alpha)
            line = [each for each in summaries if (each[0].share, *each[0][1:4:2]) == key]
            x, y = [run.temperature for run, *_ in line], [gain for _, gain, _ in line]
            axes.errorbar(x, y, [2 * e for *_, e in line], capsize=3, label=f"alpha {alpha:g}")
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{temperature:g}" for temperature in x])
        axes.minorticks_off()
        axes.set(title=f"{name}, {share:.0%} of the samples", xlabel="temperature")
    grid[0][0].set_ylabel("gain over training alone,\npoints ± 2 standard errors")
    grid[0][0].legend()
    return figure
