"""The command line: a training and a report from a YAML file, and what is said of a bad one."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastkd import __main__ as command_line
from fastkd.commands import config
from fastkd.training import arguments as trainer_arguments

pytest.importorskip("accelerate")
pytest.importorskip("yaml")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

ROOT = pathlib.Path(__file__).parents[1]
PARTS = """
import os
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
def given(tmp_path, request) -> pathlib.Path:
    """A configuration beside the module that it names, unique to the test."""
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


def module_of(given: pathlib.Path):
    return sys.modules[next(given.parent.glob("parts_*.py")).stem]


def load(given: pathlib.Path, output: str = "out") -> nn.Module:
    from safetensors.torch import load_model

    student = module_of(given).student()
    load_model(student, str(given.parent / output / "student.safetensors"))
    return student


# ---- distill


def test_distill_then_report(given, monkeypatch, capsys):
    run(monkeypatch, "distill", "--config", given)
    history = json.loads((given.parent / "out" / "history.json").read_text())
    assert len(history) == 3 and history[-1]["soft"] < history[0]["soft"]
    images, labels = module_of(given).held_out()[:]
    with torch.no_grad():
        accuracy = (load(given)(images).argmax(-1) == labels).float().mean().item()
    assert history[-1]["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy {100 * accuracy:.1f} %" in capsys.readouterr().out
    assert list((given.parent / "out" / "checkpoints").iterdir())

    name = module_of(given).__name__
    target = given.parent / "shown"
    run(
        *(monkeypatch, "report", "--config", given, "--seconds", 0, "--output", target),
        *("--model", f"untrained={name}:student", "--title", "Digits"),
    )
    found = json.loads((target / "report.json").read_text())
    by_name = {model["name"]: model for model in found["models"]}
    assert list(by_name) == ["teacher", "distilled", "untrained"] and found["title"] == "Digits"
    assert by_name["distilled"]["accuracy"] == pytest.approx(accuracy)
    assert by_name["untrained"]["accuracy"] < accuracy
    assert (target / "report.html").read_text().startswith("<!doctype html>")
    assert "untrained" in capsys.readouterr().out


def test_report_without_a_configuration(given, monkeypatch, capsys):
    name = next(given.parent.glob("parts_*.py")).stem
    monkeypatch.chdir(given.parent)
    run(
        *(monkeypatch, "report", "--teacher", f"{name}:teacher", "--data", f"{name}:held_out"),
        *("--model", f"a={name}:student", "--seconds", 0),
    )
    assert "agrees with the teacher" in capsys.readouterr().out


def test_flags_and_set_override_the_file(given, monkeypatch, capsys):
    run(
        *(monkeypatch, "distill", "--config", given, "--epochs", 1, "--output"),
        *(given.parent / "2026", "--set", "student.options.width=5", "--set", "ema=0.5"),
        *("--set", "schedule=cosine", "--set", "checkpoints=false", "--set", "clip=1e0"),
    )
    history = json.loads((given.parent / "2026" / "history.json").read_text())
    assert len(history) == 1 and not (given.parent / "2026" / "checkpoints").exists()
    from safetensors.torch import load_file

    weights = load_file(given.parent / "2026" / "student.safetensors")
    assert weights["0.weight"].shape == (5, 64)
    described = ("--set", "student.options.width=5", "--set", f"output={given.parent / '2026'}")
    run(monkeypatch, "report", "--config", given, *described, "--seconds", 0)
    assert "385" in capsys.readouterr().out.replace(" ", "").partition("parameters")[2][:40]


def test_resumed_it_ends_as_if_it_had_never_stopped(given, monkeypatch):
    arguments = (monkeypatch, "distill", "--config", given)
    run(*arguments, "--output", given.parent / "whole", "--epochs", 4)
    run(*arguments, "--epochs", 2)
    run(*arguments, "--epochs", 4, "--resume")
    for one, other in zip(load(given, "whole").parameters(), load(given).parameters(), strict=True):
        assert torch.equal(one, other)


def test_history_goes_on_where_a_run_was_interrupted(given, monkeypatch, capsys):
    arguments = (monkeypatch, "distill", "--config", given)
    run(*arguments, "--epochs", 1)
    run(*arguments, "--resume")
    run(*arguments, "--resume")  # nothing is left to do
    history = json.loads((given.parent / "out" / "history.json").read_text())
    assert len(history) == 3 and history[2]["soft"] < history[1]["soft"] < history[0]["soft"]
    assert f"accuracy {100 * history[-1]['accuracy']:.1f} %" in capsys.readouterr().out


def test_another_run_s_checkpoints(given, monkeypatch, capsys):
    run(monkeypatch, "distill", "--config", given, "--epochs", 1)
    again = (monkeypatch, capsys, "distill", "--config", given)
    assert re.search("output: .* holds the checkpoints of another run", refused(*again))
    error = refused(*again, "--resume", "--set", "checkpoints=false")
    assert "--resume needs checkpoints, and checkpoints is false" in error


@pytest.mark.parametrize("change", ["teacher.top_k=4", "loss.temperature=3"])
def test_a_cache_that_does_not_fit(given, monkeypatch, capsys, change):
    cached = ("distill", "--config", given, "--set", f"teacher.cache={given.parent / 'cache'}")
    run(monkeypatch, *cached, "--set", "teacher.top_k=5", "--set", "checkpoints=false")
    changed = ("--set", "teacher.top_k=5", "--set", change, "--set", "checkpoints=false")
    error = refused(monkeypatch, capsys, *cached, *changed)
    assert re.search(r"fastkd distill: teacher.cache: .* holds a cache with", error)
    without = (*changed, "--set", "teacher.factory=null", "--set", f"teacher.cache={given.parent}")
    error = refused(monkeypatch, capsys, *cached, *without)
    assert re.search(r"fastkd distill: teacher.cache: .* holds no teacher's cache", error)


@pytest.mark.parametrize(
    "other",
    [
        ["train.options={first: 7, last: 400}"],  # more of it
        ["train.options={first: 7, last: 214}", "teacher.factory=null"],
        ["validation.options.first=250"],
        ["validation.options.first=250", "teacher.factory=null"],
    ],
)
def test_a_cache_of_other_data(given, monkeypatch, capsys, other):
    """Is refused, and nothing is added to it."""
    cache = given.parent / "cache"
    cached = ("distill", "--config", given, "--set", f"teacher.cache={cache}")
    run(monkeypatch, *cached, "--set", "checkpoints=false", "--set", "train.options.last=207")
    files = list(cache.iterdir())
    changes = [part for change in other for part in ("--set", change)]
    error = refused(monkeypatch, capsys, *cached, "--set", "train.options.last=207", *changes)
    assert "fastkd distill: teacher.cache: batch: the inputs of 50 of 50 samples" in error
    assert "Choose another folder" in error and list(cache.iterdir()) == files


def test_a_cache_of_augmented_data(given, monkeypatch, capsys):
    name = next(given.parent.glob("parts_*.py")).stem
    augmented = ("--set", f"train={name}:Augmented", "--set", f"teacher.cache={given.parent / 'c'}")
    error = refused(monkeypatch, capsys, "distill", "--config", given, *augmented)
    assert "leave out teacher.cache for random augmentation" in error
    assert not (given.parent / "out").exists()


def test_a_cosine_needs_an_end(given, monkeypatch, capsys):
    name = next(given.parent.glob("parts_*.py")).stem
    streamed = ("distill", "--config", given, "--set", f"train={name}:Stream")
    run(monkeypatch, *streamed)
    error = refused(
        *(monkeypatch, capsys, *streamed, "--output", given.parent / "b"),
        *("--set", "schedule=cosine"),
    )
    assert "schedule: cosine ends with the last step" in error


@pytest.mark.slow
def test_two_processes(given):
    """Each asks the teacher about half of the data, and the schedule ends with the last step."""
    cache = given.parent / "cache"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    changes = (f"teacher.cache={cache}", "schedule=cosine")
    overrides = [part for change in changes for part in ("--set", change)]
    done = subprocess.run(
        [sys.executable, *launch, "fastkd", "distill", "--config", str(given), *overrides],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from fastkd import teachers
    from fastkd.teachers import shard

    assert len(teachers.TeacherCache(cache)) == 300
    assert [len(shard.read(file)[0].ids) for file in cache.glob(shard.PATTERN)] == [150, 150]
    (last,) = (given.parent / "out" / "checkpoints").glob("step-00000006")
    schedule = torch.load(last / "scheduler.pt")
    assert schedule["_last_lr"] == [pytest.approx(0.0, abs=1e-12)]
    history = json.loads((given.parent / "out" / "history.json").read_text())
    assert [each["rows"] for each in history] == [100] * 3


def test_a_cached_teacher_teaches_the_same(given, monkeypatch, capsys):
    run(monkeypatch, "distill", "--config", given, "--output", given.parent / "live")
    cache = given.parent / "cache"
    once = (monkeypatch, "distill", "--config", given, "--set", f"teacher.cache={cache}")
    asked = module_of(given).asked
    run(*once)
    asked = module_of(given).asked - asked - 50 * 1700
    assert asked == 300 and list(cache.glob("shard-*.safetensors"))
    for one, other in zip(load(given, "live").parameters(), load(given).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)
    run(*once, "--set", "teacher.factory=null", "--output", given.parent / "again")
    for one, other in zip(load(given, "again").parameters(), load(given).parameters(), strict=True):
        assert torch.equal(one, other)
    error = refused(
        *(*once[:1], capsys, *once[1:], "--output", given.parent / "none"),
        *("--set", f"train={module_of(given).__name__}:batches"),
    )
    assert "train: with teacher.cache it must be a data set" in error


def test_the_most_probable_classes_teach_nearly_the_same(given, monkeypatch):
    """All ten of them, at the default temperature, so what differs is float16 alone."""
    arguments = (monkeypatch, "distill", "--config", given, "--set", "loss={alpha: 0.1}")
    run(*arguments, "--output", given.parent / "live")
    cache = given.parent / "cache"
    run(*arguments, "--set", f"teacher.cache={cache}", "--set", "teacher.top_k=10")
    for one, other in zip(load(given, "live").parameters(), load(given).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-3)


def test_without_labels_the_history_is_json(given, monkeypatch, capsys):
    name = next(given.parent.glob("parts_*.py")).stem
    unlabelled = ("--set", f"train={name}:unlabelled", "--set", f"validation={name}:unlabelled")
    run(monkeypatch, "distill", "--config", given, *unlabelled)
    text = (given.parent / "out" / "history.json").read_text()
    assert [each["accuracy"] for each in json.loads(text)] == [None] * 3 and "NaN" not in text
    assert "accuracy" not in capsys.readouterr().out


def test_a_factory_may_return_a_loader(given, monkeypatch):
    name = next(given.parent.glob("parts_*.py")).stem
    run(monkeypatch, "distill", "--config", given, "--set", f"train={name}:batches")


@pytest.mark.slow
def test_the_example_runs(monkeypatch, tmp_path, capsys):
    example = ROOT / "examples" / "digits.yaml"
    run(monkeypatch, "distill", "--config", example, "--epochs", 5, "--output", tmp_path)
    assert (tmp_path / "student.safetensors").exists()


def test_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("info", "distill", "report"))


@pytest.mark.parametrize(
    ("command", "texts"), [("distill", list(config.KEYS)), ("report", ["--config", "--model"])]
)
def test_help_names_every_key(monkeypatch, capsys, command, texts):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, command, "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in texts)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", "epoch is no key of the configuration; did you mean epochs?"),
        ("epochs=1.5", "epochs must be an integer of at least 1; got 1.5"),
        ("epochs=true", "epochs must be an integer of at least 1; got True"),
        ("seed=-1", "seed must be an integer from 0 to 9223372036854775807; got -1"),
        ("ema=2", "ema must be a number between 0 and 1; got 2"),
        ("clip=.nan", "clip must be a number between 0 and inf; got nan"),
        ("schedule=linear", "schedule must be one of constant, cosine; got 'linear'"),
        ("checkpoints=2", "checkpoints must be true or false; got 2"),
        ("output=3", "output must be text; got 3"),
        ("output=null", "output is missing: folder for"),
        ("loss=3", "loss must be a mapping of names to values; got 3"),
        ("loss.alhpa=1", "loss.alhpa is no key of the configuration; did you mean alpha?"),
        ("loss.temperature=0", "loss: temperature must be positive"),
        (
            "optimizer.name=open",
            "optimizer.name must be an optimizer of torch.optim, .* got 'open'",
        ),
        ("optimizer.name=__builtins__", "optimizer.name must be an optimizer of torch.optim"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("optimizer.lrr=1", "optimizer: .*lrr"),
        ("student=3", "student must be 'module:factory' or a mapping; got 3"),
        ("student=os.system", "student must be 'module:factory'; got 'os.system'"),
        ("student=os:system('x')", "student must be 'module:factory'; got"),
        ("student=no_such_module:f", "student: there is no module 'no_such_module' to import"),
        ("student={module}:absent", "student: {module} has no 'absent'"),
        ("student=json:loads", "student: the module 'json' is not in .*--module json"),
        ("student=sys:exit", "student: the module 'sys' is not in .*--module sys"),
        ("student={module}:os.system", "student: .* must be a function or class that {module} def"),
        ("student={module}:nn.Linear", "got one of torch.nn.modules.linear. Define a function"),
        ("student={module}:student.__call__", "must be a function or class that {module} defines"),
        ("student={module}:student.__globals__.get", "must be a function or class that {module} "),
        ("train={module}:DataLoader", "train: .* must be a function or class that {module} def"),
        ("student={module}:number", "student: .*:number must be a function or class; got int"),
        ("student={module}:nothing", "must return a torch.nn.Module; got NoneType"),
        ("student.cache=x", "student.cache is no key of the configuration"),
        ("student.options=[1]", "student.options must be a mapping"),
        ("teacher={{}}", "teacher.factory is missing"),
        ("teacher.top_k=0", "teacher.top_k must be an integer of at least 1"),
        (
            "teacher.weights=x.pt",
            "teacher.weights must be a .safetensors file, since other formats may run",
        ),
        ("teacher.weights=x.safetensors", "teacher.weights: there is no file x.safetensors"),
        ("train.weights=x", "train.weights is no key of the configuration; there are factory"),
        ("batch_size=[", "batch_size: '\\[' is no YAML"),
        ("output=2024-13-45", "output: '2024-13-45' is no YAML: month must be"),
        (f"seed={2**70}", "seed must be an integer from 0 to 9223372036854775807; got"),
        ("loss.reduction=sum", "loss must have reduction='mean'"),
        ("loss.normalizer=5", "loss must have normalizer=None"),
        ("loss.teacher_weights=[1, 2]", "teacher_weights must have one number for each teacher"),
        ("loss.classes=50", "classes must be at most 10"),
        ("optimizer.name=LBFGS", "optimizer.name must be .* aside; got 'LBFGS'"),
        ("optimizer.name=SparseAdam", "optimizer.name must be .* aside; got 'SparseAdam'"),
        ("student=.{module}:student", "student must be 'module:factory'; got"),
        (
            "student.options={{widht: 3}}",
            "student.options: .*:student does not take these options: .*widht",
        ),
        ("train={module}:nothing", "train: .* must return a data set or a DataLoader; got None"),
        ("output={module}.py", "output must be a folder; got .*, and .* is a file"),
        ("teacher.cache={module}.py/c", "teacher.cache must be a folder; got .*, and .* is a file"),
        ("x", "--set takes KEY=VALUE; got 'x'"),
        ("epochs.x=1", "epochs.x: epochs is no mapping, but 3"),
    ],
)
def test_a_sentence_names_the_key(given, monkeypatch, capsys, change, message):
    name = next(given.parent.glob("parts_*.py")).stem
    monkeypatch.chdir(given.parent)
    change = change.format(module=name) if "{" in change else change
    message = message.replace("{module}", name)
    error = refused(monkeypatch, capsys, "distill", "--config", given, "--set", change)
    assert re.search(f"fastkd distill: .*{message}", error), error
    assert not (given.parent / "out").exists()


