"""Test CUDA: synchronization, graphs, streams, peak memory, tensors of more than 2^31 elements."""

import pytest
import torch
from support import (
    BF16,
    CUDA_SIZE_CLASSES,
    DTYPES,
    FP16,
    FP32,
    FP64,
    ROUNDING,
    assert_grad,
    distance,
    make,
    name_of,
    truth,
)
from torch import Tensor

import fastkd
from fastkd import TopK

pytestmark = pytest.mark.cuda

# For these numbers of classes, the kernels use 8 lanes of a warp, a warp, or a CTA per row.
WIDTHS = (10, 100, 500, 1000, 3000, 8193, 32000, 50257, 128256, 262145)
CALLS = {
    "mean": lambda s, t, y: fastkd.loss(s, t, y, temperature=3.0, alpha=0.3),
    "sum": lambda s, t, y: fastkd.loss(s, t, y, reduction="sum"),
    "none": lambda s, t, y: fastkd.loss(s, t, y, reduction="none").sum(),
    "terms": lambda s, t, y: fastkd.terms(s, t, y).loss,
    "no labels": lambda s, t, y: fastkd.loss(s, t),
    "weights": lambda s, t, y: fastkd.loss(s, t, y, hard_weight=0.3, soft_weight=2.0),
    "inplace": lambda s, t, y: fastkd.loss(s * 1, t, y, inplace=True),
}


def step(call, problem, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = problem.student.detach().requires_grad_()
    value = call(leaf, *problem[1:])
    (grad,) = torch.autograd.grad(value * scale, leaf)
    return value.detach(), grad


@pytest.fixture
def no_synchronization():
    """Return a context in which torch raises an error when it synchronizes with the device."""
    torch.cuda.synchronize()

    class Watch:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    yield Watch()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_calls_do_not_synchronize(no_synchronization, classes, call):
    problem = make((64, classes), BF16, device="cuda")
    tokens = torch.full((), 50, device="cuda")
    with no_synchronization:
        step(CALLS[call], problem)
        step(CALLS[call], problem, 3.0)
        fastkd.loss(*problem, normalizer=tokens)
        fastkd.loss(*problem, temperature=problem.student.detach().float().abs().amax(-1) + 1)
        CALLS["none"](*problem)


def lists_of(problem, k: int = 20) -> TopK:
    return TopK(*(problem.teacher.float() / 2).log_softmax(-1).topk(k))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [30, 1000, 32000])
def test_sparse_teachers_do_not_synchronize(no_synchronization, classes, reduction):
    problem = make((64, classes), BF16, device="cuda")
    lists = lists_of(problem)
    lists.indices[3] = classes  # an invalid class, visible only in the data
    with no_synchronization:
        for scale in (1.0, 3.0):
            leaf = problem.student.detach().requires_grad_()
            value = fastkd.loss(leaf, lists, problem.labels, reduction=reduction)
            value.backward(torch.full_like(value, scale))


