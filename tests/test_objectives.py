"""Test every divergence, teacher form, label kind, reduction and dtype against the NumPy oracle."""

import re
from typing import Any

import oracle
import pytest
import torch
from support import BF16, DTYPES, FP16, FP32, FP64, compute_dtype, make, pairwise
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import reference

NAMES = fastkd.divergences()
OF_LOGITS = [name for name, kind in reference.DIVERGENCES.items() if kind.compares == "logits"]
ROWS, CLASSES = 5, 6
# Relative tolerances of terms. An absolute tolerance is this number times temperature**2 and the
# square of the largest logit, which counts as at least 1.
BOUND = {FP32: 4e-6, FP64: 1e-13}
GRAD_BOUND = {FP32: 4e-6, FP64: 1e-9, BF16: 2**-8, FP16: 2**-10}


def make_teacher(form: str, dtype: torch.dtype, device: Any, seed: int = 1) -> Any:
    """Make a teacher in ``form``: one tensor, or a list of three tensors."""
    teachers = [
        make((ROWS, CLASSES), FP64, labels=False, device=device, seed=seed + i).student
        for i in range(3 if form.startswith("three") else 1)
    ]
    if form == "log_probs":
        teachers = [x.log_softmax(-1) for x in teachers]
    if form == "probs":
        teachers = [x.softmax(-1) for x in teachers]
    teachers = [x.to(dtype) for x in teachers]
    return teachers if len(teachers) > 1 else teachers[0]


FORMS = {
    "logits": {},
    "log_probs": {"teacher_form": "log_probs"},
    "probs": {"teacher_form": "probs"},
    "three, probs": {"ensemble": "probs", "teacher_weights": [1.0, 2.0, 0.5]},
    "three, logits": {"ensemble": "logits"},
}


def make_labels(kind: str, device: Any) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "indices":
        return torch.tensor([3, -100, 0, 5, 3], device=device)
    return make((ROWS, CLASSES), FP64, labels=False, device=device, seed=9).student.softmax(-1)


def refusal(name: str, form: str, kind: str) -> str | None:
    """Return the error message of a combination that is refused, or None."""
    if name in OF_LOGITS and form in ("log_probs", "probs"):
        return 'compares logits and needs teacher_form="logits"'
    if name in OF_LOGITS and form == "three, probs":
        return 'with several teachers it needs ensemble="logits"'
    if name == "dkd" and kind == "none":
        return "needs labels (class indices); got labels=None"
    if name == "dkd" and kind == "probabilities":
        return "needs class indices as labels; got probabilities"
    return None


