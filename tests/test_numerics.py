"""Test inputs on which simple code cancels or overflows, such as huge or masked logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FLOOR,
    FP16,
    FP32,
    FP64,
    ROUNDING,
    assert_grad,
    assert_value,
    compute_dtype,
    distance,
    eager,
    make,
    name_of,
    pairwise,
    truth,
)
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import _C

INF, NAN = math.inf, math.nan
CLASSES = 32000


def make_near(
    kl: float, device: torch.device, *, rows: int = 4, classes: int = CLASSES
) -> tuple[Tensor, Tensor]:
    """Make float32 logits whose KL divergence is about ``kl`` in each row at temperature 1."""
    student, noise, _ = make((rows, classes), FP32, device=device, labels=False, spread=1.0)
    # To leading order, the KL is half the variance of the difference of the logits.
    return student * 3.0, student * 3.0 + noise * math.sqrt(2 * kl)


@pytest.mark.parametrize("kl", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 5e-7, 1e-7, 1e-8])
def test_divergence_is_exact_near_the_teacher(device, kl):
    student, teacher = make_near(kl, device)
    exact = truth(student, teacher, temperature=1.0, reduction="none")
    assert ((exact.loss > kl / 2) & (exact.loss < kl * 2)).all()
    leaf = student.requires_grad_()
    rows = fastkd.loss(leaf, teacher, temperature=1.0, reduction="none")
    assert float((rows.detach() / exact.loss - 1).abs().max()) <= 2e-6
    rows.sum().backward()
    # The kernels subtract the teacher's from the student's probabilities without cancellation. The
    # gradient's error is the rounding of the row's normalizer: a unit in the last place of the
    # teacher's probabilities. Eager PyTorch has a rounding error in each class.
    error = distance(leaf.grad, exact.grad)
    assert error <= 2 * FLOOR[FP32] * float(teacher.double().softmax(-1).norm())
    theirs = eager(student, teacher, temperature=1.0, reduction="sum")[1]
    assert error <= distance(theirs, exact.grad)


def rows_of(leaf: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """Return row losses after a backward pass; assert that no_grad gives equal losses."""
    rows = fastkd.loss(leaf, teacher, **options)
    rows.sum().backward()
    with torch.no_grad():
        assert torch.equal(rows, fastkd.loss(leaf, teacher, **options))
    return rows.detach()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 4.0])
@pytest.mark.parametrize("classes", [300, CLASSES])
def test_divergence_is_exact_by_either_formula(device, classes, temperature):
    # The KLs lie below and above the bound of well-separated rows (docs/maths.md, section 3).
    options = {"temperature": temperature, "reduction": "none"}
    worst, errors = [0.0, 0.0], [0.0, 0.0]
    for kl in (0.03, 0.05, 0.08, 0.3, 2.0):
        student, teacher = make_near(kl * temperature**2, device, rows=16, classes=classes)
        exact = truth(student, teacher, **options)
        leaf = student.requires_grad_()
        rows = rows_of(leaf, teacher, **options)
        of_eager = eager(student, teacher, **options)
        for i, (values, grad) in enumerate(((rows, leaf.grad), of_eager)):
            worst[i] = max(worst[i], float((values / exact.loss - 1).abs().max()))
            errors[i] += distance(grad, exact.grad) ** 2
    assert worst[0] <= min(5e-6, worst[1])
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5, 4.0])
@pytest.mark.parametrize("classes", [300, CLASSES])
def test_reverse_kl_is_exact_by_either_formula(device, classes, temperature):
    # The CPU kernels use one formula if the sum of slopes is well above 0, and else another formula
    # (is_sum_of_slopes in csrc/cpu/row.h).
    options = {"divergence": "reverse_kl", "temperature": temperature, "reduction": "none"}
    for kl in (1e-5, 0.03, 0.05, 0.08, 0.3, 2.0):
        student, teacher = make_near(kl * temperature**2, device, rows=16, classes=classes)
        exact = truth(student, teacher, **options)
        leaf = student.requires_grad_()
        rows = rows_of(leaf, teacher, **options)
        assert float((rows / exact.loss - 1).abs().max()) <= 5e-6
        assert distance(leaf.grad, exact.grad) <= 2e-6 * float(exact.grad.norm())


@pytest.mark.parametrize("share", [0.04, 0.06, 0.125, 0.5, 1.5])
@pytest.mark.parametrize("classes", [300, 1000, CLASSES])
def test_divergence_is_exact_for_one_class_above_equal_classes(device, classes, share):
    # For these logits, all additions of a sum can round in one direction.
    teacher = torch.zeros(1, classes, device=device)
    student = teacher.clone()
    student[0, 7] = math.log(math.expm1(share) * classes)
    options = {"temperature": 1.0, "reduction": "none"}
    exact = truth(student, teacher, **options)
    leaf = student.requires_grad_()
    rows = fastkd.loss(leaf, teacher, **options)
    rows.sum().backward()
    assert float(rows.detach() / exact.loss - 1) == pytest.approx(0, abs=5e-6)
    assert distance(leaf.grad, exact.grad) <= 1e-6 * float(exact.grad.norm())


@pytest.mark.parametrize(
    ("mix", "apart", "classes"),
    pairwise([0.5, 0.3], [3.0, 1.0, 0.3, 0.1, 0.01, 0.001], [10, 1000, CLASSES]),
    ids=str,
)
def test_jsd_is_exact_near_and_far(device, classes, apart, mix):
    # The kernels use a series near the teacher, and a logarithm elsewhere.
    student, teacher = make_near(apart**2 / 2, device, classes=classes)
    options = {"divergence": "jsd", "mix": mix, "temperature": 1.0, "reduction": "none"}
    exact = truth(student, teacher, **options)
    leaf = student.requires_grad_()
    rows = fastkd.loss(leaf, teacher, **options)
    assert float((rows.detach() / exact.loss - 1).abs().max()) <= (1e-5 if classes == 10 else 2e-6)
    rows.sum().backward()
    assert distance(leaf.grad, exact.grad) <= 1e-6 * float(exact.grad.norm())


@pytest.mark.parametrize("kl", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("classes", [10, 100, CLASSES])
def test_dkd_is_exact_near_the_teacher(device, classes, kl):
    student, teacher = make_near(kl, device, rows=16, classes=classes)
    labels = torch.arange(16) % classes
    options = {"temperature": 1.0, "divergence": "dkd", "hard_weight": 0.0, "soft_weight": 1.0}
    exact = truth(student, teacher, labels, reduction="none", **options)
    leaf = student.requires_grad_()
    rows = fastkd.loss(leaf, teacher, labels, reduction="none", **options)
    # The rounding error of a row's sum of exponentials adds half of the error's square to the loss.
    floor = torch.finfo(FP32).eps ** 2 / 2
    # Measured on a CPU in December 2026 for kl = 1e-8 (60 draws of 64 rows of 10 classes): the
    # largest error was 29 times the floor.
    torch.testing.assert_close(rows.detach().double(), exact.loss, rtol=4e-6, atol=30 * floor)
    rows.sum().backward()
    # Rounding the normalizers gives the gradient an error of a unit in the last place of the
    # probabilities.
    others = teacher.double().softmax(-1)
    share = 1 - others.gather(-1, labels.unsqueeze(-1))
    others = others.scatter(-1, labels.unsqueeze(-1), 0) / share
    assert distance(leaf.grad, exact.grad) <= 2 * FLOOR[FP32] * 9 * float(others.norm())


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("classes", [10, 100, CLASSES])
def test_cosine_is_exact_near_the_teacher(device, classes, distance):
    student, teacher = make_near(distance**2 / 2, device, rows=16, classes=classes)
    leaf, exact_leaf = student.requires_grad_(), student.detach().double().requires_grad_()
    rows = fastkd.loss(leaf, teacher, divergence="cosine", temperature=1.0, reduction="none")
    u = F.normalize(exact_leaf, dim=-1)
    exact = (u - F.normalize(teacher.double(), dim=-1)).square().sum(-1) / 2
    # The distance of the two unit vectors multiplies the vectors' rounding errors.
    off = (rows.detach().double() - exact.detach()).abs()
    assert (off <= 2e-6 * exact.detach() + FLOOR[FP32] * (2 * exact.detach()).sqrt()).all()
    rows.sum().backward()
    exact.sum().backward()
    length = exact_leaf.detach().norm(dim=-1).min()
    assert_grad(leaf.grad, exact_leaf.grad, FP32, weight=float(1 / length))


@pytest.mark.parametrize("gap", [30.0, 150.0, 1500.0])
@pytest.mark.parametrize("classes", [10, 1000])
def test_dkd_is_exact_for_labels_far_above_or_below_the_rest(device, classes, gap):
    # For the larger gaps, the label's exponential overflows or underflows relative to the other
    # classes' exponentials.
    student, teacher, _ = make((4, classes), FP32, device=device, labels=False)
    labels = torch.tensor([0, 3, 5, classes - 1], device=device)
    signs = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], device=device)
    rows = torch.arange(4, device=device)
    student[rows, labels] += gap * signs[0]
    teacher[rows, labels] += gap * signs[1]
    options = {"divergence": "dkd", "reduction": "none", "temperature": 1.0}
    exact = truth(student, teacher, labels, label_smoothing=0.1, **options)
    leaf = student.requires_grad_()
    got = fastkd.terms(leaf, teacher, labels, label_smoothing=0.1, **options)
    for ours, theirs in zip(got, exact.terms, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs, rtol=2e-6, atol=2e-6)
    got.loss.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("log_target", [False, True])
def test_torchs_kl_div_is_wrong_where_fastkd_is_exact(log_target):
    student, teacher = make_near(5e-7, torch.device("cpu"), rows=8)
    exact = truth(student, teacher, temperature=1.0, reduction="none").loss
    target = F.log_softmax(teacher, -1) if log_target else F.softmax(teacher, -1)
    theirs = F.kl_div(F.log_softmax(student, -1), target, reduction="none", log_target=log_target)
    ours = fastkd.loss(student, teacher, temperature=1.0, reduction="none")
    assert float((theirs.sum(-1) / exact - 1).abs().mean()) > 0.1
    assert float((ours / exact - 1).abs().max()) <= 2e-6


@pytest.mark.parametrize("student_dtype", [FP32, FP64], ids=name_of)
def test_divergence_is_exact_near_the_teacher_in_double(device, student_dtype):
    student, teacher = make_near(1e-8, device)
    student = student.to(student_dtype)
    teacher = student.double() + (teacher.double() - student.double())
    exact = truth(student, teacher, temperature=1.0)
    got = fastkd.loss(student, teacher, temperature=1.0)
    # The truth itself cancels in float64: the terms p (log p - log q) add up to 1e-8, and their
    # magnitudes add up to 1e-4.
    assert float(got) == pytest.approx(float(exact.loss), rel=1e-7)


@pytest.mark.parametrize(
    ("dtype", "temperature", "classes"),
    pairwise(DTYPES, [0.5, 1.0, 2.0, 3.0, 20.0], [2, 33, 5001]),
    ids=str,
)
def test_equal_logits_have_no_divergence(device, classes, temperature, dtype):
    student, _, _ = make((6, classes), dtype, device=device, labels=False)
    rows = fastkd.loss(student, student, temperature=temperature, reduction="none")
    assert (rows >= 0).all() and (rows < 1e-12).all()
    leaf = student.clone().requires_grad_()
    fastkd.loss(leaf, student, temperature=temperature).backward()
    assert float(leaf.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_a_kl_is_never_negative(device, dtype):
    for step in range(8):
        student, noise, _ = make((64, 257), dtype, device=device, labels=False, seed=step)
        teacher = (student.double() + noise.double() * 10.0**-step).to(dtype)
        for temperature in (1.0, 3.0):
            rows = fastkd.loss(student, teacher, temperature=temperature, reduction="none")
            assert (rows >= 0).all()


# ---- gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 4.0, "alpha": 0.1}, {"alpha": 1.0}], ids=str
)
def test_gradient_errors_are_at_most_eagers(device, options, dtype):
    problem = make((16, 4000), dtype, device=device)
    exact = truth(*problem, **options).grad
    leaf = problem.student.detach().requires_grad_()
    fastkd.loss(leaf, *problem[1:], **options).backward()
    error = distance(leaf.grad, exact)
    if dtype in (BF16, FP16):
        assert error <= ROUNDING * distance(exact.to(dtype), exact)
    else:
        assert_grad(leaf.grad, exact, dtype)
    if dtype is FP32:  # the bound is eager's error plus a unit in the last place
        _, theirs = eager(*problem, **options)
        assert error <= distance(theirs, exact) + FLOOR[dtype] * float(exact.norm())


@pytest.mark.parametrize(
    ("shape", "temperature", "alpha"),
    pairwise(
        [(8, 10), (512, 19), (37, 100), (16, 1000)], [1.0, 2.0, 4.0, 7.0], [0.0, 0.5, 0.9, 1.0]
    ),
    ids=str,
)
def test_gradient_error_of_few_classes_is_below_eagers(shape, temperature, alpha):
    # The test compares root mean squares, since the rounding of 1 / rows may decide a single
    # comparison.
    ours, theirs = [], []
    for seed in range(12):
        problem = make(shape, FP32, seed=seed)
        options = {"temperature": temperature, "alpha": alpha}
        exact = truth(*problem, **options).grad
        leaf = problem.student.detach().requires_grad_()
        fastkd.loss(leaf, *problem[1:], **options).backward()
        ours.append(distance(leaf.grad, exact) / float(exact.norm()))
        theirs.append(distance(eager(*problem, **options)[1], exact) / float(exact.norm()))
    assert math.hypot(*ours) <= math.hypot(*theirs)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_a_loss_scale_keeps_small_16_bit_gradients(device, scale, reduction, dtype):
    # Without a loss scale of 65536, gradients of the mean would be below float16's normal range.
    student, teacher, labels = make((64, 32000), dtype, device=device, spread=1.0)
    options = {"temperature": 4.0, "alpha": 0.1, "reduction": reduction}
    exact = truth(student, teacher, labels, **options).grad * scale
    if dtype is FP16 and reduction == "mean" and scale == 65536.0:
        lost = (exact / scale).to(FP16).double() * scale
        assert distance(lost, exact) > 5 * distance(exact.to(FP16), exact)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, **options)
    (value.sum() * scale).backward()
    limit = ROUNDING * distance(exact.to(dtype), exact)
    assert distance(leaf.grad, exact) <= limit + FLOOR[FP32] * float(exact.norm())


# ---- the exponential


def _exp2(values, by_registers):
    """Compute 2 to the power of values by the kernels' exponential."""
    result = np.array(values, dtype=np.float32)
    _C.exp2_(result, by_registers)
    return result


