"""The models and data of digits.py, as ``fastkd distill --config`` is given them."""

from __future__ import annotations

from digits import load, make_student, train_teacher
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

SEED = 0


def teacher() -> nn.Module:
    """Trained on all training images, which takes a few seconds."""
    return train_teacher(load(SEED), SEED, tqdm(disable=True))


def student() -> nn.Module:
    """One hidden layer, untrained."""
    return make_student()


def training_set() -> TensorDataset:
    """The few images that the student may see, and their labels."""
    digits = load(SEED)
    return TensorDataset(digits.images[digits.few], digits.labels[digits.few])


def test_set() -> TensorDataset:
    """Images that neither has seen."""
    digits = load(SEED)
    return TensorDataset(digits.test_images, digits.test_labels)