@pytest.mark.parametrize("classes", [30, 1000, 128256])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_teachers_can_be_captured(classes, reduction):
    static = make((32, classes), BF16, device="cuda")
    lists = lists_of(static)
    leaf = static.student.requires_grad_()

    def forward_backward(student: Tensor) -> tuple[Tensor, Tensor]:
        value = fastkd.loss(student, lists, static.labels, reduction=reduction)
        return value, torch.autograd.grad(value, student, torch.full_like(value, 2))[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward(leaf)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = forward_backward(leaf)
    for seed in range(1, 4):
        fresh = make((32, classes), BF16, device="cuda", seed=seed)
        with torch.no_grad():
            pairs = zip((*static, *lists[:2]), (*fresh, *lists_of(fresh)[:2]), strict=True)
            for old, new in pairs:
                old.copy_(new)
        graph.replay()
        expected = forward_backward(fresh.student.requires_grad_())
        assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


def test_the_watch_detects_synchronization(no_synchronization):
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronization:
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("call", ["mean", "none", "terms"])
def test_graphs_can_be_captured_and_replayed(call, classes):
    static = make((32, classes), BF16, device="cuda")
    leaf = static.student.requires_grad_()

    def forward_backward() -> tuple[Tensor, Tensor]:
        value = CALLS[call](leaf, *static[1:])
        return value, torch.autograd.grad(value * 2, leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = forward_backward()
    for seed in range(1, 4):
        fresh = make((32, classes), BF16, device="cuda", seed=seed)
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        expected = step(CALLS[call], fresh, 2.0)
        assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize("classes", [10, 1000, 32000, 128256])
def test_kernels_run_on_a_side_stream(classes):
    # The side stream copies the logits late, so kernels on another stream would read zeros.
    problem = make((64, classes), BF16, device="cuda")
    expected = step(CALLS["mean"], problem)
    late = [torch.zeros_like(x) for x in problem]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, problem, strict=True):
            x.copy_(y)
        value, grad = step(CALLS["mean"], type(problem)(*late))
    side.synchronize()
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize("classes", [10, 1000, 32000, 128256])
def test_two_streams_give_the_results_of_one(classes):
    problems = [make((64, classes), BF16, device="cuda", seed=seed) for seed in range(2)]
    expected = [step(CALLS["terms"], problem) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(step(CALLS["terms"], problems[index]))
    torch.cuda.synchronize()
    for index in range(2):
        for value, grad in results[index]:
            assert torch.equal(value, expected[index][0]) and torch.equal(grad, expected[index][1])


@pytest.mark.parametrize("classes", WIDTHS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_repeated_calls_give_equal_bits(classes, dtype):
    problem = make((200, classes), dtype, device="cuda")
    first = step(CALLS["terms"], problem)
    for _ in range(20):
        again = step(CALLS["terms"], problem)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 131, 132, 133, 265])
@pytest.mark.parametrize("classes", WIDTHS)
def test_rows_around_the_number_of_processors_equal_the_truth(classes, rows):
    problem = make((rows, classes), BF16, device="cuda", ignored=0.0)
    value, grad = step(CALLS["mean"], problem)
    exact = truth(*problem, temperature=3.0, alpha=0.3)
    assert abs(float(value) / float(exact.loss) - 1) <= 2e-6
    assert_grad(grad, exact.grad, FP32)


@pytest.mark.parametrize("classes", WIDTHS)
def test_ignored_rows_do_not_change_other_rows(classes):
    student, teacher, labels = make((130, classes), BF16, device="cuda", ignored=0.0)
    labels[::2] = -100
    expected = step(CALLS["mean"], type(make((1, 1)))(student[1::2], teacher[1::2], labels[1::2]))
    student[::2], teacher[::2] = float("nan"), float("inf")
    leaf = student.requires_grad_()
    value = CALLS["mean"](leaf, teacher, labels)
    value.backward()
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-6, atol=0)
    assert (leaf.grad[::2] == 0).all()
    # The relative tolerance is bfloat16's eps.
    torch.testing.assert_close(leaf.grad[1::2], expected[1], rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize(
    "classes", [1, *(limit + off for limit in CUDA_SIZE_CLASSES[:-1] for off in (-1, 1))]
)
@pytest.mark.parametrize(
    "pair",
    [(FP32, BF16), (BF16, FP32), (FP16, BF16), (FP64, BF16), (FP64, FP64)],
    ids=lambda p: "-".join(map(name_of, p)),
)
def test_mixed_dtypes_of_each_size_equal_the_truth(classes, pair):
    problem = make((5, classes), *pair, device="cuda", ignored=0.0)
    acc = FP64 if FP64 in pair else FP32
    exact = truth(*problem, temperature=3.0, alpha=0.3)
    assert_grad(step(CALLS["mean"], problem)[1], exact.grad, acc, weight=4.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_than_2_to_the_31_elements_are_supported(reduction):
    rows, classes = 16400, 131072
    assert rows * classes > 2**31
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("CUDA: needs 14 GB of free memory")
    student = torch.empty(rows, classes, dtype=BF16, device="cuda").normal_(std=2)
    teacher = torch.empty_like(student).normal_(std=2)
    labels = torch.randint(classes, (rows,), device="cuda")
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, reduction=reduction)
    value.sum().backward()
    some = torch.tensor([0, 1, 8191, 16383, 16384, 16385, rows - 1], device="cuda")
    exact = truth(student[some], teacher[some], labels[some], reduction="sum")
    share = exact.grad / rows if reduction == "mean" else exact.grad
    limit = ROUNDING * distance(share.to(BF16), share)
    assert distance(leaf.grad[some], share) <= limit
    if reduction == "none":
        assert float(value.detach()[some].double().sum()) == pytest.approx(
            float(exact.loss), rel=2e-6
        )
    del leaf, value, student, teacher
    torch.cuda.empty_cache()


def test_pixels_beyond_2_to_the_31_elements_are_supported():
    # Offsets of a pixel's last classes exceed 2^31.
    classes, pixels = 19, 2**27
    assert classes * pixels > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("CUDA: needs 24 GB of free memory")
    student = torch.empty(1, classes, pixels, dtype=BF16, device="cuda").normal_(std=2)
    teacher = torch.empty_like(student).normal_(std=2)
    labels = torch.randint(classes, (1, pixels), device="cuda")
    labels[:, 4096:-4096] = -100
    hidden = student.requires_grad_() * 1
    value = fastkd.loss(hidden, teacher, labels, dim=1, reduction="sum", inplace=True)
    (grad,) = torch.autograd.grad(value, hidden)
    some = torch.tensor([0, 1, 4095, pixels - 4096, pixels - 1], device="cuda")
    rows = [x.detach()[0, :, some].t() for x in (student, teacher)]
    exact = truth(*rows, labels[0, some], reduction="sum")
    limit = ROUNDING * distance(exact.grad.to(BF16), exact.grad)
    assert distance(grad[0, :, some].t(), exact.grad) <= limit
    del grad, hidden, value, student, teacher
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("inplace", "tensors"), [(False, 1.0), (True, 0.0)])
def test_peak_memory_of_pixels_is_one_gradient(inplace, tensors, dtype):
    # Beside the gradient, the call may take 100 bytes per pixel.
    student, teacher = (torch.randn(2, 150, 64, 64, device="cuda").to(dtype) for _ in range(2))
    labels = torch.randint(150, (2, 64, 64), device="cuda")
    hidden = student.requires_grad_() * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = fastkd.loss(hidden, teacher, labels, dim=1, inplace=inplace)
    (grad,) = torch.autograd.grad(value, hidden)
    taken = torch.cuda.max_memory_allocated() - before
    assert grad.stride() == student.stride()
    assert taken <= tensors * student.nbytes + 100 * labels.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("inplace", "tensors"), [(False, 1.0), (True, 0.0)])