@pytest.mark.parametrize("by_registers", [False, True])
def test_exp2_is_exact_over_its_range(isa, by_registers):
    # The values are every 97th float in [-126, 128), and integers and halves with the floats next
    # to them. The bound, in ulp, is largest for the x86 baseline, which has no FMA.
    bound = 1.3 if isa == "default" else 1.2 if isa == "avx2" and by_registers else 1.0
    bits = np.arange(0, 0x43000000, 97, dtype=np.uint32)
    positive = bits.view(np.float32)
    negative = -positive[positive <= 126]
    edges = np.arange(-126, 128, dtype=np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, -INF), np.nextafter(edges, INF)])
    halves = np.arange(-125.5, 127.5, dtype=np.float32)
    halves = np.concatenate([halves, np.nextafter(halves, -INF), np.nextafter(halves, INF)])
    worst = 0.0
    for values in (positive, negative, edges[(edges >= -126) & (edges < 128)], halves):
        for part in np.array_split(values, max(1, len(values) // 2**20)):
            exact = np.exp2(part.astype(np.float64))
            ulp = np.exp2(np.floor(part.astype(np.float64)) - 23)
            got = _exp2(part, by_registers).astype(np.float64)
            worst = max(worst, float((np.abs(got - exact) / ulp).max()))
    assert worst <= bound


@pytest.mark.parametrize("by_registers", [False, True])
def test_exp2_saturates_beyond_its_range(isa, by_registers):
    assert (_exp2([-126.00001, -127, -149, -1000, -3e38, -INF], by_registers) == 0).all()
    assert _exp2([0.0, -0.0], by_registers).tolist() == [1.0, 1.0]
    assert np.isnan(_exp2([NAN], by_registers)).all()
    with pytest.raises(ValueError, match="contiguous dimension of float32"):
        _C.exp2_(np.zeros(4), by_registers)


# ---- masked classes

MASKS = {
    "teacher": (False, True),
    "student": (True, False),
    "both": (True, True),
}


@pytest.mark.parametrize(
    ("dtype", "side", "classes", "reduction"),
    pairwise(DTYPES, MASKS, [5, 40, 1500, 20000], ["mean", "none"]),
    ids=str,
)
def test_masked_classes_give_exact_values(device, side, classes, dtype, reduction):
    student, teacher, labels = make((6, classes), dtype, device=device, ignored=0.0)
    columns = torch.arange(classes, device=device) % 3 == 1
    labels = torch.where(labels % 3 == 1, labels - 1, labels)  # never a masked class
    masked_student, masked_teacher = MASKS[side]
    if masked_student:
        student = student.masked_fill(columns, -INF)
    if masked_teacher:
        teacher = teacher.masked_fill(columns, -INF)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, reduction=reduction)
    value.sum().backward()
    if side == "student":
        # The teacher's probability of the masked classes makes the loss infinite.
        assert (value == INF).all()
        assert leaf.grad.isfinite().all()
        # The KL's gradient q - p holds in the limit, also where q = 0.
        p = teacher.double().div(2).softmax(-1)
        q = student.detach().double().div(2).softmax(-1)
        hard = student.detach().double().softmax(-1) - F.one_hot(labels, classes)
        exact = 0.5 * 2 * (q - p) + 0.5 * hard
        exact = exact / 6 if reduction == "mean" else exact
        assert_grad(leaf.grad, exact, compute_dtype(student, teacher))
        return
    exact = truth(student, teacher, labels, reduction=reduction)
    assert exact.grad.isfinite().all()
    assert_value(value, exact, compute_dtype(student, teacher))
    assert_grad(leaf.grad, exact.grad, compute_dtype(student, teacher))
    if masked_student:
        assert (leaf.grad[:, columns] == 0).all()


def test_masked_label_costs_infinity(device):
    student = torch.tensor([[0.0, -INF, 1.0]], device=device, requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 2.0]], device=device)
    value = fastkd.loss(student, teacher, torch.tensor([1], device=device))
    assert value == INF
    value.backward()
    assert student.grad.isfinite().all()


