"""Test that every field of fastkd.terms, and the gradient, equal the reference."""

import math

import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    assert_grad,
    compute_dtype,
    make,
    make_topk,
    name_of,
    pairwise,
    truth,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd import _C, reference

RELATIVE = {FP32: 2e-6, FP64: 1e-13}
# An entropy or a divergence may be a small difference of larger numbers, and then needs an absolute
# bound.
ABSOLUTE = {FP32: 1e-6, FP64: 1e-14}


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, **options) -> fastkd.Terms:
    acc = compute_dtype(student, teacher)
    exact = truth(student, teacher, labels, **options)
    leaf = student.detach().requires_grad_()
    got = fastkd.terms(leaf, teacher, labels, **options)
    assert isinstance(got, fastkd.Terms)
    for name, ours, theirs in zip(got._fields, got, exact.terms, strict=True):
        assert ours.dtype == acc and ours.shape == theirs.shape, name
        torch.testing.assert_close(
            ours.detach().double(),
            theirs.detach(),
            rtol=RELATIVE[acc],
            atol=ABSOLUTE[acc],
            msg=lambda m, n=name: f"{n}: {m}",
        )
    got.loss.sum().backward()
    assert_grad(leaf.grad, exact.grad, acc)
    return got


@pytest.mark.parametrize(
    ("dtype", "reduction", "shape"),
    pairwise(
        DTYPES, ["mean", "sum", "none"], [(6, 10), (2, 3, 170), (4, 3001), (3, _C.segment + 5)]
    ),
    ids=str,
)
def test_every_field_equals_the_reference(device, shape, reduction, dtype):
    check(*make(shape, dtype, device=device), reduction=reduction)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 3.0, "alpha": 0.0},
        {"temperature": 4.0, "alpha": 1.0},
        {"hard_weight": 2.0, "soft_weight": 0.5},
        {"hard_weight": 0.0, "soft_weight": 0.0},
        {"label_smoothing": 0.2},
        {"normalizer": 5.0},
        {"temperature": 0.5},
    ],
    ids=str,
)
def test_options_equal_the_reference(device, options):
    # The weights change the loss, but no other field of Terms.
    check(*make((6, 170), device=device), **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_row_temperatures_equal_the_reference(device, reduction):
    temperature = torch.linspace(0.5, 5, 6, device=device)
    check(*make((6, 170), device=device), temperature=temperature, reduction=reduction)


def test_every_instruction_set_equals_the_reference(isa):
    for dtype in (FP32, BF16, FP16, FP64):
        check(*make((3, 1030), dtype))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms_need_no_labels(device, reduction):
    student, teacher, _ = make((6, 170), device=device, labels=False)
    got = check(student, teacher, None, reduction=reduction)
    assert torch.equal(got.hard, torch.zeros_like(got.hard))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_loss_of_terms_is_that_of_loss(device, dtype):
    student, teacher, labels = make((6, 1003), dtype, device=device)
    for reduction in ("mean", "sum", "none"):
        a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
        loss = fastkd.loss(a, teacher, labels, reduction=reduction)
        loss_of_terms = fastkd.terms(b, teacher, labels, reduction=reduction).loss
        loss.sum().backward()
        loss_of_terms.sum().backward()
        assert torch.equal(loss, loss_of_terms) and torch.equal(a.grad, b.grad)


def test_only_the_loss_carries_a_gradient(device):
    student, teacher, labels = make((6, 13), device=device)
    got = fastkd.terms(student.requires_grad_(), teacher, labels)
    assert got.loss.requires_grad
    for name, term in zip(got._fields[1:], got[1:], strict=True):
        assert not term.requires_grad, name
    # Terms other than the loss have no gradient, so uses of them do not change the gradient.
    (3 * got.loss + got.hard + got.student_entropy).backward()
    alone = student.detach().requires_grad_()
    (3 * fastkd.loss(alone, teacher, labels)).backward()
    assert torch.equal(student.grad, alone.grad)


def test_ignored_rows_are_zero_in_every_field(device):
    student, teacher, labels = make((6, 13), device=device, ignored=0.0)
    labels[2] = -100
    student[2], teacher[2] = math.nan, math.inf
    got = fastkd.terms(student, teacher, labels, reduction="none")
    mean = fastkd.terms(student, teacher, labels)
    for name, term, average in zip(got._fields, got, mean, strict=True):
        assert term[2] == 0, name
        torch.testing.assert_close(average, term.sum() / 5, msg=name)


@pytest.mark.parametrize(
    ("student", "teacher", "agree"),
    [
        ([1.0, 2.0, 0.0], [0.0, 5.0, 1.0], 1),
        ([1.0, 2.0, 0.0], [6.0, 5.0, 1.0], 0),
        ([2.0, 2.0, 0.0], [0.0, 5.0, 1.0], 1),  # a tie that includes the teacher's choice
        ([2.0, 1.0, 2.0], [0.0, 5.0, 5.0], 1),  # ties that share a class
        ([2.0, 2.0, 0.0], [0.0, 1.0, 5.0], 0),
        ([2.0, 0.0, 2.0], [0.0, 5.0, 0.0], 0),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 7.0], 1),
        ([0.0, -math.inf, 1.0], [0.0, -math.inf, 1.0], 1),
    ],
)
@pytest.mark.parametrize("width", [3, 200])
def test_agreement_counts_equal_greatest_classes(device, width, student, teacher, agree):
    # Classes with low logits pad the rows to ``width``.
    pad = [-9.0] * (width - 3)
    s, t = (torch.tensor([pad + row], device=device) for row in (student, teacher))
    assert fastkd.terms(s, t, reduction="none").agreement.tolist() == [agree]


