"""Distill in a plain PyTorch loop: only the loss and a call of the teacher change.

    python examples/plain_loop.py [--seeds N] [--epochs N]

The teacher learns from 1,200 labeled digits. A small student learns from 100 of these digits, with
and without the teacher, from the same initial weights for the same number of steps.
"""

import argparse
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def make_network(width: int) -> nn.Sequential:
    """Return a network of one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(
    model: nn.Module, loader: DataLoader, epochs: int, rate: float, teacher: nn.Module | None = None
) -> None:
    """Train on the labels, and on the teacher's logits if there is a teacher."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(epochs):
        for images, labels in loader:
            if teacher is None:
                loss = F.cross_entropy(model(images), labels)
            else:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                # alpha is the weight of the cross entropy with the labels.
                loss = fastkd.loss(
                    model(images), teacher_logits, labels, temperature=4.0, alpha=0.1
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def compute_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images that a model recognizes."""
    return 100 * (model(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Train a teacher, a student alone and a student distilled for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100, help="of the students")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks this small gain nothing from a second thread
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    gains = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        training, test = torch.randperm(len(images)).tensor_split([1200])
        all_rows, few = (
            DataLoader(TensorDataset(images[rows], labels[rows]), 32, shuffle=True)
            for rows in (training, training[:100])
        )
        teacher = make_network(256)
        train(teacher, all_rows, 10, 3e-3)
        accuracies = {"teacher": compute_accuracy(teacher, images[test], labels[test])}
        for name, source in {"student alone": None, "student distilled": teacher}.items():
            torch.manual_seed(seed)
            student = make_network(16)
            train(student, few, options.epochs, 1e-2, source)
            accuracies[name] = compute_accuracy(student, images[test], labels[test])
        gains.append(accuracies["student distilled"] - accuracies["student alone"])
        shown = ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())
        print(f"seed {seed}: test accuracy: {shown}")
    error = 2 * stdev(gains) / len(gains) ** 0.5
    print(f"gain by distillation: {mean(gains):+.1f} ± {error:.1f} points (2 standard errors)")


if __name__ == "__main__":
    main()
