"""Hints on a small CNN: the student's inner features learn from the teacher's.

    python examples/feature_hints.py [--epochs N] [--kind mse|cosine|attention]

A student of two narrow convolutions is distilled with and without a hint between the second
convolutions, which have 4 and 32 channels: a projection is learned along, and thrown away.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def network(width: int) -> nn.Sequential:
    """Two convolutions and a linear layer, with names to refer to."""
    model = nn.Sequential()
    model.add_module("image", nn.Unflatten(1, (1, 8, 8)))
    model.add_module("first", nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()))
    model.add_module("second", nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()))
    model.add_module(
        "head", nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))
    )
    return model


def train(
    model: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int, **options: object
) -> fastkd.Trainer:
    """By Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    trainer = fastkd.Trainer(model, teacher, optimizer, progress=False, **options)
    trainer.fit(loader, epochs)
    return trainer


def main() -> None:
    """Trains a teacher, a student without and a student with hints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="of each network")
    parser.add_argument("--kind", choices=("mse", "cosine", "attention"), default="mse")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks this small gain nothing from a second one
    torch.manual_seed(0)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    everything = DataLoader(TensorDataset(images[:1200], labels[:1200]), 32, shuffle=True)
    few = DataLoader(TensorDataset(images[:200], labels[:200]), 32, shuffle=True)
    test = DataLoader(TensorDataset(images[1200:], labels[1200:]), 256)

    # Without a soft term the trainer trains on labels alone, whatever the teacher says.
    teacher = network(32)
    labels_alone = fastkd.KDLoss(hard_weight=1.0, soft_weight=0.0)
    train(teacher, network(1), everything, options.epochs, loss=labels_alone)

    loss = fastkd.KDLoss(temperature=4.0, alpha=0.1)
    hint = fastkd.Hint("second", "second", weight=1.0, loss=options.kind)
    for name, hints in {"without hints": [], f"with a hint ({options.kind})": [hint]}.items():
        torch.manual_seed(1)
        student = network(4)
        trainer = train(student, teacher, few, 4 * options.epochs, loss=loss, hints=hints)
        found = trainer.evaluate(test)
        print(
            f"{name}: test accuracy {found.accuracy:.1%}, KL from the teacher {found.soft:.3f}, "
            f"agreement with it {found.agreement:.1%}"
        )


if __name__ == "__main__":
    main()
