"""Test that losses computed in parts of the rows equal losses computed at once."""

import pytest
import torch
from support import FP64, make

import fastkd
from fastkd import reference
from fastkd._core import rows
from fastkd._core.arguments import Call, prepare
from fastkd._core.objective import Options

ROWS, CLASSES = 7, 6
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": torch.tensor(3.0)},
    "class weights": {"class_weight": torch.linspace(0.5, 2, CLASSES)},
    "row numbers": {
        "temperature": torch.linspace(1, 3, ROWS),
        "hard_weight": torch.linspace(0, 1, ROWS),
        "soft_weight": torch.linspace(1, 0, ROWS),
    },
    "two teachers": {"ensemble": "logits"},
}


@pytest.mark.parametrize("kind", ["none", "indices", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS)
def test_parts_equal_the_whole(monkeypatch, device, options, kind):
    student, teacher, labels = make((ROWS, CLASSES), FP64, device=device)
    if kind == "probabilities":
        labels = teacher.flip(0).softmax(-1)
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in OPTIONS[options].items()}
    if kind == "none":
        labels = None
        inputs = {k: v for k, v in inputs.items() if k not in ("class_weight", "hard_weight")}
    teachers = [teacher, student.flip(1)] if options == "two teachers" else teacher
    t = torch.tensor(1.5, dtype=FP64, device=device, requires_grad=True)
    leaf = student.requires_grad_()
    call = prepare(leaf, teachers, labels, Options(teacher_temperature=t, **inputs))

    def at_once(call: Call) -> reference.Terms:
        return rows.compute_reference_terms(call)

    def results(compute) -> tuple:
        terms = compute(call)
        gradients = torch.autograd.grad(terms.loss.sum(), (leaf, t), create_graph=True)
        second = torch.autograd.grad(gradients[0].square().sum(), leaf)
        return (*terms, *gradients, *second)

    expected = results(at_once)
    monkeypatch.setattr(rows, "MAX_LOGITS_PER_PART", 3 * CLASSES)
    for ours, theirs in zip(results(rows.compute_checkpointed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_memory_is_that_of_one_part(monkeypatch):
    # The hook records saved tensors of at least the logits' size.
    student, teacher, labels = make((64, CLASSES))
    saved_sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= student.numel():
            saved_sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(rows, "MAX_LOGITS_PER_PART", 8 * CLASSES)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        options = {"divergence": "cosine", "standardize": True}  # no kernel computes this call
        fastkd.loss(student.requires_grad_(), teacher, labels, **options).backward()
    assert not saved_sizes