RUN = "{{factory: '{factory}', options: {{command: 'echo executed > {proof}'}}}}"


@pytest.mark.parametrize("command", ["distill", "report"])
@pytest.mark.parametrize("key", ["teacher", "student", "train", "validation"])
@pytest.mark.parametrize("factory", ["os:system", "{module}:os.system"])
def test_a_configuration_runs_no_command(given, monkeypatch, capsys, command, key, factory):
    name, proof = next(given.parent.glob("parts_*.py")).stem, given.parent / "proof"
    if command == "report" and key == "train":
        key = "validation"  # a report has no training data
    text = RUN.format(factory=factory.format(module=name), proof=proof)
    lines = [line for line in given.read_text().splitlines() if not line.startswith(f"{key}:")]
    given.write_text("\n".join([*lines, f"{key}: {text}"]))
    refused(monkeypatch, capsys, command, "--config", given)
    assert not proof.exists()


def test_other_modules_are_not_imported(given, monkeypatch, capsys, tmp_path_factory):
    """An import runs code. A module that --module names is imported, with those inside it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    package = elsewhere / "distant_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text(PARTS)
    monkeypatch.syspath_prepend(elsewhere)
    change = ("distill", "--config", given, "--set", "student=distant_parts.small:student")
    error = refused(monkeypatch, capsys, *change)
    assert (
        "If you trust the module, called with any options, add --module distant_parts.small"
        in error
    )
    assert not any(name.startswith("distant_parts") for name in sys.modules)
    error = refused(monkeypatch, capsys, *change, "--module", "distant_parts.sma")
    assert "add --module distant_parts.small" in error
    run(monkeypatch, *change, "--module", "distant_parts", "--epochs", 1)
    run(monkeypatch, *change, "--module", "distant_parts.small", "--epochs", 1, "--resume")


def test_modules_beside_a_configuration_replace_no_other(given, monkeypatch, capsys):
    """Its folder comes last where Python looks for modules."""
    before = list(sys.path)
    (given.parent / "wave.py").write_text("raise ZeroDivisionError")
    change = ("--set", "student=wave:open")
    error = refused(monkeypatch, capsys, "distill", "--config", given, *change)
    assert "another module 'wave' is imported instead of the one in" in error
    assert sys.path[: len(before)] == before and str(given.parent) in sys.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("a: [", "is no YAML"),
        ("student: !!python/object/apply:os.system ['false']", "is no YAML.*python/object"),
        ("[" * 100_000, "is no YAML"),
        ("\x00", "is no YAML"),
        ("output: 2024-13-45", "is no YAML: month must be"),
        ("epochs: " + "9" * 5000, "is no YAML: Exceeds the limit"),
        (
            "epochs: 1\nloss: &a {x: *a}",
            "config.yaml has the alias \\*a in line 2, and aliases are",
        ),
        ("a: &a [1]\nb: {<<: *a}", "config.yaml has the alias \\*a in line 2, and"),
        ("teacher: m:f", "student is missing: module:factory of the student"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, monkeypatch, capsys, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert re.search(message, refused(monkeypatch, capsys, "distill", "--config", file))


def test_nested_aliases_end_at_once(tmp_path):
    """They stand for 9^10 values, which no machine can hold: another process tries it."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines))
    assert file.stat().st_size < 700
    assert "has the alias *a0 in line 2" in command_in_another_process(file)


