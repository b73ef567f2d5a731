"""Distill in a plain PyTorch loop: the teacher's call and the loss are the only changes.

python examples/plain_loop.py [--epochs N]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def network(width: int) -> nn.Sequential:
    """Make a network with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of correctly classified images."""
    return (model(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    """Train a teacher, then its student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of teacher and student each")
    epochs = parser.parse_args().epochs

    torch.set_num_threads(1)  # networks this small gain nothing from a second thread
    torch.manual_seed(0)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    loader = DataLoader(TensorDataset(images[:1200], labels[:1200]), 32, shuffle=True)

    teacher = network(256)
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(x), y).backward()
            optimizer.step()
    teacher.eval()

    student = network(8)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    for epoch in range(epochs):
        for x, y in loader:
            with torch.no_grad():
                teacher_logits = teacher(x)
            # alpha weighs the labels' term. terms() is loss() with the quantities worth printing.
            terms = fastkd.terms(student(x), teacher_logits, y, temperature=4.0, alpha=0.1)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: hard {terms.hard:.3f}, soft {terms.soft:.4f}")

    for name, model in {"teacher": teacher, "student": student}.items():
        print(f"{name}: test accuracy {accuracy(model, images[1200:], labels[1200:]):.1%}")


if __name__ == "__main__":
    main()
