"""Test that loss and gradient equal the float64 reference: options, dtypes and layouts."""

import itertools
import math
from functools import partial

import pytest
import torch
from support import (
    BF16,
    CUDA_SIZE_CLASSES,
    DTYPES,
    FP16,
    FP32,
    FP64,
    assert_grad,
    assert_same,
    assert_value,
    compute_dtype,
    eager,
    make,
    name_of,
    truth,
)
from torch import Tensor

import fastkd
from fastkd import _C
from fastkd._core import autograd, native

S = _C.segment
PAIRS = [*((d, d) for d in DTYPES), *itertools.permutations(DTYPES, 2)]


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    grad_output: Tensor | None = None,
    against_eager: bool = True,
    **options,
) -> None:
    """Check one forward and backward pass against the truth and eager PyTorch."""
    acc = compute_dtype(student, teacher)
    if grad_output is None and options.get("reduction") == "none":
        rows = student.shape[:-1]
        grad_output = torch.linspace(
            0.5, 2, math.prod(rows), device=student.device, dtype=acc
        ).view(rows)
    exact = truth(student, teacher, labels, grad_output=grad_output, **options)
    theirs = (None, None)
    if against_eager and acc == FP32:  # in float64, eager PyTorch is as exact as the truth
        theirs = eager(student, teacher, labels, grad_output=grad_output, **options)
    leaf = student.detach().requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, **options)
    assert_value(value, exact, acc, theirs[0])
    value.backward(grad_output)
    assert leaf.grad.dtype == student.dtype
    assert_grad(leaf.grad, exact.grad, acc, theirs[1])
    # If no gradient is needed, the kernels run separate code, whose value must be equal.
    assert torch.equal(fastkd.loss(student.detach(), teacher, labels, **options), value.detach())


# ---- dtypes and options


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(map(name_of, pair)))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_pair_of_dtypes_equals_the_truth(device, pair, reduction):
    problem = make((9, 1003), *pair, device=device)
    equal_dtypes = pair[0] == pair[1]
    check(*problem, reduction=reduction, against_eager=equal_dtypes)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=name_of)
