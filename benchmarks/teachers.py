"""Measure the size, speed and accuracy of teacher caches, for the tables of docs/teachers.md.

``python -m benchmarks.teachers`` writes the tables. Accuracy is the KL from the teacher's
probabilities to the cached probabilities. Another table has the speed of digests.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import pydoc_data.topics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markdown import Markdown
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import environment
from fastkd import teachers

DOCUMENT = Path(__file__).parents[1] / "docs" / "teachers.md"
BATCH = 64
SECONDS = 1.0  # duration of reading for each case


class Case(NamedTuple):
    """Describe a teacher cache: the samples, the stored classes and the dtype."""

    name: str
    samples: int
    positions: tuple[int, ...]
    classes: int
    top_k: int | None
    dtype: torch.dtype


CASES = (
    Case("CIFAR-100", 50_000, (), 100, None, torch.float16),
    Case("ImageNet-1k", 20_000, (), 1000, None, torch.float16),
    Case("ImageNet-1k", 20_000, (), 1000, None, torch.float32),
    Case("ImageNet-1k", 20_000, (), 1000, 16, torch.float16),
    Case("Llama-3, 256 tokens", 24, (256,), 128_256, 64, torch.float16),
)


class ConstantTeacher(nn.Module):
    """Return random logits, equal for every batch, so that the teacher takes no time."""

    def __init__(self, case: Case) -> None:
        """Draw the logits."""
        super().__init__()
        rows = 2 if case.positions else BATCH
        torch.manual_seed(0)
        self.logits = nn.Buffer(4 * torch.randn(rows, *case.positions, case.classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of as many rows as the batch has."""
        return self.logits[: len(inputs)]


def measure_case(case: Case) -> list[str]:
    """Measure a cache, and return its row of the table of sizes and speeds."""
    with tempfile.TemporaryDirectory() as folder:
        data = teachers.WithIds(TensorDataset(torch.zeros(case.samples, 1)))
        loader = DataLoader(data, 2 if case.positions else BATCH)
        start = time.perf_counter()
        cache = teachers.precompute(
            ConstantTeacher(case),
            loader,
            folder,
            top_k=case.top_k,
            dtype=case.dtype,
            progress=False,
        )
        written = case.samples / (time.perf_counter() - start)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / case.samples
        first = _measure_reads(cache, case.samples, 0.0)
        read = _measure_reads(cache, case.samples, SECONDS)
    stored = "all" if case.top_k is None else f"top {case.top_k}"
    dtype = str(case.dtype).removeprefix("torch.")
    return [
        f"{case.name} ({case.classes:,} classes)",
        f"{stored}, {dtype}",
        f"{size:,.0f}",
        f"{written:,.0f}",
        f"{first:,.0f}",
        f"{read:,.0f}",
        f"{read * size / 1e6:,.0f} MB/s",
    ]


def _measure_reads(cache: teachers.TeacherCache, samples: int, seconds: float) -> float:
    """Return the samples per second that one process reads in random order."""
    generator = torch.Generator().manual_seed(0)
    size = min(BATCH, samples)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        for ids in torch.randperm(samples, generator=generator).split(size):
            cache.lookup(ids)
            count += len(ids)
    return count / (time.perf_counter() - start)


DIGESTS: dict[str, Callable[[bytes], object]] = {
    "CRC-32 (zlib)": zlib.crc32,
    "SHA-256 (hashlib)": lambda data: hashlib.sha256(data).digest(),
    "BLAKE2b (hashlib)": lambda data: hashlib.blake2b(data).digest(),
}


def measure_digests() -> Iterator[list[str]]:
    """Yield rows of the table of digests, with the best speed of 200 runs on 64 KiB."""
    data = os.urandom(2**16)
    for name, compute in DIGESTS.items():
        best = float("inf")
        for _ in range(200):
            start = time.perf_counter()
            compute(data)
            best = min(best, time.perf_counter() - start)
        yield [name, f"{len(data) // 1024} KiB", f"{len(data) / best / 1e6:,.0f} MB/s"]


def make_digits() -> tuple[str, nn.Module, Tensor]:
    """Train a classifier of 1,797 images of digits; return name, classifier and images."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images), labels).backward()
        optimizer.step()
    return "digits, 10 classes", teacher, images


def make_characters() -> tuple[str, nn.Module, Tensor]:
    """Make a model that predicts a character from two characters; return name, model, inputs."""
    text = "\n".join(pydoc_data.topics.topics.values())
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(sign) for sign in text])
    size = len(alphabet)
    pairs = codes[:-2] * size + codes[1:-1]
    counts = torch.full((size * size, size), 0.01)
    counts.index_put_((pairs, codes[2:]), torch.ones(len(pairs)), accumulate=True)
    teacher = nn.Embedding.from_pretrained(counts.log())
    sequences = pairs[: len(pairs) // 128 * 128].view(-1, 128)
    return f"characters, {size} classes", teacher, sequences[:400]


def measure_losses() -> Iterator[list[str]]:
    """Yield rows of the table of KLs from the teacher's to the cached probabilities."""
    for name, teacher, inputs in (make_digits(), make_characters()):
        loader = DataLoader(teachers.WithIds(TensorDataset(inputs)), BATCH)
        for top_k in (None, 1, 2, 4, 8):
            cells = [name, "all" if top_k is None else f"top {top_k}"]
            for temperature in (1.0, 4.0):
                with tempfile.TemporaryDirectory() as folder:
                    cache = teachers.precompute(
                        *(teacher, loader, folder),
                        top_k=top_k,
                        temperature=temperature,
                        progress=False,
                    )
                cells += [f"{cache.kl:.2g}", f"{100 * cache.tail:.2g} %"]
            yield cells


def make_table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(heading) + " |", "|---|---|" + "---:|" * (len(heading) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    """Measure the caches, and write the tables of docs/teachers.md."""
    speeds = make_table(
        [
            *("cache", "classes stored", "bytes a sample", "written, samples/s"),
            *("read first, samples/s", "read again, samples/s", "read again"),
        ],
        [measure_case(case) for case in CASES],
    )
    lost = make_table(
        ["teacher", "classes stored", "KL lost, T = 1", "tail", "KL lost, T = 4", "tail"],
        list(measure_losses()),
    )
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    facts = environment.describe("cpu")
    where = f"{facts['device']}, torch {torch.__version__}, {date}."
    digests = make_table(["digest", "of", "speed"], list(measure_digests()))
    blocks = {"speeds": f"{speeds}\n\n{where}", "losses": lost, "digests": f"{digests}\n\n{where}"}
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    DOCUMENT.write_text(text, encoding="utf-8")
    Console().print(Markdown("\n\n".join(blocks.values())))


if __name__ == "__main__":
    main()
