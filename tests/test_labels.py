"""Test that class indices of narrow integer dtypes give the results of int64 indices."""

import pytest
import torch
from support import loss_in_chunks, make
from torch import nn

import fastkd
from fastkd import Head, TopK, reports, teachers
from fastkd.compat import distilbert, torchtune
from fastkd.integrations.transformers import causal_labels
from fastkd.training import student_loss, teacher

CLASSES = 200
NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]
LABELS = {torch.int8: [3, -100, 5, -100, 100, 7]}  # int8 holds ignore_index, but no label above 127
OTHERS = [156, 3, 156, 5, 199, 7]


def labels_in(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(LABELS.get(dtype, OTHERS), dtype=dtype)


def make_topk(teacher):
    return TopK(*teacher[:, :CLASSES].log_softmax(-1).topk(7))


def make_head(logits):
    return Head(logits, torch.eye(logits.shape[-1]))


def loss_of_heads(student, teacher, labels, **options):
    return loss_in_chunks(make_head(student), make_head(teacher), labels, **options)


def loss_of_chunks(student, teacher, labels):
    chunked = torchtune.ForwardKLWithChunkedOutputLoss(2)
    parts = (x.unsqueeze(0).chunk(2, 1) for x in (student, teacher))
    return chunked(*parts, labels.unsqueeze(0))


def loss_of_distilbert(student, teacher, labels):
    logits = (x.unsqueeze(0) for x in (student, teacher))
    return distilbert.step_loss(
        *logits, torch.ones(1, 6), labels.unsqueeze(0), alpha_ce=0.5, alpha_mlm=0.0, alpha_clm=0.5
    )


def loss_with_learned_temperature(student, teacher, labels):
    return fastkd.loss(student, teacher, labels, temperature=torch.tensor(2.0, requires_grad=True))


def loss_under_vmap(student, teacher, labels):
    return torch.func.vmap(fastkd.loss)(
        *(x.unflatten(0, (2, 3)) for x in (student, teacher, labels))
    )


WEIGHT = torch.linspace(0.5, 1.5, CLASSES)
LOSSES = {
    "loss": fastkd.loss,
    "standardize": lambda *a: fastkd.loss(*a, standardize=True),
    "class_weight": lambda *a: fastkd.loss(*a, class_weight=WEIGHT),
    "smoothed": lambda *a: fastkd.loss(*a, class_weight=WEIGHT, label_smoothing=0.1),
    "dkd": lambda *a: fastkd.loss(*a, divergence="dkd"),
    "learned": loss_with_learned_temperature,
    "vmap": loss_under_vmap,
    "reference": fastkd.reference.loss,
    "heads": loss_of_heads,
    "heads by classes": lambda *a: loss_of_heads(
        *a, chunks={"chunk_by": "classes", "chunk_size": 64}
    ),
    "heads, class_weight": lambda *a: loss_of_heads(*a, class_weight=WEIGHT),
    "topk": lambda s, t, y: fastkd.loss(s, make_topk(t), y),
    "topk of heads": lambda s, t, y: fastkd.loss(make_head(s), make_topk(t), y),
    "torchtune": loss_of_chunks,
    "distilbert": loss_of_distilbert,
    "causal": lambda s, t, y: fastkd.loss(s, t, causal_labels({"labels": y.unsqueeze(0)})[0]),
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_narrow_labels_give_the_loss_of_int64_labels(name, dtype):
    student, teacher, _ = make((6, CLASSES))
    labels = labels_in(dtype)
    got, want = (LOSSES[name](student, teacher, y) for y in (labels, labels.long()))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["loss", "topk", "heads", "topk of heads", "dkd"])
def test_a_narrow_label_out_of_range_is_refused(name):
    student, teacher, _ = make((6, 100))
    labels = torch.tensor([3, 5, 156, 2, 1, 0], dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"labels must be in \[0, 100\) or ignore_index=-100; row 2 has 156"
    ):
        LOSSES[name](student, teacher, labels)


def test_narrow_indices_of_lists_are_accepted():
    student, teacher, _ = make((6, 300))
    lists = make_topk(teacher)
    narrow = lists._replace(indices=lists.indices.to(torch.uint8))
    for logits in (student, make_head(student)):
        assert torch.equal(fastkd.loss(logits, narrow), fastkd.loss(logits, lists))


def test_check_inputs_checks_rows_labelled_156():
    student, teacher, _ = make((6, CLASSES))
    student[2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"student must not hold NaN or \+inf; row 2"):
        fastkd.check_inputs(student, teacher, labels_in(torch.uint8))


def test_a_trainer_counts_rows_labelled_156():
    student = nn.Linear(4, CLASSES)
    _, logits, _ = make((6, CLASSES))
    for labels in (student_loss.get_labels, lambda batch: batch[1]):
        loss = student_loss.StudentLoss(
            student, fastkd.KDLoss(), [], teacher.compute_logits, labels
        )
        batch = (torch.zeros(6, 4), labels_in(torch.uint8))
        targets = loss.get_targets(batch)
        assert loss.count_rows(targets) == 6
        assert loss.sum_terms(student, batch, logits)[-1] == 6
        assert loss.sum_terms(student, batch, make_topk(logits))[-1] == 6


def test_a_report_counts_rows_labelled_156():
    logits, _, _ = make((6, CLASSES))
    loader = [(logits, labels_in(torch.uint8))]
    answers = reports.measure.measure_answers({"a": nn.Identity()}, loader, -100, -1)[0]
    assert answers["a"].rows == 6


def test_precompute_keeps_rows_labelled_156(tmp_path):
    logits, labels = torch.randn(1, 6, CLASSES), labels_in(torch.uint8).flip(0)
    loader = [(logits, labels.unsqueeze(0), torch.tensor([0]))]
    cache = teachers.precompute(nn.Identity(), loader, tmp_path, progress=False)
    assert cache._lengths.tolist() == [6]
