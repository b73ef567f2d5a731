"""Test that the teacher cache refuses wrong teachers, wrong data, and damaged files."""

import itertools
import json
import os
import pathlib
import pickle
import random
import socket
import struct
import subprocess
import sys

import pytest
import torch
from stacks import CountingTeacher, digits, lookup_tensors, numbered_digits, write_cache
from torch import nn
from torch.utils.data import DataLoader, Subset

import fastkd
from fastkd.teachers import TeacherCache, precompute, shard

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

IMAGES, LABELS = digits(200, torch.float32).tensors
DATA = numbered_digits()


# ---- wrong teachers, wrong data, invalid arguments


def test_another_teacher_is_refused(cache):
    cache.check(teacher=CountingTeacher())
    changed = CountingTeacher()
    changed.layers[0].bias.data[0] += 1e-6
    with pytest.raises(ValueError, match=r"^teacher: .* other weights"):
        cache.check(teacher=changed)


def test_wrappers_do_not_change_the_fingerprint(cache):
    assert fastkd.teachers.fingerprint(nn.DataParallel(CountingTeacher())) == cache.teacher
    assert (
        fastkd.teachers.fingerprint(torch.compile(CountingTeacher(), backend="eager"))
        == cache.teacher
    )
    assert fastkd.teachers.fingerprint(CountingTeacher().half()) != cache.teacher


