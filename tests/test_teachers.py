"""Test the teacher cache: round trips, losses, interruptions, and several readers."""

import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from stacks import CountingTeacher, digits, lookup_tensors, numbered_digits, write_cache
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import fastkd
from fastkd import batches
from fastkd.teachers import TeacherCache, WithIds, shard

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

IMAGES, LABELS = digits(200, torch.float32).tensors
DATA = numbered_digits()
EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


class Characters(nn.Module):
    """Compute a teacher's logits for sequences of characters."""

    def __init__(self, vocabulary: int = 30) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return 3 * self.table(input_ids)


def truth(teacher: nn.Module, temperature: float = 2.0) -> torch.Tensor:
    with torch.no_grad():
        return (teacher.double()(IMAGES.double()) / temperature).log_softmax(-1)


# ---- round trips


@pytest.mark.parametrize("dtype", EPS)
def test_a_dense_cache_returns_what_was_written(tmp_path, dtype):
    cache = write_cache(CountingTeacher(), tmp_path, dtype=dtype, temperature=3.0, shard_bytes=1000)
    ids = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:77]
    cached, exact = cache.lookup(ids), truth(CountingTeacher(), 3.0)[ids]
    assert cached.dtype == dtype and cached.shape == (77, 10)
    assert bool(((cached - exact).abs() <= EPS[dtype] * exact.abs() * 1.001 + 1e-6).all())
    assert len(list(tmp_path.iterdir())) > 1


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_a_top_k_cache_returns_what_was_written(tmp_path, top_k):
    cache = write_cache(CountingTeacher(), tmp_path, top_k=top_k, dtype=torch.float32)
    ids = torch.tensor([199, 0, 7, 7])
    log_probs, indices, _ = cache.lookup(ids)
    values, places = truth(CountingTeacher())[ids].topk(top_k)
    assert indices.dtype == torch.int64 and torch.equal(indices, places)
    torch.testing.assert_close(log_probs.double(), values, rtol=1e-6, atol=1e-6)
    assert (cache.top_k, cache.classes, cache.temperature) == (top_k, 10, 2.0)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("top_k", [None, 1, 3, 10])
def test_the_kl_of_caching_is_measured(tmp_path, dtype, top_k):
    cache = write_cache(CountingTeacher(), tmp_path, top_k=top_k, dtype=dtype, shard_bytes=3000)
    log_p = truth(CountingTeacher())
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
    # ``sure`` has a subnormal tail; the KL of ``level`` consists of rounding errors.
    torch.manual_seed(0)
    sure, level = torch.randn(1, 1000), torch.zeros(1, 14)
    sure[0, 3], level[0, 4:] = 105.0, -15.669451713562012
    for name, logits in (("sure", sure), ("level", level)):
        loader = DataLoader(WithIds(TensorDataset(logits)))
        options = {"loader": loader, "top_k": top_k, "temperature": 1.0}
        assert 0 <= write_cache(nn.Identity(), tmp_path / name, **options).kl < 1e-6


def test_masked_classes_are_cached(tmp_path):
    class Masked(CountingTeacher):
        def forward(self, images):
            logits = super().forward(images).clone()
            logits[:, 3:] = -torch.inf
            return logits

    cache = write_cache(Masked(), tmp_path, top_k=5)
    log_probs = cache.lookup(torch.arange(200)).log_probs
    assert bool((log_probs[:, :3].exp().sum(-1) - 1).abs().max() < 1e-3)
    assert bool((log_probs[:, 3:] == -torch.inf).all())
    assert 0 <= cache.kl < 1e-5 and cache.tail == 0


