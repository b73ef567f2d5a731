"""What a trainer accepts, and the accelerator that it makes itself."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import torch
from torch import Tensor

from fastkd import checks, extras
from fastkd.losses import KDLoss


def accelerator() -> Any:
    """Accelerate's own choice; on machines with a CPU alone it has to be told, or each of several
    processes would train for itself."""
    return extras.load("accelerate", "train").Accelerator(cpu=not torch.accelerator.is_available())


def check_sharding(sharding: Any, ema: float | None) -> None:
    """What of this can be done under FSDP."""
    if not sharding.is_fsdp2:
        raise ValueError(
            "accelerator: FSDP is supported in version 2; give "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if ema is not None:
        raise ValueError("ema cannot average parameters that FSDP has sharded")


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
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
    if clip is not None:
        checks.number("clip", clip, 0.0, math.inf, open_low=True)
    if ema is not None and not 0 < checks.number("ema", ema, 0.0, 1.0) < 1:
        raise ValueError(f"ema must be in (0, 1); got {ema!r}")
    if save_every is not None and checkpoints is None:
        raise ValueError("save_every needs checkpoints, the folder to write in")
