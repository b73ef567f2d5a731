"""Test properties of the loss that hold for every input, with Hypothesis."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    DTYPES,
    FP32,
    FP64,
    Answer,
    assert_grad,
    assert_value,
    compute_dtype,
    make,
    truth,
    weights,
)
from torch import Tensor

import fastkd
from fastkd import _C, reference

WIDTHS = st.one_of(
    st.integers(1, 70),
    st.sampled_from([127, 128, 129, 144, 145, 1000, 1023, 1025, 2049, _C.segment + 3]),
)
ROWS = st.integers(1, 6)
TEMPERATURES = st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0]), st.floats(0.5, 20.0))
SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0.0, 1.0)


@given(classes=WIDTHS, rows=ROWS, t=TEMPERATURES, seed=SEEDS, dtype=st.sampled_from(DTYPES))
def test_soft_term_is_not_negative_and_zero_at_the_teacher(device, classes, rows, t, seed, dtype):
    student, teacher, _ = make((rows, classes), dtype, device=device, labels=False, seed=seed)
    got = fastkd.loss(student, teacher, temperature=t, reduction="none")
    assert (got >= 0).all()
    self_divergence = fastkd.loss(teacher, teacher, temperature=t, reduction="none")
    assert (self_divergence >= 0).all() and (self_divergence <= 1e-12).all()


@given(
    classes=WIDTHS,
    rows=ROWS,
    t=TEMPERATURES,
    seed=SEEDS,
    alpha=SHARES,
    a=st.integers(-64, 64),
    b=st.integers(-64, 64),
)
def test_a_constant_added_to_a_row_changes_nothing(device, classes, rows, t, seed, alpha, a, b):
    student, teacher, labels = make((rows, classes), FP32, device=device, seed=seed)
    # Multiples of 2^-12 below 32 stay exact when an integer is added.
    student, teacher = ((x.clamp(-31, 31) * 4096).round() / 4096 for x in (student, teacher))
    leaf, moved = student.clone().requires_grad_(), (student + a).requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, temperature=t, alpha=alpha)
    moved_loss = fastkd.loss(moved, teacher + b, labels, temperature=t, alpha=alpha)
    torch.testing.assert_close(moved_loss, value, rtol=2e-6, atol=2e-6)
    value.backward()
    moved_loss.backward()
    scale = 1 + t  # rounding errors of the hard and the soft gradient
    torch.testing.assert_close(moved.grad, leaf.grad, rtol=2e-5, atol=2e-7 * scale)


@given(classes=WIDTHS, rows=ROWS, t=TEMPERATURES, seed=SEEDS)
def test_permuted_classes_permute_the_gradient(device, classes, rows, t, seed):
    student, teacher, labels = make((rows, classes), FP32, device=device, seed=seed)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)).to(device)
    place = order.argsort()
    moved = torch.where(labels == -100, labels, place[labels.clamp(min=0)])
    leaf, permuted_leaf = (
        student.clone().requires_grad_(),
        student[:, order].clone().requires_grad_(),
    )
    value = fastkd.loss(leaf, teacher, labels, temperature=t)
    permuted = fastkd.loss(permuted_leaf, teacher[:, order], moved, temperature=t)
    torch.testing.assert_close(permuted, value, rtol=2e-6, atol=1e-6)
    value.backward()
    permuted.backward()
    torch.testing.assert_close(permuted_leaf.grad, leaf.grad[:, order], rtol=2e-6, atol=1e-6)


@given(
    classes=WIDTHS,
    rows=st.integers(2, 6),
    t=TEMPERATURES,
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
)
def test_rows_are_independent(device, classes, rows, t, seed, dtype):
    student, teacher, labels = make((rows, classes), dtype, device=device, seed=seed)

    def run(s: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = s.clone().requires_grad_()
        value = fastkd.loss(leaf, w, y, temperature=t, reduction="sum" if s.dim() == 1 else "none")
        value.sum().backward()
        return value.detach(), leaf.grad

    values, grads = run(student, teacher, labels)
    flipped = run(student.flip(0), teacher.flip(0), labels.flip(0))
    assert torch.equal(flipped[0].flip(0), values) and torch.equal(flipped[1].flip(0), grads)
    for row in range(rows):
        value, grad = run(student[row : row + 1], teacher[row : row + 1], labels[row : row + 1])
        if device.type == "cpu":
            assert torch.equal(value[0], values[row]) and torch.equal(grad[0], grads[row])
        else:
            torch.testing.assert_close(value[0], values[row], rtol=2e-6, atol=1e-7)


@given(classes=WIDTHS, rows=ROWS, t=TEMPERATURES, seed=SEEDS, alpha=SHARES, smoothing=SHARES)
def test_gradients_sum_to_zero_over_classes(device, classes, rows, t, seed, alpha, smoothing):
    student, teacher, labels = make((rows, classes), FP32, device=device, seed=seed)
    leaf = student.requires_grad_()
    fastkd.loss(
        leaf,
        teacher,
        labels,
        temperature=t,
        alpha=alpha,
        label_smoothing=smoothing,
        reduction="sum",
    ).backward()
    # The hard and the soft gradient are differences of distributions, whose sums round to 1.
    assert float(leaf.grad.double().sum(-1).abs().max()) <= 1e-6 * (1 + t)


@given(
    classes=WIDTHS,
    rows=ROWS,
    seed=SEEDS,
    dtype=st.sampled_from(DTYPES),
    junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]),
    index=st.sampled_from([-100, -1, 0, 7]),
)
def test_ignored_rows_are_zero_and_unread(device, classes, rows, seed, dtype, junk, index):
    student, teacher, labels = make((rows, classes), dtype, device=device, seed=seed, ignored=0.5)
    is_ignored = labels == -100
    labels = torch.where(is_ignored, index, labels)
    is_ignored = labels == index
    clean = fastkd.loss(student, teacher, labels, ignore_index=index)
    student[is_ignored], teacher[is_ignored] = junk, -junk
    leaf = student.requires_grad_()
    rowwise = fastkd.terms(leaf, teacher, labels, ignore_index=index, reduction="none")
    assert all((term[is_ignored] == 0).all() for term in rowwise)
    value = fastkd.loss(leaf, teacher, labels, ignore_index=index)
    assert torch.equal(value, clean)
    value.backward()
    assert (leaf.grad[is_ignored] == 0).all() and leaf.grad.isfinite().all()


@given(classes=WIDTHS, rows=ROWS, t=TEMPERATURES, seed=SEEDS, alpha=SHARES)
def test_the_loss_is_linear_in_alpha(device, classes, rows, t, seed, alpha):
    problem = make((rows, classes), FP64, device=device, seed=seed)
    hard, soft, both = (fastkd.loss(*problem, temperature=t, alpha=a) for a in (1.0, 0.0, alpha))
    torch.testing.assert_close(both, alpha * hard + (1 - alpha) * soft, rtol=1e-13, atol=1e-14)
    got = fastkd.terms(*problem, temperature=t, alpha=alpha)
    torch.testing.assert_close(
        got.loss, alpha * got.hard + (1 - alpha) * t * t * got.soft, rtol=1e-13, atol=1e-14
    )


@given(classes=WIDTHS, rows=ROWS, t=TEMPERATURES, seed=SEEDS, ignored=SHARES, n=st.floats(0.1, 1e6))
def test_reductions_agree(device, classes, rows, t, seed, ignored, n):
    student, teacher, labels = make(
        (rows, classes), FP32, device=device, seed=seed, ignored=ignored
    )
    none, total, mean, normed = (
        fastkd.loss(student, teacher, labels, temperature=t, reduction=r, normalizer=k)
        for r, k in (("none", None), ("sum", None), ("mean", None), ("mean", n))
    )
    count = max(int((labels != -100).sum()), 1)
    close = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(total.double(), none.double().sum(), **close)
    torch.testing.assert_close(mean.double(), none.double().sum() / count, **close)
    torch.testing.assert_close(normed.double(), none.double().sum() / n, **close)


@st.composite
def calls(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]:
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    shape = (*leading, draw(WIDTHS))
    layout = {
        "dtypes": draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES))),
        # Layout of each tensor: classes cut off at either end, rows skipped, dimensions swapped.
        "cut": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "step": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "swap": draw(st.tuples(st.booleans(), st.booleans())),
        "seed": draw(SEEDS),
    }
    options: dict[str, Any] = {
        "temperature": draw(TEMPERATURES),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    layout["labels"] = draw(st.booleans())
    layout["rows"] = draw(st.booleans())
    if layout["labels"]:
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
        options["ignore_index"] = draw(st.sampled_from([-100, 0]))
        if draw(st.booleans()):
            options["alpha"] = draw(SHARES)
        else:
            options["hard_weight"] = draw(st.floats(0.0, 3.0))
            options["soft_weight"] = draw(st.floats(0.0, 3.0))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.floats(0.5, 100.0))
    return shape, layout, options


def lay_out(values: Tensor, cut: int, step: int, swap: bool) -> Tensor:
    """Copy logits into a view of a larger tensor, optionally with swapped first dimensions."""
    swap = swap and values.dim() > 2
    shape = list(values.transpose(0, 1).shape if swap else values.shape)
    if len(shape) > 1:
        shape[-2] *= step
    base = torch.full(
        (*shape[:-1], shape[-1] + 2 * cut), math.nan, dtype=values.dtype, device=values.device
    )
    view = base[..., cut : cut + shape[-1]]
    if len(shape) > 1:
        view = view[..., ::step, :]
    view = view.transpose(0, 1) if swap else view
    return view.copy_(values)


@settings(max_examples=100)
@given(call=calls())
def test_any_call_equals_the_reference(device, call):
    shape, layout, options = call
    student, teacher, labels = make(
        shape, *layout["dtypes"], device=device, labels=layout["labels"], seed=layout["seed"]
    )
    if labels is not None:
        labels = torch.where(labels == -100, options["ignore_index"], labels)
    if layout["rows"]:
        options = {
            **options,
            "temperature": torch.linspace(0.5, 1.0, math.prod(shape[:-1]), device=device).view(
                shape[:-1]
            )
            * options["temperature"],
        }
    student, teacher = (
        lay_out(x, layout["cut"][i], layout["step"][i], layout["swap"][i])
        for i, x in enumerate((student, teacher))
    )
    acc = compute_dtype(student, teacher)
    exact = truth(student, teacher, labels, **options)
    leaf = student.detach().requires_grad_()
    got = fastkd.terms(leaf, teacher, labels, **options)
    # A row's soft term has a weight of up to 3 * temperature**2. Even if the exact term is 0, the
    # loss contains the term's rounding error times this weight.
    size = float(torch.as_tensor(options["temperature"]).max()) ** 2 * 4
    slack = Answer(exact.terms, exact.loss, exact.grad, exact.noise + size * torch.finfo(acc).eps)
    assert_value(got.loss, slack, acc)
    got.loss.sum().backward()
    assert_grad(leaf.grad, exact.grad, acc, weight=size)


@pytest.mark.parametrize("name", fastkd.divergences())
@given(classes=st.integers(1, 40), t=TEMPERATURES, seed=SEEDS)
def test_every_divergence_is_the_references(device, name, classes, t, seed):
    classes += name == "dkd"  # dkd needs at least two classes
    student, teacher, labels = make((3, classes), FP64, device=device, seed=seed)
    options = {"temperature": t, "divergence": name}
    leaf, exact_leaf = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, **options)
    expected = reference.loss(exact_leaf, teacher, labels, **weights(options, True))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13 * t * t)
    value.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, exact_leaf.grad, rtol=1e-10, atol=1e-13 * t)
