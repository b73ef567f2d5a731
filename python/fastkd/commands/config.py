"""Read a training's configuration: plain YAML, with every key checked and nothing executed.

Code is named, never written: ``"module:factory"`` is a function or class without arguments, or with
the ``options`` beside it, that makes a model or a data set. Its module has to lie beside the
configuration file or to be named on the command line, and has to define it: a configuration reaches
no other code. :mod:`fastkd.commands.factories` checks that before it imports anything.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd import extras, losses
from fastkd._core import checks


class ConfigError(ValueError):
    """A configuration that cannot be used; the message begins with the key at fault."""


class Part(NamedTuple):
    """Something that the user's code makes: ``"module:factory"``, or a mapping with more."""

    factory: str | None
    options: dict[str, Any]
    weights: str | None
    """A safetensors file that the model is loaded from."""
    cache: str | None
    """A folder with a teacher's log-probabilities."""
    top_k: int | None


class Key(NamedTuple):
    """A key of the configuration."""

    read: Callable[[str, Any], Any]
    """``read(name, value)`` gives the value that is used, or raises ConfigError."""
    default: Any
    help: str


REQUIRED = object()


# ---- values


def _part(allowed: Sequence[str]) -> Callable[[str, Any], Part]:
    def read(name: str, value: Any) -> Part:
        given: Any = {"factory": value} if isinstance(value, str) else value
        if not isinstance(given, dict):
            raise ConfigError(f"{name} must be 'module:factory' or a mapping; got {value!r}")
        _known(f"{name}.", given, allowed)
        given = {key: item for key, item in given.items() if item is not None}
        for key, check in (("factory", _text), ("weights", _text), ("cache", _folder)):
            if key in given:
                check(f"{name}.{key}", given[key])
        factory = given.get("factory")
        if factory is None and given.get("cache") is None:
            raise ConfigError(f"{name}.factory is missing: 'module:factory'")
        if factory is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", factory):
            raise ConfigError(f"{name} must be 'module:factory'; got {factory!r}")
        options = _mapping(f"{name}.options", given.get("options", {}))
        top_k = given.get("top_k")
        if top_k is not None:
            _integer(1)(f"{name}.top_k", top_k)
        return Part(factory, options, given.get("weights"), given.get("cache"), top_k)

    return read