def test_a_term_without_weight_may_be_infinite(device):
    student = torch.tensor([[0.0, -INF, 1.0]], device=device)
    teacher = torch.tensor([[0.0, 1.0, 2.0]], device=device)
    label = torch.tensor([0], device=device)
    exact = F.cross_entropy(student, label)
    torch.testing.assert_close(fastkd.loss(student, teacher, label, alpha=1.0), exact)
    masked = torch.tensor([1], device=device)
    assert fastkd.loss(teacher, teacher, masked, alpha=0.0) == 0
    assert fastkd.loss(student, teacher, masked, hard_weight=0.0, soft_weight=0.0) == 0


@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_rows_without_any_class_are_nan(device, masked):
    # A row of -inf has no softmax.
    student, teacher, labels = make((5, 70), device=device, ignored=0.0)
    if masked != "teacher":
        student[2] = -INF
    if masked != "student":
        teacher[2] = -INF
    rows = fastkd.loss(student, teacher, labels, reduction="none")
    assert rows.isnan().tolist() == [False, False, True, False, False]


# ---- NaN and infinite logits


@pytest.mark.parametrize(
    ("dtype", "bad", "side", "classes"),
    pairwise(DTYPES, [NAN, INF], ["student", "teacher"], [10, 200, 3000, 40000]),
    ids=str,
)
def test_nan_and_inf_stay_in_their_row(device, side, bad, classes, dtype):
    rows = 5
    student, teacher, labels = make((rows, classes), dtype, device=device, ignored=0.0)
    clean = student.clone().requires_grad_()
    expected = fastkd.loss(clean, teacher, labels, reduction="none")
    expected.sum().backward()
    # The first, middle and last class lie in different threads, vectors or remainders.
    for column in (0, classes // 2, classes - 1):
        inputs = {"student": student.clone(), "teacher": teacher.clone()}
        inputs[side][2, column] = bad
        leaf = inputs["student"].requires_grad_()
        value = fastkd.loss(leaf, inputs["teacher"], labels, reduction="none")
        value.sum().backward()
        others = [0, 1, 3, 4]
        assert value[2].isnan() and leaf.grad[2].isnan().all()
        assert torch.equal(value[others], expected.detach()[others])
        assert torch.equal(leaf.grad[others], clean.grad[others])
        for reduction in ("mean", "sum"):
            again = inputs["student"].detach().requires_grad_()
            total = fastkd.loss(again, inputs["teacher"], labels, reduction=reduction)
            total.backward()
            assert total.isnan()
            assert again.grad[2].isnan().all() and again.grad[others].isfinite().all()
    if side == "teacher":
        # A soft weight of 0 does not hide the teacher's NaN or +inf.
        assert fastkd.loss(student, inputs["teacher"], labels, alpha=1.0).isnan()


@pytest.mark.parametrize("classes", [10, 200, 3000])
def test_ignored_rows_may_hold_anything(device, classes):
    student, teacher, labels = make((6, classes), device=device, ignored=0.0)
    labels[1::2] = -100
    expected = fastkd.loss(student, teacher, labels)
    student[1::2], teacher[1::2] = NAN, INF
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels)
    value.backward()
    assert torch.equal(value, expected)
    assert torch.equal(leaf.grad[1::2], torch.zeros(3, classes, device=device))


