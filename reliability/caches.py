"""libFuzzer on the reader of teachers' caches: what a file holds gives an answer or a ValueError.

``python -m reliability.caches [SECONDS [SEED]]``. atheris follows the reader's branches. Half of
the mutations are of a header's entries, which the format's length and offsets then fit again: of
bytes changed at random hardly one in a thousand gets past the JSON. A finding is left in
``build/caches`` by libFuzzer, and ``tests/test_teachers.py`` is where it belongs once it is fixed.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "build" / "caches"
NUMBERS = (0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 1e308, 0.5)
TEXTS = ("", "nan", "inf", "-1", "1e999", "[]", "[-1]", "[0]", "[3]", "9" * 25, "\0", "é", "None")


def split(data: bytes) -> tuple[Any, bytes]:
    """A file's header and its body; raises ValueError where there is no header."""
    if len(data) < 8:
        raise ValueError("too short")
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + min(size, 2**20)]), data[8 + size :]


def join(header: Any, body: bytes) -> bytes:
    """The file of both."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def edited(data: bytes, seed: int) -> bytes:
    """One entry of the header is another number or text, is gone, or is a neighbour's."""
    header, body = split(data)
    draw = random.Random(seed)
    container, key = draw.choice(places(header))
    kind = draw.randrange(4)
    if kind == 0:
        container[key] = draw.choice(NUMBERS)
    elif kind == 1:
        container[key] = draw.choice(TEXTS)
    elif kind == 2:
        del container[key]
    else:
        other, its = draw.choice(places(header))
        container[key] = json.loads(json.dumps(other[its]))
    if draw.randrange(4) == 0:  # lengths, ids and lists of classes are in the body
        bytes_ = bytearray(body)
        for _ in range(draw.randrange(1, 5) if body else 0):
            bytes_[draw.randrange(len(bytes_))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        body = bytes(bytes_)
    return join(header, body)


def write_corpus(folder: Path) -> None:
    """Whole shards: dense, top-k, and sequences."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from fastkd.teachers import WithIds, precompute

    folder.mkdir(parents=True, exist_ok=True)
    images, tokens = torch.randn(5, 4), torch.randint(9, (4, 6))
    kinds: dict[str, tuple[nn.Module, torch.Tensor, dict[str, Any]]] = {
        "dense": (nn.Linear(4, 7), images, {}),
        "topk": (nn.Linear(4, 7), images, {"top_k": 3}),
        "sequences": (nn.Embedding(9, 7), tokens, {"top_k": 2}),
    }
    for name, (teacher, inputs, options) in kinds.items():
        loader = DataLoader(WithIds(TensorDataset(inputs)), 2)
        precompute(teacher, loader, FOLDER / name, progress=False, **options)
        (shard,) = (FOLDER / name).glob("*.safetensors")
        (folder / name).write_bytes(shard.read_bytes())


def fuzz(arguments: list[str]) -> None:
    """libFuzzer's loop; it ends the process."""
    import atheris

    from fastkd.teachers import TeacherCache, cache, shard

    # One by one: where a package is installed editable, atheris's hook of imports changes nothing.
    for owner in (shard, cache, TeacherCache):
        for name, member in list(vars(owner).items()):
            if inspect.isfunction(member):
                setattr(owner, name, atheris.instrument_func(member))

    place = FOLDER / f"open-{os.getpid()}"
    place.mkdir(exist_ok=True)

    def read(data: bytes) -> None:
        (place / "shard-00000.safetensors").write_bytes(data)
        try:
            opened = TeacherCache(place)
            opened.lookup(opened.ids[:8])
        except ValueError:
            return

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            try:
                return edited(data, seed)[:most]
            except (ValueError, TypeError, IndexError, RecursionError):
                pass  # there is no header to edit
        return bytes(atheris.Mutate(data, most))

    atheris.Setup([sys.argv[0], *arguments], read, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Runs libFuzzer in a process of its own, whose last words are the figures."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    corpus = FOLDER / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    options = [f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4000", "-rss_limit_mb=4096"]
    options += ["-print_final_stats=1", f"-artifact_prefix={FOLDER}/", str(corpus)]
    program = "import sys; from reliability import caches; caches.fuzz(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", program, *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
