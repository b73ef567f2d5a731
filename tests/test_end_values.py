"""Test weights, mixtures and smoothing at the ends of their ranges, such as a weight of 0."""

import pytest
import torch
from support import BF16, FP32, FP64, make, pairwise
from torch import Tensor

import fastkd
from fastkd import reference

INF = float("inf")
CLASSES = [6, 100, 200, 3000]
# These divergences are infinite if the side (student or teacher) alone masks a class.
INFINITE = {
    "teacher": ["reverse_kl", "symmetric_kl", "mse", "centered_mse"],
    "student": ["forward_kl", "symmetric_kl", "soft_cross_entropy", "mse", "centered_mse", "dkd"],
}
MASKED = [(side, name) for side, names in INFINITE.items() for name in names]


def make_masked(
    side: str, classes: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Return (student, teacher, labels) of four rows; one side masks a class in three rows."""
    student, teacher, labels = make((4, classes), dtype, device=device, ignored=0.0)
    (student if side == "student" else teacher)[:3, 1] = -INF
    return student, teacher, labels.masked_fill(labels == 1, 2)


def gradient(student: Tensor, teacher: Tensor, labels: Tensor | None, **options) -> Tensor:
    leaf = student.clone().requires_grad_()
    fastkd.loss(leaf, teacher, labels, **options).sum().backward()
    return leaf.grad


@pytest.mark.parametrize(
    ("dtype", "classes", "reduction", "side", "name"),
    pairwise(
        [FP32, BF16, FP64],
        CLASSES,
        ["sum", "none"],
        ["teacher", "student"],
        ["forward_kl", "reverse_kl"],
    ),
    ids=str,
)
def test_the_symmetric_kl_ignores_the_kl_of_weight_0(device, name, side, reduction, classes, dtype):
    mix = 1.0 if name == "forward_kl" else 0.0
    student, teacher, _ = make_masked(side, classes, dtype, device)
    options = {"reduction": reduction, "temperature": 1.5}
    both = {**options, "divergence": "symmetric_kl", "mix": mix}
    value = fastkd.loss(student, teacher, **both)
    expected = fastkd.loss(student, teacher, divergence=name, **options)
    torch.testing.assert_close(value, expected)
    got = gradient(student, teacher, None, **both)
    alone = gradient(student, teacher, None, divergence=name, **options)
    finite = alone.isfinite().all(-1)
    assert bool(finite[3]) and (name == "reverse_kl" or bool(finite.all()))
    torch.testing.assert_close(
        got[finite], alone[finite], rtol=2e-2 if dtype is BF16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mix", [0.0, 1.0])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_the_reference_of_the_symmetric_kl_ignores_the_kl_of_weight_0(side, mix):
    student, teacher, _ = make_masked(side, 6, FP64, torch.device("cpu"))
    name = "forward_kl" if mix else "reverse_kl"
    if (name == "reverse_kl") == (side == "teacher"):
        return  # the KL of weight 1 is infinite
    options = {"hard_weight": 0.0, "soft_weight": 1.0}
    leaf = student.requires_grad_()
    value = reference.loss(leaf, teacher, divergence="symmetric_kl", mix=mix, **options)
    assert torch.equal(value, reference.loss(leaf, teacher, divergence=name, **options))
    assert torch.autograd.grad(value, leaf)[0].isfinite().all()


@pytest.mark.parametrize(
    ("classes", "dtype", "mix", "name"),
    pairwise(
        [6, 200],
        [FP32, FP64],
        [1e-12, 1e-7, 1 - 1e-12],
        ["jsd", "skewed_forward_kl", "skewed_reverse_kl"],
    ),
    ids=str,
)
def test_mixtures_near_0_and_1_are_accepted(device, name, mix, dtype, classes):
    student, teacher, _ = make_masked("teacher", classes, dtype, device)
    student[2, 3] = -INF
    options = {"divergence": name, "mix": mix, "reduction": "none"}
    value = fastkd.loss(student, teacher, **options)
    assert not value.isnan().any() and float(value.min()) >= 0
    assert not gradient(student, teacher, None, **options).isnan().any()


@pytest.mark.parametrize(
    ("classes", "dtype", "weighting", "masking"),
    pairwise(CLASSES, [FP32, FP64], ["number", "rows", "grad_output", "reference"], MASKED),
    ids=str,
)
def test_an_infinite_soft_term_of_weight_0_has_no_effect(
    device, masking, weighting, dtype, classes
):
    side, name = masking
    student, teacher, labels = make_masked(side, classes, dtype, device)
    weight = torch.zeros(4, device=device) if weighting == "rows" else 0.0
    options = {"divergence": name, "soft_weight": weight, "reduction": "none"}
    if weighting == "grad_output":
        leaf = student.clone().requires_grad_()
        value = fastkd.loss(leaf, teacher, labels, divergence=name, reduction="none")
        value.backward(torch.zeros_like(value))
        assert (leaf.grad == 0).all()
        return
    if weighting == "reference":
        leaf = student.clone().requires_grad_()
        value = reference.loss(leaf, teacher, labels, hard_weight=1.0, **options)
        got = torch.autograd.grad(value.sum(), leaf)[0]
    else:
        value = fastkd.loss(student, teacher, labels, hard_weight=1.0, **options)
        got = gradient(student, teacher, labels, hard_weight=1.0, **options)
    hard = torch.nn.functional.cross_entropy
    torch.testing.assert_close(value, hard(student, labels, reduction="none"))
    leaf = student.clone().requires_grad_()
    hard(leaf, labels, reduction="sum").backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_an_infinite_hard_term_of_weight_0_has_no_effect(device, smoothing, classes):
    # The hard term of a masked label is infinite.
    student, teacher, labels = make_masked("student", classes, FP32, device)
    teacher[:3, 1] = -INF
    labels[:3] = 1
    options = {"label_smoothing": smoothing, "hard_weight": 0.0, "soft_weight": 1.0}
    value = fastkd.terms(student, teacher, labels, **options)
    torch.testing.assert_close(value.loss, fastkd.loss(student, teacher))
    assert value.hard == INF
    got = gradient(student, teacher, labels, **options)
    torch.testing.assert_close(got, gradient(student, teacher, None), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_the_reference_of_smoothing_1_has_finite_gradients_for_a_masked_label(hard_weight):
    # With smoothing 1 and a masked label, the hard term is infinite, and its gradient is finite.
    student, teacher, labels = make_masked("student", 6, FP64, torch.device("cpu"))
    teacher[:3, 1] = -INF
    labels[:3] = 1
    leaf = student.requires_grad_()
    options = {"label_smoothing": 1.0, "hard_weight": hard_weight, "soft_weight": 1.0}
    value = reference.loss(leaf, teacher, labels, **options)
    assert bool(value == INF) == (hard_weight > 0) and not value.isnan()
    got = torch.autograd.grad(value, leaf)[0]
    assert got.isfinite().all()
    kernel = fastkd.loss(leaf, teacher, labels, **options)
    torch.testing.assert_close(kernel, value)
    torch.testing.assert_close(torch.autograd.grad(kernel, leaf)[0], got)


def compute_selected_rows(
    temperature: Tensor, weight: Tensor, keep: slice, name: str, side: str, teachers: int
):
    """Return (loss, gradient of logits, gradient of temperature) of the rows ``keep``."""
    student, teacher, labels = make_masked(side, 7, FP32, torch.device("cpu"))
    every = [teacher, teacher.roll(1, 0)] if teachers > 1 else [teacher]
    for logits in every:
        logits[:3, 1] = teacher[:3, 1]
        logits[3, 1] = 0.5
    leaf, t = student[keep].requires_grad_(), temperature.clone().requires_grad_()
    value = fastkd.loss(
        leaf,
        [logits[keep] for logits in every] if teachers > 1 else every[0][keep],
        labels[keep],
        temperature=t,
        divergence=name,
        hard_weight=1.0,
        soft_weight=weight[keep],
        reduction="sum",
        ensemble="logits" if reference.DIVERGENCES[name].compares == "logits" else "probs",
    )
    return value.detach(), *torch.autograd.grad(value, (leaf, t))


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize(("side", "name"), [pair for pair in MASKED if pair[1] != "dkd"])
def test_an_infinite_row_of_weight_0_gives_finite_gradients(side, name, teachers):
    weight, t = torch.tensor([0.0, 0.0, 0.0, 0.7]), torch.tensor(1.5)
    value, grad, of_t = compute_selected_rows(t, weight, slice(0, 4), name, side, teachers)
    _, last, expected = compute_selected_rows(t, weight, slice(3, 4), name, side, teachers)
    assert value.isfinite() and grad.isfinite().all()
    torch.testing.assert_close(of_t, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad[3], last[0], rtol=1e-4, atol=1e-6)
