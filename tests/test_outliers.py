"""Test that outliers and constant option tensors cost no accuracy; no divergence is negative."""

import pytest
import torch
from support import BF16, FP16, FP32, FP64, make, name_of, pairwise, truth

import fastkd

SQUARED = ["mse", "centered_mse"]
CLASSES = [7, 100, 144, 145, 3000]


def errors(divergence, student, teacher, **options):
    """Return (relative errors of row losses, errors of the gradient, magnitudes of the true
    gradient).
    """
    options = {"divergence": divergence, "reduction": "none", "temperature": 1.5, **options}
    exact = truth(student, teacher, **options)
    leaf = student.clone().requires_grad_()
    value = fastkd.loss(leaf, teacher, **options)
    value.sum().backward()
    grad = (leaf.grad.double() - exact.grad).abs()
    return (value.detach().double() / exact.loss - 1).abs(), grad, exact.grad.abs()


@pytest.mark.parametrize(
    ("classes", "size_of_one", "teacher_temperature"),
    pairwise(CLASSES, [1e4, 1e6, 1e8, -1e8], [None, 0.7]),
    ids=str,
)
def test_squared_error_is_exact_with_an_outlier(device, classes, size_of_one, teacher_temperature):
    # Subtracting the row's maximum, as a softmax does, would round away digits of other classes.
    student, teacher, _ = make((6, classes), device=device, labels=False)
    student[:, classes // 2] = size_of_one
    value, grad, size = errors("mse", student, teacher, teacher_temperature=teacher_temperature)
    assert float(value.max()) < 1e-6
    rest = student.abs() < 100
    # With two temperatures, the difference has the rounding errors of two quotients of up to 20.
    limit = 4e-7 * size + (0 if teacher_temperature is None else 20 * 2e-7 * 2 / classes)
    assert bool((grad <= limit)[rest].all())


@pytest.mark.parametrize(
    ("classes", "size_of_one", "teacher_temperature"),
    pairwise(CLASSES, [1e4, 1e6, 1e8, -1e8], [None, 0.7]),
    ids=str,
)
def test_centered_squared_error_is_exact_with_an_outlier(
    device, classes, size_of_one, teacher_temperature
):
    # A mean of squares minus a squared mean would cancel.
    student, teacher, _ = make((6, classes), device=device, labels=False)
    student[:, classes // 2] = size_of_one
    value, grad, size = errors(
        "centered_mse", student, teacher, teacher_temperature=teacher_temperature
    )
    assert float(value.max()) < 1e-6
    # The outlier makes the mean large, and each class is compared with the mean.
    scale = (20 + abs(size_of_one) / classes) * 2 / classes
    assert bool((grad <= 1e-6 * (size + scale)).all())


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("classes", CLASSES)
def test_centered_squared_error_is_exact_if_logits_differ_by_a_constant(device, classes, dtype):
    student, noise, _ = make((6, classes), FP64, device=device, labels=False)
    student = student.to(dtype)
    teacher = (student.double() + 1e-2 * noise + 1000).to(dtype if dtype is FP64 else FP32)
    value, _, _ = errors("centered_mse", student, teacher)
    assert float(value.max()) < (1e-10 if dtype is FP64 else 1e-4)
    leaf, exact = (
        student.clone().requires_grad_(),
        truth(student, teacher, divergence="centered_mse"),
    )
    fastkd.loss(leaf, teacher, divergence="centered_mse").backward()
    rounding = (exact.grad.to(dtype).double() - exact.grad).norm()
    limit = 2e-5 if dtype is not FP64 else 1e-11
    assert float((leaf.grad.double() - exact.grad).norm() - 1.5 * rounding) <= limit * float(
        exact.grad.norm()
    )


@pytest.mark.parametrize(
    ("dtype", "classes", "divergence"),
    pairwise([FP32, BF16], CLASSES, ["mse", "centered_mse", "forward_kl", "reverse_kl", "jsd"]),
    ids=str,
)
def test_an_outlier_costs_no_accuracy_in_any_dtype_or_pass(device, divergence, classes, dtype):
    student, teacher, labels = make((6, classes), dtype, device=device, ignored=0.0)
    student[:, classes // 2] = 3e4
    exact = truth(student, teacher, labels, divergence=divergence, reduction="sum")
    leaf = student.clone().requires_grad_()
    total = fastkd.loss(leaf, teacher, labels, divergence=divergence, reduction="sum")
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second)
    torch.testing.assert_close(total.double(), exact.loss, rtol=1e-6, atol=0)
    rounding = (exact.grad.to(dtype).double() - exact.grad).norm()
    assert float((first.double() - exact.grad).norm()) <= 1.5 * float(rounding) + 1e-6 * float(
        exact.grad.norm()
    )


ROWS = 20
NEUTRAL = {
    "row weights": lambda classes: {"soft_weight": torch.ones(ROWS)},
    "temperatures of rows": lambda classes: {"temperature": torch.full((ROWS,), 3.0)},
    "equal temperatures": lambda classes: {
        "temperature": torch.full((ROWS,), 3.0),
        "teacher_temperature": torch.full((ROWS,), 3.0),
    },
    "class_weight": lambda classes: {"class_weight": torch.ones(classes)},
}


@pytest.mark.parametrize(
    ("offset", "classes", "row_tensors"),
    pairwise([0.0, 20.0], [3, 10, 100, 144, 145, 1000], NEUTRAL),
    ids=str,
)
def test_row_tensors_that_change_nothing_cost_no_accuracy(device, row_tensors, classes, offset):
    # The baseline call has no tensor among its options.
    teacher, noise, labels = make((ROWS, classes), device=device, ignored=0.0)
    teacher += offset
    student = teacher + 1e-3 * noise
    options = {"temperature": 3.0, "reduction": "none", "hard_weight": 0.0, "soft_weight": 1.0}
    exact = truth(student, teacher, labels, **options)
    baseline = fastkd.loss(student, teacher, labels, **options)
    tensors = {name: value.to(device) for name, value in NEUTRAL[row_tensors](classes).items()}
    value = fastkd.loss(student, teacher, labels, **{**options, **tensors})
    error = ((value.double() - exact.loss) / exact.loss).abs().max()
    of_baseline = ((baseline.double() - exact.loss) / exact.loss).abs().max()
    assert float(error) <= 2 * float(of_baseline) + 2e-7


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("divergence", [d for d in fastkd.divergences() if d != "dkd"])
@pytest.mark.parametrize("classes", [2, 3, 200])
def test_a_divergence_is_never_negative(device, divergence, classes):
    # Some terms are differences of subnormal numbers.
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4000, classes, generator=generator) * 20
    student[:, 0] += torch.linspace(60, 110, 4000)
    near = torch.randn(4000, classes, generator=generator) * torch.logspace(-4, 1, 4000).view(-1, 1)
    options = {"divergence": divergence, "temperature": 1.0, "reduction": "none"}
    value = fastkd.loss(student.to(device), (student + near).to(device), **options)
    assert float(value.min()) >= 0
    soft = fastkd.terms(student.to(device), (student + near).to(device), **options).soft
    assert float(soft.min()) >= 0


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_a_sparse_divergence_is_never_negative(device, tail):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2000, 3, generator=generator, dtype=FP64) * 20
    student[:, 0] += torch.linspace(650, 760, 2000)
    teacher = student + torch.randn(2000, 3, generator=generator, dtype=FP64)
    top = fastkd.TopK(*teacher.to(device).log_softmax(-1).topk(2), tail)
    value = fastkd.loss(student.to(device), top, reduction="none")
    assert float(value.min()) >= 0
