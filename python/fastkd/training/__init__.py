"""Train students: the trainer, and the feature hints that it can add to the loss."""

from fastkd.training.hints import Hint
from fastkd.training.trainer import Evaluation, Step, Trainer

__all__ = ["Evaluation", "Hint", "Step", "Trainer"]