def test_every_instruction_set_equals_the_truth(isa, dtype):
    for classes in (10, 170, 3001):
        check(*make((5, classes), dtype), temperature=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("temperature", [1, 2.0, 3.0, 4.0, 0.5, 20.0, 1.7])
def test_temperatures_equal_the_truth(device, temperature, dtype):
    check(*make((8, 301), dtype, device=device), temperature=temperature)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"alpha": 0.3},
        {"alpha": 1.0},
        {"alpha": 1},
        {"hard_weight": 0.25},
        {"soft_weight": 3.0},
        {"hard_weight": 2.0, "soft_weight": 0.1},
        {"hard_weight": 0.0, "soft_weight": 0.5},
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0, "alpha": 0.9},
        {"ignore_index": 3},
        {"ignore_index": -1},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"reduction": "none", "label_smoothing": 0.2, "temperature": 3.0},
        {"normalizer": 17},
        {"normalizer": 0.125},
        {"divergence": "forward_kl"},
    ],
    ids=str,
)
def test_options_equal_the_truth(device, options, dtype):
    student, teacher, labels = make((12, 181), dtype, device=device)
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, options["ignore_index"])
    check(student, teacher, labels, temperature=options.pop("temperature", 2.0), **options)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3, "reduction": "sum"},
        {"hard_weight": 0.25},
        {"soft_weight": 3},
        {"hard_weight": 2.0, "soft_weight": 0.0},
        {"normalizer": 17},
        {"temperature": 3.0, "teacher_temperature": 1.5},
        {"temperature": 2, "teacher_temperature": 1, "soft_weight": 0.5, "normalizer": 0.125},
    ],
    ids=str,
)
@pytest.mark.skipif(
    native.EAGER is None, reason="fastkd._eager was not built, or with another torch"
)
def test_autograd_in_cpp_and_in_python_give_the_same_bits(options, dtype):
    student, teacher, labels = make((12, 181), dtype)

    def run() -> tuple[Tensor, Tensor, str]:
        leaf = student.clone().requires_grad_()
        loss = fastkd.loss(leaf, teacher, labels, **options)
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        loss.backward(torch.tensor(3.0))
        assert torch.allclose(leaf.grad, 4 * once, rtol=1e-2 if dtype == BF16 else 1e-6)
        return loss.detach(), once, loss.grad_fn.name()

    value, grad, in_cpp = run()
    with autograd.without_cpp():
        expected, expected_grad, by_python = run()
    assert "FastKDLoss" in in_cpp and "_FusedLoss" in by_python
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"soft_weight": 0.7}, {"temperature": 3.0}], ids=str)
def test_the_soft_term_needs_no_labels(device, options, reduction):
    student, teacher, _ = make((6, 170), device=device, labels=False)
    check(student, teacher, None, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_normalizer_may_be_a_tensor(device, shape, dtype):
    # The normalizer may have any real dtype, and for CUDA logits it may be on the CPU.
    for normalizer in (
        torch.full(shape, 23, dtype=torch.int64),
        torch.full(shape, 23.0, dtype=FP32, device=device),
    ):
        problem = make((12, 181), dtype, device=device)
        value = fastkd.loss(*problem, normalizer=normalizer)
        exact = truth(*problem, normalizer=23)
        assert_value(value, exact, compute_dtype(*problem[:2]))
        leaf = problem.student.requires_grad_()
        fastkd.loss(leaf, *problem[1:], normalizer=normalizer).backward()
        assert_grad(leaf.grad, exact.grad, compute_dtype(*problem[:2]))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_row_may_have_a_temperature(device, dtype, reduction):
    student, teacher, labels = make((4, 3, 50), dtype, device=device)
    temperature = torch.linspace(0.5, 8.0, 12, device=device).view(4, 3)
    check(student, teacher, labels, temperature=temperature, reduction=reduction)
    scalar = torch.tensor(3.0, device=device)
    exact = truth(student, teacher, labels, temperature=3.0)
    got = fastkd.loss(student, teacher, labels, temperature=scalar)
    assert_value(got, exact, compute_dtype(student, teacher))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_may_have_any_integer_dtype(device, index_dtype):
    student, teacher, labels = make((6, 10), device=device, ignored=0.0)
    got = fastkd.loss(student, teacher, labels.to(index_dtype))
    assert torch.equal(got, fastkd.loss(student, teacher, labels))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_give_zero(device, dtype, reduction):
    student, teacher, labels = make((4, 33), dtype, device=device, ignored=1.1)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, reduction=reduction)
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_alpha_defaults_to_one_half_with_labels_and_to_0_without():
    student, teacher, labels = make((4, 5))
    assert torch.equal(
        fastkd.loss(student, teacher, labels), fastkd.loss(student, teacher, labels, alpha=0.5)
    )
    assert torch.equal(
        fastkd.loss(student, teacher), fastkd.loss(student, teacher, soft_weight=1.0)
    )


def test_alpha_weighs_the_hard_term():
    student, teacher, labels = make((4, 5), FP64)
    hard = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(fastkd.loss(student, teacher, labels, alpha=1.0), hard)
    assert "``alpha`` weighs the **hard** term" in fastkd.loss.__doc__.splitlines()[0]


def test_module_is_the_function(device):
    student, teacher, labels = make((4, 50), device=device)
    options = {"temperature": 3.0, "alpha": 0.2, "reduction": "sum", "label_smoothing": 0.1}
    criterion = fastkd.KDLoss(**options)
    assert torch.equal(
        criterion(student, teacher, labels), fastkd.loss(student, teacher, labels, **options)
    )
    ours, theirs = (
        criterion.terms(student, teacher, labels),
        fastkd.terms(student, teacher, labels, **options),
    )
    assert all(map(torch.equal, ours, theirs))


