"""Train a model for tests of resuming and of several processes: ``training_run.py OUT``.

Resuming must restore the state of dropout, a hint's projection, a shuffled loader, a noisy dataset,
accumulation, a schedule, and averaged weights.
"""

import argparse
import json
import os
import pathlib
import signal
from collections.abc import Sequence

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, Subset

import fastkd
from fastkd.training import checkpoints


class Digits(Dataset):
    """Hold digits as sequences of 8 pixel rows, labeled with the digit, or -100 for a faint row."""

    def __init__(self, count: int, noise: float) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images[:count] / 16).view(-1, 8, 8)
        rows = torch.tensor(labels[:count]).unsqueeze(1).expand(-1, 8)
        self.labels = rows.masked_fill(self.images.sum(-1) < 1.5, -100)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = self.images[index]
        if self.noise:
            image = image + self.noise * torch.randn_like(image)
        return image, self.labels[index]


def network(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, width, dtype=torch.float64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, 10, dtype=torch.float64),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--checkpoints", type=pathlib.Path)
    parser.add_argument("--die-in-save", type=int, default=0, help="see die_in_save()")
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    teacher, student = network(24, 0.0), network(16, options.dropout)
    project = nn.Linear(16, 24, dtype=torch.float64)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    trainer = fastkd.Trainer(
        student,
        teacher,
        optimizer,
        loss=fastkd.KDLoss(temperature=3.0, alpha=0.3),
        hints=[fastkd.Hint(student="1", teacher="1", weight=0.5, project=project)],
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
        accumulate=options.accumulate,
        clip=1.0,
        ema=None if options.fsdp else 0.9,
        accelerator=sharding_accelerator() if options.fsdp else None,
        checkpoints=options.checkpoints,
        save_every=1 if options.checkpoints else None,
        progress=False,
    )
    if options.checkpoints is not None:
        trainer.resume()
    torch.manual_seed(1 + trainer.step)  # a resumed run must not depend on this seed
    if options.die_in_save:
        die_in_save(options.die_in_save)

    data = Digits(96, options.noise)
    loader = DataLoader(data, options.batch, shuffle=options.shuffle, num_workers=options.workers)
    main_process = trainer.accelerator.is_main_process
    while trainer.epoch < options.epochs:
        for step in trainer.steps(loader):
            if main_process:
                with options.out.with_suffix(".losses").open("a") as file:
                    print(step.number, float(step.loss).hex(), float(step.hint).hex(), file=file)
    if options.fsdp:
        assert all(isinstance(parameter, DTensor) for parameter in student.parameters())
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        parameters = get_model_state_dict(student, options=full)
        if main_process:
            torch.save([parameters], options.out)
        return
    # Of 37 samples in batches of 8, two processes get 3 and 2 batches. Of 5 samples, one process
    # gets none.
    held_out = [range(37), range(5)]
    evaluations = [trainer.evaluate(DataLoader(Subset(data, part), 8)) for part in held_out]
    if main_process:
        options.out.with_suffix(".evaluations").write_text(json.dumps(evaluations))
        torch.save([student.state_dict(), trainer.ema.module.state_dict()], options.out)


def sharding_accelerator() -> Accelerator:
    """Return an accelerator whose state is set to FSDP, since Accelerate ignores FSDP on CPUs."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def die_in_save(number: int) -> None:
    """Kill this process before the ``number``-th checkpoint is renamed to its final name."""
    written = 0
    synchronize = checkpoints.synchronize

    def killing(path: pathlib.Path) -> None:
        nonlocal written
        written += path.name == checkpoints._INCOMPLETE
        if written == number:
            os.kill(os.getpid(), signal.SIGKILL)
        synchronize(path)

    checkpoints.synchronize = killing


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # DTensor's process group has threads that may abort the process at interpreter exit.
        os._exit(0)
