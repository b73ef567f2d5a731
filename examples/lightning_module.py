"""Distill in a Lightning module: training_step calls the teacher.

python examples/lightning_module.py [--epochs N]
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd


def network(width: int) -> nn.Sequential:
    """Make a network with one hidden layer."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


class Classifier(lightning.LightningModule):
    """Network trained on labels, and on a teacher if there is one."""

    def __init__(self, model: nn.Module, rate: float, teacher: nn.Module | None = None) -> None:
        """Freeze the teacher. A list keeps it out of the student's checkpoints."""
        super().__init__()
        self.model, self.rate = model, rate
        self.loss = fastkd.KDLoss(temperature=4.0, alpha=0.1)
        self._teachers = [] if teacher is None else [teacher.requires_grad_(False).eval()]

    def on_fit_start(self) -> None:
        """Move the teacher, which Lightning does not know, and cast it as ``precision`` casts."""
        for teacher in self._teachers:
            teacher.to(self.device, next(self.model.parameters()).dtype)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Compute the loss of a batch."""
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
        """Return the optimizer, Adam."""
        return torch.optim.Adam(self.model.parameters(), self.rate)


def main() -> None:
    """Train a teacher, then its student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="of teacher and student each")
    epochs = parser.parse_args().epochs

    torch.set_num_threads(1)  # networks this small gain nothing from a second thread
    lightning.seed_everything(0, verbose=False)
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    training = DataLoader(TensorDataset(images[:1200], labels[:1200]), 32, shuffle=True)
    test = DataLoader(TensorDataset(images[1200:], labels[1200:]), 256)

    def fit(name: str, module: Classifier) -> nn.Module:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, training)
        (result,) = trainer.validate(module, test, verbose=False)
        print(f"{name}: test accuracy {result['accuracy']:.1%}")
        return module.model

    teacher = fit("teacher", Classifier(network(256), 1e-3))
    fit("student", Classifier(network(8), 1e-2, teacher))


if __name__ == "__main__":
    main()
