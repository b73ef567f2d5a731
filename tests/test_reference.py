"""Test that the reference equals torch's cross_entropy and kl_div in float64."""

import itertools
import math

import pytest
import torch
from support import FP16, FP64, make
from torch import Tensor
from torch.nn import functional as F

from fastkd import reference

EXACT = {"rtol": 1e-12, "atol": 1e-14}
INF = math.inf


def kl(student: Tensor, teacher: Tensor, t: float | Tensor) -> Tensor:
    """Compute the KL of each row by F.kl_div."""
    t = t.unsqueeze(-1) if isinstance(t, Tensor) else t
    return F.kl_div(
        F.log_softmax(student / t, -1), F.softmax(teacher / t, -1), reduction="none"
    ).sum(-1)


@pytest.mark.parametrize("shape", [(7, 11), (2, 3, 5), (4,)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_hard_term_is_cross_entropy(shape, smoothing, ignore_index):
    student, teacher, labels = make(shape, FP64, ignored=0.0)
    labels = torch.where(labels == 1, ignore_index, labels)
    expected = {
        reduction: F.cross_entropy(
            student.reshape(-1, shape[-1]),
            labels.reshape(-1),
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        )
        for reduction in ("none", "sum", "mean")
    }
    for reduction, theirs in expected.items():
        got = reference.terms(
            student,
            teacher,
            labels,
            hard_weight=1.0,
            soft_weight=0.0,
            label_smoothing=smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        torch.testing.assert_close(got.loss, theirs.view(got.loss.shape), **EXACT)
        torch.testing.assert_close(got.hard, got.loss, **EXACT)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 20.0])
@pytest.mark.parametrize("shape", [(7, 11), (2, 3, 5), (4,), (3, 1)])
def test_soft_term_is_kl_div(shape, t):
    student, teacher, _ = make(shape, FP64, labels=False)
    expected = kl(student, teacher, t)
    got = reference.terms(
        student, teacher, temperature=t, hard_weight=0.0, soft_weight=1.0, reduction="none"
    )
    torch.testing.assert_close(got.soft, expected, **EXACT)
    torch.testing.assert_close(got.loss, t * t * expected, **EXACT)
    batch_mean = F.kl_div(
        F.log_softmax(student.reshape(-1, shape[-1]) / t, -1),
        F.softmax(teacher.reshape(-1, shape[-1]) / t, -1),
        reduction="batchmean",
    )
    mean = reference.terms(student, teacher, temperature=t, hard_weight=0.0, soft_weight=1.0)
    torch.testing.assert_close(mean.soft, batch_mean, **EXACT)


def test_row_temperatures_equal_single_rows():
    student, teacher, labels = make((6, 9), FP64, ignored=0.3)
    t = torch.linspace(0.5, 4.0, 6, dtype=FP64)
    together = reference.terms(student, teacher, labels, temperature=t, reduction="none")
    for row in range(6):
        alone = reference.terms(
            student[row], teacher[row], labels[row], temperature=float(t[row]), reduction="none"
        )
        for name, of_row, all_rows in zip(alone._fields[:6], alone[:6], together[:6], strict=True):
            torch.testing.assert_close(all_rows[row], of_row, msg=name, **EXACT)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("normalizer", [None, 3.5, "tensor"])
def test_both_terms_are_weighed_masked_and_reduced_alike(reduction, normalizer):
    student, teacher, labels = make((8, 13), FP64, ignored=0.4)
    valid = labels != -100
    assert 0 < valid.sum() < 8
    rows = 0.3 * F.cross_entropy(student, labels, reduction="none") + 1.7 * 9.0 * kl(
        student, teacher, 3.0
    )
    rows = rows * valid
    if reduction != "mean":
        normalizer = None
    divisor = valid.sum() if normalizer is None else 3.5
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / divisor}[reduction]
    got = reference.loss(
        student,
        teacher,
        labels,
        temperature=3.0,
        hard_weight=0.3,
        soft_weight=1.7,
        reduction=reduction,
        normalizer=torch.tensor(3.5) if normalizer == "tensor" else normalizer,
    )
    torch.testing.assert_close(got, expected, **EXACT)


