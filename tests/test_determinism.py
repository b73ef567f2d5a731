"""Test that the bits of losses and gradients depend on neither run nor thread count.

Instruction sets may differ by rounding.
"""

import os
import time

import pytest
import torch
from support import BF16, DTYPES, FP32, FP64, assert_same, distance, make, name_of, pairwise
from torch import Tensor

import fastkd
from fastkd import _C

S = _C.segment
SHAPES = [
    (64, 10),  # the calling thread computes all rows
    (300, 1000),  # each thread computes complete rows
    (5, 3 * S + 1),  # with two threads: complete rows, and one row that the threads share
    (1, 5 * S + 100),  # one row, whose segments the threads share
    (2, 2 * S),
    (7, S + 1),
]
# The kernels compute these divergences by different loops over a row.
SWEEPS = ["forward_kl", "reverse_kl", "jsd", "dkd", "cosine"]


def run(
    student: Tensor, teacher: Tensor, labels: Tensor, reduction: str, divergence: str = "forward_kl"
) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    options = {"reduction": reduction, "divergence": divergence}
    got = fastkd.terms(leaf, teacher, labels, label_smoothing=0.1, **options)
    got.loss.backward(
        torch.linspace(0.5, 2, got.loss.numel(), device=student.device, dtype=got.loss.dtype).view(
            got.loss.shape
        )
    )
    return [leaf.grad, *(term.detach() for term in got)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_repeated_calls_give_equal_bits(device, shape, reduction, dtype):
    problem = make(shape, dtype, device=device)
    first = run(*problem, reduction)
    for _ in range(3):
        assert all(map(torch.equal, first, run(*problem, reduction)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("dtype", "reduction", "shape", "divergence"),
    pairwise(DTYPES, ["mean", "none"], SHAPES, SWEEPS),
    ids=str,
)
def test_bits_are_equal_for_any_number_of_threads(divergence, shape, reduction, dtype):
    problem = make(shape, dtype, ignored=0.1)
    torch.set_num_threads(1)
    alone = run(*problem, reduction, divergence)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for ours, theirs in zip(run(*problem, reduction, divergence), alone, strict=True):
            assert torch.equal(ours, theirs), f"{count} threads"


@pytest.mark.usefixtures("threads", "isa")
def test_merged_sums_of_a_shared_row_equal_those_of_one_thread():
    for seed in range(60):
        student, teacher, _ = make((1, 2 * S - 3000), FP64, labels=False, seed=seed)
        student.requires_grad_()
        gradients = []
        for count in (1, 2):
            torch.set_num_threads(count)
            value = fastkd.loss(student, teacher, temperature=15.8)
            gradients.append(torch.autograd.grad(value, student)[0])
        assert torch.equal(*gradients), f"seed {seed}"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(64, 8 * S), (1, 64 * S)], ids=["whole rows", "one row"])
def test_several_threads_do_the_work(shape):
    # time.thread_time() counts the calling thread alone.
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    student, teacher, _ = make(shape, labels=False)
    torch.set_num_threads(2)
    student.requires_grad_()
    fastkd.loss(student, teacher)  # starts the threads
    thread_seconds, process_seconds = time.thread_time(), time.process_time()
    for _ in range(8):
        fastkd.loss(student, teacher)
    thread_seconds, process_seconds = (
        time.thread_time() - thread_seconds,
        time.process_time() - process_seconds,
    )
    assert thread_seconds < 0.75 * process_seconds


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(16, 10), (8, 1000), (2, 20000)], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "dkd"])
def test_instruction_sets_agree(divergence, shape, dtype):
    problem = make(shape, dtype)
    best, before = run(*problem, "mean", divergence), _C.isa()
    bound = 1e-13 if dtype is FP64 else 2e-6
    try:
        for name in _C.available_isas():
            _C.use_isa(name)
            grad, *terms = run(*problem, "mean", divergence)
            for ours, theirs in zip(terms, best[1:], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound / 10, msg=name)
            # Rounding to 16 bits may differ by one unit in the last place.
            eps = max(torch.finfo(dtype).eps, bound)
            torch.testing.assert_close(
                grad, best[0], rtol=eps, atol=bound * float(best[0].abs().max()), msg=name
            )
            assert distance(grad, best[0].double()) <= max(eps / 16, bound) * float(
                best[0].double().norm()
            )
    finally:
        _C.use_isa(before)


def test_isa_can_be_forced_and_an_unknown_isa_is_refused():
    before = _C.isa()
    with pytest.raises(ValueError, match=r"isa 'mmx' is not available here; available: .*default"):
        _C.use_isa("mmx")
    assert _C.isa() == before
    for name in _C.available_isas():
        _C.use_isa(name)
        assert _C.isa() == name
    _C.use_isa(before)


@pytest.mark.parametrize(
    ("classes", "dtype", "divergence"),
    pairwise([2, 20, 32, 33, 39, 64, 1003, S + 5], DTYPES, SWEEPS),
    ids=str,
)
def test_a_gradient_recomputed_in_backward_has_the_bits_of_forward(
    device, divergence, dtype, classes
):
    student, teacher, labels = make((24, classes), dtype, device=device)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    total = fastkd.loss(a, teacher, labels, reduction="sum", divergence=divergence)
    (first,) = torch.autograd.grad(total, a, retain_graph=True)
    (second,) = torch.autograd.grad(total, a)
    rows = fastkd.loss(b, teacher, labels, reduction="none", divergence=divergence)
    rows.sum().backward()
    assert_same(second, first)
    assert_same(b.grad, first)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("classes", [16411, pytest.param(2 * S + 5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("divergence", [*SWEEPS, "topk"])
def test_a_gradient_too_large_for_the_caches_has_the_same_bits(divergence, dtype, classes):
    # Stores are non-temporal from 12 MiB on; rows of an odd number of classes are misaligned.
    few_rows = 4
    times = -(-13 * 2**20 // (few_rows * classes * dtype.itemsize))
    problem = make((few_rows, classes), dtype)
    indices = torch.arange(64).expand(few_rows, 64)
    log_probs = torch.full((few_rows, 64), -5.0, dtype=FP64 if dtype is FP64 else FP32)

    def gradient(times: int) -> Tensor:
        student, teacher, labels, ids, list_ = (
            x.repeat(times, *[1] * (x.dim() - 1)) for x in (*problem, indices, log_probs)
        )
        student.requires_grad_()
        if divergence == "topk":
            loss = fastkd.loss(student, fastkd.TopK(list_, ids), labels, reduction="sum")
        else:
            loss = fastkd.loss(student, teacher, labels, reduction="sum", divergence=divergence)
        return torch.autograd.grad(loss, student)[0].view(times, few_rows, classes)

    small, large = gradient(1), gradient(times)
    assert all(torch.equal(part, small[0]) for part in large)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("divergence", SWEEPS)
def test_terms_do_not_change_the_gradient_of_a_hard_term_of_weight_0(device, divergence, dtype):
    student, teacher, labels = make((800, 150), dtype, device=device, spread=10.0)
    gradients = []
    for reduction in ("sum", "none"):
        leaf = student.clone().requires_grad_()
        options = {"alpha": 0.0, "temperature": 1.0, "reduction": reduction}
        loss = fastkd.terms(leaf, teacher, labels, divergence=divergence, **options).loss
        gradients += torch.autograd.grad(loss.sum(), leaf)
    assert_same(*gradients)