# ---- sizes

WIDTHS = {
    1: "one class: no freedom, both terms are zero",
    2: "two classes",
    3: "odd, below every vector",
    10: "digits",
    15: "vector edge",
    16: "vector edge",
    17: "vector edge",
    31: "vector edge",
    32: "vector edge",
    33: "vector edge",
    63: "vector edge",
    64: "vector edge",
    65: "vector edge",
    100: "CIFAR-100",
    127: "warp of four classes a lane",
    129: "warp of four classes a lane",
    1000: "ImageNet",
    1023: "block of the CPU kernels",
    1024: "block of the CPU kernels",
    1025: "block of the CPU kernels",
    2047: "two blocks",
    2049: "two blocks",
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=name_of)
@pytest.mark.parametrize("classes", WIDTHS, ids=str)
def test_every_width_equals_the_truth(device, classes, dtype):
    check(*make((5, classes), dtype, device=device), reduction="mean")
    check(*make((2, classes), dtype, device=device, seed=1), reduction="none", temperature=3.0)


LONG_WIDTHS = {
    S - 1: "one segment of the CPU kernels",
    S: "one segment",
    S + 1: "a second segment of one class",
    2 * S + 1: "a third segment of one class",
    32000: "Llama 2",
    50257: "GPT-2, odd",
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("classes", LONG_WIDTHS, ids=str)
def test_long_rows_equal_the_truth(device, classes, dtype):
    # With two threads, each thread computes one row, and the threads share the third row by
    # segments if the row has several.
    check(*make((3, classes), dtype, device=device, ignored=0.0), against_eager=dtype == FP32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 128256), FP32),  # Llama 3
        ((2, 128256), BF16),
        ((1, 151936), FP32),  # Qwen
        ((1, 151936), FP64),
        ((1, 151936), FP16),
        ((1, 128257), BF16),  # odd, so the last vector is incomplete
    ],
    ids=str,
)
def test_vocabularies_equal_the_truth(device, shape, dtype):
    check(*make(shape, dtype, device=device, ignored=0.0), temperature=4.0, against_eager=False)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=name_of)
@pytest.mark.parametrize("limit", CUDA_SIZE_CLASSES)
def test_each_size_class_of_the_cuda_kernels(limit, dtype):
    for classes in (limit - 1, limit, limit + 1):
        problem = make((3, classes), dtype, device="cuda", ignored=0.0)
        check(*problem, against_eager=False)
        check(*problem, against_eager=False, reduction="none", temperature=3.0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 128, 129, 300, 1500])
def test_every_number_of_rows_equals_the_truth(device, rows, dtype):
    # A CTA of the CUDA kernels computes 8 or 32 rows at a time, or fewer rows at the end.
    for classes in (10, 200):
        check(*make((rows, classes), dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 10), (4, 0, 10), (0, 100000)])
def test_no_rows_give_zero(device, shape, dtype):
    student, teacher, labels = make(shape, dtype, device=device)
    for reduction in ("mean", "sum", "none"):
        for index in (labels, None):
            leaf = student.detach().requires_grad_()
            value = fastkd.loss(leaf, teacher, index, reduction=reduction)
            assert value.shape == (shape[:-1] if reduction == "none" else ())
            value.sum().backward()
            assert value.sum() == 0 and leaf.grad.shape == shape


# ---- layouts


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 2), (1, 4, 1), (2, 1, 2, 2)], ids=str)
def test_leading_shapes_are_flattened(device, leading, reduction):
    check(
        *make((*leading, 33), device=device, ignored=0.3 if leading else 0.0), reduction=reduction
    )


