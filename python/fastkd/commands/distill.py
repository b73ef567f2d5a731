"""Implement ``fastkd distill``: train the student that a configuration names."""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from fastkd import extras, losses, teachers
from fastkd.commands.config import Training, raise_as_config_error
from fastkd.commands.factories import ConfigError, Factories
from fastkd.teachers import writing
from fastkd.training import arguments, checkpoints
from fastkd.training.trainer import Trainer

# LBFGS.step needs a closure, and SparseAdam needs sparse gradients.
_UNSUPPORTED = ("LBFGS", "SparseAdam")


def distill(
    training: Training,
    factories: Factories,
    resume: bool = False,
    temperature: float | None = None,
    alpha: float | None = None,
    divergence: str | None = None,
) -> None:
    """Train a student on a teacher's outputs, and write the student to the output folder.

    Options come from the file that --config names, and from the command line, which takes
    precedence: --loss.temperature=8 sets one entry of a mapping. Functions are named as
    module:function. A function's module must be in the file's folder, or named by --module; read
    these modules before you run somebody else's configuration. To train in several processes, run
    accelerate launch -m fastkd distill --config FILE.

    Args:
        training: the options of the training.
        factories: object that makes the models and the data.
        resume: resume from the newest checkpoint in the output folder.
        temperature: short for --loss.temperature.
        alpha: short for --loss.alpha, the weight of the labels' term.
        divergence: short for --loss.divergence.
    """
    training.require("student", "train", "output")
    if not training.teacher_cache:
        training.require("teacher")
    extras.check("train", "safetensors.torch", "numpy", "accelerate", "tqdm")
    output = pathlib.Path(training.output)
    folder = output / "checkpoints"
    if resume and not training.checkpoints:
        raise ConfigError("resume needs checkpoints, and checkpoints is false")
    if training.checkpoints and not resume and checkpoints.list_complete(folder):
        raise ConfigError(
            f"output: {folder} holds the checkpoints of another run. Continue it by --resume=true, "
            "choose another --output, or delete them"
        )
    with raise_as_config_error("mixed_precision"):
        accelerator = arguments.make_accelerator(mixed_precision=training.mixed_precision)
    shortcuts = {"temperature": temperature, "alpha": alpha, "divergence": divergence}
    overrides = {name: value for name, value in shortcuts.items() if value is not None}
    options: Any = {**training.loss, **overrides}
    with raise_as_config_error("loss"):
        loss = losses.KDLoss(**options)
    with raise_as_config_error():
        arguments.check_loss(loss, teachers=1)
    torch.manual_seed(training.seed)
    student = factories.make_model("student", training)
    optimizer = make_optimizer(training.optimizer, student)
    teacher, train, validation = make_teacher_and_data(training, factories, loss, accelerator)
    loader = make_loader(train, training, shuffle=True)
    held_out = make_loader(validation, training, shuffle=False)
    trainer = make_trainer(
        training,
        student,
        optimizer,
        loader,
        loss,
        teacher,
        accelerator,
        checkpoints=folder if training.checkpoints else None,
    )
    # Seed again, so that the order of the data does not depend on how the teacher was made.
    torch.manual_seed(training.seed)
    if resume and trainer.resume():
        accelerator.print(f"resumed after step {trainer.step}")
    history = trainer.fit(loader, training.epochs, validation=held_out)
    if accelerator.is_main_process:
        trained = student if trainer.ema is None else trainer.ema.module
        _write(output, trained, [evaluation._asdict() for evaluation in history])
        if history:
            shares = {"accuracy": history[-1].accuracy, "agreement": history[-1].agreement}
            known = {name: share for name, share in shares.items() if not math.isnan(share)}
            print(", ".join(f"{name} {100 * share:.1f} %" for name, share in known.items()))
        print(f"wrote {output / 'student.safetensors'}; fastkd report shows it")
    # A process that exits without destroying the process group may be aborted by threads of the
    # group.
    accelerator.end_training()