def check(student: Tensor, teacher: Any, labels: Tensor | None, **options: Any) -> None:
    """Assert that the first six fields and the gradient of fastkd.terms equal the oracle's."""
    weighed = {"hard_weight": 0.3, "soft_weight": 0.9} if labels is not None else {}
    resolved = {**weighed, **options}
    exact_options = {"hard_weight": 0.0, "soft_weight": 1.0, **resolved}
    host = [x.cpu() for x in (teacher if isinstance(teacher, list) else [teacher])]
    on_host = (student.cpu(), host, None if labels is None else labels.cpu())
    exact = oracle.terms(*on_host, **exact_options)
    leaf = student.detach().requires_grad_()
    got = fastkd.terms(leaf, teacher, labels, **resolved)
    acc = compute_dtype(student, host[0])
    size = float(torch.as_tensor(options.get("temperature", 2.0)).max()) ** 2
    size *= max(1.0, float(max(x.double().abs().max() for x in (student, *host)))) ** 2
    for name, ours, theirs in zip(exact._fields, got[:6], exact, strict=True):
        assert ours.dtype == acc, name
        torch.testing.assert_close(
            ours.detach().double().cpu(),
            torch.as_tensor(theirs, dtype=FP64),
            rtol=BOUND[acc],
            atol=BOUND[acc] * size,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    got.loss.sum().backward()
    assert leaf.grad.dtype == student.dtype
    gradient = torch.from_numpy(oracle.gradient(*on_host, **exact_options))
    bound = max(GRAD_BOUND[student.dtype], GRAD_BOUND[acc])
    torch.testing.assert_close(
        leaf.grad.double().cpu(),
        gradient,
        rtol=bound,
        atol=bound * max(float(gradient.abs().max()), 1e-2),
    )


@pytest.mark.parametrize("kind", ["none", "indices", "probabilities"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_equals_numpys(device, name, form, kind):
    labels = make_labels(kind, device)
    message = refusal(name, form, kind)
    # Each reduction and each dtype occurs, but not each pair, since reductions do not depend on
    # dtypes.
    for reduction, dtype in zip(("mean", "sum", "none", "mean"), DTYPES, strict=True):
        student = make((ROWS, CLASSES), dtype, labels=False, device=device).student
        teacher = make_teacher(form, dtype, device)
        options = {"divergence": name, "reduction": reduction, **FORMS[form]}
        if message is None:
            check(student, teacher, labels, **options)
            continue
        with pytest.raises(ValueError, match=re.escape(message)):
            fastkd.loss(student, teacher, labels, **options)


def rows(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, ROWS, dtype=FP64)


OPTIONS: dict[str, dict[str, Any]] = {
    "temperatures": {"temperature": 3.0, "teacher_temperature": 1.5},
    "0-d temperatures": {"temperature": torch.tensor(3.0), "teacher_temperature": 1.5},
    "row temperatures": {"temperature": rows(1, 3), "teacher_temperature": rows(4, 0.5)},
    "row weights": {"hard_weight": rows(0, 2), "soft_weight": rows(1, 0)},
    "one weight a tensor": {"hard_weight": torch.tensor(0.7), "soft_weight": 2.0},
    "smoothing": {"label_smoothing": 0.2},
    "class weights": {"class_weight": torch.linspace(0, 2, CLASSES)},
    "class weights and smoothing": {
        "class_weight": torch.linspace(0.5, 2, CLASSES),
        "label_smoothing": 0.3,
    },
    "normalizer": {"normalizer": 7.0, "class_weight": torch.linspace(0.5, 2, CLASSES)},
    "standardize": {"standardize": True, "temperature": 1.5},
    "ignore_index": {"ignore_index": 3},
}


@pytest.mark.parametrize(  # dkd refuses probabilities as labels
    ("kind", "options", "name"),
    [
        *pairwise(
            ["indices", "probabilities"], OPTIONS, ["forward_kl", "reverse_kl", "jsd", "mse"]
        ),
        *(("indices", options, "dkd") for options in OPTIONS),
    ],
)
def test_options_equal_numpys(device, name, options, kind):
    labels = make_labels(kind, device)
    resolved = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in OPTIONS[options].items()
    }
    if options == "ignore_index" and kind == "indices":
        labels = labels.abs().clamp(max=5)
    student = make((ROWS, CLASSES), FP64, labels=False, device=device).student
    check(student, make_teacher("logits", FP64, device), labels, divergence=name, **resolved)


@pytest.mark.parametrize("mix", [0.05, 0.7])
@pytest.mark.parametrize("name", [n for n in NAMES if reference.DIVERGENCES[n].mix is not None])
def test_every_mix_equals_numpys(device, name, mix):
    student = make((ROWS, CLASSES), FP64, labels=False, device=device).student
    teacher, labels = make_teacher("logits", FP64, device), make_labels("indices", device)
    check(student, teacher, labels, divergence=name, mix=mix)


@pytest.mark.parametrize("form", FORMS)
def test_teacher_temperature_softens_every_form(device, form):
    student = make((ROWS, CLASSES), FP64, labels=False, device=device).student
    teacher = make_teacher(form, FP64, device)
    for name in ("forward_kl", "jsd"):
        check(student, teacher, None, divergence=name, teacher_temperature=1.7, **FORMS[form])


def test_a_standardized_ensemble_equals_numpys(device):
    student = make((ROWS, CLASSES), FP64, labels=False, device=device).student
    for form in ("three, probs", "three, logits"):
        teacher = make_teacher(form, FP64, device)
        check(student, teacher, None, divergence="reverse_kl", standardize=True, **FORMS[form])


def test_a_sequence_of_one_is_one_teacher(device):
    student, teacher, labels = make((4, 7), device=device)
    alone = fastkd.loss(student, teacher, labels)
    assert torch.equal(fastkd.loss(student, (teacher,), labels), alone)
    assert torch.equal(fastkd.loss(student, [teacher], labels, teacher_weights=[3.0]), alone)


# ---- the hard term equals F.cross_entropy


@pytest.mark.parametrize(
    ("reduction", "smoothing", "weighted", "kind"),
    pairwise(["mean", "sum", "none"], [0.0, 0.1, 1.0], [False, True], ["indices", "probabilities"]),
    ids=str,
)
def test_hard_term_is_cross_entropy(device, kind, weighted, smoothing, reduction):
    student = make((ROWS, CLASSES), FP64, labels=False, device=device).student
    labels = make_labels(kind, device)
    weight = torch.linspace(0, 2, CLASSES, dtype=FP64, device=device) if weighted else None
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    options = {"label_smoothing": smoothing, "reduction": reduction}
    got = fastkd.loss(
        ours, student, labels, hard_weight=1.0, soft_weight=0.0, class_weight=weight, **options
    )
    expected = F.cross_entropy(theirs, labels, weight=weight, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_labels_without_weight_give_zero(device):
    student, teacher, labels = make((3, 4), device=device)
    weight = torch.zeros(4, device=device)
    got = fastkd.loss(student, teacher, labels, class_weight=weight, alpha=1.0)
    assert got == 0


def test_class_weights_work_in_place_and_for_pixels(device):
    student, teacher, _ = make((2, 7, 5, 3), device=device, labels=False)
    labels = torch.randint(7, (2, 5, 3), generator=torch.Generator().manual_seed(3)).to(device)
    labels[0, 0] = -100
    options: dict[str, Any] = {
        "class_weight": torch.linspace(0, 2, 7, device=device),
        "hard_weight": torch.linspace(0.5, 1, 30, device=device).view(2, 5, 3),
        "soft_weight": 0.5,
    }
    results = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        logits = leaf * 1
        got = fastkd.terms(logits, teacher, labels, dim=1, inplace=inplace, **options)
        got.loss.backward()
        results.append((torch.stack(got[:6]), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    leaf = student.clone().requires_grad_()
    exact = reference.terms(leaf, teacher, labels, dim=1, **options)
    exact.loss.backward()
    torch.testing.assert_close(results[0], (torch.stack(exact[:6]), leaf.grad))


# ---- classes in dim 1, slices of padded classes


@pytest.mark.parametrize(
    ("kind", "reduction", "name", "shape"),
    pairwise(
        ["none", "indices", "probabilities"],
        ["mean", "none"],
        ["forward_kl", "jsd"],
        [(2, 3), (2, 3, 4), (2, 3, 4, 5)],
    ),
    ids=str,
)
def test_classes_may_be_in_dimension_1(device, shape, name, reduction, kind):
    student, teacher, _ = make(shape, device=device, labels=False)
    last = (shape[0], *shape[2:], shape[1])
    labels = None
    if kind == "indices":
        labels = make(last, device=device).labels
    if kind == "probabilities":
        labels = make(shape, device=device, seed=4).student.softmax(1)
    options = {"divergence": name, "reduction": reduction}
    ours, theirs = student.clone().requires_grad_(), student.movedim(1, -1).clone()
    theirs.requires_grad_()
    moved = labels.movedim(1, -1) if kind == "probabilities" else labels
    got = fastkd.loss(ours, teacher, labels, dim=1, **options)
    expected = fastkd.loss(theirs, teacher.movedim(1, -1).contiguous(), moved, **options)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.movedim(-1, 1))
    assert ours.grad.shape == shape


def test_hard_term_in_dimension_1_is_cross_entropy(device):
    student, teacher, _ = make((2, 5, 3, 4), FP64, device=device, labels=False)
    labels = make((2, 3, 4, 5), FP64, device=device).labels
    got = fastkd.loss(student, teacher, labels, dim=1, hard_weight=1.0, soft_weight=0.0)
    torch.testing.assert_close(got, F.cross_entropy(student, labels))


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("extra", [(0, 2), (3, 0), (1, 1)])
def test_slices_of_padded_classes_are_supported(device, extra, name):
    student, teacher, labels = make((4, 7), device=device)
    padded = [
        F.pad(x, (0, more), value=50.0) for x, more in zip((student, teacher), extra, strict=True)
    ]
    leaf, unpadded_leaf = padded[0].requires_grad_(), student.clone().requires_grad_()
    options = {"divergence": name, "class_weight": torch.ones(7, device=device)}
    got = fastkd.loss(leaf[:, :7], padded[1][:, :7], labels, **options)
    expected = fastkd.loss(unpadded_leaf, teacher, labels, **options)
    torch.testing.assert_close(got, expected)
    got.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad[:, :7], unpadded_leaf.grad)
    assert (leaf.grad[:, 7:] == 0).all()


def test_slices_of_padded_classes_in_dimension_1_are_supported(device):
    student, teacher, _ = make((2, 6, 3), device=device, labels=False)
    got = fastkd.loss(student[:, :4], teacher[:, :5][:, :4], dim=1)
    sliced = [logits[:, :4].contiguous() for logits in (student, teacher)]
    torch.testing.assert_close(got, fastkd.loss(*sliced, dim=1))


# ---- calls with kernels


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels_are", ["probabilities", "indices"])
def test_kernels_compute_targets(labels_are, reduction, monkeypatch):
    # Probabilities as labels, and smoothed class weights, need a second pass of the kernels. The
    # patch makes the reference fail.
    student, teacher, labels = make((3, ROWS, CLASSES), ignored=0.3)
    options: dict[str, Any] = {"class_weight": torch.rand(CLASSES) + 0.1, "label_smoothing": 0.1}
    options |= {"reduction": reduction, "hard_weight": torch.rand(3, ROWS), "soft_weight": 0.3}
    if labels_are == "probabilities":
        labels = torch.rand(student.shape) * 2
    leaf = student.requires_grad_()
    expected = reference.terms(leaf.double(), teacher.double(), labels, **options)
    (gradient,) = torch.autograd.grad(expected.loss.sum(), leaf)
    monkeypatch.setattr(reference, "terms", None)
    got = fastkd.terms(leaf, teacher, labels, **options)
    got.loss.sum().backward()
    for field, double in zip(got[:6], expected[:6], strict=True):
        torch.testing.assert_close(field.double(), double, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=2e-5, atol=2e-7)
    with pytest.raises(ValueError, match="inplace"):
        fastkd.loss(leaf * 1, teacher, labels, **options, inplace=True)


def test_second_derivatives_of_targets_equal_finite_differences():
    student, teacher, labels = make((3, CLASSES), FP64, ignored=0.0)
    smoothed = {"class_weight": torch.rand(CLASSES) + 0.1, "label_smoothing": 0.1}
    for target, options in ((torch.rand(student.shape), {}), (labels, smoothed)):

        def function(z: Tensor, target: Tensor = target, options: Any = options) -> Tensor:
            return fastkd.loss(z, teacher, target, **options)

        assert torch.autograd.gradcheck(function, student.requires_grad_())
        assert torch.autograd.gradgradcheck(function, student.requires_grad_())


def test_labels_need_not_be_probabilities(device):
    # F.cross_entropy, too, accepts labels whose rows do not sum to 1.
    student, teacher, _ = make((ROWS, CLASSES), device=device, labels=False)
    labels = torch.rand(student.shape, device=device)
    labels[0], labels[1, 2] = 0, -0.5
    got = fastkd.loss(student, teacher, labels, hard_weight=1.0, soft_weight=0.0)
    torch.testing.assert_close(got, F.cross_entropy(student, labels))


FUSED_CALLS = {
    "temperatures": {"temperature": 3.0, "teacher_temperature": 1.5},
    "row temperatures": {"temperature": rows(1, 3).float(), "teacher_temperature": 2.0},
    "log_probs": {"teacher_form": "log_probs"},
    "probs": {"teacher_form": "probs"},
    "two": {"ensemble": "probs", "teacher_weights": [2.0, 1.0]},
    "two in logits": {"ensemble": "logits"},
}


@pytest.mark.parametrize("options", FUSED_CALLS)
def test_teachers_in_other_forms_stay_fused(device, options, monkeypatch):
    # The patch makes the reference fail, so kernels must compute the call.
    student, teacher, labels = make((ROWS, CLASSES), device=device)
    resolved: dict[str, Any] = {
        k: v.to(device) if isinstance(v, Tensor) else v for k, v in FUSED_CALLS[options].items()
    }
    teachers: Any = [teacher, student.flip(0)] if "two" in options else teacher
    if options == "probs":
        teachers = teacher.softmax(-1)
    leaf = student.requires_grad_()
    expected = reference.loss(
        leaf.double(), [x.double() for x in teachers] if "two" in options else teachers.double(),
        labels, **resolved,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(expected, leaf)
    monkeypatch.setattr(reference, "terms", None)
    got = fastkd.loss(leaf, teachers, labels, **resolved)
    got.backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-6)