def test_agreement_sees_every_segment(device):
    # With two CPU threads, the threads share the fifth row by segments.
    width = 3 * _C.segment + 7
    student, teacher = torch.zeros(5, width, device=device), torch.zeros(5, width, device=device)
    places = [0, _C.segment - 1, _C.segment, 2 * _C.segment + 3, width - 1]
    for row, place in enumerate(places):
        student[row, place] = 3.0
        teacher[row, place] = 4.0
    assert fastkd.terms(student, teacher, reduction="none").agreement.tolist() == [1] * 5
    teacher[:, 17] = 5.0
    assert fastkd.terms(student, teacher, reduction="none").agreement.tolist() == [0] * 5


def test_nan_rows_are_nan_in_every_field(device):
    student, teacher, labels = make((4, 170), device=device, ignored=0.0)
    student[1, 7] = math.nan
    got = fastkd.terms(student, teacher, labels, reduction="none")
    for name, term in zip(got._fields, got, strict=True):
        if name == "teacher_entropy" or name.endswith("mass"):  # independent of the NaN
            continue
        assert not term[[0, 2, 3]].isnan().any(), name
        if name != "agreement":
            assert term[1].isnan(), name


def test_masked_classes_have_no_entropy(device):
    student, teacher, _ = make((4, 170), device=device, labels=False)
    student[:, ::3] = teacher[:, ::3] = -math.inf
    keep = torch.arange(170, device=device) % 3 != 0
    got = fastkd.terms(student, teacher)
    expected = truth(student[:, keep], teacher[:, keep]).terms
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        assert float(ours) == pytest.approx(theirs.item(), rel=2e-6, abs=1e-6), name


def test_bfloat16_terms_are_float32(device):
    got = fastkd.terms(*make((4, 10), BF16, device=device))
    assert {term.dtype for term in got} == {FP32}


# ---- sparse teachers