def test_long_texts_end_at_once(tmp_path):
    """Looking for a number in them takes time in proportion to their length."""
    file = tmp_path / "config.yaml"
    file.write_text(f"seed: '{'1' * 500_000}'")
    assert "is missing" in command_in_another_process(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    error = command_in_another_process(tmp_path / "config.yaml")
    assert "config.yaml is no regular file" in error


def command_in_another_process(file: pathlib.Path) -> str:
    """What a command that is refused prints; one that does not end fails the test."""
    command = [sys.executable, "-m", "fastkd", "distill", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_a_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, "distill", "--config", tmp_path / "none.yaml")
    assert "config: cannot read" in error and "No such file" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--teacher is missing"),
        (["--teacher", "json:loads"], "--data is missing"),
        (["--teacher", "json:loads", "--data", "json:loads"], "--model is missing"),
        (["--model", "json:loads"], "--model must be NAME=MODULE:FACTORY"),
        (["--teacher", "json"], "--teacher must be 'module:factory'; got 'json'"),
        (["--batch-size", "0"], "--batch-size must be an integer of at least 1; got 0"),
        (["--output", __file__], "--output must be a folder; got"),
        (["--set", "epochs=3"], "--set changes what a --config says, and there is none"),
    ],
)
def test_a_report_of_too_little(monkeypatch, capsys, arguments, message):
    assert message in refused(monkeypatch, capsys, "report", *arguments)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seconds", "-1", "seconds must be finite and at least 0; got -1"),
        ("--model", "teacher={module}:student", "students: no student may be named 'teacher'"),
    ],
)
def test_what_a_report_refuses(given, monkeypatch, capsys, flag, value, message):
    name = next(given.parent.glob("parts_*.py")).stem
    monkeypatch.chdir(given.parent)
    parts = ("--teacher", f"{name}:teacher", "--data", f"{name}:data")
    model = ("--model", f"a={name}:student", flag, value.format(module=name))
    assert f"fastkd report: {message}" in refused(monkeypatch, capsys, "report", *parts, *model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.top_k=50", "top_k must be at most the number of classes, 10; got 50"),
        ("loss.divergence=jsd", "loss: divergence must be 'forward_kl' with a cache of the top 5"),
        ("train={module}:Stream", "train: with teacher.cache it must be a data set with .*Stream"),
    ],
)
def test_what_a_cache_cannot_do(given, monkeypatch, capsys, change, message):
    name = next(given.parent.glob("parts_*.py")).stem
    cached = ("--set", f"teacher.cache={given.parent / 'cache'}", "--set", "teacher.top_k=5")
    change = ("--set", change.format(module=name))
    error = refused(monkeypatch, capsys, "distill", "--config", given, *cached, *change)
    assert re.search(f"fastkd distill: {message}", error), error


