"""Train a deep, narrow network with a feature hint, as in FitNets (Romero et al., 2015).

    python examples/feature_hints.py [--seeds N] [--epochs N]

The teacher has two convolutions of 32 channels, and learns from 1,200 digits. The student has six
convolutions of 6 channels, and sees 100 digits. The hint makes the student's third layer predict
the teacher's second layer, by a 1x1 convolution that is trained with the student.
"""

import argparse
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def make_network(width: int, depth: int) -> nn.Sequential:
    """Return a network of convolutions and a linear layer, with named modules."""
    model = nn.Sequential()
    model.add_module("image", nn.Unflatten(1, (1, 8, 8)))
    for number in range(1, depth + 1):
        layer = nn.Conv2d(1 if number == 1 else width, width, 3, padding=1)
        model.add_module(f"layer{number}", nn.Sequential(layer, nn.ReLU()))
    model.add_module(
        "head", nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))
    )
    return model


def train(
    model: nn.Module, teacher: nn.Module, loader: DataLoader, epochs: int, **options: object
) -> fastkd.Trainer:
    """Train a model by Adam, and return the trainer."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    trainer = fastkd.Trainer(model, teacher, optimizer, progress=False, **options)
    trainer.fit(loader, epochs)
    return trainer


def main() -> None:
    """Train a teacher and three students for each seed: alone, distilled, and with a hint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60, help="of the students")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks this small gain nothing from a second thread
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    # Without a soft term the trainer trains on labels alone.
    labels_alone = fastkd.KDLoss(hard_weight=1.0, soft_weight=0.0)
    distillation = fastkd.KDLoss(temperature=4.0, alpha=0.1)
    accuracies: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        training, test = torch.randperm(len(images)).tensor_split([1200])
        everything, few, held_out = (
            DataLoader(TensorDataset(images[rows], labels[rows]), 32, shuffle=rows is not test)
            for rows in (training, training[:100], test)
        )
        teacher = make_network(32, 2)
        train(teacher, make_network(1, 1), everything, 6, loss=labels_alone)
        project = nn.Conv2d(6, 32, 1)
        hint = fastkd.Hint(student="layer3", teacher="layer2", weight=20.0, project=project)
        for name, loss, hints in (
            ("alone", labels_alone, []),
            ("distilled", distillation, []),
            ("distilled with a hint", distillation, [hint]),
        ):
            torch.manual_seed(seed)
            student = make_network(6, 6)
            trainer = train(student, teacher, few, options.epochs, loss=loss, hints=hints)
            accuracy = 100 * trainer.evaluate(held_out).accuracy
            accuracies.setdefault(name, []).append(accuracy)
            print(f"seed {seed}, {name}: test accuracy {accuracy:.1f} %")
    alone, distilled, hinted = accuracies.values()
    for name, values in {"trained alone": alone, "distilled without a hint": distilled}.items():
        gains = [a - b for a, b in zip(hinted, values, strict=True)]
        error = 2 * stdev(gains) / len(gains) ** 0.5
        print(
            f"with a hint against {name}: {mean(gains):+.1f} ± {error:.1f} points (2 std. errors)"
        )


if __name__ == "__main__":
    main()
