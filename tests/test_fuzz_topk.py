"""Test that losses of random sparse teachers equal the definition in float64."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import (
    GRAD_OUTPUTS,
    LAYOUTS,
    NARROW,
    SMOOTHING,
    TEMPERATURES,
    WEIGHTS,
    check_close,
    copy_to_layout,
    draw_rarely,
    execution_settings,
    has_equal_bits,
    largest_of,
    narrow_labels,
    program,
    special_values,
    write_special_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BF16, FP16, FP32, FP64, compute_dtype
from torch import Tensor

import fastkd
from fastkd import _C, Sampled, TopK, reference
from fastkd._core import checks
from fastkd._core.arguments import SPARSE_DIVERGENCES
from fastkd._core.values import ESTIMATORS, TAILS
from fastkd.reference.topk import is_infinite_without_rest


class Case(NamedTuple):
    """Hold the parameters of a call; the repr of a case is code, but for inf and nan."""

    leading: tuple[int, ...] = (3,)
    classes: int = 10
    k: int = 3
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    spread: float = 3.0
    seed: int = 0
    special: tuple[tuple[int, int, int, float], ...] = ()  # (student or list, row, column, value)
    padding: float = 0.0
    # (row, position in the list, an invalid class or padding)
    wrong: tuple[int, int, int] | None = None
    layout: str = "contiguous"
    labels: str = "indices"
    ignored: float = 0.2
    tail: str = "ghost"
    divergence: str = "forward_kl"
    estimator: str | None = None
    row_weights: bool = False
    temperature: float = 2.0
    weights: tuple[float, float] = (0.5, 0.5)
    smoothing: float = 0.0
    reduction: str = "mean"
    normalizer: float | None = None
    grad_output: float = 1.0
    isa: str = "default"
    threads: int = 1
    with_terms: bool = False


CASES = st.builds(
    Case,
    leading=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    classes=st.one_of(
        st.integers(1, 70), st.sampled_from([127, 157, 1000, 2049, _C.segment, _C.segment + 3])
    ),
    k=st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 200])),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP32, BF16, FP16, FP64])] * 2),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 100.0, 300.0, 1e4]),
    seed=st.integers(0, 2**31),
    special=special_values(2),
    padding=st.sampled_from([0.0, 0.3, 1.0]),
    wrong=draw_rarely(
        None,
        st.tuples(
            st.integers(0, 30),
            st.integers(0, 200),
            st.sampled_from([2**62, 2**31, 10**6, -(2**63), -1]),
        ),
    ),
    layout=st.sampled_from(LAYOUTS),
    labels=st.sampled_from(["indices", "none", *NARROW]),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
    tail=st.sampled_from(TAILS),
    divergence=st.sampled_from(SPARSE_DIVERGENCES),
    estimator=draw_rarely(None, st.sampled_from(ESTIMATORS)),
    row_weights=st.booleans(),
    temperature=TEMPERATURES,
    weights=WEIGHTS,
    smoothing=SMOOTHING,
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalizer=draw_rarely(None, st.sampled_from([0.5, 7.0, 1e4])),
    grad_output=GRAD_OUTPUTS,
    isa=st.sampled_from(_C.available_isas()),
    threads=st.integers(1, 3),
    with_terms=st.booleans(),
)


class Problem(NamedTuple):
    student: Tensor
    indices: Tensor
    log_probs: Tensor
    labels: Tensor | None


def build(case: Case, device: torch.device) -> Problem:
    if case.estimator is not None:
        case = case._replace(k=1)
    generator = torch.Generator().manual_seed(case.seed)
    shape, k = (*case.leading, case.classes), min(case.k, case.classes)
    student = torch.randn(shape, generator=generator, dtype=FP64) * case.spread
    teacher = student / case.temperature + torch.randn(shape, generator=generator, dtype=FP64)
    log_probs, indices = teacher.log_softmax(-1).topk(k)
    indices = indices.contiguous()
    indices[torch.rand(indices.shape, generator=generator) < case.padding] = -1
    if case.wrong is not None and indices.numel():
        row, place, wrong = case.wrong
        lists = indices.view(-1, k)
        lists[row % len(lists), place % k] = wrong
    values = [student.to(case.dtypes[0]), log_probs.to(case.dtypes[1]).contiguous()]
    write_special_values(values, case.special)
    labels = None
    if case.labels != "none":
        labels = torch.randint(case.classes, case.leading, generator=generator)
        is_ignored = torch.rand(case.leading, generator=generator) < case.ignored
        labels = labels.masked_fill(is_ignored, -100).to(device)
        labels = narrow_labels(labels, case.labels, case.classes)
    student, log_probs = (copy_to_layout(x.to(device), case.layout) for x in values)
    return Problem(student, copy_indices(indices, case.layout), log_probs, labels)


def copy_indices(indices: Tensor, layout: str) -> Tensor:
    """Return the indices or, for "classes apart", a copy in every second entry of a tensor."""
    if layout != "classes apart":
        return indices
    return indices.new_full((*indices.shape, 2), 10**9)[..., 0].copy_(indices)


def is_refused(problem: Problem) -> bool:
    """Return True if a row that is not ignored has an invalid list."""
    student, indices, log_probs, labels = problem
    labels = None if labels is None else labels.long()
    try:
        checks.check_lists(student, log_probs, indices, labels, -100)
    except ValueError:
        return True
    return False


def soft_term_options(case: Case) -> dict[str, Any]:
    """Return the divergence and its mix, unless the estimator or the tail "ignore" allows none."""
    if case.estimator is not None or case.tail == "ignore":
        return {}
    return {"divergence": case.divergence, "mix": reference.DIVERGENCES[case.divergence].mix}


def row_weight(case: Case, student: Tensor) -> float | Tensor:
    """Return a factor of the soft weight: 1 or, with ``row_weights``, one number per row."""
    if not case.row_weights:
        return 1.0
    weight = torch.arange(student[..., 0].numel(), dtype=FP64) % 3 / 2
    return weight.view(student.shape[:-1]).to(student.device)


def exact(case: Case, problem: Problem, reduction: str) -> tuple[fastkd.Terms, Tensor]:
    """Compute (terms, gradient) by fastkd.reference in float64."""
    student, indices, log_probs, labels = problem
    leaf = student.detach().double().requires_grad_()
    hard, soft = (0.0, 1.0) if labels is None else case.weights
    smoothing = 0.0 if labels is None else case.smoothing
    classes, k = student.shape[-1], indices.shape[-1]
    out = reference.topk.terms(
        leaf.reshape(-1, classes),
        log_probs.double().reshape(-1, k),
        indices.long().reshape(-1, k),
        None if labels is None else labels.long().reshape(-1),
        tail=case.tail,
        estimator=case.estimator,
        **soft_term_options(case),
        temperature=case.temperature,
        hard_weight=hard,
        soft_weight=soft * row_weight(case, student.reshape(-1, classes)),
        reduction=reduction,
        label_smoothing=smoothing,
        normalizer=case.normalizer,
    )
    return out, torch.autograd.grad(out.loss.sum(), leaf)[0]


def check(case: Case, device: torch.device) -> None:
    problem = build(case, device)
    if case.reduction != "mean":
        case = case._replace(normalizer=None)
    student, indices, log_probs, labels = problem
    options = {"temperature": case.temperature, "reduction": case.reduction}
    options |= {"normalizer": case.normalizer}
    if labels is not None:
        options |= {"label_smoothing": case.smoothing}
        options |= dict(zip(("hard_weight", "soft_weight"), case.weights, strict=True))
    options |= soft_term_options(case)
    if case.row_weights:
        hard, soft = (0.0, 1.0) if labels is None else case.weights
        options |= {"soft_weight": soft * row_weight(case, student)}
        options |= {"hard_weight": hard} if labels is not None else {}
    leaf, teacher = student.detach().requires_grad_(), TopK(log_probs, indices, case.tail)
    if case.estimator is not None:
        teacher = Sampled(log_probs[..., 0], indices[..., 0], case.estimator)
    before = [None if x is None else x.clone() for x in problem]
    compute = fastkd.terms if case.with_terms else fastkd.loss
    if is_refused(problem) and device.type == "cpu":
        with pytest.raises(ValueError, match=r"^teacher\.(indices|tokens|log_probs) must"):
            compute(leaf, teacher, labels, **options)
        return
    terms = compute(leaf, teacher, labels, **options)
    value = terms.loss if isinstance(terms, fastkd.Terms) else terms
    value.backward(torch.full_like(value, case.grad_output))
    grad, value = leaf.grad, value.detach()
    for tensor, copy in zip(problem, before, strict=True):
        assert tensor is None or has_equal_bits(tensor, copy), "an input was written"
    exact_terms, gradient = exact(case, problem, case.reduction)
    want, gradient = exact_terms.loss.detach(), gradient * case.grad_output
    rows = exact(case, problem, "none")[0].loss.detach()

    acc = compute_dtype(student, log_probs)
    eps, t = torch.finfo(acc).eps, case.temperature
    mass = reference.topk.mass(indices.long(), log_probs.double())
    if is_infinite_without_rest(case.divergence, 0.5) and bool((1 - mass < eps / 2).any()):
        return  # the ghost's least probability depends on the compute dtype
    hard, soft = (0.0, 1.0) if labels is None else case.weights
    largest = largest_of(student, log_probs)
    size = (hard * (1 + largest) + soft * t * t * (1 + largest / min(t, 1.0))) / (
        case.normalizer or 1.0
    )
    assert grad is not None and value.dtype == acc and grad.dtype == student.dtype
    assert value.shape == (student.shape[:-1] if case.reduction == "none" else ())
    if size > 1e30:  # float32 overflows where float64 does not
        return
    # k3 has exp(d) of a log-probability difference d. The relative error of exp(d) is d's error.
    relative = 8 * eps * (1 + largest / min(t, 1.0)) if case.estimator == "k3" else 8 * eps
    check_close(
        value.flatten(), want.flatten(), relative, 64 * eps * size * max(1, len(rows)), "loss"
    )
    term_size = 1 + largest / min(t, 1.0)
    if acc is FP64:  # PyTorch, and so the reference, sums classes sequentially in eight SIMD lanes
        term_size += case.classes / 8 / 64
    term_size /= case.normalizer or 1.0
    if isinstance(terms, fastkd.Terms) and term_size <= 1e30:
        for name, ours, theirs in zip(terms._fields[1:], terms[1:], exact_terms[1:], strict=True):
            bound = 64 * eps * term_size * max(1, len(rows))
            check_close(ours.flatten(), theirs.flatten(), relative, bound, name)
    # A loss that overflows, such as k3 of a token with a student probability of 1e-90, has no
    # gradient to compare.
    is_finite = rows.abs() < torch.finfo(acc).max / 2
    is_comparable = is_finite.view(*student.shape[:-1], 1) & gradient.isfinite()
    info = torch.finfo(grad.dtype)
    check_close(
        grad.where(is_comparable, torch.zeros_like(grad)),
        gradient.where(is_comparable, torch.zeros_like(gradient)),
        0.51 * info.eps + relative,
        64 * eps * abs(case.grad_output) * size + info.smallest_normal * info.eps,
        "gradient",
    )


def run(case: Case, device: torch.device) -> None:
    with execution_settings(case.isa, case.threads, in_python=False):
        check(case, device)


# Each case failed once, as the comment above it says.
REGRESSIONS = [
    # The reference did not renormalize a list whose probabilities all underflow.
    Case(
        leading=(),
        classes=2,
        k=63,
        spread=300.0,
        wrong=(0, 0, -1),
        labels="none",
        temperature=0.5,
        tail="renormalize",
        divergence="reverse_kl",
    ),
    # The reference's entropy of many equal probabilities has the error of a sequential sum.
    Case((), 32768, 1, (FP32, FP64), 0.0, special=((0, 0, 0, 6e-8),), with_terms=True),
    # With logits as log_probs, exponentials overflowed, and their sum was a small float64 number.
    Case(special=((1, 0, 0, 1e38),)),
    Case(special=((1, 1, 2, 3e4),), dtypes=(FP64, FP64), tail="ignore"),
    # The probabilities of the list underflowed before their division by the list's sum, so that a
    # mixture of student and teacher was divided by 0.
    Case(
        leading=(),
        classes=32771,
        k=63,
        spread=10000.0,
        seed=1226,
        wrong=(0, 0, -(2**63)),
        temperature=1.0,
        tail="renormalize",
        divergence="skewed_reverse_kl",
    ),
    # The bits of the kernel's exponential overflowed for a negative grad_output.
    *(
        Case(
            (4,), 40, k=40, spread=300.0, reduction="none", grad_output=-0.5, ignored=0.0, tail=tail
        )
        for tail in TAILS
    ),
    # PyTorch's operations gave 0 for an empty list in a row without any probability.
    Case(leading=(), classes=1, k=1, special=((0, 0, 0, -math.inf),), padding=1.0, labels="none"),
    # PyTorch's operations gave 0, not inf, for a masked class whose probability underflows.
    Case(
        leading=(),
        classes=2,
        k=2,
        spread=1e4,
        special=((0, 0, 1, -math.inf),),
        ignored=0.0,
        temperature=1.0,
        weights=(0.0, 0.3),
    ),
]


@pytest.mark.filterwarnings("ignore:.*torch.frombuffer")
@settings(max_examples=200)
@given(case=CASES)
def test_random_lists_equal_the_definition(device, case):
    run(case, device)


@pytest.mark.parametrize("case", REGRESSIONS)
def test_earlier_failures_equal_the_definition(device, case):
    run(case, device)


if __name__ == "__main__":
    program(CASES, run)
