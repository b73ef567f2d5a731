"""Train students by distillation, with or without feature hints."""

from fastkd.training.hints import Hint
from fastkd.training.trainer import Evaluation, Step, Trainer

__all__ = ["Evaluation", "Hint", "Step", "Trainer"]
