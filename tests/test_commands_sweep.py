"""Test the command ``fastkd sweep``."""

import itertools
import json
import pathlib
import re

import pytest
import torch
from stacks import module_of, run_command, run_refused_command
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.commands import sweep

pytest.importorskip("accelerate")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("restored_path")


def read_sweep(config_path: pathlib.Path, output: str) -> dict[tuple, float]:
    lines = (config_path.parent / output / "sweep.jsonl").read_text().splitlines()[1:]
    return {tuple(options): accuracy for *options, accuracy in map(json.loads, lines)}


def test_a_sweep_is_a_table_of_trainings(config_path, monkeypatch, capsys):
    run_command(
        *(monkeypatch, "sweep", "--config", config_path, "--alpha=[0.1]", "--divergence=[jsd]"),
        *("--temperature=[1,4]", "--share=[0.5,1]", "--seeds=2"),
    )
    results = read_sweep(config_path, "out")
    assert len(results) == 2 * 2 * (1 + 2)
    parts = module_of(config_path)
    images, labels = parts.data()[:]
    for share, epochs in ((1.0, 3), (0.5, 6)):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
        chosen = order[:100] if share < 1 else torch.arange(200)
        torch.manual_seed(1)
        student = parts.student()
        trainer = fastkd.Trainer(
            student,
            parts.teacher().eval(),
            torch.optim.Adam(student.parameters(), 1e-2),
            loss=fastkd.KDLoss(divergence="jsd", temperature=4.0, alpha=0.1),
        )
        torch.manual_seed(1)
        samples = TensorDataset(images[chosen], labels[chosen])
        trainer.fit(DataLoader(samples, 50, shuffle=True), epochs)
        accuracy = trainer.evaluate(DataLoader(parts.held_out(), 50)).accuracy
        assert results[share, "jsd", 4.0, 0.1, 1] == accuracy
    accuracies = [100 * results[0.5, "jsd", 4.0, 0.1, seed] for seed in (0, 1)]
    alone = [100 * results[0.5, "", 1.0, 1.0, seed] for seed in (0, 1)]
    gains = [a - b for a, b in zip(accuracies, alone, strict=True)]
    cells = [
        f"{sum(values) / 2:{sign}.2f} ± {abs(values[0] - values[1]) / 2:.2f}"
        for values, sign in ((accuracies, ""), (gains, "+"))
    ]
    table = (config_path.parent / "out" / "sweep.md").read_text()
    assert f"| 50% | jsd | 4 | 0.1 | {cells[0]} | {cells[1]} |" in table
    assert table in capsys.readouterr().out
    assert (config_path.parent / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_one_seed_has_no_standard_errors(config_path, monkeypatch):
    options = ("--epochs=1", "--temperature=[2]", "--alpha=[0.1]", "--seeds=1")
    run_command(monkeypatch, "sweep", "--config", config_path, *options)
    results = read_sweep(config_path, "out")
    alone, distilled = (100 * accuracy for accuracy in results.values())
    table = (config_path.parent / "out" / "sweep.md").read_text()
    row = f"| 100% | forward_kl | 2 | 0.1 | {distilled:.2f} | {distilled - alone:+.2f} |"
    assert row in table and "nan" not in table and "±" not in table


def test_labels_of_the_plot_never_overlap():
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    rows = {
        sweep.Run(share, divergence, temperature, alpha, seed): 0.8 + 0.01 * seed
        for share, seed in itertools.product((0.5, 1.0), range(3))
        for divergence, temperature, alpha in (
            *itertools.product(("forward_kl", "jsd"), (1.0, 4.0, 8.0), (0.1, 0.5)),
            ("", 1.0, 1.0),
        )
    }
    figure = sweep._draw(rows)
    backend.FigureCanvasAgg(figure).draw()
    texts = [label for axes in figure.axes for label in (axes.title, axes.xaxis.label)]
    texts += [label for axes in figure.axes[2:] for label in axes.get_xticklabels()]
    assert [label.get_text() for label in texts].count("temperature") == 4
    assert [label.get_text() for label in texts[-3:]] == ["1", "4", "8"]
    for first, second in itertools.combinations(texts, 2):
        assert not first.get_window_extent().overlaps(second.get_window_extent())


def test_a_sweep_continues_where_it_stopped(config_path, monkeypatch):
    options = ("--epochs=1", "--temperature=[2]", "--alpha=[0.1]")
    arguments = (monkeypatch, "sweep", "--config", config_path, *options)
    run_command(*arguments, "--seeds=2")
    file = config_path.parent / "out" / "sweep.jsonl"
    complete = file.read_text()
    lines = complete.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2
    # The results end within a line, as if the run was killed.
    file.write_text("".join(lines[:3]) + lines[3][:9])
    trained = []
    fit = fastkd.Trainer.fit
    monkeypatch.setattr(
        fastkd.Trainer, "fit", lambda self, *args: trained.append(1) or fit(self, *args)
    )
    run_command(*arguments, "--seeds=2")
    assert file.read_text() == complete and len(trained) == 2
    run_command(*arguments, "--seeds=3")
    assert file.read_text().startswith(complete) and len(trained) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("temperature=4", r"temperature: .*tuple.* 4\. Write a list in brackets, such as \[1,2\]"),
        ("temperature=[]", r"temperature must have at least one value; got \[\]"),
        ("share=[]", r"share must have at least one value; got \[\]"),
        ("temperature=[0]", "loss: temperature must be positive"),
        ("divergence=[kld]", "loss: divergence must be one of"),
        ("alpha=[2]", r"loss: alpha must be in \[0, 1\]"),
        ("loss.hard_weight=1", "loss: .*alpha"),
        ("share=[0]", r"share must be in \(0, 1\]; got 0"),
        ("seeds=0", "seeds must be an int of at least 1; got 0"),
        ("validation=", "validation is missing"),
        ("optimizer.name=LBFGS", "optimizer: name must be"),
        ("teacher_top_k=2", "teacher_top_k: a cache of a few classes has one temperature"),
        ("validation={module}:unlabelled", "validation must have labels"),
        ("share=[0.5] --train={module}:batches", "share: train must return a data set"),
        ("epochs=4", "holds a sweep of another configuration"),
    ],
)
def test_a_sweep_refuses_invalid_options(config_path, monkeypatch, capsys, change, message):
    name = next(config_path.parent.glob("parts_*.py")).stem
    changes = f"--{change.replace('{module}', name)}".split()
    arguments = (
        "sweep",
        "--config",
        config_path,
        "--temperature=[2]",
        "--alpha=[0.1]",
        "--seeds=1",
    )
    if change == "epochs=4":
        run_command(monkeypatch, *arguments)
        capsys.readouterr()
    error = run_refused_command(monkeypatch, capsys, *arguments, *changes)
    assert re.search(f"^fastkd sweep: .*{message}", error), error
