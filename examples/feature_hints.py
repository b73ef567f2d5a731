"""Train inner features of a small CNN to match its teacher's, by feature hints.

    python examples/feature_hints.py [--epochs N] [--kind mse|cosine|attention]

A student of two narrow convolutions is distilled with and without a hint between the second
convolutions, which have 4 and 32 channels. A 1x1 convolution, trained with the student, maps the
student's feature to the teacher's. It is no part of the student.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def network(width: int) -> nn.Sequential:
    """Return two convolutions and a linear layer, as named modules."""
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
    """Train by Adam, and return the trainer."""
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    trainer = fastkd.Trainer(model, teacher, optimizer, progress=False, **options)
    trainer.fit(loader, epochs)
    return trainer


def main() -> None:
    """Train a teacher, a student without hints and a student with a hint."""
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

    # Without a soft term the trainer trains on labels alone.
    teacher = network(32)
    labels_alone = fastkd.KDLoss(hard_weight=1.0, soft_weight=0.0)
    train(teacher, network(1), everything, options.epochs, loss=labels_alone)

    loss = fastkd.KDLoss(temperature=4.0, alpha=0.1)
    hint = fastkd.Hint(
        student="second", teacher="second", loss=options.kind, project=nn.Conv2d(4, 32, 1)
    )
    for name, hints in {"without hints": [], f"with a hint ({options.kind})": [hint]}.items():
        torch.manual_seed(1)
        student = network(4)
        trainer = train(student, teacher, few, 4 * options.epochs, loss=loss, hints=hints)
        result = trainer.evaluate(test)
        print(
            f"{name}: test accuracy {result.accuracy:.1%}, KL from the teacher {result.soft:.3f}, "
            f"agreement with it {result.agreement:.1%}"
        )


if __name__ == "__main__":
    main()
