"""Distill in a Lightning module: training_step calls the teacher.

    python examples/lightning_module.py [--seeds N] [--epochs N]

The teacher learns from 1,200 labeled digits. A small student learns from 100 of these digits, with
and without the teacher, from the same initial weights for the same number of steps.
"""

import argparse
from statistics import mean, stdev

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def make_network(width: int) -> nn.Sequential:
    """Return a network of one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Classifier(lightning.LightningModule):
    """Train a network on labels, and on a teacher's logits if there is a teacher."""

    def __init__(self, model: nn.Module, rate: float, teacher: nn.Module | None = None) -> None:
        """Freeze the teacher, and store it in a list, which Lightning does not save."""
        super().__init__()
        self.model, self.rate = model, rate
        self.loss = fastkd.KDLoss(temperature=4.0, alpha=0.1)
        self._teachers = [] if teacher is None else [teacher.requires_grad_(False).eval()]

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not manage, to the model's device and dtype."""
        for teacher in self._teachers:
            teacher.to(self.device, next(self.model.parameters()).dtype)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        if not self._teachers:
            return F.cross_entropy(self.model(images), labels)
        with torch.no_grad():
            teacher_logits = self._teachers[0](images)
        terms = self.loss.terms(self.model(images), teacher_logits, labels)
        self.log_dict({"hard": terms.hard, "soft": terms.soft}, prog_bar=True)
        return terms.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the accuracy on a batch."""
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an Adam optimizer."""
        return torch.optim.Adam(self.model.parameters(), self.rate)


def main() -> None:
    """Train a teacher, a student alone and a student distilled for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100, help="of the students")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks this small gain nothing from a second thread
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16

    def fit(module: Classifier, training: DataLoader, test: DataLoader, epochs: int) -> float:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, training)
        (result,) = trainer.validate(module, test, verbose=False)
        return 100 * result["accuracy"]

    gains = []
    for seed in range(options.seeds):
        lightning.seed_everything(seed, verbose=False)
        training, test = torch.randperm(len(images)).tensor_split([1200])
        all_rows, few, held_out = (
            DataLoader(TensorDataset(images[rows], labels[rows]), size, shuffle=size == 32)
            for rows, size in ((training, 32), (training[:100], 32), (test, 1000))
        )
        teacher = Classifier(make_network(256), 3e-3)
        accuracies = {"teacher": fit(teacher, all_rows, held_out, 10)}
        for name, source in {"student alone": None, "student distilled": teacher.model}.items():
            torch.manual_seed(seed)
            student = Classifier(make_network(16), 1e-2, source)
            accuracies[name] = fit(student, few, held_out, options.epochs)
        gains.append(accuracies["student distilled"] - accuracies["student alone"])
        shown = ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items())
        print(f"seed {seed}: test accuracy: {shown}")
    error = 2 * stdev(gains) / len(gains) ** 0.5
    print(f"gain by distillation: {mean(gains):+.1f} ± {error:.1f} points (2 standard errors)")


if __name__ == "__main__":
    main()
