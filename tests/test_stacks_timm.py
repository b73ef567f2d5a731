"""Test that timm's LogitDistillationTask and fastkd.compat's give equal losses."""

import copy

import peers
import pytest
import torch
from torch import nn

from fastkd.compat.timm import LogitDistillationTask

STEPS, CLASSES = 20, 10


class Network(nn.Module):
    """Define a small convolutional network with the attributes that timm reads."""

    num_classes, in_chans = CLASSES, 3
    pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}  # noqa: RUF012

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # On a CPU, autocast would compute log_softmax in bfloat16, which changes timm's loss.
        return self.layers(images).float()


def train(kind, student, teacher, autocast: bool, **options) -> list[float]:
    """Train in a loop like timm's train.py; return each step's loss."""
    torch.manual_seed(3)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(CLASSES, (8,))) for _ in range(STEPS)]
    task = kind(copy.deepcopy(student), copy.deepcopy(teacher), verbose=False, **options)
    task.train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.05, momentum=0.9)
    losses = []
    for images, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = task(images.to(memory_format=torch.channels_last), labels)
        optimizer.zero_grad()
        result["loss"].backward()
        nn.utils.clip_grad_norm_(task.trainable_module.parameters(), 1.0)
        optimizer.step()
        losses.append(float(result["loss"].detach()))
    return losses


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": nn.CrossEntropyLoss()},
        {"criterion": nn.CrossEntropyLoss(), "task_loss_weight": 0.3, "temperature": 4.0},
        {"criterion": nn.CrossEntropyLoss(label_smoothing=0.1), "distill_loss_weight": 2.0},
    ],
    ids=["weights of 1", "complementary", "smoothed"],
)
def test_each_step_has_the_loss_of_timm(options, autocast):
    student, teacher = Network(4, 0), Network(16, 1)
    theirs = train(peers.timm_task(), student, teacher, autocast, **options)
    ours = train(LogitDistillationTask, student, teacher, autocast, **options)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_cross_entropy_in_the_same_pass_changes_nothing():
    student, teacher = Network(4, 0), Network(16, 1)
    options = {"task_loss_weight": 0.3, "temperature": 4.0}
    theirs = train(
        peers.timm_task(), student, teacher, False, criterion=nn.CrossEntropyLoss(), **options
    )
    ours = train(LogitDistillationTask, student, teacher, False, **options)
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-5)