def make_optimizer(options: dict[str, Any], student: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that the options name."""
    options = {"name": "AdamW", **options}
    name = str(options.pop("name"))
    kind: Any = getattr(torch.optim, name, None)
    is_optimizer = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if not is_optimizer or name in _UNSUPPORTED:
        raise ConfigError(
            "optimizer: name must be that of a torch.optim class other than "
            f"{' and '.join(_UNSUPPORTED)}; got {name!r}"
        )
    with raise_as_config_error("optimizer"):
        optimizer: torch.optim.Optimizer = kind(student.parameters(), **options)
        return optimizer


def make_trainer(
    training: Training,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    loss: losses.KDLoss,
    teacher: Any,
    accelerator: Any,
    **options: Any,
) -> Trainer:
    """Make the trainer of a student; :class:`fastkd.Trainer` also gets ``options``."""
    scheduler = _make_scheduler(optimizer, training, loader, accelerator.num_processes)
    with raise_as_config_error():
        return Trainer(
            student,
            teacher,
            optimizer,
            loss=loss,
            scheduler=scheduler,
            accumulate=training.accumulate,
            clip=None if training.clip == math.inf else training.clip,
            ema=training.ema or None,
            accelerator=accelerator,
            **options,
        )


def make_teacher_and_data(
    training: Training, factories: Factories, loss: losses.KDLoss, accelerator: Any
) -> tuple[Any, Any, Any]:
    """Make the teacher (a model or a cache) and the data, whose samples get ids for a cache."""
    train, validation = (factories.make_data(each, training) for each in ("train", "validation"))
    live = factories.make_model("teacher", training) if training.teacher else None
    if not training.teacher_cache:
        return live, train, validation
    for name, data in (("train", train), ("validation", validation)):
        if isinstance(data, (DataLoader, IterableDataset)):
            raise ConfigError(
                f"{name} must return a data set with __getitem__ if there is a teacher_cache, so "
                f"that its samples have ids; got {type(data).__name__}"
            )
    parts = [train] if validation is None else [train, validation]
    samples = teachers.WithIds(ConcatDataset(parts))
    cache = _make_cache(training, live, samples, len(train), loss, accelerator)
    held_out = None if validation is None else Subset(samples, range(len(train), len(samples)))
    return cache, Subset(samples, range(len(train))), held_out


def _make_cache(
    training: Training,
    live: nn.Module | None,
    samples: teachers.WithIds,
    first_validation: int,
    loss: losses.KDLoss,
    accelerator: Any,
) -> teachers.TeacherCache:
    """Compute missing entries of the teacher's cache if ``live`` is a model; open the cache."""
    folder = pathlib.Path(training.teacher_cache)
    if live is not None:
        top_k = training.teacher_top_k or None
        temperature = _get_teacher_temperature(loss, top_k)
        options: Any = {"dtype": torch.float16, "top_k": top_k, "temperature": temperature}
        with raise_as_config_error("teacher_cache"):
            cache = writing.open_existing(folder, **options, teacher=teachers.fingerprint(live))
        if cache is not None:  # check the cached samples before precompute() adds samples
            _check_inputs(cache, samples, first_validation, training.batch_size)
        share = range(accelerator.process_index, len(samples), accelerator.num_processes)
        loader = make_loader(Subset(samples, share), training, shuffle=False)
        live, is_main = live.to(accelerator.device), accelerator.is_main_process
        try:
            teachers.precompute(live, loader, folder, **options, progress=is_main)
        except writing.TopKError as error:
            raise ConfigError(f"teacher_{error}") from None
        accelerator.wait_for_everyone()
    with raise_as_config_error("teacher_cache"):
        cache = teachers.TeacherCache(folder)
        temperature = _get_teacher_temperature(loss, cache.top_k)
        cache.check(ids=torch.arange(len(samples)), temperature=temperature)
    _check_inputs(cache, samples, first_validation, training.batch_size)
    return cache


def _get_teacher_temperature(loss: losses.KDLoss, top_k: int | None) -> float:
    """Return the temperature at which the loss needs the teacher's probabilities."""
    default = 2.0 if top_k is None else 1.0
    return float(loss.teacher_temperature or loss.temperature or default)


def _check_inputs(
    cache: teachers.TeacherCache, samples: teachers.WithIds, first_validation: int, count: int
) -> None:
    """Raise ConfigError if the cache was computed from inputs that differ from ``samples``.

    Compare the cached samples among the first ``count`` samples of the training data and of the
    validation data.
    """
    for first in (0, first_validation):
        ids = torch.arange(first, min(first + count, len(samples)))
        for batch in DataLoader(Subset(samples, ids[cache.contains(ids)].tolist()), count):
            try:
                cache.check(batch=batch)
            except ValueError as error:
                raise ConfigError(
                    f"teacher_cache: {error}. Choose another folder for other data. With random "
                    "augmentation, leave out teacher_cache"
                ) from None


def make_loader(data: Any, training: Training, *, shuffle: bool) -> Any:
    """Make a DataLoader of a data set; return None or a DataLoader unchanged."""
    if data is None or isinstance(data, DataLoader):
        return data
    shuffle = shuffle and not isinstance(data, IterableDataset)
    return DataLoader(data, training.batch_size, shuffle=shuffle, num_workers=training.workers)


def _make_scheduler(
    optimizer: torch.optim.Optimizer, training: Training, loader: Any, processes: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if training.schedule == "constant":
        return None
    try:
        batches = math.ceil(len(loader) / processes)  # batches of each process
    except TypeError:
        raise ConfigError(
            "schedule: cosine needs the number of steps, and an iterable data set has no length; "
            "use constant"
        ) from None
    steps = training.epochs * math.ceil(batches / training.accumulate)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _write(output: pathlib.Path, student: nn.Module, history: list[dict[str, Any]]) -> None:
    """Write the student and its history, each file completely or not at all."""
    # JSON has no NaN, which is the accuracy without labels.
    finite = [{k: v if math.isfinite(v) else None for k, v in each.items()} for each in history]
    output.mkdir(parents=True, exist_ok=True)
    part = output / "student.part"
    try:
        extras.load("safetensors.torch", "train").save_model(student, str(part))
        os.replace(part, output / "student.safetensors")
        part.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
        os.replace(part, output / "history.json")
    finally:
        part.unlink(missing_ok=True)  # remains after a failed write, such as on a full disk
