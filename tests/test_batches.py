"""Test sample ids, the splitting of batches into parts, and the logits of models' outputs."""

import pytest
import torch
from stacks import digits, numbered_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fastkd import batches
from fastkd.teachers import WithIds

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

IMAGES = digits(200, torch.float32).tensors[0]
DATA = numbered_digits()


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