class Packed(nn.Module):
    """Hold a tuple of weights in the module's state, like quantized layers."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "packed"] = (self.weight, None)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("of_channels", [False, True])
def test_a_fingerprint_depends_on_quantized_weights(of_channels):
    def packed(value, scale):
        weight = torch.full((3, 2), value)
        if not of_channels:
            return Packed(torch.quantize_per_tensor(weight, scale, 0, torch.qint8))
        scales = torch.full((3,), scale)
        return Packed(torch.quantize_per_channel(weight, scales, torch.zeros(3), 0, torch.qint8))

    prints = [
        fastkd.teachers.fingerprint(packed(value, scale))
        for value, scale in ((1.0, 0.1), (1.0, 0.1), (1.0, 0.2), (2.0, 0.2))
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_another_number_of_classes_is_refused(cache):
    with pytest.raises(ValueError, match=r"^classes: .* a teacher of 10 classes; got 11"):
        cache.check(classes=11)


def test_another_temperature_is_refused_by_a_top_k_cache(cache, tmp_path):
    cache.check(temperature=2.0)
    with pytest.raises(ValueError, match=r"^temperature: .* at temperature 2, which cannot"):
        cache.check(temperature=4.0)
    write_cache(CountingTeacher(), tmp_path).check(temperature=4.0)


def test_missing_samples_are_named(cache):
    with pytest.raises(ValueError, match=r"^ids: .* lacks 2 of the 3 .* 200; it holds 200"):
        cache.lookup(torch.tensor([0, 200, -1]))
    with pytest.raises(ValueError, match="lacks 1 of the 1"):
        cache.check(ids=torch.tensor([2**62]))


@pytest.mark.parametrize("ids", [[0], torch.tensor([1.5]), torch.tensor([True]), torch.tensor(1)])
def test_invalid_ids_are_refused(cache, ids):
    for ask in (cache.lookup, cache.contains, lambda ids: cache.check(ids=ids)):
        with pytest.raises(TypeError, match=r"^ids must be an integer tensor of shape \(B,\); got"):
            ask(ids)


def test_an_invalid_shape_is_refused(cache):
    with pytest.raises(TypeError, match=r"^shape must be a tuple, .* or None; got 3"):
        cache.lookup(torch.tensor([0]), 3)


def test_other_data_are_refused(cache):
    loader = iter(DataLoader(DATA, 16))
    cache.check(batch=next(loader))
    swapped = next(loader)
    with pytest.raises(ValueError, match=r"inputs of 16 of 16 samples .*such as id 31"):
        cache.check(batch=swapped._replace(ids=swapped.ids.flip(0)))
    with pytest.raises(ValueError, match="carry no ids"):
        cache.check(batch=swapped[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3}, "^top_k: .* with top_k 4"),
        ({"dtype": torch.float32}, "^dtype: "),
        ({"temperature": 1.0}, "^temperature: "),
    ],
)
def test_a_cache_with_other_options_is_not_extended(cache, options, message):
    before = sorted(cache.path.iterdir())
    with pytest.raises(ValueError, match=message):
        write_cache(CountingTeacher(), cache.path, **{"top_k": 4, **options})
    with pytest.raises(ValueError, match=r"^teacher: "):
        write_cache(CountingTeacher(classes=11), cache.path, top_k=4)
    assert sorted(cache.path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be an int of at least 1; got 0"),
        ({"top_k": True}, "top_k must be"),
        ({"top_k": 11}, "at most the number of classes, 10; got 11"),
        ({"dtype": torch.int8}, "dtype must be float16, bfloat16 or float32; got torch.int8"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"shard_bytes": 0}, "shard_bytes must be"),
        ({"ignore_index": 2**70}, "ignore_index must be an int of 64 bits"),
        ({"loader": [(IMAGES, LABELS)]}, "carry no sample ids"),
        ({"loader": [(IMAGES, LABELS, LABELS[:3])]}, r"B = 3, one for each"),
        ({"loader": [(IMAGES, LABELS, IMAGES)]}, "ids must be an integer tensor of shape"),
        ({"loader": [(IMAGES * torch.nan, LABELS, LABELS)]}, "NaN or"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        write_cache(CountingTeacher(), tmp_path / "new", **options)
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize("teacher", [lambda images: images, [CountingTeacher(), CountingTeacher()]])
def test_a_teacher_must_be_a_module(tmp_path, cache, teacher):
    kind = type(teacher).__name__
    with pytest.raises(TypeError, match=rf"^teacher must be one torch\.nn\.Module; got {kind}"):
        write_cache(teacher, tmp_path / "new")
    with pytest.raises(TypeError, match=r"^teacher must be"):
        cache.check(teacher=teacher)


def test_an_empty_loader_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="loader gave no batch"):
        precompute(CountingTeacher(), [], tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no teacher's cache"):
        TeacherCache(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for use in (lambda path: write_cache(CountingTeacher(), path), TeacherCache):
            with pytest.raises(ValueError, match=r"^path must be a folder; got .*file is a file"):
                use(path)
    with pytest.raises(TypeError, match="path must be a folder's path; got int"):
        TeacherCache(3)


def test_the_teacher_stays_unchanged(tmp_path):
    teacher = CountingTeacher().train()
    teacher.layers[1].eval()
    write_cache(teacher, tmp_path)
    assert teacher.training and not teacher.layers[1].training
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- forged and damaged files


def split_parts(data: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_parts(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture
def forged(cache, tmp_path):
    """Return a shard's bytes, and a function that writes forged bytes as a cache of one shard."""
    data = (cache.path / "shard-00000.safetensors").read_bytes()

    def forge(new: bytes) -> pathlib.Path:
        (tmp_path / "shard-00000.safetensors").write_bytes(new)
        return tmp_path

    return data, forge


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "pickle", "does not say format"),
        ("version", "1", "version 1 of the format"),
        ("version", "9" * 5000, "its version is"),
        ("classes", "0", "its classes is"),
        ("classes", "-3", "its classes is"),
        ("classes", "9" * 30, "its classes is"),
        ("classes", "3", "its top_k is"),
        ("top_k", "5", "(log_probs|indices) is"),
        ("top_k", "", "it holds the tensors"),
        ("temperature", "nan", "its temperature is"),
        ("temperature", "0", "its temperature is 0"),
        ("positions", "[" * 190, "Expecting value|positions"),
        ("positions", "[9, -1]", "its positions are"),
        ("positions", "{}", "its positions are"),
        ("positions", "[3, 4]", "not that of its positions"),
        ("positions", json.dumps([2**31 - 1] * 4), "not that of its positions"),
        ("kl", "", "its kl is|could not convert"),
    ],
)
def test_forged_metadata_is_refused(forged, key, value, message):
    data, forge = forged
    header, body = split_parts(data)
    header["__metadata__"][key] = value
    with pytest.raises(
        ValueError, match=f"not a complete shard of a teacher's cache: .*({message})"
    ):
        TeacherCache(forge(join_parts(header, body)))


@pytest.mark.parametrize(
    "change",
    [
        lambda header, body: join_parts(b"\xff" * 40, body),
        lambda header, body: struct.pack("<Q", 2**63) + body,
        lambda header, body: struct.pack("<Q", 10**8 - 1) + body,
        lambda header, body: b"",
        lambda header, body: join_parts(b"[" * 100_000, body),
        lambda header, body: join_parts(
            {**header, "ids": {**header["ids"], "shape": [2**60]}}, body
        ),
        lambda header, body: join_parts({**header, "ids": {**header["ids"], "shape": [-1]}}, body),
        lambda header, body: join_parts({**header, "ids": {**header["ids"], "dtype": "F64"}}, body),
        lambda header, body: join_parts(
            {**header, "log_probs": {**header["log_probs"], "data_offsets": [0, 2**62]}}, body
        ),
        lambda header, body: join_parts({k: v for k, v in header.items() if k != "ids"}, body),
        lambda header, body: join_parts({"__metadata__": header["__metadata__"]}, b""),
        lambda header, body: join_parts(header, body[:-1]),
        lambda header, body: join_parts(header, body + b"\0"),
        lambda header, body: pickle.dumps({"ids": [1]}),
    ],
)
def test_forged_files_are_refused(forged, change):
    data, forge = forged
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is not a complete shard"):
        TeacherCache(forge(change(*split_parts(data))))