def test_the_loss_of_a_dense_cache_is_that_of_the_teacher(tmp_path):
    # The log-probabilities of all classes serve losses at any temperature.
    cache = write_cache(CountingTeacher(), tmp_path, dtype=torch.float32, temperature=2.0)
    student, ids = torch.randn(64, 10), torch.arange(64)
    with torch.no_grad():
        logits = CountingTeacher()(IMAGES[:64])
    for temperature in (1.0, 2.0, 5.0):
        ours = fastkd.loss(
            student, cache.lookup(ids) * cache.temperature, LABELS[:64], temperature=temperature
        )
        theirs = fastkd.loss(student, logits, LABELS[:64], temperature=temperature)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_top_k_cache_is_a_teacher(tmp_path):
    # All ten classes are cached, so the loss equals the loss of the logits.
    cache = write_cache(CountingTeacher(), tmp_path, top_k=10, dtype=torch.float32, temperature=3.0)
    student, ids = torch.randn(64, 10), torch.arange(64)
    with torch.no_grad():
        logits = CountingTeacher()(IMAGES[:64])
    ours = fastkd.loss(student, cache.lookup(ids), LABELS[:64], temperature=3.0)
    theirs = fastkd.loss(student, logits, LABELS[:64], temperature=3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    text = write_cache(Characters(), tmp_path / "text", loader=sequences(4), top_k=4)
    batch = collate_padded([(TEXT[0], None, 0), (TEXT[1], None, 1)])
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


def collate_padded(samples: list, length: int | None = None) -> batches.Labelled:
    """Collate samples (tokens, labels, id), padded at the end; the tokens replace the labels."""
    length = length or max(1, max(len(item[0]) for item in samples))
    inputs = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full((len(samples), length), -100)
    for row, (tokens, _, _) in enumerate(samples):
        inputs[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = tokens
    return batches.Labelled(inputs, labels, torch.tensor([item[2] for item in samples]))


def sequences(batch_size: int) -> DataLoader:
    data = WithIds([(tokens, tokens) for tokens in TEXT])
    return DataLoader(data, batch_size=batch_size, collate_fn=collate_padded)


@pytest.mark.parametrize("top_k", [None, 4])
def test_sequences_are_cached_without_padding(tmp_path, top_k):
    cache = write_cache(
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
        else:  # the padding's rows are distributions, too
            rest = log_probs[row, len(tokens) :].exp().sum(-1)
            torch.testing.assert_close(rest, torch.ones_like(rest))
        torch.testing.assert_close(log_probs[row, : len(tokens)], exact)
    assert cache.lookup(torch.tensor([0, 3]))[0].shape[-2:] == (5, top_k or 30)[-2:] or top_k
    with pytest.raises(ValueError, match="up to 9 positions"):
        cache.lookup(torch.tensor([0, 1]), shape=(8,))
    assert cache.check(batch=collate_padded([(TEXT[1], None, 1), (TEXT[3], None, 3)], 20)) is None
    with pytest.raises(ValueError, match="such as id 3"):
        cache.check(batch=collate_padded([(TEXT[1], None, 1), (TEXT[3] + 1, None, 3)], 20))


def test_an_attention_mask_limits_the_cached_positions(tmp_path):
    batch = {
        "input_ids": torch.arange(8).view(2, 4),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "ids": torch.tensor([10, 3]),
    }
    cache = write_cache(Characters(), tmp_path, loader=[batch])
    assert cache._lengths.tolist() == [4, 2] and cache.ids.tolist() == [3, 10]
    cache.check(batch=batch)


def test_a_mapping_may_have_values_shared_by_samples(tmp_path):
    class Scaled(nn.Module):
        def forward(self, images, scale, names, mask=None):
            return images * scale

    batch = {"images": IMAGES, "scale": torch.tensor(2.0), "names": ["a"] * 200, "mask": None}
    cache = write_cache(Scaled(), tmp_path, loader=[{**batch, "ids": torch.arange(200)}])
    cache.check(batch={**batch, "ids": torch.arange(200)})
    assert len(cache) == 200


def test_pixels_are_cached(tmp_path):
    data = WithIds(TensorDataset(torch.arange(5 * 12).view(5, 3, 4) % 30))
    cache = write_cache(Characters(), tmp_path, loader=DataLoader(data, 2), top_k=2)
    assert cache.positions == (3, 4)
    log_probs, indices, _ = cache.lookup(torch.tensor([4, 0]), shape=(3, 4))
    assert indices.shape == log_probs.shape == (2, 3, 4, 2)
    exact = Characters()(data[4].inputs).topk(2).indices
    assert torch.equal(indices[0], exact)
    with pytest.raises(ValueError, match=r"rows of shape \(3, 4\)"):
        cache.lookup(torch.tensor([4]), shape=(4, 3))


# ---- interruptions


def assert_equal_caches(ours_cache: TeacherCache, theirs_cache: TeacherCache) -> None:
    assert torch.equal(ours_cache.ids, theirs_cache.ids)
    for ours, theirs in zip(
        lookup_tensors(ours_cache, ours_cache.ids),
        lookup_tensors(theirs_cache, ours_cache.ids),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert ours_cache.kl == pytest.approx(theirs_cache.kl, rel=1e-5)


@pytest.mark.parametrize("error", [InterruptedError, KeyboardInterrupt])
def test_an_interrupted_cache_is_resumed_without_repetition(tmp_path, cache, error):
    with pytest.raises(InterruptedError):
        write_cache(CountingTeacher(fail_after=96), tmp_path, top_k=4)
    assert TeacherCache(tmp_path).ids.tolist() == list(range(96))
    teacher = CountingTeacher()
    resumed = write_cache(teacher, tmp_path, top_k=4)
    assert teacher.samples == 200 - 96
    assert_equal_caches(resumed, cache)
    write_cache(teacher, tmp_path, top_k=4)
    assert teacher.samples == 200 - 96


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interrupt_while_a_file_is_written_loses_nothing(tmp_path, monkeypatch, interrupted):
    # The interrupt comes in the first of two files, or in the last file, after all samples.
    shards, write_shard = [], shard.write

    def interrupt(folder, part):
        shards.append(part)
        if len(shards) == interrupted:
            raise KeyboardInterrupt
        return write_shard(folder, part)

    monkeypatch.setattr(shard, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_cache(CountingTeacher(), tmp_path, shard_bytes=20 * 160)
    assert TeacherCache(tmp_path).ids.tolist() == list(range(160 if interrupted == 1 else 200))


def test_partly_cached_batches_are_completed(tmp_path, cache):
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2)).tolist()
    write_cache(
        CountingTeacher(), tmp_path, loader=DataLoader(Subset(DATA, order[:70]), 32), top_k=4
    )
    resumed = write_cache(
        CountingTeacher(), tmp_path, top_k=4, loader=DataLoader(DATA, 32, shuffle=True)
    )
    assert sum(len(part.ids) for part in resumed._shards) == 200
    assert torch.equal(lookup_tensors(resumed, cache.ids)[-1], lookup_tensors(cache, cache.ids)[-1])


def test_repeated_samples_are_cached_once(tmp_path):
    cache = write_cache(
        CountingTeacher(), tmp_path, loader=DataLoader(Subset(DATA, [5, 5, 3, 5, 3]), 2)
    )
    assert cache.ids.tolist() == [3, 5]
    assert sum(len(part.ids) for part in cache._shards) == 2


KILLED = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from stacks import CountingTeacher, numbered_digits, write_cache

class Slow(CountingTeacher):
    def forward(self, images):
        time.sleep(0.01)
        return super().forward(images)

import torch
from torch.utils.data import DataLoader
write_cache(Slow(), {path!r}, top_k=4, shard_bytes=400, loader=DataLoader(numbered_digits(), 4))
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
    teacher = CountingTeacher()
    resumed = write_cache(teacher, tmp_path, top_k=4)
    assert teacher.samples < 200 and len(resumed) == 200
    assert torch.equal(lookup_tensors(resumed, cache.ids)[-1], lookup_tensors(cache, cache.ids)[-1])


def test_a_file_appears_completely_or_not_at_all(tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit("killed here")

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(SystemExit):
        write_cache(CountingTeacher(), tmp_path, shard_bytes=1000)
    assert not list(tmp_path.glob(shard.PATTERN))


def test_incomplete_files_are_not_read(tmp_path, cache):
    write_cache(CountingTeacher(), tmp_path, top_k=4)
    (tmp_path / ".1234.part").write_bytes(b"half")
    assert_equal_caches(TeacherCache(tmp_path), cache)


def test_two_processes_may_write_different_samples(tmp_path, cache, monkeypatch):
    # The patched glob finds no files, so the second writer tries a name that is already taken.
    halves = [DataLoader(Subset(DATA, range(first, 200, 2)), 32) for first in (0, 1)]
    write_cache(CountingTeacher(), tmp_path, loader=halves[0], top_k=4)
    monkeypatch.setattr(pathlib.Path, "glob", lambda *_: iter(()))
    with pytest.raises(FileNotFoundError):  # the patch hides the files from the reader, too
        write_cache(CountingTeacher(), tmp_path, loader=halves[1], top_k=4)
    monkeypatch.undo()
    assert_equal_caches(TeacherCache(tmp_path), cache)


def test_two_writers_at_the_same_time_write_two_files(tmp_path, monkeypatch):
    halves = [DataLoader(Subset(DATA, range(first, 200, 2)), 32) for first in (0, 1)]
    module = pytest.importorskip("safetensors.torch")
    save_file = module.save_file

    def save(*arguments):
        save_file(*arguments)
        if len(halves) > 1:
            write_cache(CountingTeacher(), tmp_path, loader=halves.pop(), top_k=4)

    monkeypatch.setattr(module, "save_file", save)
    assert len(write_cache(CountingTeacher(), tmp_path, loader=halves[0], top_k=4)) == 200


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