def views(student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pairs of views or copies of (4, 6, 40) logits in different memory layouts."""
    shifted = torch.empty(student.numel() + 1, dtype=student.dtype, device=student.device)[1:]
    return {
        "next-token slice": (student[:, :-1], teacher[:, :-1]),
        "first tokens cut": (student[:, 1:], teacher[:, 1:]),
        "padded vocabulary": (student[..., :37], teacher[..., :37]),
        "both": (student[:, :-1, :37], teacher[:, :-1, :37]),
        "student alone sliced": (student[:, :-1], teacher[:, :-1].contiguous()),
        "teacher alone sliced": (student[:, :-1].contiguous(), teacher[:, :-1]),
        "different slices": (student[:, 1:, 3:], teacher[:, :-1, :-3]),
        "every other row": (student[:, ::2], teacher[:, ::2]),
        "every other sequence": (student[::2], teacher[::2]),
        "sequence first": (student.transpose(0, 1), teacher.transpose(0, 1)),
        "student alone sequence first": (
            student.transpose(0, 1),
            teacher.transpose(0, 1).contiguous(),
        ),
        "expanded teacher": (student, teacher[:, :1].expand(4, 6, 40)),
        "one expanded row": (student, teacher[:1, :1].expand(4, 6, 40)),
        "classes not adjacent": (student.transpose(1, 2), teacher.transpose(1, 2)),
        "student's classes not adjacent": (student[..., ::2], teacher[..., ::2].contiguous()),
        "teacher's classes not adjacent": (student[..., ::2].contiguous(), teacher[..., ::2]),
        "three levels": (
            student.view(2, 2, 6, 40)[:, :, ::2],
            teacher.view(2, 2, 6, 40)[:, :, ::2],
        ),
        "base pointer off by one": (shifted.view_as(student).copy_(student), teacher),
        "stride off by one": (student[..., 1:], teacher[..., :-1]),
        "one row": (student[:1, :1], teacher[:1, :1]),
    }


LAYOUTS = list(views(torch.empty(4, 6, 40), torch.empty(4, 6, 40)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_the_bits_of_copies(device, layout, dtype):
    assert_equal = assert_same
    if layout == "classes not adjacent" and dtype is FP64 and device.type == "cpu":
        # In float64, the CPU kernels copy each of these rows before computing it.
        assert_equal = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-15)
    base, teacher, _ = make((4, 6, 40), dtype, device=device, labels=False)
    for reduction in ("mean", "none"):
        leaf = base.clone().requires_grad_()
        student, teacher_view = views(leaf, teacher)[layout]
        labels = torch.arange(math.prod(student.shape[:-1]), device=device).view(student.shape[:-1])
        labels = (labels % student.shape[-1]).masked_fill(labels % 5 == 1, -100)
        copy = student.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        value = fastkd.loss(student, teacher_view, labels, reduction=reduction)
        expected = fastkd.loss(copy, teacher_view.contiguous(), labels, reduction=reduction)
        assert_equal(value.detach(), expected.detach())
        outgoing = torch.linspace(1, 2, value.numel(), device=device, dtype=value.dtype).view_as(
            value
        )
        inner = torch.autograd.grad(value, student, outgoing)[0]
        expected.backward(outgoing)
        assert_equal(inner, copy.grad)
        if student.grad_fn is not None:
            again = fastkd.loss(
                views(leaf, teacher)[layout][0], teacher_view, labels, reduction=reduction
            )
            again.backward(outgoing)
            behind = views(leaf, teacher)[layout][0]
            assert_equal(leaf.grad, torch.autograd.grad(behind, leaf, copy.grad)[0])
    check(student.detach(), teacher_view, labels)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=name_of)
@pytest.mark.parametrize("classes", [33, 1000, 5001])
def test_misaligned_rows_equal_the_truth(device, classes, dtype):
    student, teacher, labels = make((9, classes), dtype, device=device)
    expected = fastkd.loss(student, teacher, labels)
    for a, b in itertools.product(range(0, 8, 3), repeat=2):
        shifted = [
            torch.empty(x.numel() + n, dtype=dtype, device=device)[n:].view_as(x).copy_(x)
            for x, n in ((student, a), (teacher, b))
        ]
        leaf = shifted[0].requires_grad_()
        value = fastkd.loss(leaf, shifted[1], labels)
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        exact = truth(student, teacher, labels)
        assert_grad(leaf.grad, exact.grad, FP32)


def test_rows_far_apart_equal_the_truth(device):
    # A stride of 2^31 elements needs int64.
    if device.type == "cuda":
        pytest.skip("CUDA memory is not committed lazily; test_cuda has a case that is full")
    base = torch.empty(2**31 + 64, dtype=torch.float16)  # pages that are not written take no memory
    student = base.as_strided((2, 40), (2**31, 1))
    fresh, teacher, labels = make((2, 40), FP16, ignored=0.0)
    student.copy_(fresh)
    got = fastkd.loss(student, teacher, labels)
    assert torch.equal(got, fastkd.loss(fresh, teacher, labels))


def test_torchs_defaults_change_nothing():
    # PyTorch's operations compute ``calls``, and the smoothed labels of ``soft``.
    student, teacher, labels = make((6, 20))
    calls = [{"standardize": True}, {"temperature": torch.tensor(3.0, requires_grad=True)}]
    values = [fastkd.loss(student, teacher, labels, **options) for options in calls]
    soft = fastkd.loss(student, teacher, teacher.softmax(-1), label_smoothing=0.1)
    torch.set_default_dtype(FP64)
    torch.set_default_device("meta")
    try:
        for options, value in zip(calls, values, strict=True):
            assert torch.equal(fastkd.loss(student, teacher, labels, **options), value)
        again = fastkd.loss(student, teacher, teacher.softmax(-1), label_smoothing=0.1)
        assert torch.equal(again, soft) and again.dtype == FP32
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(FP32)


NORMALIZERS = {
    "0": 0,
    "0.0": 0.0,
    "a tensor": torch.tensor(0),
    "a tensor of shape (1,)": torch.zeros(1),
}


NORMALIZED = ({"divergence": "jsd"}, {}, {"standardize": True}, {"label_smoothing": 0.1})


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS)
@pytest.mark.parametrize("options", NORMALIZED, ids=str)
@pytest.mark.usefixtures("each_autograd")
def test_a_normalizer_of_0_needs_ignored_rows(normalizer, options, device):
    student, teacher, labels = make((6, 20), device=device)
    ignored = torch.full_like(labels, -100)
    weight, top = torch.eye(20, device=device), fastkd.TopK(*teacher.log_softmax(-1).topk(3))

    def topk(s, y):
        return fastkd.loss(s, top, y, normalizer=normalizer)

    def linear(s, y):
        return fastkd.loss(fastkd.Head(s, weight), teacher, y, normalizer=normalizer, **options)

    def dense(s, y):
        return fastkd.loss(s, teacher, y, normalizer=normalizer, **options)

    for loss in (dense, topk, linear):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, ignored)
        value.backward()
        assert value == 0 and leaf.grad is not None and not leaf.grad.any()
        if device.type == "cpu":
            for rows in (labels,) if options else (labels, None):
                with pytest.raises(ValueError, match="normalizer must be positive and finite"):
                    loss(leaf, rows)


@pytest.mark.parametrize(
    ("normalizer", "options"),
    [
        (NORMALIZERS["a tensor"], {}),
        *(
            pytest.param(normalizer, options, marks=pytest.mark.slow)
            for normalizer, options in zip(NORMALIZERS.values(), NORMALIZED, strict=True)
        ),
    ],
    ids=str,
)
def test_a_normalizer_of_0_is_compiled(normalizer, options, device):
    student, teacher, labels = make((6, 20), device=device)

    def loss(s, y):
        return fastkd.loss(s, teacher, y, normalizer=normalizer, **options)

    torch._dynamo.reset()
    leaf = student.requires_grad_()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(
        leaf, torch.full_like(labels, -100)
    )
    value.backward()
    assert value == 0 and not leaf.grad.any()
