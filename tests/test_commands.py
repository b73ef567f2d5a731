"""The command line: distill and report from a YAML file, and messages about bad files."""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import __main__ as command_line
from fastkd import extras
from fastkd._core import native
from fastkd.commands import config

pytest.importorskip("accelerate")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

ROOT = pathlib.Path(__file__).parents[1]
PARTS = """
import os
from os import system
import fastkd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

asked = 0
number = 3

def data(first=0, last=200):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    return TensorDataset(images[first:last], torch.tensor(labels)[first:last])

def held_out(first=200):
    return data(first, first + 100)

def unlabelled():
    return TensorDataset(data().tensors[0])

def batches():
    return DataLoader(data(), 50)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*data().tensors))

class Augmented(Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        image, label = data()[index]
        return image + torch.rand(64), label

class Asked(nn.Linear):
    def forward(self, images):
        global asked
        asked += len(images)
        return super().forward(images)

def teacher():
    torch.manual_seed(5)
    made = Asked(64, 10)
    images, labels = data(0, 1700).tensors
    optimizer = torch.optim.Adam(made.parameters(), 0.05)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(images), labels).backward()
        optimizer.step()
    return made

def student(width=8):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

def broken():
    raise ZeroDivisionError

def misled():
    fastkd.KDLoss(temperature=0.0)

def misshapen():
    return nn.Linear(3, 10)

def nothing():
    return None
"""
CONFIG = """
teacher: {module}:teacher
student: {module}:student
train: {module}:data
validation: {module}:held_out
output: {output}
epochs: 3
batch_size: 50
loss: {{temperature: 4, alpha: 0.1}}
optimizer: {{name: Adam, lr: 1e-2}}
"""


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def config_path(tmp_path, request) -> pathlib.Path:
    """Write a configuration and a module of a unique name beside it."""
    module = "parts_" + re.sub(r"\W", "_", request.node.name)[:80]
    (tmp_path / f"{module}.py").write_text(PARTS)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(module=module, output=json.dumps(str(tmp_path / "out"))))
    return file


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["fastkd", *map(str, arguments)])
    command_line.main()


