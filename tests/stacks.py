"""Define tiny models, data, hand-written losses and commands, for tests that train."""

import copy
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import __main__ as command_line

VOCABULARY, LENGTH = 32, 12
TEMPERATURE, ALPHA = 3.0, 0.3


def llama(width: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,  # spreads the teacher's logits
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def sentences(count: int = 32) -> list[dict[str, list[int]]]:
    """Return samples of different lengths, so that batches differ in their number of tokens."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index in range(count):
        length = 4 + index * 5 % (LENGTH - 3)
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = tokens.clone()
        labels[: index % 3] = -100  # a prompt without labels
        samples.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return samples


def pad(samples: list[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    def column(name: str, value: int) -> Tensor:
        rows = [torch.tensor(sample[name]) for sample in samples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    labels, tokens = column("labels", -100), column("input_ids", 0)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_by_hand(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    count: Tensor | float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss by PyTorch's operations; the labels are already shifted."""
    rows = labels != -100
    student, teacher = student[rows].float(), teacher[rows].float()
    hard = F.cross_entropy(student, labels[rows], reduction="sum", label_smoothing=smoothing)
    p, q = ((logits / TEMPERATURE).log_softmax(-1) for logits in (teacher, student))
    soft = F.kl_div(q, p, reduction="sum", log_target=True) * TEMPERATURE**2
    return (ALPHA * hard + (1 - ALPHA) * soft) / (rows.sum() if count is None else count)


def losses(trainer: Any) -> list[float]:
    """Return the losses that a transformers trainer has logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINER_LOSS = {"temperature": 3.0, "alpha": 0.3}


def digits(count: int = 64, dtype: torch.dtype = torch.float64) -> TensorDataset:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images[:count] / 16, dtype=dtype), torch.tensor(labels[:count])
    )


def network(width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).to(dtype)


def trainer_of(student: nn.Module, teacher, **options) -> fastkd.Trainer:
    options = {"loss": fastkd.KDLoss(**TRAINER_LOSS), "progress": False, **options}
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    return fastkd.Trainer(student, teacher, optimizer, **options)


def train_by_hand(student: nn.Module, teacher, steps, **options) -> nn.Module:
    """Train a copy of the student in a hand-written loop; return the copy."""
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    for inputs, labels in steps:
        with torch.no_grad():
            answer = teacher(inputs)
        loss = fastkd.loss(student(inputs), answer, labels, **{**TRAINER_LOSS, **options})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def assert_same_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


def batches_of(data: TensorDataset, size: int = 16):
    return list(DataLoader(data, size))


class WithPixels(nn.Module):
    """Map the keyword argument ``pixels`` to a dict with logits, as transformers' models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, pixels):
        return {"logits": self.model(pixels)}


def digit_loader() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits(1797, torch.float32).tensors
    return list(zip(images.split(100), labels.split(100), strict=True))


def digits_model(width: int, seed: int = 0, epochs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer, loader = torch.optim.Adam(made.parameters(), 3e-3), digit_loader()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(made(images), labels).backward()
            optimizer.step()
    return made


class CountingTeacher(nn.Module):
    """Count the samples that the teacher gets; raise an error after ``fail_after`` samples."""

    def __init__(self, classes: int = 10, fail_after: float = float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
        for parameter in self.layers[2].parameters():
            parameter.data *= 8  # makes the outputs confident, like a trained teacher's
        self.samples, self.fail_after = 0, fail_after

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.samples >= self.fail_after:
            raise InterruptedError
        self.samples += len(images)
        return self.layers(images)


def numbered_digits() -> Any:
    from fastkd.teachers import WithIds

    return WithIds(digits(200, torch.float32))


def write_cache(teacher, path, *, loader=None, **options) -> Any:
    from fastkd.teachers import precompute

    loader = loader or DataLoader(numbered_digits(), batch_size=32)
    return precompute(teacher, loader, path, progress=False, **options)


def lookup_tensors(cache: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cached = cache.lookup(ids)
    return (cached,) if cache.top_k is None else cached[:2]


USER_MODULE = """
import os
from os import system
import fastkd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

teacher_samples = 0
number = 3

def data(first=0, last=200):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    return TensorDataset(images[first:last], torch.tensor(labels)[first:last])

def held_out(first=200):
    return data(first, first + 100)

def unlabelled():
    return TensorDataset(data().tensors[0])

def batches():
    return DataLoader(data(), 50)

class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*data().tensors))

class Augmented(Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        image, label = data()[index]
        return image + torch.rand(64), label

class CountingLinear(nn.Linear):
    def forward(self, images):
        global teacher_samples
        teacher_samples += len(images)
        return super().forward(images)

def teacher():
    torch.manual_seed(5)
    made = CountingLinear(64, 10)
    images, labels = data(0, 1700).tensors
    optimizer = torch.optim.Adam(made.parameters(), 0.05)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(images), labels).backward()
        optimizer.step()
    return made

def student(width=8):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

def broken():
    raise ZeroDivisionError

def misled():
    fastkd.KDLoss(temperature=0.0)

def misshapen():
    return nn.Linear(3, 10)

def nothing():
    return None
"""
COMMAND_CONFIG = """
teacher: {module}:teacher
student: {module}:student
train: {module}:data
validation: {module}:held_out
output: {output}
epochs: 3
batch_size: 50
loss: {{temperature: 4, alpha: 0.1}}
optimizer: {{name: Adam, lr: 1e-2}}
"""


def run_command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["fastkd", *map(str, arguments)])
    command_line.main()


def run_refused_command(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def module_of(config_path: pathlib.Path):
    return sys.modules[next(config_path.parent.glob("parts_*.py")).stem]


def load_student(config_path: pathlib.Path, output: str = "out") -> nn.Module:
    from safetensors.torch import load_model

    student = module_of(config_path).student()
    load_model(student, str(config_path.parent / output / "student.safetensors"))
    return student