def test_the_gradient_is_torchs():
    student, teacher, labels = make((8, 13), FP64, ignored=0.4)
    leaf, exact_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    valid = labels != -100
    rows = 0.3 * F.cross_entropy(leaf, labels, reduction="none") + 0.7 * 4.0 * kl(
        leaf, teacher, 2.0
    )
    (rows * valid).sum().div(valid.sum()).backward()
    reference.loss(exact_leaf, teacher, labels, hard_weight=0.3, soft_weight=0.7).backward()
    torch.testing.assert_close(exact_leaf.grad, leaf.grad, **EXACT)


def test_entropies_and_agreement_are_their_formulas():
    student, teacher, _ = make((8, 13), FP64, labels=False)
    got = reference.terms(student, teacher, temperature=3.0, reduction="none")
    for logits, entropy in ((student, got.student_entropy), (teacher, got.teacher_entropy)):
        expected = torch.distributions.Categorical(logits=logits / 3.0).entropy()
        torch.testing.assert_close(entropy, expected, **EXACT)
    agreement = student.argmax(-1) == teacher.argmax(-1)
    assert torch.equal(got.agreement, agreement.double())


@pytest.mark.parametrize(
    ("student", "teacher", "soft"),
    [
        # The teacher masks a class: the class contributes 0, though the student gives it a
        # probability.
        ([0.0, 0.0], [0.0, -INF], math.log(2)),
        # Student and teacher mask a class: the loss is as if the class did not exist.
        ([0.0, 1.0, -INF], [1.0, 0.0, -INF], None),
        # The student alone masks a class: the loss is infinite, also if the teacher's probability
        # underflows.
        ([0.0, -INF], [0.0, 0.0], INF),
        ([0.0, -INF], [0.0, -1e9], INF),
    ],
)
def test_masked_classes_give_exact_values(student, teacher, soft):
    student, teacher = torch.tensor(student, dtype=FP64), torch.tensor(teacher, dtype=FP64)
    got = reference.terms(student, teacher, temperature=1.0, hard_weight=0.0, soft_weight=1.0)
    if soft is None:
        soft = float(kl(student[:2], teacher[:2], 1.0))
    assert float(got.loss) == pytest.approx(soft, rel=1e-14)


def test_a_term_without_weight_may_be_infinite():
    student = torch.tensor([[0.0, -INF]], dtype=FP64)
    teacher = torch.zeros(1, 2, dtype=FP64)
    zero, second = torch.tensor([0]), torch.tensor([1])
    assert reference.loss(student, teacher, zero, hard_weight=1.0, soft_weight=0.0) == 0
    assert reference.loss(student, teacher, zero, hard_weight=1.0, soft_weight=0.1) == INF
    assert reference.loss(student, teacher, second, hard_weight=1.0, soft_weight=0.0) == INF
    assert reference.loss(teacher, teacher, second, hard_weight=0.0, soft_weight=1.0) == 0


def test_ignored_rows_are_not_read():
    student, teacher, labels = make((6, 5), FP64, ignored=0.0)
    labels[1::2] = -100
    expected = reference.terms(student[::2], teacher[::2], labels[::2])
    student[1::2], teacher[1::2] = math.nan, INF
    student.requires_grad_()
    got = reference.terms(student, teacher, labels)
    for name, ours, theirs in zip(got._fields[:6], got[:6], expected[:6], strict=True):
        torch.testing.assert_close(ours, theirs, msg=name, **EXACT)
    got.loss.backward()
    assert torch.equal(student.grad[1::2], torch.zeros(3, 5, dtype=FP64))
    assert student.grad[::2].isfinite().all()


@pytest.mark.parametrize("label", [-1, 5, -101])
def test_labels_out_of_range_give_nan_for_their_row(label):
    student, teacher, labels = make((3, 5), FP64, ignored=0.0)
    labels[1] = label
    got = reference.loss(student, teacher, labels, reduction="none")
    assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("a", "b"), [*itertools.product([FP16, torch.float32, FP64], repeat=2)])
def test_the_reference_computes_in_float32_or_wider(a, b):
    student, teacher, labels = make((3, 5), a, b)
    expected = FP64 if FP64 in (a, b) else torch.float32
    assert reference.loss(student, teacher, labels).dtype == expected


def test_all_rows_ignored_give_zero():
    student = torch.zeros(3, 4, requires_grad=True)
    value = reference.loss(student, torch.ones(3, 4), torch.full((3,), -100))
    value.backward()
    assert value == 0 and torch.equal(student.grad, torch.zeros(3, 4))
