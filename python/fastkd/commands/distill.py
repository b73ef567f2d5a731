"""``python -m fastkd distill``: trains the student that a configuration names."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from fastkd import extras, losses, teachers
from fastkd.commands import config
from fastkd.commands.factories import Factories
from fastkd.teachers import writing
from fastkd.training import arguments as trainer_arguments
from fastkd.training import checkpoints
from fastkd.training.trainer import Trainer

DESCRIPTION = """Trains a student on a teacher's answers, as a YAML file says:

    teacher: my_models:teacher        # a function that returns a torch.nn.Module
    student: my_models:student
    train: my_data:training_set       # a function that returns a data set of (input, label)
    validation: my_data:test_set
    output: runs/first
    loss: {temperature: 4, alpha: 0.1}

and writes student.safetensors, history.json and checkpoints to the output folder. The functions
have to be defined in modules beside the file, or in those that --module names. Read the modules
beside it before you run a configuration of somebody else. For several processes:
accelerate launch -m fastkd distill --config FILE. Keys of the file:
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
    config.add_set(parser)
    config.add_modules(parser)
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
    extras.check("train", "safetensors.torch", "numpy")  # for the student, after the training
    factories = Factories(arguments.config.parent, arguments.modules)
    output = pathlib.Path(chosen["output"])
    checkpoints = _checkpoints(output, chosen, arguments.resume)
    accelerator = _accelerator(chosen["mixed_precision"])
    torch.manual_seed(chosen["seed"])
    student = factories.make_model("student", chosen["student"])
    loss = config.make_loss(chosen["loss"])
    optimizer = config.make_optimizer(chosen["optimizer"], student)
    teacher, train, validation = _teacher_and_data(chosen, factories, loss.options, accelerator)
    loader = _loader(train, chosen, shuffle=True)
    trainer = Trainer(
        student,
        teacher,
        optimizer,
        loss=loss,
        scheduler=_scheduler(optimizer, chosen, loader, accelerator.num_processes),
        accumulate=chosen["accumulate"],
        clip=chosen["clip"],
        ema=chosen["ema"],
        accelerator=accelerator,
        checkpoints=checkpoints,
    )
    held_out = None if validation is None else _loader(validation, chosen, shuffle=False)
    torch.manual_seed(chosen["seed"])  # the order of the data, however the teacher was made
    if arguments.resume and trainer.resume():
        accelerator.print(f"going on after step {trainer.step}")
    history = trainer.fit(loader, chosen["epochs"], validation=held_out)
    if accelerator.is_main_process:
        trained = student if trainer.ema is None else trainer.ema.module
        _write(output, trained, [found._asdict() for found in history])
        if history:
            last = history[-1]
            right = "" if math.isnan(last.accuracy) else f"accuracy {100 * last.accuracy:.1f} %, "
            print(f"{right}agreement {100 * last.agreement:.1f} %")
        print(f"wrote {output / 'student.safetensors'}; python -m fastkd report shows it")
    # Ends the group of processes, whose threads may abort one that leaves without.
    accelerator.end_training()


def _accelerator(precision: str) -> Any:
    try:
        return trainer_arguments.make_accelerator(mixed_precision=precision)
    except ValueError as error:
        raise config.ConfigError(f"mixed_precision: {error}") from None


def _checkpoints(output: pathlib.Path, chosen: dict[str, Any], resume: bool) -> pathlib.Path | None:
    """The folder of checkpoints, if it is as it has to be."""
    if not chosen["checkpoints"]:
        if resume:
            raise config.ConfigError("--resume needs checkpoints, and checkpoints is false")
        return None
    folder = output / "checkpoints"
    if checkpoints.list_complete(folder) and not resume:
        raise config.ConfigError(
            f"output: {folder} holds the checkpoints of another run. Go on with it by --resume, "
            "choose another --output, or delete them"
        )
    return folder


