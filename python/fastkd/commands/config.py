"""Read the options of a training from a YAML file and the command line, with jsonargparse."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from fastkd import extras, validation
from fastkd._core.mistakes import OPTION_HINTS
from fastkd.commands.factories import ConfigError, Factories

# Largest depth of nesting in a file; PyYAML recurses for each level.
_MAX_DEPTH = 50


class Value:
    """Accept any value; for ``typing.Any``, jsonargparse would import a class named by a value."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Hold the options of a training: keys of a configuration file or of the command line.

    Args:
        teacher: function that returns the teacher, as module:function.
        teacher_options: arguments of the teacher's function, such as {width: 512}.
        teacher_weights: .safetensors file with the teacher's weights.
        teacher_cache: folder of the teacher's log-probabilities; missing entries are computed if
            teacher is set.
        teacher_top_k: number of classes in the cache; 0 for all.
        student: function that returns the student.
        student_options: arguments of the student's function.
        student_weights: .safetensors file with the student's initial weights.
        train: function that returns the training data, a data set or a DataLoader.
        train_options: arguments of the training data's function.
        validation: function that returns held-out data.
        validation_options: arguments of the held-out data's function.
        output: folder for the files of distill (checkpoints, student.safetensors, history.json) or
            of sweep.
        epochs: number of passes over the training data.
        batch_size: number of samples in a batch of one process.
        seed: seed of the weights, the order of the data and dropout.
        workers: number of processes that load data.
        loss: options of fastkd.KDLoss, such as {temperature: 4, alpha: 0.1}.
        optimizer: options of a torch.optim class and its name, {name: AdamW} by default.
        schedule: schedule of the learning rate.
        accumulate: number of batches of each process in one optimizer step.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the student's weights; 0 for no average.
        mixed_precision: mixed precision of Accelerate.
        checkpoints: save a checkpoint after each epoch.
    """

    teacher: str = ""
    teacher_options: dict[str, Value] = dataclasses.field(default_factory=dict)
    teacher_weights: str = ""
    teacher_cache: str = ""
    teacher_top_k: int = 0
    student: str = ""
    student_options: dict[str, Value] = dataclasses.field(default_factory=dict)
    student_weights: str = ""
    train: str = ""
    train_options: dict[str, Value] = dataclasses.field(default_factory=dict)
    validation: str = ""
    validation_options: dict[str, Value] = dataclasses.field(default_factory=dict)
    output: str = ""
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    workers: int = 0
    loss: dict[str, Value] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Value] = dataclasses.field(default_factory=dict)
    schedule: Literal["constant", "cosine"] = "constant"
    accumulate: int = 1
    clip: float = math.inf
    ema: float = 0.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    checkpoints: bool = True

    def __post_init__(self) -> None:
        """Check the ranges of the numbers, and that the folders are not files."""
        for name in ("epochs", "batch_size", "accumulate"):
            validation.check_count(name, getattr(self, name))
        for name in ("teacher_top_k", "seed", "workers"):
            validation.check_count(name, getattr(self, name), 0)
        validation.check_number("seed", self.seed, 0, 2**63, open_high=True)
        validation.check_number("ema", self.ema, 0.0, 1.0, open_high=True)
        if self.clip != math.inf:
            validation.check_number("clip", self.clip, 0.0, math.inf, open_low=True)
        for name in ("teacher_cache", "output"):
            validation.check_folder(name, getattr(self, name))

    def require(self, *names: str) -> None:
        """Raise ConfigError if one of the named options is not set."""
        for name in names:
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing: give it in the file or by --{name}")


def run(command: Callable[..., None], arguments: Sequence[str]) -> None:
    """Call a command with the options in its arguments and in the file that ``--config`` names.

    The file may set the fields of :class:`Training` only. ``--module`` is not one of these fields,
    so a file cannot make a module trusted. The parameters of ``command`` after ``training`` and
    ``factories`` are options of the command line. The docstring of ``command`` is the help.
    """
    jsonargparse = extras.load("jsonargparse", "train")
    jsonargparse.typing.register_type(
        Value,
        serializer=lambda value: value,
        deserializer=_parse_value,
        type_check=lambda value, _: not isinstance(value, str),
        fail_already_registered=False,
    )
    settings = {"exit_on_error": False, "allow_abbrev": False, "print_config": None}
    file_parser = jsonargparse.ArgumentParser(**settings)
    parser = jsonargparse.ArgumentParser(
        prog=f"fastkd {command.__name__}",
        description=(command.__doc__ or "").partition("Args:")[0],
        **settings,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options")
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        help="module whose functions the file may name besides those of modules in its folder; "
        "includes submodules; repeatable",
    )
    options = parser.add_function_arguments(command, as_group=False, skip={"training", "factories"})
    for each in (file_parser, parser):
        each.add_class_arguments(Training, as_group=False)
    source, file_options, fields = "", None, dataclasses.fields(Training)
    try:
        path = parser.parse_args(arguments).config
        if path is not None:
            source = f"{path}: "
            file_options = file_parser.parse_object(_read(pathlib.Path(path)))
            _make_training(file_options)
            source = ""
        namespace = parser.parse_args(arguments, namespace=file_options)
        training = _make_training(namespace)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        message = shorten_message(error)
        misspelled = re.search(r"(?:arguments: --|Option ')(\w+)", message)
        names = ["config", "module", *options, *(field.name for field in fields)]
        hint = validation.suggest(misspelled[1], names, OPTION_HINTS) if misspelled else ""
        if "Expected a tuple" in message:
            hint = ". Write a list in brackets, such as [1,2]"
        raise ConfigError(f"{source}{message}{hint}") from None
    factories = Factories(pathlib.Path(path or "config.yaml").parent, namespace.module)
    command(training, factories, **{name: namespace[name] for name in options})


def _make_training(namespace: Any) -> Training:
    """Return the options of a training; a null in the file means the field's default."""
    values = {field.name: namespace[field.name] for field in dataclasses.fields(Training)}
    return Training(**{name: value for name, value in values.items() if value is not None})


