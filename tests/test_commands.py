"""Test the command line: distill, report, info and help."""

import dataclasses
import importlib
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from stacks import load_student, module_of, run_command, run_refused_command

import fastkd
from fastkd import __main__ as command_line
from fastkd._core import native
from fastkd.commands import config

pytest.importorskip("accelerate")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("restored_path")


def test_distill_writes_what_report_reads(config_path, monkeypatch, capsys):
    run_command(monkeypatch, "distill", "--config", config_path)
    history = json.loads((config_path.parent / "out" / "history.json").read_text())
    assert len(history) == 3 and history[-1]["soft"] < history[0]["soft"]
    images, labels = module_of(config_path).held_out()[:]
    with torch.no_grad():
        accuracy = (load_student(config_path)(images).argmax(-1) == labels).float().mean().item()
    assert history[-1]["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy {100 * accuracy:.1f} %" in capsys.readouterr().out
    assert list((config_path.parent / "out" / "checkpoints").iterdir())

    name = module_of(config_path).__name__
    target = config_path.parent / "shown"
    run_command(
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
    run_command(
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
    run_command(
        *(monkeypatch, "distill", "--config", config_path, "--epochs", 1, "--ema", 0.5, *changed),
        *("--schedule", "cosine", "--checkpoints", "false", "--clip", "1e0"),
    )
    history = json.loads((config_path.parent / "2026" / "history.json").read_text())
    assert len(history) == 1 and not (config_path.parent / "2026" / "checkpoints").exists()
    from safetensors.torch import load_file

    weights = load_file(config_path.parent / "2026" / "student.safetensors")
    assert weights["0.weight"].shape == (5, 64)
    run_command(monkeypatch, "report", "--config", config_path, *changed, "--seconds", 0)
    assert "385" in capsys.readouterr().out.replace(" ", "").partition("parameters")[2][:40]


def test_shortcuts_set_the_options_of_the_loss(config_path, monkeypatch):
    short = ("--temperature", 3, "--alpha", 0.3, "--divergence", "jsd")
    full = [f"--loss.{name}={value}" for name, value in zip(*[iter(short)] * 2, strict=True)]
    full = [option.replace(".--", ".") for option in full]
    arguments = (monkeypatch, "distill", "--config", config_path)
    run_command(*arguments, *short, "--output", config_path.parent / "short")
    run_command(*arguments, *full, "--output", config_path.parent / "full")
    run_command(*arguments)
    weights = [
        next(load_student(config_path, name).parameters()) for name in ("short", "full", "out")
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_resumed_run_gives_the_parameters_of_an_uninterrupted_run(config_path, monkeypatch):
    arguments = (monkeypatch, "distill", "--config", config_path)
    run_command(*arguments, "--output", config_path.parent / "whole", "--epochs", 4)
    run_command(*arguments, "--epochs", 2)
    run_command(*arguments, "--epochs", 4, "--resume=true")
    for expected, actual in zip(
        load_student(config_path, "whole").parameters(),
        load_student(config_path).parameters(),
        strict=True,
    ):
        assert torch.equal(expected, actual)


def test_a_resumed_run_extends_the_history(config_path, monkeypatch, capsys):
    arguments = (monkeypatch, "distill", "--config", config_path)
    run_command(*arguments, "--epochs", 1)
    run_command(*arguments, "--resume=true")
    run_command(*arguments, "--resume=true")  # no epoch remains to train
    history = json.loads((config_path.parent / "out" / "history.json").read_text())
    assert len(history) == 3 and history[2]["soft"] < history[1]["soft"] < history[0]["soft"]
    assert f"accuracy {100 * history[-1]['accuracy']:.1f} %" in capsys.readouterr().out


def test_checkpoints_of_another_run_are_refused(config_path, monkeypatch, capsys):
    run_command(monkeypatch, "distill", "--config", config_path, "--epochs", 1)
    again = (monkeypatch, capsys, "distill", "--config", config_path)
    assert re.search("output: .* holds the checkpoints of another run", run_refused_command(*again))
    error = run_refused_command(*again, "--resume=true", "--checkpoints=false")
    assert "resume needs checkpoints, and checkpoints is false" in error


@pytest.mark.parametrize("change", ["teacher_top_k=4", "loss.temperature=3"])
def test_a_cache_with_other_options_is_refused(config_path, monkeypatch, capsys, change):
    cached = ("distill", "--config", config_path, f"--teacher_cache={config_path.parent / 'cache'}")
    run_command(monkeypatch, *cached, "--teacher_top_k=5", "--checkpoints=false")
    changed = ("--teacher_top_k=5", f"--{change}", "--checkpoints=false")
    error = run_refused_command(monkeypatch, capsys, *cached, *changed)
    assert re.search(r"fastkd distill: teacher_cache: .* holds a cache with", error)
    without = (*changed, "--teacher=", f"--teacher_cache={config_path.parent}")
    error = run_refused_command(monkeypatch, capsys, *cached, *without)
    assert re.search(r"fastkd distill: teacher_cache: .* holds no teacher's cache", error)


@pytest.mark.parametrize(
    "changes",
    [
        ["train_options={first: 7, last: 400}"],  # would add samples to the cache
        ["train_options={first: 7, last: 214}", "teacher="],
        ["validation_options.first=250"],
        ["validation_options.first=250", "teacher="],
    ],
)
def test_a_cache_of_other_data_is_refused(config_path, monkeypatch, capsys, changes):
    cache = config_path.parent / "cache"
    cached = ("distill", "--config", config_path, f"--teacher_cache={cache}")
    run_command(monkeypatch, *cached, "--checkpoints=false", "--train_options.last=207")
    files = list(cache.iterdir())
    flags = [f"--{change}" for change in changes]
    error = run_refused_command(monkeypatch, capsys, *cached, "--train_options.last=207", *flags)
    assert "fastkd distill: teacher_cache: batch: the inputs of 50 of 50 samples" in error
    assert "Choose another folder" in error and list(cache.iterdir()) == files


def test_a_cache_of_augmented_data_is_refused(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    augmented = (f"--train={name}:Augmented", f"--teacher_cache={config_path.parent / 'c'}")
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", config_path, *augmented)
    assert "With random augmentation, leave out teacher_cache" in error
    assert not (config_path.parent / "out").exists()


def test_a_cosine_schedule_needs_the_number_of_steps(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    streamed = ("distill", "--config", config_path, f"--train={name}:Stream")
    run_command(monkeypatch, *streamed)
    error = run_refused_command(
        *(monkeypatch, capsys, *streamed, "--output", config_path.parent / "b"),
        "--schedule=cosine",
    )
    assert "schedule: cosine needs the number of steps" in error


@pytest.mark.slow
def test_two_processes_share_the_teacher(config_path):
    # Each process runs the teacher on half of the data; the schedule ends with the last step.
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
    run_command(
        monkeypatch, "distill", "--config", config_path, "--output", config_path.parent / "live"
    )
    cache = config_path.parent / "cache"
    once = (monkeypatch, "distill", "--config", config_path, f"--teacher_cache={cache}")
    before = module_of(config_path).teacher_samples
    run_command(*once)
    samples = module_of(config_path).teacher_samples - before - 50 * 1700
    assert samples == 300 and list(cache.glob("shard-*.safetensors"))
    for expected, actual in zip(
        load_student(config_path, "live").parameters(),
        load_student(config_path).parameters(),
        strict=True,
    ):
        torch.testing.assert_close(expected, actual, rtol=1e-2, atol=2e-3)
    run_command(*once, "--teacher=", "--output", config_path.parent / "again")
    for expected, actual in zip(
        load_student(config_path, "again").parameters(),
        load_student(config_path).parameters(),
        strict=True,
    ):
        assert torch.equal(expected, actual)
    error = run_refused_command(
        *(*once[:1], capsys, *once[1:], "--output", config_path.parent / "none"),
        f"--train={module_of(config_path).__name__}:batches",
    )
    assert "train must return a data set with __getitem__ if there is a teacher_cache" in error


def test_a_cache_of_all_classes_gives_nearly_the_same_student(config_path, monkeypatch):
    # A cache of all ten classes differs from the teacher only by float16 rounding.
    loss = "--loss={temperature: 2, alpha: 0.1}"
    arguments = (monkeypatch, "distill", "--config", config_path, loss)
    run_command(*arguments, "--output", config_path.parent / "live")
    cache = config_path.parent / "cache"
    run_command(*arguments, f"--teacher_cache={cache}", "--teacher_top_k=10")
    for expected, actual in zip(
        load_student(config_path, "live").parameters(),
        load_student(config_path).parameters(),
        strict=True,
    ):
        torch.testing.assert_close(expected, actual, rtol=1e-2, atol=2e-3)


def test_without_labels_the_history_is_valid_json(config_path, monkeypatch, capsys):
    name = next(config_path.parent.glob("parts_*.py")).stem
    unlabelled = (f"--train={name}:unlabelled", f"--validation={name}:unlabelled")
    run_command(
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
    run_command(monkeypatch, "distill", "--config", config_path, f"--train={name}:batches")


@pytest.mark.slow
def test_the_example_configuration_runs(monkeypatch, tmp_path, capsys):
    example = ROOT / "examples" / "digits.yaml"
    run_command(monkeypatch, "distill", "--config", example, "--epochs", 5, "--output", tmp_path)
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
        run_command(monkeypatch, command, "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(config.Training))
    assert "largest norm of the gradient" in shown and "--module" in shown


def test_the_console_script_is_the_module():
    (script,) = (
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "fastkd"
    )
    assert script.load() is command_line.main
