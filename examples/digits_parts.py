"""Make the models and data of digits.py for ``fastkd distill --config``."""

from __future__ import annotations

from digits import load, make_student, train_teacher
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

SEED = 0


def teacher() -> nn.Module:
    """Train a teacher on all training images, in a few seconds."""
    return train_teacher(load(SEED), SEED, tqdm(disable=True))


def student() -> nn.Module:
    """Make an untrained student with one hidden layer."""
    return make_student()


def training_set() -> TensorDataset:
    """Return the student's few training images and their labels."""
    digits = load(SEED)
    return TensorDataset(digits.images[digits.few], digits.labels[digits.few])


def test_set() -> TensorDataset:
    """Return the test images, which no model is trained on."""
    digits = load(SEED)
    return TensorDataset(digits.test_images, digits.test_labels)
