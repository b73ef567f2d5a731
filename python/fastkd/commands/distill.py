"""``python -m fastkd distill``: trains the student that a configuration names."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import textwrap
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from fastkd import extras, losses, teachers
from fastkd.commands import config
from fastkd.trainer import Trainer

DESCRIPTION = """Trains a student on a teacher's answers, as a YAML file says:

    teacher: my_models:teacher        # a function that returns a torch.nn.Module
    student: my_models:student
    train: my_data:training_set       # a function that returns a data set of (input, label)
    validation: my_data:test_set
    output: runs/first
    loss: {temperature: 4, alpha: 0.1}

and writes student.safetensors, history.json and checkpoints to the output folder. For several
processes: accelerate launch -m fastkd distill --config FILE. Keys of the file:
"""
# Keys that have a flag of their own; --set reaches all of them.
FLAGS = ("output", "epochs", "batch_size", "seed", "workers")


def add(commands: Any) -> None:
    """Adds the command."""
    keys = "\n".join(f"  {name:<16}{_wrapped(key)}" for name, key in config.KEYS.items())
    parser = commands.add_parser(
        "distill",
        help="train a student on a teacher's answers, as a YAML file says",
        description=DESCRIPTION + "\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=pathlib.Path, required=True, metavar="FILE")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="instead of what the file says; KEY may be an inner one, such as loss.temperature",
    )
    for name in FLAGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="VALUE", help=f"instead of the file's {name}"
        )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in the output"
    )
    parser.set_defaults(run=run)


def _wrapped(key: config.Key) -> str:
    default = "" if key.default in (None, config.REQUIRED, {}) else f"; default {key.default}"
    indent = " " * 18
    filled = textwrap.fill(key.help + default, 98, initial_indent=indent, subsequent_indent=indent)
    return filled.strip()


def run(arguments: argparse.Namespace) -> None:
    """Trains."""
    overrides = list(arguments.overrides)
    for name in FLAGS:
        value = getattr(arguments, name)
        if value is not None:
            overrides.append(f"{name}={json.dumps(value) if name == 'output' else value}")
    chosen = config.read(arguments.config, overrides)
    config.importable(arguments.config.parent)
    output = pathlib.Path(chosen["output"])
    torch.manual_seed(chosen["seed"])
    student = config.make_model("student", chosen["student"])
    loss = config.make_loss(chosen["loss"])
    optimizer = config.make_optimizer(chosen["optimizer"], student)
    teacher, train, validation = _teacher_and_data(chosen, loss.options)
    loader = _loader(train, chosen, shuffle=True)
    trainer = Trainer(
        student,
        teacher,
        optimizer,
        loss=loss,
        scheduler=_scheduler(optimizer, chosen, loader),
        accumulate=chosen["accumulate"],
        clip=chosen["clip"],
        ema=chosen["ema"],
        accelerator=extras.load("accelerate", "train").Accelerator(
            mixed_precision=chosen["mixed_precision"]
        ),
        checkpoints=output / "checkpoints" if chosen["checkpoints"] else None,
    )
    held_out = None if validation is None else _loader(validation, chosen, shuffle=False)
    torch.manual_seed(chosen["seed"])  # the order of the data, however the teacher was made
    if arguments.resume and trainer.resume():
        print(f"going on after step {trainer.step}")
    history = trainer.fit(loader, chosen["epochs"], validation=held_out)
    if trainer.accelerator.is_main_process:
        trained = student if trainer.ema is None else trainer.ema.module
        _write(output, trained, [found._asdict() for found in history])
        if history:
            last = history[-1]
            print(f"accuracy {100 * last.accuracy:.1f} %, agreement {100 * last.agreement:.1f} %")
        print(f"wrote {output / 'student.safetensors'}; python -m fastkd report shows it")


def _teacher_and_data(chosen: dict[str, Any], loss: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The teacher, live or cached, and the data; with a cache, samples that carry their ids."""
    part: config.Part = chosen["teacher"]
    train = config.make("train", chosen["train"])
    validation = chosen["validation"] and config.make("validation", chosen["validation"])
    live = None if part.factory is None else config.make_model("teacher", part)
    if part.cache is None:
        return live, train, validation
    for name, data in (("train", train), ("validation", validation)):
        if isinstance(data, DataLoader):
            raise config.ConfigError(
                f"{name}: with teacher.cache it must be a data set, not a DataLoader, so that "
                "samples can be given ids"
            )
    options = {**losses.DEFAULTS, **loss}
    temperature = float(options["teacher_temperature"] or options["temperature"])
    whole = teachers.WithIds(ConcatDataset([train, *([] if validation is None else [validation])]))
    if live is not None:
        cache = teachers.precompute(
            live,
            _loader(whole, chosen, shuffle=False),
            part.cache,
            top_k=part.top_k,
            temperature=temperature,
        )
    else:
        cache = teachers.TeacherCache(part.cache)
    cache.check(ids=torch.arange(len(whole)), temperature=temperature)
    held_out = None if validation is None else Subset(whole, range(len(train), len(whole)))
    return cache, Subset(whole, range(len(train))), held_out


def _loader(data: Any, chosen: dict[str, Any], *, shuffle: bool) -> Any:
    """Batches; a factory may also return a DataLoader of its own."""
    if isinstance(data, DataLoader):
        return data
    return DataLoader(data, chosen["batch_size"], shuffle=shuffle, num_workers=chosen["workers"])


def _scheduler(
    optimizer: torch.optim.Optimizer, chosen: dict[str, Any], loader: Any
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if chosen["schedule"] == "constant":
        return None
    steps = chosen["epochs"] * -(-len(loader) // chosen["accumulate"])
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _write(output: pathlib.Path, student: nn.Module, history: list[dict[str, Any]]) -> None:
    """The student and what its evaluations gave, each file whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    part = output / "student.part"
    extras.load("safetensors.torch", "train").save_model(student, str(part))
    os.replace(part, output / "student.safetensors")
    part.write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    os.replace(part, output / "history.json")