READ = "import sys; from fastkd.teachers import TeacherCache; TeacherCache(sys.argv[1])"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize(
    "kind",
    ["pipe", *(pytest.param(k, marks=pytest.mark.slow) for k in ("socket", "device", "folder"))],
)
def test_only_regular_files_are_opened(tmp_path, kind):
    # Opening a named pipe or a device could block until the timeout.
    file = tmp_path / "shard-00000.safetensors"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(file))
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    command = [sys.executable, "-c", READ, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "ValueError" in done.stderr and "it is not a regular file" in done.stderr


def test_forged_lengths_are_refused(forged):
    data, forge = forged
    header, body = split_parts(data)
    start, stop = header["lengths"]["data_offsets"]
    count = (stop - start) // 8
    for lengths in ([count + 1, -1] + [1] * (count - 2), [2**62] * count, [0] * count):
        new = body[:start] + struct.pack(f"<{count}q", *lengths) + body[stop:]
        with pytest.raises(ValueError, match="lengths do not add up"):
            TeacherCache(forge(join_parts(header, new)))


def test_a_forged_class_is_refused(cache, tmp_path):
    # The forged shard has a valid checksum.
    content, _ = shard.read(cache.path / "shard-00000.safetensors")
    content.indices[0, 0] = 10
    shard.write(tmp_path, content)
    with pytest.raises(ValueError, match="names a class beyond its 10"):
        TeacherCache(tmp_path).lookup(content.ids)


def contents(path: pathlib.Path) -> list[torch.Tensor]:
    """Return ids, lengths, input digests, (classes, temperature, kl, tail) and teacher outputs."""
    read = TeacherCache(path)
    numbers = torch.tensor([read.classes, read.temperature, read.kl, read.tail])
    return [read.ids, read._lengths, read._inputs, numbers, *lookup_tensors(read, read.ids)]


def test_damaged_and_truncated_files_are_refused(forged):
    data, forge = forged
    original = contents(forge(data))
    header_size = struct.unpack("<Q", data[:8])[0] + 8
    rng, refused = random.Random(0), 0
    for turn in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(header_size if turn % 2 else len(data))] = rng.randrange(256)
        new = bytes(damaged[: rng.randrange(len(data))] if turn % 5 == 0 else damaged)
        try:
            read = contents(forge(new))
        except ValueError:
            refused += 1
        else:
            assert all(map(torch.equal, read, original))
    assert refused > 390


@pytest.mark.parametrize("top_k", [None, 2])
def test_flipped_bits_are_detected(tmp_path, top_k):
    three_samples = Subset(DATA, range(3))
    write_cache(CountingTeacher(5), tmp_path, loader=DataLoader(three_samples, 3), top_k=top_k)
    (file,) = tmp_path.iterdir()
    data, original = file.read_bytes(), contents(tmp_path)
    accepted = 0
    for place, bit in itertools.product(range(len(data)), (7, None)):
        # Flip the highest bit of each byte, then one of the byte's lower bits.
        bit = place * 5 % 7 if bit is None else bit
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        file.write_bytes(damaged)
        try:
            read = contents(tmp_path)
        except ValueError:
            continue
        accepted += 1
        assert all(map(torch.equal, read, original)), f"bit {bit} of byte {place}"
    assert accepted < 50  # flips in blanks of the header, for example, change nothing


def test_each_sample_has_its_checksum(tmp_path):
    # Only sample 17 is damaged, so other samples stay readable.
    write_cache(CountingTeacher(), tmp_path)
    (file,) = tmp_path.iterdir()
    header, body = split_parts(file.read_bytes())
    assert header["checksums"]["shape"] == [200]
    at = header["log_probs"]["data_offsets"][0] + 17 * 10 * 2
    file.write_bytes(join_parts(header, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]))
    cache = TeacherCache(tmp_path)
    cache.lookup(torch.tensor([0, 16, 18, 199]))
    for _ in range(2):
        message = r"shard-00000.safetensors is damaged: .* sample 17 is wrong\. Delete the file and"
        with pytest.raises(ValueError, match=message):
            cache.lookup(torch.tensor([0, 17]))
    file.unlink()
    assert len(write_cache(CountingTeacher(), tmp_path).lookup(torch.tensor([0, 17]))) == 2


def test_shards_of_two_caches_are_not_mixed(cache, tmp_path):
    write_cache(CountingTeacher(), tmp_path, top_k=3)
    (tmp_path / "shard-00001.safetensors").write_bytes(
        (cache.path / "shard-00000.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"shard-00001.* their top_k are 4 and 3"):
        TeacherCache(tmp_path)
