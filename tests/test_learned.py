"""Test learned temperatures and weights, and standardized logits, against the reference."""

import pytest
import torch
from support import BF16, FP32, FP64, make, name_of, pairwise

import fastkd
from fastkd import reference

ROWS, CLASSES = 9, 37
NAMES = fastkd.divergences()


def make_row_numbers(low, high):
    return torch.linspace(low, high, ROWS, dtype=FP64)


# Each call learns all tensors among its options, except class_weight.
LEARN = {
    "temperature": {"temperature": torch.tensor(2.0, dtype=FP64)},
    "temperatures of rows": {
        "temperature": make_row_numbers(1, 4),
        "teacher_temperature": torch.tensor(1.5, dtype=FP64),
    },
    "student's temperature": {
        "temperature": torch.tensor(2.5, dtype=FP64),
        "teacher_temperature": 3.0,
    },
    "weights": {
        "hard_weight": make_row_numbers(0.1, 1),
        "soft_weight": torch.tensor(0.4, dtype=FP64),
    },
    "standardize": {"standardize": True, "temperature": 1.5},
    "standardize, temperature": {"standardize": True, "temperature": torch.tensor(1.5, dtype=FP64)},
    "class weights": {
        "soft_weight": torch.tensor(0.4, dtype=FP64),
        "class_weight": torch.linspace(0.5, 2, CLASSES, dtype=FP64).requires_grad_(False),
    },
}


def make_leaves(options):
    """Return the options with cloned tensors, and a list of the clones that require grad."""
    fixed = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    learned = [
        value.requires_grad_()
        for name, value in fixed.items()
        if isinstance(value, torch.Tensor) and name != "class_weight"
    ]
    return fixed, learned


def make_problem(dtype, device="cpu"):
    """Make a problem with a class that student and teacher mask, and NaNs in an ignored row."""
    student, teacher, labels = make((ROWS, CLASSES), dtype, device=device, ignored=0.0)
    student[1, 3] = teacher[1, 3] = -torch.inf
    labels[1] = 5
    labels[4] = -100
    student[4, 2] = teacher[4, 0] = torch.nan
    return student, teacher, labels


@pytest.mark.parametrize(
    ("reduction", "learn", "name"), pairwise(["mean", "none"], LEARN, NAMES), ids=str
)
def test_gradients_are_those_of_float64(name, learn, reduction):
    for dtype, bound in ((FP32, 2e-6), (BF16, 2.0**-8)):
        student, teacher, labels = make_problem(dtype)
        options, learned = make_leaves(LEARN[learn])
        leaf = student.clone().requires_grad_()
        loss = fastkd.loss(leaf, teacher, labels, divergence=name, reduction=reduction, **options)
        factor = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        got = torch.autograd.grad(loss, [leaf, *learned], factor)
        assert got[0].dtype is dtype and not got[0][4].any()

        fixed, learned = make_leaves(LEARN[learn])
        if "hard_weight" not in fixed and "soft_weight" not in fixed:
            fixed.update(hard_weight=0.5, soft_weight=0.5)
        fixed.setdefault("hard_weight", 1.0)
        wide = student.double().requires_grad_()
        terms = reference.terms(
            wide, teacher.double(), labels, divergence=name, reduction=reduction, **fixed
        )
        expected = torch.autograd.grad(terms.loss, [wide, *learned], factor.double())
        torch.testing.assert_close(loss.double(), terms.loss, rtol=bound, atol=bound)
        # Terms cancel in a gradient near 0, so the gradient's error is bounded relative to the
        # largest of the gradient, the loss and 1.
        size = max(float(terms.loss.detach().abs().max()), 1.0)
        for ours, theirs in zip(got, expected, strict=True):
            scale = float(theirs.abs().max())
            # Only the logits' gradient is rounded to 16 bits.
            limit = bound if ours.shape == student.shape else min(bound, 2e-6)
            assert float((ours.double() - theirs).abs().max()) <= limit * max(scale, size)


MIXTURES = {
    "two": ({"teacher_temperature": 3.0}, lambda w: [w, 0.5 * w]),
    "two of rows": ({"teacher_temperature": make_row_numbers(1, 2)}, lambda w: [w, 0.5 * w]),
    "two, logits": ({"teacher_temperature": 3.0, "ensemble": "logits"}, lambda w: [w, 0.5 * w]),
    "probs": ({"teacher_form": "probs"}, lambda w: w.softmax(-1)),
}