@pytest.mark.parametrize("classes", [1000, 32000])
def test_peak_memory_is_one_gradient(classes, inplace, tensors, dtype):
    student, teacher, labels = make((512, classes), dtype, device="cuda")
    leaf = student.requires_grad_()
    hidden = leaf * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = fastkd.loss(hidden, teacher, labels, inplace=inplace)
    grad = torch.autograd.grad(value, hidden)
    taken = torch.cuda.max_memory_allocated() - before
    del grad
    assert taken <= tensors * student.nbytes + 2**16


def test_calls_do_not_change_the_current_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("CUDA: needs two devices")
    problem = make((64, 32000), BF16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    value, grad = step(CALLS["mean"], problem)
    assert value.device == grad.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    expected = step(CALLS["mean"], type(problem)(*(x.to("cuda:0") for x in problem)))
    assert torch.equal(grad.to("cuda:0"), expected[1])


def test_labels_on_another_device_are_refused():
    student, teacher, labels = make((6, 10), device="cuda")
    with pytest.raises(ValueError, match="labels must be on the logits' device, cuda:0; got cpu"):
        fastkd.loss(student, teacher, labels.cpu())
    with pytest.raises(ValueError, match="must be on the same device; got cuda:0 and cpu"):
        fastkd.loss(student, teacher.cpu(), labels)


def test_cpu_and_cuda_agree():
    for dtype in DTYPES:
        on_cpu, on_cuda = make((33, 5003), dtype), make((33, 5003), dtype, device="cuda")
        value, grad = step(CALLS["mean"], on_cuda)
        expected, theirs = step(CALLS["mean"], on_cpu)
        torch.testing.assert_close(value.cpu(), expected, rtol=2e-6, atol=0)
        eps = max(torch.finfo(dtype).eps, 2e-6)
        assert distance(grad.cpu(), theirs.double()) <= eps * float(theirs.double().norm())
