"""Fuzz the reader of teacher caches, which must read a file or raise ValueError.

``python -m reliability.caches [SECONDS [SEED]]`` starts atheris, a libFuzzer for Python that
follows the reader's branches. Half of the mutations change an entry of the header, and correct the
header's length and usually the checksums. Without these corrections the reader would refuse nearly
every file early. If the reader accepts a file, it must refuse the file with a flipped bit, or read
equal contents. The reader must also refuse pipes, sockets, devices and folders. libFuzzer writes a
failing file to ``build/caches``. After a fix, add a test of the failing file to
``tests/test_teachers_refusals.py``.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "build" / "caches"
NUMBERS = (0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, 1e308, 0.5)
TEXTS = ("", "nan", "inf", "-1", "1e999", "[]", "[-1]", "[0]", "[3]", "9" * 25, "\0", "é", "None")


def split(data: bytes) -> tuple[Any, bytes]:
    """Split a safetensors file into header and body; raise ValueError if there is no header."""
    if len(data) < 8:
        raise ValueError("too short")
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + min(size, 2**20)]), data[8 + size :]


def join(header: Any, body: bytes) -> bytes:
    """Return the bytes of a safetensors file with this header and body."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def list_entries(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every entry inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    pairs = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            pairs += list_entries(value[key])
    return pairs


def edit_header(data: bytes, seed: int) -> bytes:
    """Change or delete one entry of the header, and sometimes change bytes of the body."""
    header, body = split(data)
    draw = random.Random(seed)
    container, key = draw.choice(list_entries(header))
    kind = draw.randrange(4)
    if kind == 0:
        container[key] = draw.choice(NUMBERS)
    elif kind == 1:
        container[key] = draw.choice(TEXTS)
    elif kind == 2:
        del container[key]
    else:
        other, other_key = draw.choice(list_entries(header))
        container[key] = json.loads(json.dumps(other[other_key]))
    if draw.randrange(4) == 0:  # lengths, ids and class lists are in the body
        changed = bytearray(body)
        for _ in range(draw.randrange(1, 5) if body else 0):
            changed[draw.randrange(len(changed))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        body = bytes(changed)
    return join(*recompute_checksums(header, body)) if draw.randrange(4) else join(header, body)


def recompute_checksums(header: Any, body: bytes) -> tuple[Any, bytes]:
    """Recompute a file's checksums, as an attacker would; raise if the file lacks checksums."""

    def part(name: str) -> bytes:
        start, stop = header[name]["data_offsets"]
        return body[start:stop]

    texts = header["__metadata__"]
    rows, count = header["log_probs"]["shape"][0], len(part("lengths")) // 8
    rows_of = [part(name) for name in ("log_probs", "indices") if name in header]
    sums, start = [], 0
    for length in struct.unpack(f"<{count}q", part("lengths")):
        crc = 0
        for data in rows_of:
            size = len(data) // rows
            crc = zlib.crc32(data[start * size : (start + length) * size], crc)
        sums.append(crc)
        start += length
    start, stop = header["checksums"]["data_offsets"]
    body = body[:start] + struct.pack(f"<{len(sums)}q", *sums) + body[stop:]
    dtypes = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    dtype = f"torch.{dtypes[header['log_probs']['dtype']]}"
    named = sorted((key, text) for key, text in texts.items() if key != "crc32")
    crc = zlib.crc32(json.dumps([named, dtype]).encode())
    for name in ("ids", "lengths", "inputs", "checksums"):
        crc = zlib.crc32(part(name), crc)
    texts["crc32"] = f"{crc:08x}"
    return header, body


def write_corpus(folder: Path) -> None:
    """Write valid shards: dense, top-k, and sequences."""
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
        shutil.rmtree(FOLDER / name, ignore_errors=True)  # an earlier run's files
        loader = DataLoader(WithIds(TensorDataset(inputs)), 2)
        precompute(teacher, loader, FOLDER / name, progress=False, **options)
        (shard,) = (FOLDER / name).glob("*.safetensors")
        (folder / name).write_bytes(shard.read_bytes())


OPEN = "import sys; from fastkd.teachers import TeacherCache; TeacherCache(sys.argv[1])"


def check_other_files() -> None:
    """Check that opening a pipe, a socket, a device or a folder as a shard raises ValueError."""
    folder = FOLDER / "others"
    file = folder / "shard-00000.safetensors"

    def bind() -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(file))  # socket paths are limited to about 100 bytes

    for make in (lambda: os.mkfifo(file), bind, lambda: file.symlink_to("/dev/zero"), file.mkdir):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make()
        command = [sys.executable, "-c", OPEN, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "ValueError: " not in done.stderr:
            raise AssertionError(f"{file.stat()} is not refused: {done.stderr}")
    shutil.rmtree(folder)


def fuzz(arguments: list[str]) -> None:
    """Run libFuzzer's loop, which ends the process."""
    import atheris

    from fastkd.teachers import TeacherCache, cache, shard

    # atheris's import hook misses editable packages, so functions are instrumented one by one.
    for owner in (shard, cache, TeacherCache):
        for name, member in list(vars(owner).items()):
            if inspect.isfunction(member):
                setattr(owner, name, atheris.instrument_func(member))

    place = FOLDER / f"open-{os.getpid()}"
    place.mkdir(exist_ok=True)

    def read_contents(data: bytes) -> list[bytes] | None:
        """Return the header, ids and first rows of a file; None if the reader refuses the file."""
        (place / "shard-00000.safetensors").write_bytes(data)
        try:
            opened = TeacherCache(place)
            rows = opened.lookup(opened.ids[:8])
        except ValueError:
            return None
        tensors = [opened.ids, *([rows] if opened.top_k is None else rows)]
        texts = repr((opened.header, opened.kl, opened.tail)).encode()
        return [texts, *(shard.view_bytes(tensor).tobytes() for tensor in tensors)]

    def read(data: bytes) -> None:
        original = read_contents(data)
        if original is None:
            return
        draw = random.Random(zlib.crc32(data))
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if read_contents(bytes(flipped)) not in (None, original):
            raise AssertionError("a flipped bit changes what is read, and no error says so")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            try:
                return edit_header(data, seed)[:most]
            except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
                pass  # no header to edit, or no checksums to recompute
            except (struct.error, AttributeError):
                pass  # entries of a wrong type or size
        return bytes(atheris.Mutate(data, most))

    atheris.Setup([sys.argv[0], *arguments], read, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Write the corpus, check files that are not regular, and run libFuzzer in a child process."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    corpus = FOLDER / "corpus"
    write_corpus(corpus)
    check_other_files()
    options = [f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4000", "-rss_limit_mb=4096"]
    options += ["-print_final_stats=1", f"-artifact_prefix={FOLDER}/", str(corpus)]
    program = "import sys; from reliability import caches; caches.fuzz(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", program, *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
