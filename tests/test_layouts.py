"""Test logits with non-adjacent classes, such as (N, C, H, W): results, strides, no copies."""

from typing import Any

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
    name_of,
    pairwise,
    weights,
)
from torch import Tensor

import fastkd
from fastkd import reference
from fastkd._core import dense, shapes

# Shapes are (N, classes, pixels...). Except in float64, the CPU kernels read 32 pixels at a time,
# so the shapes have fewer pixels, a multiple of 32 pixels, or a remainder.
SHAPES = [(2, 19, 5, 7), (5, 3, 4), (2, 21, 8, 24), (1, 150, 33), (1, 1100, 40), (3, 1, 2, 2)]
# The kernels read the first four layouts in place.
LAYOUTS = ["plain", "channels last", "fewer classes", "classes outside", "crop", "spread"]


def make(
    shape: tuple[int, ...],
    layout: str = "plain",
    dtype: torch.dtype = FP32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw logits in a memory layout; the values do not depend on the layout."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=FP64).mul_(3).to(device, dtype)
    n, classes, *pixels = shape
    if layout == "channels last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "classes outside":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    view = {
        "plain": values.new_empty(shape),
        "fewer classes": values.new_empty((n, classes + 2, *pixels))[:, :classes],
        "crop": values.new_empty((n, classes, *(x + 3 for x in pixels)))[
            (slice(None), slice(None), *(slice(2, -1) for _ in pixels))
        ],
        "spread": values.new_empty((*shape[:-1], 2 * shape[-1]))[..., ::2],
    }[layout]
    return view.copy_(values)


def make_labels(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rows = (shape[0], *shape[2:])
    labels = torch.randint(shape[1], rows, generator=generator)
    return labels.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100).to(device)