def _parse_value(value: Any) -> Any:
    """Parse JSON text, such as ``8`` or ``[0.9, 0.99]``; return other values unchanged."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Read a configuration file: YAML without aliases.

    Aliases are refused, because a short file with nested aliases may expand to billions of values.
    """
    yaml = extras.load("yaml", "train")
    if path.exists() and not path.is_file():  # reading a named pipe waits for a writer
        raise ValueError("must be a regular file")
    depth = 0
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            line = f"line {event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{line} uses a YAML alias (*name); aliases are not accepted")
            if depth > _MAX_DEPTH:
                raise ValueError(f"{line} is nested more than {_MAX_DEPTH} levels deep")
        values = extras.load("jsonargparse", "train").get_loader("yaml")(text)
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"must have keys and values; got {values!r}")
    for field in dataclasses.fields(Training):
        value = values.get(field.name)
        # jsonargparse would parse the text again, as YAML with aliases.
        if isinstance(value, str) and not str(field.type).startswith(("str", "Literal")):
            is_mapping = str(field.type).startswith("dict")
            accepted = "a mapping, such as {key: value}" if is_mapping else f"of type {field.type}"
            raise ValueError(f"{field.name} must be {accepted}; got {value!r}")
    return values


def shorten_message(error: Exception) -> str:
    """Return the first 300 characters of an error's message, as one line without markup."""
    text = re.sub(r"Parser key \"([^\"]+)\"|<class '([^']+)'>", r"\1\2", str(error))
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def raise_as_config_error(key: str = "") -> Iterator[None]:
    """Re-raise ValueError, TypeError and OSError as ConfigError, with ``key`` before the message.

    Do not wrap user code, whose errors need a traceback. Omit ``key`` if the messages name the
    option.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{key}{': ' if key else ''}{shorten_message(error)}") from None