def _integer(low: int, high: float = math.inf) -> Callable[[str, Any], int]:
    accepted = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def read(name: str, value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{name} must be an integer {accepted}; got {value!r}")
        return value

    return read


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not low < value < high:
            raise ConfigError(
                f"{name} must be a number between {low:g} and {high:g}; got {value!r}"
            )
        return float(value)

    return read


def _one_of(*accepted: str) -> Callable[[str, Any], str]:
    def read(name: str, value: Any) -> str:
        if value not in accepted:
            raise ConfigError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
        return str(value)

    return read


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ConfigError(f"{name} must be true or false; got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be text; got {value!r}")
    return value


def _folder(name: str, value: Any) -> str:
    try:
        return str(checks.folder(name, _text(name, value)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name} must be a mapping of names to values; got {value!r}")
    return value


KEYS: dict[str, Key] = {
    "teacher": Key(
        _part(("factory", "options", "weights", "cache", "top_k")),
        REQUIRED,
        "module:factory of the teacher; or a mapping with factory, options, weights (a "
        ".safetensors file), cache (a folder of its log-probabilities, computed there first if "
        "there is a factory) and top_k (how many of them to keep)",
    ),
    "student": Key(
        _part(("factory", "options", "weights")),
        REQUIRED,
        "module:factory of the student, likewise",
    ),
    "train": Key(
        _part(("factory", "options")), REQUIRED, "module:factory of the training data set"
    ),
    "validation": Key(_part(("factory", "options")), None, "module:factory of held-out data"),
    "output": Key(_folder, REQUIRED, "folder for checkpoints, the student and its history"),
    "epochs": Key(_integer(1), 10, "passes over the training data"),
    "batch_size": Key(_integer(1), 64, "samples in a batch, for each process"),
    "seed": Key(_integer(0, 2**63 - 1), 0, "of weights, order and dropout"),
    "workers": Key(_integer(0), 0, "processes that load data"),
    "loss": Key(_mapping, {}, "options of fastkd.KDLoss, such as {temperature: 4, alpha: 0.1}"),
    "optimizer": Key(
        _mapping, {"name": "AdamW", "lr": 1e-3}, "name of a torch.optim class, and its options"
    ),
    "schedule": Key(
        _one_of("constant", "cosine"), "constant", "of the learning rate: constant or cosine"
    ),
    "accumulate": Key(_integer(1), 1, "batches that make one optimizer step"),
    "clip": Key(_number(0, math.inf), None, "largest norm of the gradient"),
    "ema": Key(_number(0, 1), None, "decay of a moving average of the student"),
    "mixed_precision": Key(_one_of("no", "fp16", "bf16"), "no", "no, fp16 or bf16"),
    "checkpoints": Key(_boolean, True, "after every epoch, to resume from"),
}


# ---- reading


def add_set(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that changes what a file says."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="instead of what the file says; KEY may be an inner one, such as loss.temperature",
    )


def read(path: pathlib.Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration in a YAML file, changed by ``KEY=VALUE`` texts, with every key checked.

    ``KEY`` may be of an inner mapping, such as ``loss.temperature``; ``VALUE`` is YAML.

    Raises:
        ConfigError: for anything that is not as :data:`KEYS` has it.
    """
    if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
        raise ConfigError(f"config: {path} is no regular file")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from None
    given = _parsed(f"config: {path}", text)
    if not isinstance(given, dict):
        raise ConfigError(f"config: {path} must hold keys and values; it holds {line(given)}")
    for override in overrides:
        _override(given, override)
    _known("", given, list(KEYS))
    found = {}
    for name, key in KEYS.items():
        if given.get(name) is not None:
            found[name] = key.read(name, given[name])
        elif key.default is REQUIRED:
            raise ConfigError(f"{name} is missing: {key.help}")
        else:
            found[name] = key.default
    return found


def _parsed(name: str, text: str | bytes) -> Any:
    """Return the value of a YAML text without aliases.

    A few nested aliases stand for billions of values.
    """
    yaml = extras.load("yaml", "train")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise ConfigError(
                    f"{name} has the alias *{event.anchor} in line {event.start_mark.line + 1}, "
                    "and aliases are not accepted: write the value out"
                )
            return super().compose_node(parent, index)

    try:
        return _numbers(Loader(text).get_single_data())
    except ConfigError as error:
        raise ConfigError(str(error)) from None  # without the parser's traceback
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-45 is a ValueError
        raise ConfigError(f"{name} is no YAML: {line(error)}") from None


def _override(given: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set takes KEY=VALUE; got {text!r}")
    *outer, last = name.split(".")
    for key in outer:
        inner = given.setdefault(key, {})
        if isinstance(inner, str):  # module:factory, the short form
            inner = given[key] = {"factory": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{name}: {key} is no mapping, but {inner!r}")
        given = inner
    given[last] = _parsed(f"{name}: {value!r}", value)


def _numbers(value: Any) -> Any:
    """1e-3 as a number: YAML 1.1, which the parser reads, takes it for text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def _known(prefix: str, given: Mapping[Any, Any], names: Sequence[str]) -> None:
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"{prefix}{key} is no key of the configuration; {hint}")


def line(value: Any) -> str:
    """Return the beginning of a text in one line."""
    return " ".join(str(value).split())[:200]


def add_modules(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names modules from which a configuration may take factories."""
    parser.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="MODULE",
        dest="modules",
        help="a module that the file may take functions from, beside those in the file's folder; "
        "its submodules, too; repeatable",
    )


# ---- making what needs no code of the user's


def make_loss(options: dict[str, Any]) -> losses.KDLoss:
    """The loss with these options."""
    _known("loss.", options, list(inspect.signature(losses.KDLoss).parameters))
    try:
        return losses.KDLoss(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss: {line(error)}") from None


# One wants a closure, the other sparse gradients.
OTHERS = ("LBFGS", "SparseAdam")


def make_optimizer(options: dict[str, Any], student: nn.Module) -> torch.optim.Optimizer:
    """One of ``torch.optim``."""
    options = dict(options)
    name = options.pop("name", "AdamW")
    kind = getattr(torch.optim, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or name in OTHERS:
        raise ConfigError(
            f"optimizer.name must be an optimizer of torch.optim, {' and '.join(OTHERS)} aside; "
            f"got {name!r}"
        )
    try:
        return kind(student.parameters(), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {line(error)}") from None