@pytest.mark.parametrize("which", MIXTURES)
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "dkd"])
def test_a_mixture_of_teachers_equals_the_reference(name, which):
    fixed, teachers_of = MIXTURES[which]
    results = []
    for dtype in (FP32, FP64):
        student, teacher, labels = (
            x.to(dtype) if x.is_floating_point() else x for x in make((ROWS, CLASSES))
        )
        leaf, t = student.requires_grad_(), make_row_numbers(1, 3).requires_grad_()
        options = {**fixed, "temperature": t, "divergence": name, "reduction": "sum"}
        teachers = teachers_of(teacher)
        if dtype is FP32:
            loss = fastkd.loss(leaf, teachers, labels, alpha=0.5, **options)
        else:
            weights = {"hard_weight": 0.5, "soft_weight": 0.5}
            loss = reference.terms(leaf, teachers, labels, **weights, **options).loss
        gradients = torch.autograd.grad(loss, [leaf, t])
        results.append([loss.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("learn", [name for name in LEARN if name != "class weights"])
@pytest.mark.parametrize("kind", ["probabilities", "smoothed weights"])
def test_probabilities_and_smoothed_weights_equal_the_reference(kind, learn, reduction):
    results = []
    for dtype in (FP32, FP64):
        student, teacher, labels = (
            x.to(dtype) if x.is_floating_point() else x for x in make((ROWS, CLASSES))
        )
        options, learned = make_leaves(LEARN[learn])
        options["reduction"] = reduction
        if kind == "probabilities":
            labels = make((ROWS, CLASSES), labels=False, seed=1).student.to(dtype).softmax(-1)
        else:
            weight = torch.linspace(0.5, 2, CLASSES, dtype=FP64)
            options.update(class_weight=weight, label_smoothing=0.2)
        leaf = student.requires_grad_()
        if dtype is FP32:
            terms = fastkd.terms(leaf, teacher, labels, **options)
            loss = fastkd.loss(leaf, teacher, labels, **options)
            gradients = torch.autograd.grad(loss.sum(), [leaf, *learned])
            torch.testing.assert_close(terms.loss, loss)
        else:
            if "hard_weight" not in options and "soft_weight" not in options:
                options.update(hard_weight=0.5, soft_weight=0.5)
            terms = reference.terms(leaf, teacher, labels, **{"hard_weight": 1.0, **options})
            gradients = torch.autograd.grad(terms.loss.sum(), [leaf, *learned])
        results.append([*terms[:6], *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_terms_of_each_row_equal_the_reference(dtype):
    student, teacher, labels = make_problem(dtype)
    got = fastkd.terms(student, teacher, labels, standardize=True, reduction="none")
    expected = reference.terms(
        student.double(), teacher.double(), labels, standardize=True, reduction="none"
    )
    for ours, theirs in zip(got[:6], expected[:6], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)


def test_only_the_temperature_learns():
    student, teacher, labels = make((ROWS, CLASSES))
    t = torch.tensor(3.0, requires_grad=True)
    loss = fastkd.loss(student, teacher, labels, temperature=t)
    loss.backward(retain_graph=True)
    first, t.grad = t.grad, None
    loss.backward()
    assert torch.equal(first, t.grad)
    with torch.no_grad():
        torch.testing.assert_close(fastkd.loss(student, teacher, labels, temperature=t), loss)


def test_constant_rows_are_finite_and_nan_stays_in_its_row():
    student, teacher, labels = make((4, CLASSES), ignored=0.0)
    student[0] = 3.0
    teacher[1] = -2.0
    student[2, 5] = torch.nan
    leaf = student.requires_grad_()
    losses = fastkd.loss(leaf, teacher, labels, standardize=True, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.isnan().tolist() == [False, False, True, False]
    assert grad.isfinite().all(-1).tolist() == [True, True, False, True]


# ---- higher derivatives, batched gradients, masked and constant rows


@pytest.mark.parametrize("learn", LEARN)
def test_gradients_with_create_graph_are_the_same(learn):
    student, teacher, labels = make((ROWS, CLASSES), FP64)
    options, learned = make_leaves(LEARN[learn])
    leaf = student.requires_grad_()

    def gradients(create_graph=False):
        loss = fastkd.loss(leaf, teacher, labels, **options)
        return torch.autograd.grad(loss, [leaf, *learned], create_graph=create_graph)

    for once, again in zip(gradients(), gradients(create_graph=True), strict=True):
        torch.testing.assert_close(again, once, rtol=1e-11, atol=1e-13)
        assert again.requires_grad and not once.requires_grad


@pytest.mark.parametrize("learn", LEARN)
def test_batched_gradients_equal_those_of_single_rows(learn):
    student, teacher, labels = make((ROWS, CLASSES), FP64)
    options, learned = make_leaves(LEARN[learn])
    leaf = student.requires_grad_()
    losses = fastkd.loss(leaf, teacher, labels, reduction="none", **options)
    batch = torch.autograd.grad(
        losses,
        [leaf, *learned],
        torch.eye(ROWS, dtype=FP64),
        is_grads_batched=True,
        retain_graph=True,
    )
    for row in range(ROWS):
        alone = torch.autograd.grad(losses[row], [leaf, *learned], retain_graph=True)
        for ours, theirs in zip(batch, alone, strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("learn", ["standardize", "temperatures"])
def test_a_class_that_one_side_masks_has_the_references_gradient(learn, side, name):
    options = {"standardize": True}
    if learn == "temperatures":
        options = {"temperature": torch.tensor(2.5), "teacher_temperature": torch.tensor(3.0)}

    def gradients(loss, dtype, **weights):
        problem = make((4, 6), labels=False)._asdict()
        problem[side][:, 2] = -torch.inf
        leaf, teacher = (problem[key].to(dtype) for key in ("student", "teacher"))
        fixed, learned = make_leaves(options)
        value = loss(leaf.requires_grad_(), teacher, divergence=name, **fixed, **weights)
        return torch.autograd.grad(value, [leaf, *learned])

    exact = gradients(reference.loss, FP64, hard_weight=0.0, soft_weight=1.0)
    for ours, theirs in zip(gradients(fastkd.loss, FP32), exact, strict=True):
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_inference_tensors_are_accepted():
    t = torch.tensor(2.0, requires_grad=True)
    with torch.inference_mode():
        student, teacher, labels = make((ROWS, CLASSES))
    fastkd.loss(student, teacher, labels, temperature=t).backward()
    expected = torch.tensor(2.0, requires_grad=True)
    fastkd.loss(student.clone(), teacher.clone(), labels, temperature=expected).backward()
    assert torch.equal(t.grad, expected.grad)


def test_a_masked_class_of_weight_0_has_no_effect():
    student, teacher, _ = make((2, 5))
    student[0, 2] = teacher[0, 2] = -torch.inf
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    options = {"hard_weight": 0.5, "class_weight": weight}
    labels = torch.tensor([2, 1])
    learned = torch.tensor(0.5, requires_grad=True)
    got = fastkd.loss(student, teacher, labels, soft_weight=learned, **options)
    expected = fastkd.loss(student, teacher, labels, soft_weight=0.5, **options)
    torch.testing.assert_close(got, expected, check_stride=False)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_standardized_logits_have_no_offset(offset):
    student, teacher, labels = make((64, 1000))
    student, teacher = student.mul_(8).round_().div_(8), teacher.mul_(8).round_().div_(8)
    gradients = []
    for dtype, by in ((FP32, offset), (FP64, 0.0)):
        leaf = (student.to(dtype) + by).requires_grad_()
        loss = fastkd.loss(leaf, teacher.to(dtype) + by, labels, standardize=True)
        gradients += torch.autograd.grad(loss, leaf)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-6


@pytest.mark.parametrize("mask", [-1e20, -1e30, torch.finfo(FP32).min])
def test_a_finite_mask_gives_finite_gradients(mask):
    student, teacher, _ = make((4, 50))
    student[:, 40:] = teacher[:, 40:] = mask
    leaf = student.requires_grad_()
    loss = fastkd.loss(leaf, teacher, standardize=True)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert 0 <= loss.item() < 1e-6 and float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("classes", [3, 10, 200, 1000])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dkd", "cosine")])
def test_rows_without_spread_are_equal(name, classes):
    student, teacher = torch.randn(2, 8, 1, generator=torch.Generator().manual_seed(0))
    losses = fastkd.loss(
        student.expand(8, classes),
        teacher.expand(8, classes),
        divergence=name,
        standardize=True,
        temperature=0.5,
        reduction="none",
    )
    entropy = torch.tensor(float(classes)).log() if name == "soft_cross_entropy" else 0.0
    assert float((losses - 0.25 * entropy).abs().max()) < 1e-5