def refused(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def module_of(config_path: pathlib.Path):
    return sys.modules[next(config_path.parent.glob("parts_*.py")).stem]


def load(config_path: pathlib.Path, output: str = "out") -> nn.Module:
    from safetensors.torch import load_model

    student = module_of(config_path).student()
    load_model(student, str(config_path.parent / output / "student.safetensors"))
    return student


# ---- distill


def test_distill_writes_what_report_reads(config_path, monkeypatch, capsys):
    run(monkeypatch, "distill", "--config", config_path)
    history = json.loads((config_path.parent / "out" / "history.json").read_text())
    assert len(history) == 3 and history[-1]["soft"] < history[0]["soft"]
    images, labels = module_of(config_path).held_out()[:]
    with torch.no_grad():
        accuracy = (load(config_path)(images).argmax(-1) == labels).float().mean().item()
    assert history[-1]["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy {100 * accuracy:.1f} %" in capsys.readouterr().out
    assert list((config_path.parent / "out" / "checkpoints").iterdir())

    name = module_of(config_path).__name__
    target = config_path.parent / "shown"
    run(
        *(monkeypatch, "report", "--config", config_path, "--seconds", 0, "--save", target),
        *("--model.untrained", f"{name}:student", "--title", "Digits", "--threads", 1),
    )
    report = json.loads((target / "report.json").read_text())
    by_name = {model["name"]: model for model in report["models"]}
    assert list(by_name) == ["teacher", "distilled", "untrained"] and report["title"] == "Digits"
    assert by_name["distilled"]["accuracy"] == pytest.approx(accuracy)
    assert by_name["untrained"]["accuracy"] < accuracy and report["environment"]["threads"] == "1"
    assert (target / "report.html").read_text().startswith("<!doctype html>")
    assert "untrained" in capsys.readouterr().out


def test_report_needs_no_configuration(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    monkeypatch.chdir(config_path.parent)
    run(
        *(
            monkeypatch,
            "report",
            "--teacher",
            f"{name}:teacher",
            "--validation",
            f"{name}:held_out",
        ),
        *("--model.a", f"{name}:student", "--seconds", 0),
    )
    assert "agrees with the teacher" in capsys.readouterr().out


def test_options_override_the_file(config_path, monkeypatch, capsys):
    changed = ("--student_options.width", 5, "--output", config_path.parent / "2026")
    run(
        *(monkeypatch, "distill", "--config", config_path, "--epochs", 1, "--ema", 0.5, *changed),
        *("--schedule", "cosine", "--checkpoints", "false", "--clip", "1e0"),
    )
    history = json.loads((config_path.parent / "2026" / "history.json").read_text())
    assert len(history) == 1 and not (config_path.parent / "2026" / "checkpoints").exists()
    from safetensors.torch import load_file

    weights = load_file(config_path.parent / "2026" / "student.safetensors")
    assert weights["0.weight"].shape == (5, 64)
    run(monkeypatch, "report", "--config", config_path, *changed, "--seconds", 0)
    assert "385" in capsys.readouterr().out.replace(" ", "").partition("parameters")[2][:40]


def test_shortcuts_set_the_options_of_the_loss(config_path, monkeypatch):
    short = ("--temperature", 3, "--alpha", 0.3, "--divergence", "jsd")
    full = [f"--loss.{name}={value}" for name, value in zip(*[iter(short)] * 2, strict=True)]
    full = [option.replace(".--", ".") for option in full]
    arguments = (monkeypatch, "distill", "--config", config_path)
    run(*arguments, *short, "--output", config_path.parent / "short")
    run(*arguments, *full, "--output", config_path.parent / "full")
    run(*arguments)
    weights = [next(load(config_path, name).parameters()) for name in ("short", "full", "out")]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_resumed_run_gives_the_parameters_of_an_uninterrupted_run(config_path, monkeypatch):
    arguments = (monkeypatch, "distill", "--config", config_path)
    run(*arguments, "--output", config_path.parent / "whole", "--epochs", 4)
    run(*arguments, "--epochs", 2)
    run(*arguments, "--epochs", 4, "--resume=true")
    for expected, actual in zip(
        load(config_path, "whole").parameters(), load(config_path).parameters(), strict=True
    ):
        assert torch.equal(expected, actual)


def test_a_resumed_run_extends_the_history(config_path, monkeypatch, capsys):
    arguments = (monkeypatch, "distill", "--config", config_path)
    run(*arguments, "--epochs", 1)
    run(*arguments, "--resume=true")
    run(*arguments, "--resume=true")  # no epoch remains
    history = json.loads((config_path.parent / "out" / "history.json").read_text())
    assert len(history) == 3 and history[2]["soft"] < history[1]["soft"] < history[0]["soft"]
    assert f"accuracy {100 * history[-1]['accuracy']:.1f} %" in capsys.readouterr().out


def test_checkpoints_of_another_run_are_refused(config_path, monkeypatch, capsys):
    run(monkeypatch, "distill", "--config", config_path, "--epochs", 1)
    again = (monkeypatch, capsys, "distill", "--config", config_path)
    assert re.search("output: .* holds the checkpoints of another run", refused(*again))
    error = refused(*again, "--resume=true", "--checkpoints=false")
    assert "resume needs checkpoints, and checkpoints is false" in error


@pytest.mark.parametrize("change", ["teacher_top_k=4", "loss.temperature=3"])
def test_a_cache_with_other_options_is_refused(config_path, monkeypatch, capsys, change):
    cached = ("distill", "--config", config_path, f"--teacher_cache={config_path.parent / 'cache'}")
    run(monkeypatch, *cached, "--teacher_top_k=5", "--checkpoints=false")
    changed = ("--teacher_top_k=5", f"--{change}", "--checkpoints=false")
    error = refused(monkeypatch, capsys, *cached, *changed)
    assert re.search(r"fastkd distill: teacher_cache: .* holds a cache with", error)
    without = (*changed, "--teacher=", f"--teacher_cache={config_path.parent}")
    error = refused(monkeypatch, capsys, *cached, *without)
    assert re.search(r"fastkd distill: teacher_cache: .* holds no teacher's cache", error)


@pytest.mark.parametrize(
    "changes",
    [
        ["train_options={first: 7, last: 400}"],  # extends the cache
        ["train_options={first: 7, last: 214}", "teacher="],
        ["validation_options.first=250"],
        ["validation_options.first=250", "teacher="],
    ],
)
def test_a_cache_of_other_data_is_refused(config_path, monkeypatch, capsys, changes):
    """A cache of other data is refused, and no file is added to the cache."""
    cache = config_path.parent / "cache"
    cached = ("distill", "--config", config_path, f"--teacher_cache={cache}")
    run(monkeypatch, *cached, "--checkpoints=false", "--train_options.last=207")
    files = list(cache.iterdir())
    flags = [f"--{change}" for change in changes]
    error = refused(monkeypatch, capsys, *cached, "--train_options.last=207", *flags)
    assert "fastkd distill: teacher_cache: batch: the inputs of 50 of 50 samples" in error
    assert "Choose another folder" in error and list(cache.iterdir()) == files


def test_a_cache_of_augmented_data_is_refused(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    augmented = (f"--train={name}:Augmented", f"--teacher_cache={config_path.parent / 'c'}")
    error = refused(monkeypatch, capsys, "distill", "--config", config_path, *augmented)
    assert "With random augmentation, leave out teacher_cache" in error
    assert not (config_path.parent / "out").exists()


def test_a_cosine_schedule_needs_the_number_of_steps(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    streamed = ("distill", "--config", config_path, f"--train={name}:Stream")
    run(monkeypatch, *streamed)
    error = refused(
        *(monkeypatch, capsys, *streamed, "--output", config_path.parent / "b"),
        "--schedule=cosine",
    )
    assert "schedule: cosine needs the number of steps" in error


@pytest.mark.slow
def test_two_processes_share_the_teacher(config_path):
    """Each process runs the teacher on half of the data; the schedule ends with the last step."""
    cache = config_path.parent / "cache"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    changes = (f"teacher_cache={cache}", "schedule=cosine")
    overrides = [f"--{change}" for change in changes]
    done = subprocess.run(
        [sys.executable, *launch, "fastkd", "distill", "--config", str(config_path), *overrides],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from fastkd import teachers
    from fastkd.teachers import shard

    assert len(teachers.TeacherCache(cache)) == 300
    assert [len(shard.read(file)[0].ids) for file in cache.glob(shard.PATTERN)] == [150, 150]
    (last,) = (config_path.parent / "out" / "checkpoints").glob("step-00000006")
    schedule = torch.load(last / "scheduler.pt")
    assert schedule["_last_lr"] == [pytest.approx(0.0, abs=1e-12)]
    history = json.loads((config_path.parent / "out" / "history.json").read_text())
    assert [each["rows"] for each in history] == [100] * 3


def test_a_cached_teacher_gives_nearly_the_same_student(config_path, monkeypatch, capsys):
    run(monkeypatch, "distill", "--config", config_path, "--output", config_path.parent / "live")
    cache = config_path.parent / "cache"
    once = (monkeypatch, "distill", "--config", config_path, f"--teacher_cache={cache}")
    asked = module_of(config_path).asked
    run(*once)
    asked = module_of(config_path).asked - asked - 50 * 1700
    assert asked == 300 and list(cache.glob("shard-*.safetensors"))
    for expected, actual in zip(
        load(config_path, "live").parameters(), load(config_path).parameters(), strict=True
    ):
        torch.testing.assert_close(expected, actual, rtol=1e-2, atol=2e-3)
    run(*once, "--teacher=", "--output", config_path.parent / "again")
    for expected, actual in zip(
        load(config_path, "again").parameters(), load(config_path).parameters(), strict=True
    ):
        assert torch.equal(expected, actual)
    error = refused(
        *(*once[:1], capsys, *once[1:], "--output", config_path.parent / "none"),
        f"--train={module_of(config_path).__name__}:batches",
    )
    assert "train must return a data set with __getitem__ if there is a teacher_cache" in error


def test_a_cache_of_all_classes_gives_nearly_the_same_student(config_path, monkeypatch):
    """A cache of all ten classes differs from the teacher only by float16 rounding."""
    loss = "--loss={temperature: 2, alpha: 0.1}"
    arguments = (monkeypatch, "distill", "--config", config_path, loss)
    run(*arguments, "--output", config_path.parent / "live")
    cache = config_path.parent / "cache"
    run(*arguments, f"--teacher_cache={cache}", "--teacher_top_k=10")
    for expected, actual in zip(
        load(config_path, "live").parameters(), load(config_path).parameters(), strict=True
    ):
        torch.testing.assert_close(expected, actual, rtol=1e-2, atol=2e-3)


def test_without_labels_the_history_is_valid_json(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    unlabelled = (f"--train={name}:unlabelled", f"--validation={name}:unlabelled")
    run(
        monkeypatch,
        "distill",
        "--config",
        config_path,
        *unlabelled,
        "--loss={temperature: 4, alpha: 0}",
    )
    text = (config_path.parent / "out" / "history.json").read_text()
    assert [each["accuracy"] for each in json.loads(text)] == [None] * 3 and "NaN" not in text
    assert "accuracy" not in capsys.readouterr().out


def test_a_factory_may_return_a_loader(config_path, monkeypatch):
    name = next(config_path.parent.glob("parts_*.py")).stem
    run(monkeypatch, "distill", "--config", config_path, f"--train={name}:batches")


@pytest.mark.slow
def test_the_example_configuration_runs(monkeypatch, tmp_path, capsys):
    example = ROOT / "examples" / "digits.yaml"
    run(monkeypatch, "distill", "--config", example, "--epochs", 5, "--output", tmp_path)
    assert (tmp_path / "student.safetensors").exists()


def test_info_says_why_the_fast_path_is_off(monkeypatch):
    facts = command_line.info()
    assert facts["fast path"] == native.FAST_PATH and facts["fast path"][:3] in ("on,", "off")
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    old_eager = SimpleNamespace(torch_version="2.13.0", register_kernels=pytest.fail)
    monkeypatch.setattr(fastkd, "_eager", old_eager, raising=False)
    reason = "off: built with torch 2.13.0, running 2.14.1: reinstall to get it"
    assert native._load_eager() == (None, reason)
    monkeypatch.delattr(fastkd, "_eager")
    monkeypatch.setitem(sys.modules, "fastkd._eager", None)
    reason = "off: not built for torch 2.14.1: install from source to get it"
    assert native._load_eager() == (None, reason)


def test_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("info", "distill", "sweep", "report", "export"))


@pytest.mark.parametrize("command", ["distill", "sweep", "report", "export"])
def test_help_describes_every_option(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, command, "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(config.Training))
    assert "largest norm of the gradient" in shown and "--module" in shown


# ---- sweep


def swept(config_path: pathlib.Path, output: str) -> dict[tuple, float]:
    lines = (config_path.parent / output / "sweep.jsonl").read_text().splitlines()[1:]
    return {tuple(run): accuracy for *run, accuracy in map(json.loads, lines)}


def test_a_sweep_is_a_table_of_trainings(config_path, monkeypatch, capsys):
    """Each run equals a Trainer's; the table has means, standard errors and differences."""
    run(
        *(monkeypatch, "sweep", "--config", config_path, "--alpha=[0.1]", "--divergence=[jsd]"),
        *("--temperature=[1,4]", "--share=[0.5,1]", "--seeds=2"),
    )
    results = swept(config_path, "out")
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


def test_a_sweep_continues_where_it_stopped(config_path, monkeypatch):
    options = ("--epochs=1", "--temperature=[2]", "--alpha=[0.1]")
    arguments = (monkeypatch, "sweep", "--config", config_path, *options)
    run(*arguments, "--seeds=2")
    file = config_path.parent / "out" / "sweep.jsonl"
    complete = file.read_text()
    lines = complete.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2
    file.write_text("".join(lines[:3]) + lines[3][:9])  # as if killed while writing a line
    trained = []
    fit = fastkd.Trainer.fit
    monkeypatch.setattr(
        fastkd.Trainer, "fit", lambda self, *args: trained.append(1) or fit(self, *args)
    )
    run(*arguments, "--seeds=2")
    assert file.read_text() == complete and len(trained) == 2
    run(*arguments, "--seeds=3")  # one more seed
    assert file.read_text().startswith(complete) and len(trained) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("temperature=0", "temperature.*tuple.*0"),
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
        run(monkeypatch, *arguments)
        capsys.readouterr()
    error = refused(monkeypatch, capsys, *arguments, *changes)
    assert re.search(f"^fastkd sweep: .*{message}", error), error


# ---- refused configurations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student="], "student is missing"),
        (["--output="], "output is missing"),
        (["--samples=0"], "samples must be an int of at least 1; got 0"),
        (["--path=student.pte"], "path must be a file that ends in .onnx for format='onnx'; got"),
        ([], "student_weights must be an existing .safetensors file"),
    ],
)
def test_an_export_with_missing_or_invalid_options_is_refused(
    config_path, monkeypatch, capsys, arguments, message
):
    pytest.importorskip("onnxscript")
    assert message in refused(monkeypatch, capsys, "export", "--config", config_path, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", "nrecognized arguments: --epoch=3. Did you mean 'epochs'"),
        ("epochs=1.5", "epochs.*int.*1.5"),
        ("epochs=true", "epochs.*int.*True"),
        ("epochs=0", "epochs must be an int of at least 1; got 0"),
        ("epochs.x=1", "epochs.*"),
        ("seed=-1", "seed must be an int of at least 0; got -1"),
        (f"seed={2**70}", r"seed must be in \[0, 9.22337e\+18\)"),
        ("ema=2", r"ema must be in \[0, 1\); got 2"),
        ("clip=.nan", "clip must be positive and finite; got nan"),
        ("schedule=linear", "schedule.*linear"),
        ("checkpoints=2", "checkpoints.*bool.*2"),
        ("output=", "output is missing"),
        ("teacher=", "teacher is missing"),
        ("loss=3", "loss.*dict.*3"),
        ("loss.alhpa=1", "loss: .*alhpa.*Did you mean 'alpha'"),
        ("loss.temperature=0", "loss: temperature must be positive"),
        (
            "optimizer.name=open",
            "optimizer: name must be that of a torch.optim class .* got 'open'",
        ),
        ("optimizer.name=__builtins__", "optimizer: name must be that of a torch.optim class"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("optimizer.lrr=1", "optimizer: .*lrr"),
        ("optimizer.name=LBFGS", "optimizer: name must be .* got 'LBFGS'"),
        ("optimizer.name=SparseAdam", "optimizer: name must be .* got 'SparseAdam'"),
        ("student=os.system", "student must be module:function; got 'os.system'"),
        ("student=os:system('x')", "student must be module:function; got"),
        ("student=.{module}:student", "student must be module:function; got"),
        ("student={module}:os.system", "student must be module:function; got"),
        ("student=no_such_module:f", "student: the module no_such_module is not found"),
        ("student={module}:absent", "student: {module}:absent must be a function or class that"),
        (
            "student=json:loads",
            "student: the module json is .*json/__init__.py, outside .*--module",
        ),
        ("student=sys:exit", "student: the module sys is built-in, outside .*--module sys"),
        ("student={module}:load_digits", "student: .* that {module} defines; got .*sklearn"),
        ("student={module}:TensorDataset", "student: .* that {module} defines; got type of torch"),
        (
            "train={module}:DataLoader",
            "train: .* must be a function or class that {module} defines",
        ),
        ("student={module}:number", "student: {module}:number must be a function or class"),
        ("student={module}:nothing", "student must return a torch.nn.Module; got NoneType"),
        ("student_options=[1]", "student_options.*dict.*1"),
        ("student_options.widht=3", "student_options do not fit {module}:student: .*widht"),
        ("teacher_top_k=-1", "teacher_top_k must be an int of at least 0"),
        ("teacher_weights=x.pt", "teacher_weights must be an existing .safetensors file"),
        ("teacher_weights=x.safetensors", "teacher_weights must be an existing .safetensors file"),
        ("loss.reduction=sum", "loss must have reduction='mean'"),
        ("loss.normalizer=5", "loss must have normalizer=None"),
        ("train={module}:nothing", "train must return a data set or a DataLoader; got None"),
        ("output={module}.py", "output must be a folder; got .*, and .* is a file"),
        ("teacher_cache={module}.py/c", "teacher_cache must be a folder; got .*, and .* is a file"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key(
    config_path, monkeypatch, capsys, change, message
):
    name = next(config_path.parent.glob("parts_*.py")).stem
    monkeypatch.chdir(config_path.parent)
    change = change.format(module=name) if "{" in change else change
    message = message.replace("{module}", name)
    error = refused(monkeypatch, capsys, "distill", "--config", config_path, f"--{change}")
    assert re.search(f"^fastkd distill: .*{message}", error), error
    assert error.count("\n") == 1 and not (config_path.parent / "out").exists()


@pytest.mark.parametrize("command", ["distill", "report"])
@pytest.mark.parametrize("key", ["teacher", "student", "train", "validation"])
@pytest.mark.parametrize("factory", ["os:system", "{module}:os.system", "{module}:system"])
def test_a_configuration_runs_no_command(config_path, monkeypatch, capsys, command, key, factory):
    name, proof = next(config_path.parent.glob("parts_*.py")).stem, config_path.parent / "proof"
    if command == "report" and key == "train":
        key = "validation"  # a report has no training data
    lines = [
        line for line in config_path.read_text().splitlines() if not line.startswith(f"{key}:")
    ]
    lines += [f"{key}: '{factory.format(module=name)}'"]
    lines += [f"{key}_options: {{command: 'echo executed > {proof}'}}"]
    config_path.write_text("\n".join(lines))
    refused(monkeypatch, capsys, command, "--config", config_path)
    assert not proof.exists()


@pytest.mark.parametrize("key", ["module", "config", "resume", "print_config"])
def test_a_file_cannot_set_options_of_the_command_line(config_path, monkeypatch, capsys, key):
    """The keys ``module`` and ``config`` would let a file trust other modules."""
    config_path.write_text(f"{config_path.read_text()}\n{key}: os\n")
    error = refused(monkeypatch, capsys, "distill", "--config", config_path)
    assert f"fastkd distill: {config_path}: " in error and key in error


@pytest.mark.parametrize("key", ["student", "student_options", "loss", "epochs"])
@pytest.mark.parametrize("nested", [False, True])
def test_class_path_imports_nothing(config_path, monkeypatch, capsys, key, nested):
    """A class_path in the file imports no module, though jsonargparse supports class_path."""
    proof = config_path.parent / "imported"
    (config_path.parent / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(config_path.parent)
    value = "{class_path: evil.Evil, init_args: {}}"
    lines = [
        line for line in config_path.read_text().splitlines() if not line.startswith(f"{key}:")
    ]
    lines += [f"{key}: {f'{{width: {value}}}' if nested else value}"]
    config_path.write_text("\n".join(lines))
    with pytest.raises((SystemExit, TypeError)):  # the student's constructor refuses this width
        run(monkeypatch, "distill", "--config", config_path)
    assert not proof.exists() and "evil" not in sys.modules


def test_modules_elsewhere_are_imported_only_if_named(
    config_path, monkeypatch, capsys, tmp_path_factory
):
    """Only modules named by --module, and their submodules, are imported."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    package = elsewhere / "distant_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text(PARTS)
    monkeypatch.syspath_prepend(elsewhere)
    change = ("distill", "--config", config_path, "--student=distant_parts.small:student")
    error = refused(monkeypatch, capsys, *change)
    assert "add --module distant_parts.small" in error
    assert not any(name.startswith("distant_parts") for name in sys.modules)
    error = refused(monkeypatch, capsys, *change, "--module", "distant_parts.sma")
    assert "add --module distant_parts.small" in error
    run(monkeypatch, *change, "--module", "distant_parts", "--epochs", 1)
    run(monkeypatch, *change, "--module", "distant_parts.small", "--epochs", 1, "--resume=true")


def test_modules_in_the_configuration_s_folder_replace_no_other_module(
    config_path, monkeypatch, capsys
):
    """The configuration's folder is the last entry of sys.path."""
    before = list(sys.path)
    (config_path.parent / "wave.py").write_text("raise ZeroDivisionError")
    change = ("--student=wave:open",)
    error = refused(monkeypatch, capsys, "distill", "--config", config_path, *change)
    assert "the module wave is" in error and "have a name of its own" in error
    assert sys.path[: len(before)] == before and str(config_path.parent) in sys.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must have keys and values"),
        ("", "must have keys and values"),
        ("a: [", "not YAML"),
        ("student: !!python/object/apply:os.system ['false']", "not YAML.*python/object"),
        ("epochs: " + "[" * 100_000, "line 1 is nested more than 50 levels deep"),
        ("- " * 100_000, "line 1 is nested more than 50 levels deep"),
        ("\x00", "not YAML"),
        ("epochs: 2024-13-45", "epochs must be of type int; got '2024-13-45'"),
        ("epochs: " + "9" * 5000, "Exceeds the limit"),
        ("epochs: 1\nloss: &a {x: *a}", "line 2 uses a YAML alias"),
        ("a: &a [1]\nb: {<<: *a}", "line 2 uses a YAML alias"),
        ("epoch: 3", "epoch.* is not accepted|epoch"),
        ("3: 4", "3"),
        ("epochs: 1.5", "epochs.*int.*1.5"),
        ("epochs: 0", "epochs must be an int of at least 1; got 0"),
        ("student: {a: b}", "student.*str.*'a'"),
        ("student: 3", "student.*str.*3"),
        (
            "loss: '{temperature: 3}'",
            "loss must be a mapping, such as {key: value}; got '{temp",
        ),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, monkeypatch, capsys, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    error = refused(monkeypatch, capsys, "distill", "--config", file)
    assert re.search(f"^fastkd distill: {file}: .*({message})", error), error
    assert error.count("\n") == 1


def test_numbers_and_null_of_a_file_are_read(config_path, monkeypatch):
    """1e-3 is a number, though YAML 1.1 reads it as text; null stands for the default."""
    texts = ["clip: 1e-3", "ema: 5e-1", "seed: null", "loss: {alpha: 1e-1}", "optimizer: null"]
    trainings = []
    name = next(config_path.parent.glob("parts_*.py")).stem
    config_path.write_text("\n".join([f"student: {name}:student", *texts]))
    config.run(
        lambda training, factories: trainings.append(training), ["--config", str(config_path)]
    )
    (training,) = trainings
    assert (training.clip, training.ema, training.seed) == (1e-3, 0.5, 0)
    assert training.loss == {"alpha": 0.1} and training.optimizer == {}


def test_nested_aliases_are_refused_at_once(tmp_path):
    """Aliases that stand for 9^10 values are refused within the time limit."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines))
    assert file.stat().st_size < 700
    assert "line 2 uses a YAML alias" in command_in_another_process(file)
    bomb = ", ".join(f"{{{line}}}" for line in lines)
    file.write_text(f"loss: '[{bomb}]'\nepochs: '[{bomb}]'")  # jsonargparse parses texts as YAML
    assert "epochs must be of type int" in command_in_another_process(file)


@pytest.mark.slow
def test_long_texts_are_read_in_linear_time(tmp_path):
    """Parsing a number takes time proportional to the text's length."""
    file = tmp_path / "config.yaml"
    file.write_text(f"student: '{'1' * 500_000}'")
    assert "is missing" in command_in_another_process(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    error = command_in_another_process(tmp_path / "config.yaml")
    assert "config.yaml: must be a regular file" in error


def command_in_another_process(file: pathlib.Path) -> str:
    """Run a command that must be refused within a minute; return its stderr."""
    command = [sys.executable, "-m", "fastkd", "distill", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_a_missing_file_is_refused(tmp_path, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, "distill", "--config", tmp_path / "none.yaml")
    assert "none.yaml: cannot read the file" in error and "No such file" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "teacher is missing"),
        (["--teacher=json:loads"], "validation is missing"),
        (["--teacher=json:loads", "--validation=json:loads"], "at least one student"),
        (["--model=json:loads"], "model.*dict.*json:loads"),
        (["--batch_size=0"], "batch_size must be an int of at least 1; got 0"),
        (["--threads=0"], "threads must be an int of at least 1; got 0"),
        (["--seconds=-1"], "seconds must be finite and at least 0; got -1"),
        ([f"--save={__file__}"], "save must be a folder; got"),
        (["--model.teacher=json:loads"], "none may be named teacher"),
        (["--model.a=json:loads"], "validation: the module json is"),
    ],
)
def test_a_report_with_missing_or_invalid_options_is_refused(
    monkeypatch, capsys, arguments, message
):
    if arguments and arguments[0].startswith(("--sec", "--thr", "--save", "--model.")):
        arguments = ["--teacher=json:loads", "--validation=json:loads", *arguments]
    assert re.search(message, refused(monkeypatch, capsys, "report", *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.divergence=mse", "divergence must be one of .* with a TopK as teacher"),
        ("train={module}:Stream", "train must return a data set with __getitem__ .*Stream"),
    ],
)
def test_options_that_a_cache_cannot_serve_are_refused(
    config_path, monkeypatch, capsys, change, message
):
    name = next(config_path.parent.glob("parts_*.py")).stem
    cached = (f"--teacher_cache={config_path.parent / 'cache'}", "--teacher_top_k=5")
    change = f"--{change.format(module=name)}"
    error = refused(monkeypatch, capsys, "distill", "--config", config_path, *cached, change)
    assert re.search(f"fastkd distill: {message}", error), error


def test_an_unsupported_precision_is_refused(config_path, monkeypatch, capsys):
    def lacking(**_):
        raise ValueError("fp16 needs a GPU")

    monkeypatch.setattr("accelerate.Accelerator", lacking)
    error = refused(monkeypatch, capsys, "distill", "--config", config_path)
    assert "fastkd distill: mixed_precision: fp16 needs a GPU" in error


def test_weights_of_another_model_are_refused(config_path, monkeypatch, capsys):
    from safetensors.torch import save_model

    file = config_path.parent / "other.safetensors"
    save_model(nn.Linear(3, 3), str(file))
    error = refused(
        monkeypatch, capsys, "distill", "--config", config_path, f"--student_weights={file}"
    )
    assert "student_weights:" in error and "does not fit" in error
    file.write_bytes(b"no weights")
    error = refused(
        monkeypatch, capsys, "distill", "--config", config_path, f"--student_weights={file}"
    )
    assert "student_weights:" in error and "does not fit" in error


@pytest.mark.parametrize(
    ("factory", "error"), [("broken", ZeroDivisionError), ("misled", ValueError)]
)
def test_the_user_s_own_errors_keep_their_traceback(config_path, monkeypatch, factory, error):
    """Errors that fastkd raises in the user's factory keep their traceback, too."""
    name = next(config_path.parent.glob("parts_*.py")).stem
    with pytest.raises(error):
        run(monkeypatch, "distill", "--config", config_path, f"--student={name}:{factory}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("loss.teacher_weights=[1, 2]", "teacher_weights must have one number for each teacher, 1"),
        ("teacher_top_k=50", "teacher_top_k must be at most the number of classes, 10; got 50"),
    ],
)
def test_options_that_do_not_fit_the_teacher_are_refused_first(
    config_path, monkeypatch, capsys, change, message
):
    """The error is raised before anything is trained or written."""
    cached = f"--teacher_cache={config_path.parent / 'cache'}"
    error = refused(monkeypatch, capsys, "distill", "--config", config_path, cached, f"--{change}")
    assert error.splitlines()[-1].startswith(f"fastkd distill: {message}")
    assert "Traceback" not in error
    assert not (config_path.parent / "out").exists() and not list(
        config_path.parent.glob("cache/*")
    )


def test_errors_while_models_run_keep_their_traceback(config_path, monkeypatch):
    """Errors inside the user's models keep their traceback."""
    name = next(config_path.parent.glob("parts_*.py")).stem
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(monkeypatch, "distill", "--config", config_path, f"--student={name}:misshapen")
    assert not (config_path.parent / "out" / "student.safetensors").exists()


@pytest.mark.parametrize("package", ["yaml", "jsonargparse"])
def test_a_missing_package_is_named(config_path, monkeypatch, capsys, package):
    def import_module(name):
        if name == package:
            raise ModuleNotFoundError(name=name)
        return importlib.import_module(name)

    monkeypatch.setattr(extras, "importlib", SimpleNamespace(import_module=import_module))
    error = refused(monkeypatch, capsys, "distill", "--config", config_path)
    assert f"this needs {package}, which is not installed: pip install 'fastkd[train]'" in error


def test_the_user_s_missing_modules_keep_their_traceback(config_path, monkeypatch):
    (config_path.parent / "needs_more.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run(monkeypatch, "distill", "--config", config_path, "--student=needs_more:student")


def test_the_console_script_is_the_module():
    (script,) = (
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "fastkd"
    )
    assert script.load() is command_line.main