@pytest.mark.parametrize(
    ("dtype", "reduction", "shape", "teacher", "options"),
    pairwise(
        DTYPES,
        ["mean", "sum", "none"],
        [(6, 10), (2, 3, 170), (4, 3001), (3, _C.segment + 5)],
        ["ghost", "renormalize", "ignore", "k1", "k3"],
        [
            {"hard_weight": 0.0, "soft_weight": 0.5},
            {"hard_weight": 2.0, "soft_weight": 0.0, "label_smoothing": 0.2},
            {"alpha": 0.3, "temperature": 2.0},
            {"alpha": 0.3, "temperature": 0.7, "divergence": "jsd"},
        ],
    ),
    ids=str,
)
@pytest.mark.usefixtures("each_autograd")
def test_every_field_of_a_sparse_teacher_equals_the_reference(
    device, shape, reduction, dtype, teacher, options
):
    student, indices, log_probs, labels = make_topk(shape, 5, dtype, device=device)
    sampled = teacher in ("k1", "k3")
    options = {"temperature": 1.0, **options}
    if sampled or teacher == "ignore":
        options = {name: value for name, value in options.items() if name != "divergence"}
    if sampled:
        indices, log_probs = indices[..., :1], log_probs[..., :1]
        lists = fastkd.Sampled(log_probs[..., 0], indices[..., 0], estimator=teacher)
    else:
        lists = fastkd.TopK(log_probs, indices, tail=teacher)
    weights = {name: options[name] for name in options if name != "alpha"}
    if "alpha" in options:
        weights |= {"hard_weight": 0.3, "soft_weight": 0.7}
    if "divergence" in options:
        weights["mix"] = reference.DIVERGENCES[options["divergence"]].mix
    exact = reference.topk.terms(
        student.double(),
        log_probs.double(),
        indices,
        labels,
        tail="ghost" if sampled else teacher,
        estimator=teacher if sampled else None,
        reduction=reduction,
        **weights,
    )
    leaf, alone = student.clone().requires_grad_(), student.clone().requires_grad_()
    got = fastkd.terms(leaf, lists, labels, reduction=reduction, **options)
    acc = compute_dtype(student, log_probs)
    for name, ours, theirs in zip(got._fields, got, exact, strict=True):
        assert ours.dtype == acc and ours.shape == theirs.shape, name
        torch.testing.assert_close(
            ours.detach().double(),
            theirs.detach(),
            rtol=RELATIVE[acc],
            atol=ABSOLUTE[acc] * 10,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    loss = fastkd.loss(alone, lists, labels, reduction=reduction, **options)
    got.loss.sum().backward()
    loss.sum().backward()
    assert torch.equal(got.loss, loss) and torch.equal(leaf.grad, alone.grad)


def test_terms_of_a_sparse_teacher_are_right_at_the_ends_of_the_range(isa):
    log_probs, indices = torch.tensor([[-0.5, -1.5], [-0.5, -1.5]]), torch.tensor([[0, 1], [2, 3]])
    student = torch.full((2, 70), -math.inf)
    student[0, 0], student[1, 2], student[1, 5] = 3e38, -2.0, -2.0
    got = fastkd.terms(student, fastkd.TopK(log_probs, indices), reduction="none")
    torch.testing.assert_close(got.student_entropy, torch.tensor([0.0, math.log(2)]))
    torch.testing.assert_close(got.student_mass, torch.tensor([1.0, 0.5]))
    assert got.agreement.tolist() == [1, 1]


def test_rows_without_labels_have_a_hard_term_of_0_with_a_sparse_teacher(device):
    student, indices, log_probs, _ = make_topk((4, 50), 5, device=device, labels=False)
    got = fastkd.terms(student, fastkd.TopK(log_probs, indices))
    assert got.hard.item() == 0 and got.soft.item() > 0


def test_terms_of_a_sparse_teacher_make_no_tensor_of_the_size_of_the_logits():
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
            self.largest = max([self.largest, *(each.numel() for each in tensors)])
            return out

    student, indices, log_probs, labels = make_topk((4, 3001), 5)
    with Sizes() as sizes:
        fastkd.terms(student, fastkd.TopK(log_probs, indices), labels, temperature=3.0)
    assert 0 < sizes.largest < student.numel() / 4
