"""Test that each step of the Lightning example has the loss of a hand-written module."""

import copy
import importlib.util
import pathlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")
pytest.importorskip("sklearn")  # the example imports sklearn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS = 20


def example():
    path = pathlib.Path(__file__).parents[1] / "examples" / "lightning_module.py"
    spec = importlib.util.spec_from_file_location("lightning_module_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Classifier = example().Classifier


class ByHand(Classifier):
    """Compute the example's loss by PyTorch's operations."""

    def training_step(self, batch, index):
        images, labels = batch
        (teacher,) = self._teachers
        student = self.model(images)
        with torch.no_grad():
            answer = teacher(images)
        wide = torch.promote_types(student.dtype, torch.float32)
        student, answer = student.to(wide), answer.to(wide)
        hard = F.cross_entropy(student, labels)
        q, p = (student / 4).log_softmax(-1), (answer / 4).log_softmax(-1)
        soft = F.kl_div(q, p, reduction="batchmean", log_target=True) * 4**2
        return 0.1 * hard + 0.9 * soft


class Losses(lightning.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.values.append(float(outputs["loss"]))


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 10))


def run(kind, folder, precision: str, student, teacher, **options) -> list[float]:
    torch.manual_seed(3)
    data = TensorDataset(torch.randn(STEPS * 8, 8), torch.randint(10, (STEPS * 8,)))
    losses = Losses()
    trainer = lightning.Trainer(
        max_epochs=1,
        precision=precision,
        accelerator="cpu",
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        **options,
    )
    module = kind(copy.deepcopy(student), 1e-2, copy.deepcopy(teacher))
    trainer.fit(module, DataLoader(data, 8))
    return losses.values


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_each_step_has_the_loss_by_hand(precision, accumulate, tmp_path):
    student, teacher = network(8, 0), network(32, 1)
    ours, theirs = (
        run(kind, tmp_path, precision, student, teacher, accumulate_grad_batches=accumulate)
        for kind in (Classifier, ByHand)
    )
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
