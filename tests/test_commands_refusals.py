"""Test that the command line refuses bad configurations, and runs only trusted code."""

import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from stacks import USER_MODULE, run_command, run_refused_command
from torch import nn

from fastkd import extras
from fastkd.commands import config

pytest.importorskip("accelerate")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("restored_path")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", "nrecognized arguments: --epoch=3. Did you mean 'epochs'"),
        ("T=4", "nrecognized arguments: --T=4. Did you mean 'temperature'"),
        ("beta=0", "nrecognized arguments: --beta=0. TRL's beta is mix"),
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
    error = run_refused_command(
        monkeypatch, capsys, "distill", "--config", config_path, f"--{change}"
    )
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
    run_refused_command(monkeypatch, capsys, command, "--config", config_path)
    assert not proof.exists()


@pytest.mark.parametrize("key", ["module", "config", "resume", "print_config"])
def test_a_file_cannot_set_options_of_the_command_line(config_path, monkeypatch, capsys, key):
    # A file that sets ``module`` or ``config`` could make the command import more modules.
    config_path.write_text(f"{config_path.read_text()}\n{key}: os\n")
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", config_path)
    assert f"fastkd distill: {config_path}: " in error and key in error


@pytest.mark.parametrize("key", ["student", "student_options", "loss", "epochs"])
@pytest.mark.parametrize("nested", [False, True])
def test_class_path_imports_nothing(config_path, monkeypatch, capsys, key, nested):
    # jsonargparse supports class_path, but a file must not import a module by it.
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
        run_command(monkeypatch, "distill", "--config", config_path)
    assert not proof.exists() and "evil" not in sys.modules


def test_modules_elsewhere_are_imported_only_if_named(
    config_path, monkeypatch, capsys, tmp_path_factory
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    package = elsewhere / "distant_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "small.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(elsewhere)
    change = ("distill", "--config", config_path, "--student=distant_parts.small:student")
    error = run_refused_command(monkeypatch, capsys, *change)
    assert "add --module distant_parts.small" in error
    assert not any(name.startswith("distant_parts") for name in sys.modules)
    error = run_refused_command(monkeypatch, capsys, *change, "--module", "distant_parts.sma")
    assert "add --module distant_parts.small" in error
    run_command(monkeypatch, *change, "--module", "distant_parts", "--epochs", 1)
    run_command(
        monkeypatch, *change, "--module", "distant_parts.small", "--epochs", 1, "--resume=true"
    )


def test_modules_in_the_configuration_s_folder_replace_no_other_module(
    config_path, monkeypatch, capsys
):
    # The configuration's folder is at the end of sys.path, so modules in the folder hide no other
    # modules.
    before = list(sys.path)
    (config_path.parent / "wave.py").write_text("raise ZeroDivisionError")
    change = ("--student=wave:open",)
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", config_path, *change)
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
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", file)
    assert re.search(f"^fastkd distill: {file}: .*({message})", error), error
    assert error.count("\n") == 1


def test_numbers_and_null_of_a_file_are_read(config_path, monkeypatch):
    # YAML 1.1 reads 1e-3 as text, but the command reads a number; null stands for the default.
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
    # The aliases stand for 9^10 values, too many to expand within the timeout of a minute.
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
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", tmp_path / "none.yaml")
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
    assert re.search(message, run_refused_command(monkeypatch, capsys, "report", *arguments))


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
    error = run_refused_command(
        monkeypatch, capsys, "distill", "--config", config_path, *cached, change
    )
    assert re.search(f"fastkd distill: {message}", error), error


def test_an_unsupported_precision_is_refused(config_path, monkeypatch, capsys):
    def lacking(**_):
        raise ValueError("fp16 needs a GPU")

    monkeypatch.setattr("accelerate.Accelerator", lacking)
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", config_path)
    assert "fastkd distill: mixed_precision: fp16 needs a GPU" in error


def test_weights_of_another_model_are_refused(config_path, monkeypatch, capsys):
    from safetensors.torch import save_model

    file = config_path.parent / "other.safetensors"
    save_model(nn.Linear(3, 3), str(file))
    error = run_refused_command(
        monkeypatch, capsys, "distill", "--config", config_path, f"--student_weights={file}"
    )
    assert "student_weights:" in error and "does not fit" in error
    file.write_bytes(b"no weights")
    error = run_refused_command(
        monkeypatch, capsys, "distill", "--config", config_path, f"--student_weights={file}"
    )
    assert "student_weights:" in error and "does not fit" in error


@pytest.mark.parametrize(
    ("factory", "error"), [("broken", ZeroDivisionError), ("misled", ValueError)]
)
def test_the_user_s_own_errors_keep_their_traceback(config_path, monkeypatch, factory, error):
    # The factory ``misled`` calls fastkd with a bad argument.
    name = next(config_path.parent.glob("parts_*.py")).stem
    with pytest.raises(error):
        run_command(monkeypatch, "distill", "--config", config_path, f"--student={name}:{factory}")


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
    cached = f"--teacher_cache={config_path.parent / 'cache'}"
    error = run_refused_command(
        monkeypatch, capsys, "distill", "--config", config_path, cached, f"--{change}"
    )
    assert error.splitlines()[-1].startswith(f"fastkd distill: {message}")
    assert "Traceback" not in error
    assert not (config_path.parent / "out").exists() and not list(
        config_path.parent.glob("cache/*")
    )


def test_errors_while_models_run_keep_their_traceback(config_path, monkeypatch):
    name = next(config_path.parent.glob("parts_*.py")).stem
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_command(monkeypatch, "distill", "--config", config_path, f"--student={name}:misshapen")
    assert not (config_path.parent / "out" / "student.safetensors").exists()


@pytest.mark.parametrize("package", ["yaml", "jsonargparse"])
def test_a_missing_package_is_named(config_path, monkeypatch, capsys, package):
    def import_module(name):
        if name == package:
            raise ModuleNotFoundError(name=name)
        return importlib.import_module(name)

    monkeypatch.setattr(extras, "importlib", SimpleNamespace(import_module=import_module))
    error = run_refused_command(monkeypatch, capsys, "distill", "--config", config_path)
    assert f"this needs {package}, which is not installed: pip install 'fastkd[train]'" in error


def test_the_user_s_missing_modules_keep_their_traceback(config_path, monkeypatch):
    (config_path.parent / "needs_more.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run_command(monkeypatch, "distill", "--config", config_path, "--student=needs_more:student")