def _teacher_and_data(
    chosen: dict[str, Any], factories: Factories, loss: dict[str, Any], accelerator: Any
) -> tuple[Any, Any, Any]:
    """The teacher, live or cached, and the data; with a cache, samples that carry their ids."""
    part: config.Part = chosen["teacher"]
    train = factories.make_data("train", chosen["train"])
    validation = chosen["validation"] and factories.make_data("validation", chosen["validation"])
    live = None if part.factory is None else factories.make_model("teacher", part)
    if part.cache is None:
        return live, train, validation
    for name, data in (("train", train), ("validation", validation)):
        if isinstance(data, (DataLoader, IterableDataset)):
            raise config.ConfigError(
                f"{name}: with teacher.cache it must be a data set with __getitem__, whose samples "
                f"can be given ids; got {type(data).__name__}"
            )
    defaults = {**losses.DEFAULTS, **loss}
    temperature = float(defaults["teacher_temperature"] or defaults["temperature"])
    whole = teachers.WithIds(ConcatDataset([train, *([] if validation is None else [validation])]))
    if live is not None:
        options: dict[str, Any] = {"top_k": part.top_k, "temperature": temperature}
        options["dtype"] = torch.float16
        with _blaming_the_cache():
            there = writing.existing(
                pathlib.Path(part.cache), **options, teacher=teachers.fingerprint(live)
            )
        if there is not None:  # before it is added to
            _check_inputs(there, whole, len(train), chosen["batch_size"])
        # Each process asks it about its share.
        first, step = accelerator.process_index, accelerator.num_processes
        share = Subset(whole, range(first, len(whole), step))
        teachers.precompute(
            live.to(accelerator.device),
            _loader(share, chosen, shuffle=False),
            part.cache,
            **options,
            progress=accelerator.is_main_process,
        )
        accelerator.wait_for_everyone()
    with _blaming_the_cache():
        cache = teachers.TeacherCache(part.cache)
        cache.check(ids=torch.arange(len(whole)), temperature=temperature)
    _check_inputs(cache, whole, len(train), chosen["batch_size"])
    held_out = None if validation is None else Subset(whole, range(len(train), len(whole)))
    return cache, Subset(whole, range(len(train))), held_out


def _check_inputs(
    cache: teachers.TeacherCache, whole: teachers.WithIds, trained_on: int, count: int
) -> None:
    """Whether the first samples of training and validation are those that the teacher was shown."""
    for first in (0, trained_on):
        ids = torch.arange(first, min(first + count, len(whole)))
        there = ids[cache.contains(ids)].tolist()
        for batch in DataLoader(Subset(whole, there), count):
            try:
                cache.check(batch=batch)
            except ValueError as error:
                raise config.ConfigError(
                    f"teacher.cache: {error}. Choose another folder for other data; leave out "
                    "teacher.cache for random augmentation: a live teacher sees what the student "
                    "sees"
                ) from None


@contextlib.contextmanager
def _blaming_the_cache() -> Iterator[None]:
    """A cache that does not fit is the configuration's fault."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise config.ConfigError(f"teacher.cache: {error}") from None


def _loader(data: Any, chosen: dict[str, Any], *, shuffle: bool) -> Any:
    """Batches; a factory may also return a DataLoader of its own."""
    if isinstance(data, DataLoader):
        return data
    shuffle = shuffle and not isinstance(data, IterableDataset)
    return DataLoader(data, chosen["batch_size"], shuffle=shuffle, num_workers=chosen["workers"])


def _scheduler(
    optimizer: torch.optim.Optimizer, chosen: dict[str, Any], loader: Any, processes: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if chosen["schedule"] == "constant":
        return None
    try:
        batches = math.ceil(len(loader) / processes)  # of each
    except TypeError:
        raise config.ConfigError(
            "schedule: cosine ends with the last step, and how many there are, an iterable data "
            "set does not say; constant does without"
        ) from None
    steps = chosen["epochs"] * math.ceil(batches / chosen["accumulate"])
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _write(output: pathlib.Path, student: nn.Module, history: list[dict[str, Any]]) -> None:
    """The student and what its evaluations gave, each file whole or not at all."""
    # JSON has no NaN, which is the accuracy without labels.
    found = [{k: v if math.isfinite(v) else None for k, v in each.items()} for each in history]
    output.mkdir(parents=True, exist_ok=True)
    part = output / "student.part"
    try:
        extras.load("safetensors.torch", "train").save_model(student, str(part))
        os.replace(part, output / "student.safetensors")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(part, output / "history.json")
    finally:
        part.unlink(missing_ok=True)  # of a full disk
