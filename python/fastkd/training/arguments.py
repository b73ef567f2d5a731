"""Check arguments of :class:`fastkd.Trainer`, and make the default accelerator."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from fastkd import extras
from fastkd._core.checks import check_teacher_weights
from fastkd.losses import KDLoss


def make_accelerator(**options: Any) -> Any:
    """Make an ``accelerate.Accelerator``, for a CPU if the machine has no accelerator device.

    Without ``cpu=True``, several processes on CPUs would each train alone.
    """
    accelerate = extras.load("accelerate", "train")
    return accelerate.Accelerator(cpu=not torch.accelerator.is_available(), **options)


def check_accelerator(accelerator: Any, ema: float | None) -> None:
    """Raise ValueError for settings of Accelerate that the trainer does not support."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"accelerator: {launched} processes were launched, and the accelerator has "
            f"{accelerator.num_processes}; for several on CPUs use Accelerator(cpu=True)"
        )
    if accelerator.gradient_accumulation_steps != 1:  # Accelerate divides the loss by this number
        raise ValueError(
            "accelerator must have gradient_accumulation_steps=1; got "
            f"{accelerator.gradient_accumulation_steps}. Use Trainer(accumulate=...) instead"
        )
    if accelerator.distributed_type != "FSDP":
        return
    if not accelerator.is_fsdp2:
        raise ValueError(
            "accelerator: FSDP is supported in version 2; use "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if ema is not None:
        raise ValueError("ema cannot average parameters that FSDP has sharded; use ema=None")


def check_loss(loss: KDLoss, teachers: int) -> None:
    """Raise unless the trainer can use the loss; ``teachers``: the number of teachers."""
    if not isinstance(loss, KDLoss):
        raise TypeError(f"loss must be a fastkd.KDLoss; got {type(loss).__name__}")
    for name, accepted in (("reduction", "mean"), ("normalizer", None), ("class_weight", None)):
        value = loss.options.get(name, accepted)
        if value is not accepted and value != accepted:
            raise ValueError(
                f"loss must have {name}={accepted!r}, since the trainer divides both terms by the "
                f"rows of all batches of a step; got {value!r}. For another mean, call fastkd.loss "
                "in a training loop of your own"
            )
    check_teacher_weights(loss.teacher_weights, teachers)


def check_optimizer(optimizer: object, student: nn.Module) -> None:
    """Raise unless ``optimizer`` is an optimizer that has a parameter of the student."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = type(optimizer).__name__
        if isinstance(optimizer, type):
            got = f"the class {optimizer.__name__}"
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, such as "
            f"torch.optim.Adam(student.parameters()); got {got}"
        )
    if set(list_parameters(optimizer)).isdisjoint(student.parameters()):
        raise ValueError(
            "optimizer has none of the student's parameters; make it of student.parameters()"
        )


def list_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_loader(name: str, loader: object) -> None:
    """Raise TypeError for a map-style dataset, whose samples would be taken for batches."""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"{name} must yield batches; got the dataset {type(loader).__name__}, which yields "
            "single samples: wrap it in a torch.utils.data.DataLoader"
        )