def truth(
    student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute (six terms, gradient of the summed loss) by the float64 reference, classes last."""
    rows = student.detach().double().movedim(1, -1).contiguous().requires_grad_()
    options = weights(options, labels is not None)
    terms = reference.terms(rows, teacher.double().movedim(1, -1), labels, **options)
    (grad,) = torch.autograd.grad(terms.loss.sum(), rows)
    return torch.stack(terms[:6]).detach(), grad


def check(student: Tensor, teacher: Tensor, labels: Tensor | None, **options: Any) -> Tensor:
    """Assert that the first six terms and the gradient equal the truth; return the gradient."""
    student = student.detach().requires_grad_()
    options.setdefault("temperature", 2.0)
    got = fastkd.terms(student, teacher, labels, dim=1, **options)
    (grad,) = torch.autograd.grad(got.loss.sum(), student)
    exact, exact_grad = truth(student, teacher, labels, **options)
    acc = compute_dtype(student, teacher)
    bound = 1e-12 if acc is FP64 else 3e-6
    torch.testing.assert_close(
        torch.stack(got[:6]).detach().double(), exact, rtol=bound, atol=bound, equal_nan=True
    )
    if grad.dtype is not FP64:
        assert_grad(grad.movedim(1, -1), exact_grad, acc)
    else:  # in float64, the truth has rounding errors, too
        atol = 1e-14 * float(exact_grad.abs().max()) + 1e-16
        torch.testing.assert_close(grad.movedim(1, -1), exact_grad, rtol=1e-12, atol=atol)
    return grad


def check_dtypes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """Test a student dtype with teachers of this dtype, of float32 and of float64."""

    def teacher(dtype: torch.dtype) -> Tensor:
        return make(shape, dtype=dtype, seed=1, device=device)

    student, labels = make(shape, dtype=dtype, device=device), make_labels(shape, device)
    check(student, teacher(dtype), labels)
    check(student, teacher(FP32), None)
    check(student, teacher(FP64), labels, temperature=3.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_and_instruction_set_equals_the_truth(isa, shape, dtype):
    check_dtypes(shape, dtype, "cpu")


# The first shape has many pixels. The other shapes have more than 24 classes, so eight threads
# share a row.
CUDA_SHAPES = [(3, 19, 200, 301), *((2, classes, 40, 33) for classes in (25, 49, 97, 193))]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [*SHAPES, *CUDA_SHAPES], ids=str)
def test_every_dtype_on_cuda_equals_the_truth(shape, dtype):
    check_dtypes(shape, dtype, "cuda")


@pytest.mark.parametrize(
    ("reduction", "shape", "name"),
    pairwise(["mean", "sum", "none"], [(2, 19, 5, 7), (1, 1100, 40)], dense.DIVERGENCES),
    ids=str,
)
def test_every_divergence_reads_pixels_in_place(device, name, shape, reduction):
    options = {"divergence": name, "reduction": reduction, "label_smoothing": 0.1}
    for dtype in (FP32, FP64):
        student, teacher = (make(shape, dtype=dtype, seed=seed, device=device) for seed in (0, 1))
        check(student, teacher, make_labels(shape, device), **options)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"), pairwise(LAYOUTS, LAYOUTS, [(2, 19, 5, 7), (3, 60, 9)]), ids=str
)
def test_any_two_layouts_give_the_truth(device, shape, ours, theirs):
    labels = make_labels(shape, device)
    student, teacher = make(shape, ours, device=device), make(shape, theirs, seed=1, device=device)
    grad = check(student, teacher, labels)
    expected = torch.empty_like(student)
    if ours == "spread":  # neither classes nor pixels are adjacent
        expected = make(shape, "plain")
    assert grad.stride() == expected.stride()


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_pixels_may_have_their_own_options(device, name):
    shape = (2, 19, 5, 7)
    rows = torch.rand((2, 5, 7), generator=torch.Generator().manual_seed(3)).to(device) + 0.5
    student, teacher = make(shape, device=device), make(shape, seed=1, device=device)
    labels = make_labels(shape, device)
    options = {"temperature": rows, "hard_weight": rows.flip(0), "soft_weight": rows.square()}
    student.requires_grad_()
    value = fastkd.loss(student, teacher, labels, dim=1, divergence=name, **options)
    (grad,) = torch.autograd.grad(value, student)
    double = {key: number.double() for key, number in options.items()}
    exact, exact_grad = truth(student, teacher, labels, divergence=name, **double)
    torch.testing.assert_close(value.detach().double(), exact[0], rtol=3e-6, atol=0)
    assert_grad(grad.movedim(1, -1), exact_grad, FP32)


def test_labels_of_pixels_are_checked_and_ignored():
    shape = (2, 19, 3, 4)
    student, teacher, labels = make(shape), make(shape, seed=1), make_labels(shape)
    student.movedim(1, -1)[labels == -100] = torch.nan
    grad = torch.autograd.grad(
        fastkd.loss(student.requires_grad_(), teacher, labels, dim=1), student
    )[0]
    assert grad.isfinite().all()
    assert (grad.movedim(1, -1)[labels == -100] == 0).all()
    labels[1, 0, 0] = 19
    with pytest.raises(ValueError, match=r"labels must be in \[0, 19\).*row 12 has 19"):
        fastkd.loss(student, teacher, labels, dim=1)


def test_masked_classes_and_invalid_rows_have_their_values(device):
    shape = (1, 5, 2, 4)
    student, teacher = make(shape, device=device), make(shape, seed=1, device=device)
    student[0, 1, 0, 0] = teacher[0, 1, 0, 0] = -torch.inf  # both mask the class, which adds 0
    teacher[0, 1, 0, 1] = -torch.inf  # the teacher masks the class, which adds 0
    student[0, 1, 0, 2] = -torch.inf  # the student alone masks the class: the loss is +inf
    # These three rows give NaN: all classes are masked, or a logit is NaN or +inf.
    student[0, :, 0, 3] = -torch.inf
    student[0, 2, 1, 0] = torch.nan
    teacher[0, 2, 1, 1] = torch.inf
    losses = fastkd.loss(student, teacher, dim=1, reduction="none")
    rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
    torch.testing.assert_close(losses, fastkd.loss(*rows, reduction="none"), equal_nan=True)
    assert losses.isnan().tolist() == [[[False, False, False, True], [True, True, False, False]]]
    assert losses[0, 0, 2] == torch.inf


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "centered_mse"])
@pytest.mark.parametrize("shape", [(2, 19, 5, 7), (1, 1100, 40)], ids=str)
def test_a_second_backward_pass_gives_equal_bits(device, shape, name, dtype):
    # The second pass recomputes the gradient: on CPUs by the forward kernel, on CUDA from the
    # forward pass's statistics.
    student, teacher = (make(shape, dtype=dtype, seed=seed, device=device) for seed in (0, 1))
    student.requires_grad_()
    value = fastkd.loss(student, teacher, make_labels(shape, device), dim=1, divergence=name)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.stride() == second.stride() == student.stride()
    third = torch.autograd.grad(value * 3, student)[0]
    torch.testing.assert_close(third, first * 3, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_second_derivatives_of_pixels_are_right():
    shape = (2, 4, 3)
    teacher, labels = make(shape, dtype=FP64, seed=1), make_labels(shape)
    for layout in ("plain", "crop"):
        student = make(shape, layout, FP64).requires_grad_()
        assert torch.autograd.gradgradcheck(
            lambda x: fastkd.loss(x, teacher, labels, dim=1), (student,)
        )


@pytest.mark.parametrize("shape", [(2, 19, 5, 7), (1, 1100, 40)], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_pixels_are_overwritten_in_place(device, shape, name):
    expected, overwritten = (make(shape, device=device).requires_grad_() for _ in range(2))
    teacher, labels = make(shape, seed=1, device=device), make_labels(shape, device)
    value = fastkd.loss(expected, teacher, labels, dim=1, divergence=name)
    value.backward()
    hidden = overwritten * 1
    seen = []
    hidden.register_hook(lambda grad: seen.append(grad.data_ptr()))
    again = fastkd.loss(hidden, teacher, labels, dim=1, divergence=name, inplace=True)
    again.backward()
    assert torch.equal(again, value)
    assert torch.equal(overwritten.grad, expected.grad)
    assert seen == [hidden.data_ptr()]
    with pytest.raises(ValueError, match="inplace=True needs student to be laid out"):
        fastkd.loss((expected * 1)[..., ::2], teacher[..., ::2], dim=1, inplace=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(3, 19, 50, 41), (2, 60, 1000)], ids=str)
def test_bits_are_equal_for_any_number_of_threads(shape):
    student, teacher, labels = make(shape).requires_grad_(), make(shape, seed=1), make_labels(shape)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        value = fastkd.loss(student, teacher, labels, dim=1, divergence="jsd")
        results.append((value, torch.autograd.grad(value, student)[0]))
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("layout", ["plain", "channels last", "fewer classes"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_pixels_are_not_copied(layout, dtype):
    # Beside the gradient, the call may take 40 bytes per pixel and 4 KiB.
    shape = (2, 150, 50, 40)
    student, teacher = make(shape, layout, dtype).requires_grad_(), make(shape, layout, dtype, 1)
    labels = make_labels(shape)
    student.grad = torch.zeros_like(student)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        value = fastkd.loss(student, teacher, labels, dim=1)
        (grad,) = torch.autograd.grad(value, student)
    events = profile.profiler.kineto_results.events()
    taken = sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
    assert grad.nbytes <= taken <= grad.nbytes + 40 * labels.numel() + 4096


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns while it traces
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [
        pytest.param(layout, bool(i % 2), marks=pytest.mark.slow if i > 1 else ())
        for i, layout in enumerate(LAYOUTS)
    ],
)
def test_compiled_pixels_equal_eager_ones(device, layout, dynamic):
    shape = (2, 19, 5, 7)
    student, teacher = (make(shape, layout, seed=seed, device=device) for seed in (0, 1))
    student.requires_grad_()
    labels = make_labels(shape, device)

    def step(x: Tensor) -> Tensor:
        return fastkd.loss(x * 1, teacher, labels, dim=1) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = [(f(student), torch.autograd.grad(f(student), student)[0]) for f in (step, compiled)]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fakes_have_the_strides_of_pixels(device, layout, reduction):
    # The fake kernels return the strides of the real gradient.
    shape = (2, 19, 5, 7)
    student, teacher = make(shape, layout, device=device), make(shape, seed=1, device=device)
    student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
    call = dense.Arguments(
        (teacher,), labels=make_labels(shape, device), temperature=2.0, teacher_temperature=2.0,
        hard_weight=0.5, soft_weight=0.5, reduction=shapes.REDUCTIONS.index(reduction),
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    empty = torch.ops.fastkd.empty_gradient.default
    torch.library.opcheck(empty, (student, True), test_utils=checks)
    torch.library.opcheck(
        torch.ops.fastkd.loss.default,
        (student.requires_grad_(), *call),
        test_utils=(*checks, "test_aot_dispatch_static"),
    )


def test_transposed_logits_are_read_in_place():
    student, teacher, labels = make((7, 40)), make((7, 40), seed=1), torch.arange(40) % 7
    value = fastkd.loss(student.t(), teacher.t(), labels)
    expected = fastkd.loss(student.t().contiguous(), teacher.t().contiguous(), labels)
    torch.testing.assert_close(value, expected)
