"""The teacher cache: round trips, interruptions, losses, and forged files."""

import itertools
import json
import os
import pathlib
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import fastkd
from fastkd import batches
from fastkd.teachers import TeacherCache, WithIds, precompute, shard

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)

IMAGES = torch.tensor(digits[0] / 16, dtype=torch.float32)[:200]
LABELS = torch.tensor(digits[1])[:200]
DATA = WithIds(TensorDataset(IMAGES, LABELS))
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


class Counting(nn.Module):
    """Teacher that counts its samples, and fails on demand."""

    def __init__(self, classes: int = 10, fail_after: float = float("inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
        for parameter in self.layers[2].parameters():
            parameter.data *= 8  # confident, like trained teachers
        self.samples, self.fail_after = 0, fail_after

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.samples >= self.fail_after:
            raise InterruptedError
        self.samples += len(images)
        return self.layers(images)


class Characters(nn.Module):
    """Teacher of sequences of characters."""

    def __init__(self, vocabulary: int = 30) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return 3 * self.table(input_ids)


def write(teacher, path, *, loader=None, **options) -> TeacherCache:
    loader = loader or DataLoader(DATA, batch_size=32)
    return precompute(teacher, loader, path, progress=False, **options)


def truth(teacher: nn.Module, temperature: float = 2.0) -> torch.Tensor:
    with torch.no_grad():
        return (teacher.double()(IMAGES.double()) / temperature).log_softmax(-1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> TeacherCache:
    return write(Counting(), tmp_path_factory.mktemp("cache"), top_k=4, shard_bytes=2000)


# ---- round trips


@pytest.mark.parametrize("dtype", EPS)
def test_a_dense_cache_returns_what_was_written(tmp_path, dtype):
    cache = write(Counting(), tmp_path, dtype=dtype, temperature=3.0, shard_bytes=1000)
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:77]
    cached, exact = cache.lookup(ids), truth(Counting(), 3.0)[ids]
    assert cached.dtype == dtype and cached.shape == (77, 10)
    assert bool(((cached - exact).abs() <= EPS[dtype] * exact.abs() * 1.001 + 1e-6).all())
    assert len(list(tmp_path.iterdir())) > 1


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_a_top_k_cache_returns_what_was_written(tmp_path, top_k):
    cache = write(Counting(), tmp_path, top_k=top_k, dtype=torch.float32)
    ids = torch.tensor([199, 0, 7, 7])
    log_probs, indices, _ = cache.lookup(ids)
    values, places = truth(Counting())[ids].topk(top_k)
    assert indices.dtype == torch.int64 and torch.equal(indices, places)
    torch.testing.assert_close(log_probs.double(), values, rtol=1e-6, atol=1e-6)
    assert (cache.top_k, cache.classes, cache.temperature) == (top_k, 10, 2.0)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("top_k", [None, 1, 3, 10])
def test_the_kl_of_caching_is_measured(tmp_path, dtype, top_k):
    cache = write(Counting(), tmp_path, top_k=top_k, dtype=dtype, shard_bytes=3000)
    log_p = truth(Counting())
    read = cache.lookup(torch.arange(200))
    if top_k is None:
        log_q, tail = read.double(), torch.zeros(1)
    else:
        values, indices, _ = read
        tail = log_p.exp().scatter(-1, indices, 0.0).sum(-1)
        log_q = (tail / max(1, 10 - top_k)).log()[:, None].repeat(1, 10)
        log_q.scatter_(-1, indices, values.double())
    kl = (log_p.exp() * (log_p - log_q.log_softmax(-1))).sum(-1).mean()
    assert cache.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-12)
    assert cache.tail == pytest.approx(float(tail.mean()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("top_k", [None, 8])
def test_the_kl_of_caching_is_finite_and_not_negative(tmp_path, top_k):
    """The KL is finite and at least 0 for a subnormal tail, and for a loss of rounding errors."""
    torch.manual_seed(0)
    sure, level = torch.randn(1, 1000), torch.zeros(1, 14)
    sure[0, 3], level[0, 4:] = 105.0, -15.669451713562012
    for name, logits in (("sure", sure), ("level", level)):
        loader = DataLoader(WithIds(TensorDataset(logits)))
        options = {"loader": loader, "top_k": top_k, "temperature": 1.0}
        assert 0 <= write(nn.Identity(), tmp_path / name, **options).kl < 1e-6


def test_masked_classes_are_cached(tmp_path):
    class Masked(Counting):
        def forward(self, images):
            logits = super().forward(images).clone()
            logits[:, 3:] = -torch.inf
            return logits

    cache = write(Masked(), tmp_path, top_k=5)
    log_probs = cache.lookup(torch.arange(200)).log_probs
    assert bool((log_probs[:, :3].exp().sum(-1) - 1).abs().max() < 1e-3)
    assert bool((log_probs[:, 3:] == -torch.inf).all())
    assert 0 <= cache.kl < 1e-5 and cache.tail == 0


def test_the_loss_of_a_dense_cache_is_that_of_the_teacher(tmp_path):
    """Cached log-probabilities times T are logits up to a constant, at any other temperature."""
    cache = write(Counting(), tmp_path, dtype=torch.float32, temperature=2.0)
    student, ids = torch.randn(64, 10), torch.arange(64)
    with torch.no_grad():
        logits = Counting()(IMAGES[:64])
    for temperature in (1.0, 2.0, 5.0):
        ours = fastkd.loss(
            student, cache.lookup(ids) * cache.temperature, LABELS[:64], temperature=temperature
        )
        theirs = fastkd.loss(student, logits, LABELS[:64], temperature=temperature)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_top_k_cache_is_a_teacher(tmp_path):
    """With all classes cached, the loss is the teacher's; padding contributes 0."""
    cache = write(Counting(), tmp_path, top_k=10, dtype=torch.float32, temperature=3.0)
    student, ids = torch.randn(64, 10), torch.arange(64)
    with torch.no_grad():
        logits = Counting()(IMAGES[:64])
    ours = fastkd.loss(student, cache.lookup(ids), LABELS[:64], temperature=3.0)
    theirs = fastkd.loss(student, logits, LABELS[:64], temperature=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    text = write(Characters(), tmp_path / "text", loader=sequences(4), top_k=4)
    batch = padded([(TEXT[0], None, 0), (TEXT[1], None, 1)])
    student = torch.randn(2, 9, 30)
    cached = text.lookup(batch.ids, student.shape[1:-1])
    total = fastkd.loss(student, cached, batch.labels, reduction="sum")
    alone = []
    for row, n in ((0, 3), (1, 9)):
        lists = fastkd.TopK(cached.log_probs[row, :n], cached.indices[row, :n])
        alone.append(fastkd.loss(student[row, :n], lists, TEXT[row], reduction="sum"))
    torch.testing.assert_close(total, sum(alone), rtol=1e-5, atol=1e-5)


# ---- sequences and images

TEXT = [torch.arange(n) % 30 for n in (3, 9, 0, 5, 9, 1)]


def padded(samples: list, length: int | None = None) -> batches.Labelled:
    """Collate (tokens, tokens, id), padded at the end."""
    length = length or max(1, max(len(item[0]) for item in samples))
    inputs = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full((len(samples), length), -100)
    for row, (tokens, _, _) in enumerate(samples):
        inputs[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = tokens
    return batches.Labelled(inputs, labels, torch.tensor([item[2] for item in samples]))


def sequences(batch_size: int) -> DataLoader:
    data = WithIds([(tokens, tokens) for tokens in TEXT])
    return DataLoader(data, batch_size=batch_size, collate_fn=padded)


@pytest.mark.parametrize("top_k", [None, 4])
def test_sequences_are_cached_without_padding(tmp_path, top_k):
    cache = write(
        Characters(), tmp_path, loader=sequences(4), top_k=top_k, dtype=torch.float32, temperature=1
    )
    assert cache.positions == (-1,)
    assert sum(len(part.log_probs) for part in cache._shards) == sum(map(len, TEXT))
    order = [4, 2, 0]
    cached = cache.lookup(torch.tensor(order), shape=(12,))
    log_probs = cached if top_k is None else cached.log_probs
    assert log_probs.shape == (3, 12, top_k or 30)
    for row, number in enumerate(order):
        tokens = TEXT[number]
        exact = Characters()(tokens).log_softmax(-1)
        if top_k is not None:
            exact, places = exact.topk(top_k)
            assert torch.equal(cached.indices[row, : len(tokens)], places)
            assert bool((cached.indices[row, len(tokens) :] == -1).all())
            assert bool((log_probs[row, len(tokens) :] == -torch.inf).all())
        else:  # padding is a distribution, too
            rest = log_probs[row, len(tokens) :].exp().sum(-1)
            torch.testing.assert_close(rest, torch.ones_like(rest))
        torch.testing.assert_close(log_probs[row, : len(tokens)], exact)
    assert cache.lookup(torch.tensor([0, 3]))[0].shape[-2:] == (5, top_k or 30)[-2:] or top_k
    with pytest.raises(ValueError, match="up to 9 positions"):
        cache.lookup(torch.tensor([0, 1]), shape=(8,))
    assert cache.check(batch=padded([(TEXT[1], None, 1), (TEXT[3], None, 3)], 20)) is None
    with pytest.raises(ValueError, match="such as id 3"):
        cache.check(batch=padded([(TEXT[1], None, 1), (TEXT[3] + 1, None, 3)], 20))


def test_an_attention_mask_limits_the_cached_positions(tmp_path):
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "ids": torch.tensor([10, 3]),
    }
    cache = write(Characters(), tmp_path, loader=[batch])
    assert cache._lengths.tolist() == [4, 2] and cache.ids.tolist() == [3, 10]
    cache.check(batch=batch)


def test_a_mapping_may_have_values_shared_by_samples(tmp_path):
    class Scaled(nn.Module):
        def forward(self, images, scale, names, mask=None):
            return images * scale

    batch = {"images": IMAGES, "scale": torch.tensor(2.0), "names": ["a"] * 200, "mask": None}
    cache = write(Scaled(), tmp_path, loader=[{**batch, "ids": torch.arange(200)}])
    cache.check(batch={**batch, "ids": torch.arange(200)})
    assert len(cache) == 200


def test_pixels_are_cached(tmp_path):
    data = WithIds(TensorDataset(torch.arange(5 * 12).view(5, 3, 4) % 30))
    cache = write(Characters(), tmp_path, loader=DataLoader(data, 2), top_k=2)
    assert cache.positions == (3, 4)
    log_probs, indices, _ = cache.lookup(torch.tensor([4, 0]), shape=(3, 4))
    assert indices.shape == log_probs.shape == (2, 3, 4, 2)
    exact = Characters()(data[4].inputs).topk(2).indices
    assert torch.equal(indices[0], exact)
    with pytest.raises(ValueError, match=r"rows of shape \(3, 4\)"):
        cache.lookup(torch.tensor([4]), shape=(4, 3))


# ---- interruptions


def lookup(cache: TeacherCache, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the cached tensors of some samples."""
    cached = cache.lookup(ids)
    return (cached,) if cache.top_k is None else cached[:2]


def assert_equal_caches(ours_cache: TeacherCache, theirs_cache: TeacherCache) -> None:
    assert torch.equal(ours_cache.ids, theirs_cache.ids)
    for ours, theirs in zip(
        lookup(ours_cache, ours_cache.ids), lookup(theirs_cache, ours_cache.ids), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert ours_cache.kl == pytest.approx(theirs_cache.kl, rel=1e-5)


@pytest.mark.parametrize("error", [InterruptedError, KeyboardInterrupt])
def test_an_interrupted_cache_is_resumed_without_repetition(tmp_path, cache, error):
    with pytest.raises(InterruptedError):
        write(Counting(fail_after=96), tmp_path, top_k=4)
    assert TeacherCache(tmp_path).ids.tolist() == list(range(96))
    teacher = Counting()
    resumed = write(teacher, tmp_path, top_k=4)
    assert teacher.samples == 200 - 96
    assert_equal_caches(resumed, cache)
    write(teacher, tmp_path, top_k=4)
    assert teacher.samples == 200 - 96


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interrupt_while_a_file_is_written_loses_nothing(tmp_path, monkeypatch, interrupted):
    """The interrupt comes in the first file of two, or in the last file, after all samples."""
    shards, write_shard = [], shard.write

    def interrupt(folder, part):
        shards.append(part)
        if len(shards) == interrupted:
            raise KeyboardInterrupt
        return write_shard(folder, part)

    monkeypatch.setattr(shard, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(Counting(), tmp_path, shard_bytes=20 * 160)
    assert TeacherCache(tmp_path).ids.tolist() == list(range(160 if interrupted == 1 else 200))


def test_partly_cached_batches_are_completed(tmp_path, cache):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2)).tolist()
    write(Counting(), tmp_path, loader=DataLoader(Subset(DATA, order[:70]), 32), top_k=4)
    resumed = write(Counting(), tmp_path, top_k=4, loader=DataLoader(DATA, 32, shuffle=True))
    assert sum(len(part.ids) for part in resumed._shards) == 200
    assert torch.equal(lookup(resumed, cache.ids)[-1], lookup(cache, cache.ids)[-1])


def test_repeated_samples_are_cached_once(tmp_path):
    cache = write(Counting(), tmp_path, loader=DataLoader(Subset(DATA, [5, 5, 3, 5, 3]), 2))
    assert cache.ids.tolist() == [3, 5]
    assert sum(len(part.ids) for part in cache._shards) == 2


KILLED = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_teachers import Counting, write

class Slow(Counting):
    def forward(self, images):
        time.sleep(0.01)
        return super().forward(images)

import torch
from torch.utils.data import DataLoader
from test_teachers import DATA
write(Slow(), {path!r}, top_k=4, shard_bytes=400, loader=DataLoader(DATA, 4))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_usable_cache(tmp_path, cache):
    script = KILLED.format(tests=str(pathlib.Path(__file__).parent), path=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("shard-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reopened = TeacherCache(tmp_path)
    assert 0 < len(reopened) < 200
    assert torch.equal(reopened.lookup(reopened.ids).indices, cache.lookup(reopened.ids).indices)
    teacher = Counting()
    resumed = write(teacher, tmp_path, top_k=4)
    assert teacher.samples < 200 and len(resumed) == 200
    assert torch.equal(lookup(resumed, cache.ids)[-1], lookup(cache, cache.ids)[-1])


def test_a_file_appears_completely_or_not_at_all(tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit("killed here")

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(SystemExit):
        write(Counting(), tmp_path, shard_bytes=1000)
    assert not list(tmp_path.glob(shard.PATTERN))


def test_incomplete_files_are_not_read(tmp_path, cache):
    write(Counting(), tmp_path, top_k=4)
    (tmp_path / ".1234.part").write_bytes(b"half")
    assert_equal_caches(TeacherCache(tmp_path), cache)


def test_two_processes_may_write_different_samples(tmp_path, cache, monkeypatch):
    """Under a distributed sampler, both processes choose the same next free name."""
    halves = [DataLoader(Subset(DATA, range(first, 200, 2)), 32) for first in (0, 1)]
    write(Counting(), tmp_path, loader=halves[0], top_k=4)
    monkeypatch.setattr(pathlib.Path, "glob", lambda *_: iter(()))
    with pytest.raises(FileNotFoundError):  # nor can a reader see the files
        write(Counting(), tmp_path, loader=halves[1], top_k=4)
    monkeypatch.undo()
    assert_equal_caches(TeacherCache(tmp_path), cache)


def test_two_writers_with_one_process_number_write_two_files(tmp_path, monkeypatch):
    """Two containers have equal process numbers; the second writes during the first's write."""
    halves = [DataLoader(Subset(DATA, range(first, 200, 2)), 32) for first in (0, 1)]
    module = pytest.importorskip("safetensors.torch")
    save_file = module.save_file

    def save(*arguments):
        save_file(*arguments)
        if len(halves) > 1:
            write(Counting(), tmp_path, loader=halves.pop(), top_k=4)

    monkeypatch.setattr(os, "getpid", lambda: 17)
    monkeypatch.setattr(module, "save_file", save)
    assert len(write(Counting(), tmp_path, loader=halves[0], top_k=4)) == 200


# ---- many readers


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later warn
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers_read_a_cache(cache, method):
    ids = list(torch.randperm(200, generator=torch.Generator().manual_seed(3)).split(50))
    loader = DataLoader(
        ids,
        batch_size=None,
        collate_fn=cache.lookup,
        num_workers=2,
        multiprocessing_context=method,
    )
    for batch_ids, looked_up in zip(ids, loader, strict=True):
        expected = cache.lookup(batch_ids)
        assert type(looked_up) is fastkd.TopK and looked_up.tail == expected.tail
        assert all(torch.equal(*pair) for pair in zip(looked_up[:2], expected[:2], strict=True))


def test_a_pickled_cache_is_its_path(cache):
    assert len(pickle.dumps(cache)) < 500
    assert_equal_caches(pickle.loads(pickle.dumps(cache)), cache)


def test_repr_has_the_cache_s_properties(cache):
    assert "200 samples, the top 4 of 10 classes, float16, temperature 2" in repr(cache)
    assert len(cache) == 200


# ---- other teachers, other data, invalid arguments


def test_another_teacher_is_refused(cache):
    cache.check(teacher=Counting())
    changed = Counting()
    changed.layers[0].bias.data[0] += 1e-6
    with pytest.raises(ValueError, match=r"^teacher: .* other weights"):
        TeacherCache(cache.path, teacher=changed)


def test_wrappers_do_not_change_the_fingerprint(cache):
    assert fastkd.teachers.fingerprint(nn.DataParallel(Counting())) == cache.teacher
    assert fastkd.teachers.fingerprint(torch.compile(Counting(), backend="eager")) == cache.teacher
    assert fastkd.teachers.fingerprint(Counting().half()) != cache.teacher


class Packed(nn.Module):
    """Module with a tuple of weights in its state, like quantized layers."""

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
        TeacherCache(cache.path, classes=11)


def test_another_temperature_is_refused_by_a_top_k_cache(cache, tmp_path):
    cache.check(temperature=2.0)
    with pytest.raises(ValueError, match=r"^temperature: .* at temperature 2, which cannot"):
        cache.check(temperature=4.0)
    write(Counting(), tmp_path).check(temperature=4.0)


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
        write(Counting(), cache.path, **{"top_k": 4, **options})
    with pytest.raises(ValueError, match=r"^teacher: "):
        write(Counting(classes=11), cache.path, top_k=4)
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
        write(Counting(), tmp_path / "new", **options)
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize("teacher", [lambda images: images, [Counting(), Counting()]])
def test_a_teacher_must_be_a_module(tmp_path, cache, teacher):
    kind = type(teacher).__name__
    with pytest.raises(TypeError, match=rf"^teacher must be one torch\.nn\.Module; got {kind}"):
        write(teacher, tmp_path / "new")
    with pytest.raises(TypeError, match=r"^teacher must be"):
        cache.check(teacher=teacher)


def test_an_empty_loader_makes_no_folder(tmp_path):
    with pytest.raises(ValueError, match="loader gave no batch"):
        precompute(Counting(), [], tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no teacher's cache"):
        TeacherCache(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for use in (lambda path: write(Counting(), path), TeacherCache):
            with pytest.raises(ValueError, match=r"^path must be a folder; got .*file is a file"):
                use(path)
    with pytest.raises(TypeError, match="path must be a folder's path; got int"):
        TeacherCache(3)


def test_the_teacher_stays_unchanged(tmp_path):
    teacher = Counting().train()
    teacher.layers[1].eval()
    write(teacher, tmp_path)
    assert teacher.training and not teacher.layers[1].training
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- forged and damaged files


def parts_of(data: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict | bytes, body: bytes) -> bytes:
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
    header, body = parts_of(data)
    header["__metadata__"][key] = value
    with pytest.raises(
        ValueError, match=f"not a complete shard of a teacher's cache: .*({message})"
    ):
        TeacherCache(forge(joined(header, body)))


@pytest.mark.parametrize(
    "change",
    [
        lambda header, body: joined(b"\xff" * 40, body),
        lambda header, body: struct.pack("<Q", 2**63) + body,
        lambda header, body: struct.pack("<Q", 10**8 - 1) + body,
        lambda header, body: b"",
        lambda header, body: joined(b"[" * 100_000, body),
        lambda header, body: joined({**header, "ids": {**header["ids"], "shape": [2**60]}}, body),
        lambda header, body: joined({**header, "ids": {**header["ids"], "shape": [-1]}}, body),
        lambda header, body: joined({**header, "ids": {**header["ids"], "dtype": "F64"}}, body),
        lambda header, body: joined(
            {**header, "log_probs": {**header["log_probs"], "data_offsets": [0, 2**62]}}, body
        ),
        lambda header, body: joined({k: v for k, v in header.items() if k != "ids"}, body),
        lambda header, body: joined({"__metadata__": header["__metadata__"]}, b""),
        lambda header, body: joined(header, body[:-1]),
        lambda header, body: joined(header, body + b"\0"),
        lambda header, body: pickle.dumps({"ids": [1]}),
    ],
)
def test_forged_files_are_refused(forged, change):
    data, forge = forged
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is not a complete shard"):
        TeacherCache(forge(change(*parts_of(data))))


READ = "import sys; from fastkd.teachers import TeacherCache; TeacherCache(sys.argv[1])"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize(
    "kind",
    ["pipe", *(pytest.param(k, marks=pytest.mark.slow) for k in ("socket", "device", "folder"))],
)
def test_only_regular_files_are_opened(tmp_path, kind):
    """Opening the cache does not block on a named pipe, a socket, a device or a folder."""
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
    header, body = parts_of(data)
    start, stop = header["lengths"]["data_offsets"]
    count = (stop - start) // 8
    for lengths in ([count + 1, -1] + [1] * (count - 2), [2**62] * count, [0] * count):
        new = body[:start] + struct.pack(f"<{count}q", *lengths) + body[stop:]
        with pytest.raises(ValueError, match="lengths do not add up"):
            TeacherCache(forge(joined(header, new)))


def test_a_forged_class_is_refused(cache, tmp_path):
    """A class out of range is refused, though the file's checksum is valid."""
    content, _ = shard.read(cache.path / "shard-00000.safetensors")
    content.indices[0, 0] = 10
    shard.write(tmp_path, content)
    with pytest.raises(ValueError, match="names a class beyond its 10"):
        TeacherCache(tmp_path).lookup(content.ids)


def contents(path: pathlib.Path) -> list[torch.Tensor]:
    """Return everything that a cache contains."""
    read = TeacherCache(path)
    numbers = torch.tensor([read.classes, read.temperature, read.kl, read.tail])
    return [read.ids, read._lengths, read._inputs, numbers, *lookup(read, read.ids)]


def test_damaged_and_truncated_files_are_refused(forged):
    """A damaged file is refused, or its cache has the original contents."""
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
    """A flipped bit is detected, or the cache has the original contents."""
    three_samples = Subset(DATA, range(3))
    write(Counting(5), tmp_path, loader=DataLoader(three_samples, 3), top_k=top_k)
    (file,) = tmp_path.iterdir()
    data, original = file.read_bytes(), contents(tmp_path)
    accepted = 0
    for place, bit in itertools.product(range(len(data)), (7, None)):
        # The highest bit of each byte and one other bit.
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
    """Damage is detected when a sample is read, and other samples stay readable."""
    write(Counting(), tmp_path)
    (file,) = tmp_path.iterdir()
    header, body = parts_of(file.read_bytes())
    assert header["checksums"]["shape"] == [200]
    at = header["log_probs"]["data_offsets"][0] + 17 * 10 * 2
    file.write_bytes(joined(header, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]))
    cache = TeacherCache(tmp_path)
    cache.lookup(torch.tensor([0, 16, 18, 199]))
    for _ in range(2):
        message = r"shard-00000.safetensors is damaged: .* sample 17 is wrong\. Delete the file and"
        with pytest.raises(ValueError, match=message):
            cache.lookup(torch.tensor([0, 17]))
    file.unlink()
    assert len(write(Counting(), tmp_path).lookup(torch.tensor([0, 17]))) == 2


def test_shards_of_two_caches_are_not_mixed(cache, tmp_path):
    write(Counting(), tmp_path, top_k=3)
    (tmp_path / "shard-00001.safetensors").write_bytes(
        (cache.path / "shard-00000.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"shard-00001.* their top_k are 4 and 3"):
        TeacherCache(tmp_path)


# ---- batches


def test_samples_carry_their_ids():
    assert WithIds(TensorDataset(IMAGES))[-1].ids == 199
    assert isinstance(WithIds([torch.zeros(2)])[0], batches.Unlabelled)
    assert WithIds([{"x": 1}])[0] == {"x": 1, "ids": 0}
    assert [sample.ids for sample in Subset(DATA, [4, 2])] == [4, 2]
    with pytest.raises(IndexError):
        DATA[200]
    with pytest.raises(TypeError, match="got 3 values"):
        WithIds([(1, 2, 3)])[0]
    with pytest.raises(TypeError, match="must be map-style"):
        WithIds(iter([1]))


def test_batches_are_split():
    x, y, ids = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([5, 6], dtype=torch.int32)
    for batch, labels, numbers in [
        (x, None, None),
        ((x,), None, None),
        ([x, y], y, None),
        ((x, y, ids), y, ids),
        (batches.Unlabelled(x, ids), None, ids),
    ]:
        parts = batches.split(batch)
        assert parts.inputs is x and parts.labels is labels
        assert parts.ids is None if numbers is None else torch.equal(parts.ids, numbers.long())
    assert batches.split({"a": x, "labels": y, "ids": ids}).inputs == {"a": x}
    with pytest.raises(TypeError, match="got tuple of 4"):
        batches.split((x, y, ids, x))
    with pytest.raises(TypeError, match="got str"):
        batches.split("x" * 5)


def test_logits_are_taken_from_outputs():
    class Output(dict):
        @property
        def logits(self):
            return self["logits"]

    linear, x = nn.Linear(3, 2), torch.ones(1, 3)

    class Wrapped(nn.Module):
        def forward(self, x, scale=1.0):
            return Output(logits=linear(x) * scale)

    assert torch.equal(batches.logits(Wrapped(), {"x": x, "scale": 2.0}), linear(x) * 2)
    assert torch.equal(batches.logits(Wrapped(), (x, 3.0)), linear(x) * 3)
    with pytest.raises(TypeError, match="Identity must return logits as a tensor"):
        batches.logits(nn.Identity(), [None])