# ---- huge logits


@pytest.mark.parametrize(
    ("dtype", "size"),
    [*((dtype, 1e4) for dtype in DTYPES), (FP32, 1e38), (BF16, 1e38), (FP64, 1e38)],
    ids=str,
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_offsets_change_nothing(device, sign, size, dtype):
    student, teacher, labels = make((5, 100), dtype, device=device)
    student, teacher = student + sign * size, teacher - sign * size
    exact = truth(student, teacher, labels)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels)
    value.backward()
    assert_value(value, exact, compute_dtype(student, teacher))
    assert_grad(leaf.grad, exact.grad, compute_dtype(student, teacher))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=name_of)
@pytest.mark.parametrize("size", [1e4, 1e38])
def test_huge_differences_are_finite(device, size, dtype):
    # Nearly one-hot rows have a loss as large as the logits, and gradients of at most 1 in a class.
    student, teacher, labels = make((5, 100), dtype, device=device, spread=size / 4)
    exact = truth(student, teacher, labels, temperature=1.0, reduction="none")
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, temperature=1.0, reduction="none")
    assert not value.isnan().any()
    torch.testing.assert_close(value.double(), exact.loss, rtol=1e-6, atol=0)
    value.sum().backward()
    assert_grad(leaf.grad, exact.grad, compute_dtype(student, teacher))


