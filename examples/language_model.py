"""A character-level language model, distilled on the text that ships with Python.

    python examples/language_model.py [--seeds N] [--steps N] [--write docs/training.md]

A teacher learns from the whole training text. Then the same small student is trained three times on
a twentieth of it: alone, from the characters; distilled from the characters and the live teacher;
and distilled from a cache of the teacher's 8 most probable characters at each place. Both losses
take the student's hidden states and its head (fastkd.Head), and never hold a batch's logits. First
weights, batches, steps and optimizer are equal. The loss on held-out text is compared.
"""

import argparse
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd

LENGTH, BATCH, TOP_K, TEMPERATURE = 64, 16, 8, 1.0
STUDENT_SHARE = 0.05  # of the training text


class Text(NamedTuple):
    """Characters as numbers; the held-out end of it is cut off before all else."""

    training: Tensor
    few: Tensor
    held_out: Tensor
    characters: int


def load() -> Text:
    """Python's own help on its topics."""
    text = "\n".join(topics.values())
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    training, held_out = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    return Text(training, training[: int(STUDENT_SHARE * len(training))], held_out, len(number))


class LanguageModel(nn.Module):
    """Causal convolutions: a position sees itself and some 30 characters before it."""

    def __init__(self, characters: int, width: int) -> None:
        """The head is a layer of its own, since the loss takes its weight and bias."""
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, dilation=dilation) for dilation in (1, 2, 4, 8)
        )
        self.head = nn.Linear(width, characters)

    def hidden(self, tokens: Tensor) -> Tensor:
        """``(B, L)`` to ``(B, L, width)``."""
        x = self.embed(tokens).movedim(-1, 1)
        for layer in self.layers:
            x = x + F.gelu(layer(F.pad(x, (2 * layer.dilation[0], 0))))
        return x.movedim(1, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, L)`` to logits ``(B, L, characters)``."""
        return self.head(self.hidden(tokens))


Loss = Callable[[LanguageModel, Tensor, Tensor], Tensor]
"""Of a model, the numbers of some windows, ``(B,)``, and the windows, ``(B, LENGTH + 1)``."""


def windows_of(text: Tensor) -> Tensor:
    """All windows of a text, one after the other, each with the character that comes next."""
    return text[: (len(text) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)


def alone(model: LanguageModel, ids: Tensor, windows: Tensor) -> Tensor:
    """The next characters' cross entropy."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def head_of(model: LanguageModel, windows: Tensor) -> fastkd.Head:
    """The logits of all characters but the last, not computed yet."""
    return fastkd.Head(model.hidden(windows[:, :-1]), model.head.weight, model.head.bias)


def distilled(teach: Callable[[Tensor, Tensor], fastkd.Head | fastkd.TopK]) -> Loss:
    """The next characters' cross entropy, and the divergence from the teacher."""

    def loss(model: LanguageModel, ids: Tensor, windows: Tensor) -> Tensor:
        student, teacher = head_of(model, windows), teach(ids, windows)
        return fastkd.loss(student, teacher, windows[:, 1:], temperature=TEMPERATURE, alpha=0.1)

    return loss


def live(teacher: LanguageModel) -> Loss:
    """From the teacher's hidden states and its head."""

    @torch.no_grad()
    def teach(ids: Tensor, windows: Tensor) -> fastkd.Head:
        return head_of(teacher, windows)

    return distilled(teach)


def cached(cache: fastkd.teachers.TeacherCache) -> Loss:
    """From a file: the teacher is not needed any more."""
    return distilled(lambda ids, windows: cache.lookup(ids))


def train(model: LanguageModel, text: Tensor, loss_of: Loss, steps: int, seed: int) -> None:
    """On random windows of a text, by Adam with a rate that goes down to zero."""
    draw = torch.Generator().manual_seed(seed)
    windows = windows_of(text)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ids = torch.randint(len(windows), (BATCH,), generator=draw)
        optimizer.zero_grad()
        loss_of(model, ids, windows[ids]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def held_out_loss(model: LanguageModel, text: Tensor) -> float:
    """Nats for each character."""
    windows = windows_of(text)
    return alone(model, torch.arange(len(windows)), windows).item()


def experiment(seeds: int, steps: int, folder: str) -> str:
    """Trains all of them, with a cache in a folder; the results as a Markdown table."""
    text = load()
    torch.manual_seed(0)
    teacher = LanguageModel(text.characters, 96)
    train(teacher, text.training, alone, steps, seed=0)
    teacher.eval()
    numbered = fastkd.teachers.WithIds(TensorDataset(windows_of(text.few)[:, :-1]))
    cache = fastkd.teachers.precompute(
        teacher,
        DataLoader(numbered, 64),
        folder,
        top_k=TOP_K,
        temperature=TEMPERATURE,
        progress=False,
    )
    ways = {
        "student alone": alone,
        "student distilled, live teacher": live(teacher),
        f"student distilled, cache of the top {TOP_K}": cached(cache),
    }
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(seeds):
        for name, loss_of in ways.items():
            torch.manual_seed(seed)
            student = LanguageModel(text.characters, 32)
            train(student, text.few, loss_of, steps, seed)
            losses[name].append(held_out_loss(student, text.held_out))
    size = {"teacher": teacher, **dict.fromkeys(losses, student)}
    found = {"teacher": [held_out_loss(teacher, text.held_out)], **losses}
    lines = ["| | parameters | held-out loss, nats a character | each seed |", "|-|-:|-:|-|"]
    for name, values in found.items():
        parameters = sum(parameter.numel() for parameter in size[name].parameters())
        each = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {parameters:,} | {statistics.mean(values):.3f} | {each} |")
    wins = [
        sum(d < a for a, d in zip(losses["student alone"], values, strict=True))
        for values in list(losses.values())[1:]
    ]
    lines += [
        "",
        f"After {steps} steps each, distilled beats alone in {wins[0]} of {seeds} seeds from "
        f"the live teacher, and in {wins[1]} from the cache.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints the results, and writes them into a document if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind")
    parser.add_argument("--steps", type=int, default=200, help="of every model")
    parser.add_argument("--write", type=pathlib.Path, help="a file, between its markers")
    options = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain little from a second one
    with tempfile.TemporaryDirectory() as folder:
        table = experiment(options.seeds, options.steps, folder)
    print(table)
    if options.write:
        begin, end = (f"<!-- language_model:{edge} -->" for edge in ("begin", "end"))
        before, found, rest = options.write.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            parser.error(f"{options.write} must have the markers {begin} and {end}")
        options.write.write_text(f"{before}{begin}\n{table}\n{end}{after}")


if __name__ == "__main__":
    main()
