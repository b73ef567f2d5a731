"""What a trainer accepts, and the accelerator that it makes itself."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from fastkd import extras
from fastkd._core import checks
from fastkd.losses import KDLoss
from fastkd.training.hints import Hint


def accelerator(**options: Any) -> Any:
    """Accelerate's own choice; on machines with a CPU alone it has to be told, or each of several
    processes would train for itself."""
    accelerate = extras.load("accelerate", "train")
    return accelerate.Accelerator(cpu=not torch.accelerator.is_available(), **options)


def check_accelerator(given: Any, ema: float | None) -> None:
    """What the accelerator decides must be what the trainer does."""
    accelerate = extras.load("accelerate", "train")
    if not isinstance(given, accelerate.Accelerator):
        raise TypeError(
            f"accelerator must be an accelerate.Accelerator or None; got {type(given).__name__}"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != given.num_processes:
        raise ValueError(
            f"accelerator: {launched} processes were launched, but it knows of "
            f"{given.num_processes}; for several on CPUs it is Accelerator(cpu=True)"
        )
    if given.gradient_accumulation_steps != 1:  # it would divide every loss by them
        raise ValueError(
            "accelerator must have gradient_accumulation_steps=1; got "
            f"{given.gradient_accumulation_steps}. Give Trainer(accumulate=...) instead"
        )
    if given.distributed_type != "FSDP":
        return
    if not given.is_fsdp2:
        raise ValueError(
            "accelerator: FSDP is supported in version 2; give "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if ema is not None:
        raise ValueError("ema cannot average parameters that FSDP has sharded")


def check_models(student: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> None:
    """That there is something to train, and something that trains it."""
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be a torch.nn.Module; got {type(student).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be one of torch.optim's kind; got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer must step without a closure; got LBFGS, which asks for one")
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if stepped.isdisjoint(student.parameters()):
        raise ValueError(
            "optimizer has none of the student's parameters, which would stay as they are; make it "
            "of student.parameters()"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "scheduler must be one that steps without a metric; got ReduceLROnPlateau. Step it "
            "yourself, by what Trainer.evaluate gives"
        )
    methods = ("step", "state_dict", "load_state_dict")
    if scheduler is not None and not all(hasattr(scheduler, method) for method in methods):
        raise TypeError(
            "scheduler must be one of torch.optim.lr_scheduler's kind, or None; got "
            f"{type(scheduler).__name__}"
        )


def check_hints(given: object) -> tuple[Hint, ...]:
    """The hints, of which there may be none."""
    if not isinstance(given, Iterable):
        raise TypeError(
            f"hints must be a sequence of fastkd.Hint objects; got {type(given).__name__}"
        )
    hints = tuple(given)
    for hint in hints:
        if not isinstance(hint, Hint):
            raise TypeError(f"hints must be fastkd.Hint objects; got {type(hint).__name__}")
    return hints


def check_functions(forward: object, labels: object) -> None:
    """What takes a batch apart."""
    for name, given, of in (
        ("forward", forward, "a model and a batch"),
        ("labels", labels, "a batch"),
    ):
        if not callable(given):
            raise TypeError(f"{name} must be a function of {of}; got {type(given).__name__}")


def check_loader(name: str, given: object) -> None:
    """It has to give batches."""
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        raise TypeError(
            f"{name} must give batches; got the data set {type(given).__name__}, which gives "
            "single samples: put it into a torch.utils.data.DataLoader"
        )
    if not isinstance(given, Iterable):
        raise TypeError(
            f"{name} must be a DataLoader or another iterable of batches; got "
            f"{type(given).__name__}"
        )


def device(given: Any) -> torch.device:
    """Where the teacher runs."""
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "teacher_device must be a torch.device, or the name of one such as 'cpu' or 'cuda:0'; "
            f"got {given!r}"
        ) from error


def check(
    loss: KDLoss,
    accumulate: int,
    clip: float | None,
    ema: float | None,
    checkpoints: str | pathlib.Path | None,
    save_every: int | None,
) -> None:
    """The arguments of :class:`fastkd.Trainer`, as far as that needs no other package."""
    if not isinstance(loss, KDLoss):
        raise TypeError(f"loss must be a fastkd.KDLoss; got {type(loss).__name__}")
    for name, accepted in (("reduction", "mean"), ("normalizer", None)):
        given = loss.options.get(name, accepted)
        if given != accepted:
            raise ValueError(
                f"loss must have {name}={accepted!r}, since the trainer divides by the rows of all "
                f"batches of a step; got {given!r}"
            )
    hard_weight = loss.options.get("hard_weight")
    by_row = isinstance(hard_weight, Tensor) and hard_weight.dim() > 0
    if by_row and loss.options.get("class_weight") is not None:
        raise ValueError("loss: class_weight needs one hard_weight, not one for each row")
    for name, value in (("accumulate", accumulate), ("save_every", save_every)):
        if value is not None:
            checks.count(name, value)
    if clip is not None:
        checks.number("clip", clip, 0.0, math.inf, open_low=True)
    if ema is not None and not 0 < checks.number("ema", ema, 0.0, 1.0) < 1:
        raise ValueError(f"ema must be in (0, 1); got {ema!r}")
    if save_every is not None and checkpoints is None:
        raise ValueError("save_every needs checkpoints, the folder to write in")
    if checkpoints is not None:
        checks.folder("checkpoints", checkpoints, " or None")