def test_a_precision_that_the_machine_lacks(given, monkeypatch, capsys):
    def lacking(**_):
        raise ValueError("fp16 needs a GPU")

    monkeypatch.setattr(trainer_arguments, "accelerator", lacking)
    error = refused(monkeypatch, capsys, "distill", "--config", given)
    assert "fastkd distill: mixed_precision: fp16 needs a GPU" in error


def test_weights_of_another_model(given, monkeypatch, capsys):
    from safetensors.torch import save_model

    file = given.parent / "other.safetensors"
    save_model(nn.Linear(3, 3), str(file))
    error = refused(
        monkeypatch, capsys, "distill", "--config", given, "--set", f"student.weights={file}"
    )
    assert "student.weights:" in error and "does not fit" in error
    file.write_bytes(b"no weights")
    error = refused(
        monkeypatch, capsys, "distill", "--config", given, "--set", f"student.weights={file}"
    )
    assert "student.weights:" in error and "does not fit" in error


@pytest.mark.parametrize(
    ("factory", "error"), [("broken", ZeroDivisionError), ("misled", ValueError)]
)
def test_the_user_s_own_errors_keep_their_traceback(given, monkeypatch, factory, error):
    """Also where they call fastkd with what it refuses."""
    name = next(given.parent.glob("parts_*.py")).stem
    with pytest.raises(error):
        run(monkeypatch, "distill", "--config", given, "--set", f"student={name}:{factory}")


def test_a_missing_package_is_named(given, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.setattr(
        config.extras.importlib,
        "import_module",
        lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name=name)),
    )
    error = refused(monkeypatch, capsys, "distill", "--config", given)
    assert "this needs yaml, which is not installed: pip install 'fastkd[train]'" in error
