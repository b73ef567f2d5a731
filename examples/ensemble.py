"""Three teachers and one student: what Bucila, Caruana and Niculescu-Mizil began with.

    python examples/ensemble.py [--epochs N]

The student learns from the mean of the teachers' probabilities (Model Compression, 2006, with the
soft targets of Hinton et al. 2015), weighted as KDLoss(teacher_weights=...) says.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def network(width: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def teach(loader: DataLoader, epochs: int, seed: int) -> nn.Module:
    """A teacher, trained on labels; teachers differ by their first weights and order of batches."""
    torch.manual_seed(seed)
    model = network(128)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


def main() -> None:
    """Trains three teachers, then a student on each alone and on all together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15, help="of each network")
    epochs = parser.parse_args().epochs

    torch.set_num_threads(1)  # networks this small gain nothing from a second one
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    loader = DataLoader(TensorDataset(images[:1200], labels[:1200]), 32, shuffle=True)
    test = DataLoader(TensorDataset(images[1200:], labels[1200:]), 256)
    teachers = [teach(loader, epochs, seed) for seed in range(3)]

    def distil(given: list[nn.Module], **weights: object) -> fastkd.Evaluation:
        torch.manual_seed(3)
        student = network(8)
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        loss = fastkd.KDLoss(temperature=4.0, alpha=0.1, **weights)
        trainer = fastkd.Trainer(student, given, optimizer, loss=loss, progress=False)
        (*_, last) = trainer.fit(loader, epochs, validation=test)
        return last

    for number, teacher in enumerate(teachers, start=1):
        found = distil([teacher])
        print(f"teacher {number}: its student's test accuracy {found.accuracy:.1%}")
    found = distil(teachers, teacher_weights=(1.0, 1.0, 1.0))
    print(f"all three: the student's test accuracy {found.accuracy:.1%}, KL {found.soft:.3f}")


if __name__ == "__main__":
    main()