@pytest.mark.parametrize(
    ("dtype", "classes", "temperature"),
    pairwise(DTYPES, [49, 1500, 40000], [1.0, 2.0, 2.5]),
    ids=str,
)
def test_probabilities_may_underflow(device, classes, temperature, dtype):
    # Some exponentials underflow only after the division by a large sum.
    student, teacher, _ = make((16, classes), dtype, device=device, spread=0.1)
    depth = (690, 750) if dtype == FP64 else (70, 110)
    student[:, 3] = -temperature * torch.linspace(*depth, 16, device=device).to(dtype)
    teacher[:, classes // 2] = -temperature * torch.linspace(*depth, 16, device=device).to(dtype)
    labels = torch.full((16,), 5, device=device)
    exact = truth(student, teacher, labels, temperature=temperature)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, temperature=temperature)
    value.backward()
    assert_value(value, exact, compute_dtype(student, teacher))
    assert_grad(leaf.grad, exact.grad, compute_dtype(student, teacher))


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 100.0, 1e4])
def test_extreme_temperatures_are_finite(device, temperature):
    student, teacher, labels = make((5, 100), FP32, device=device)
    exact = truth(student, teacher, labels, temperature=temperature)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, temperature=temperature)
    value.backward()
    assert value.isfinite()
    torch.testing.assert_close(value.double(), exact.loss, rtol=1e-5, atol=1e-9)
    assert distance(leaf.grad, exact.grad) <= 1e-4 * float(exact.grad.norm())
