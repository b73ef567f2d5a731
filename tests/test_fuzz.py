"""Test that random calls equal the float64 reference: sizes, layouts, dtypes, options.

``make fuzz CASES=20000 SEED=7`` runs the fuzzers as programs, in batches of 500 cases from
consecutive seeds. A failing batch prints a shrunk case. Add this case to REGRESSIONS.
test_objectives.py tests several teachers, teachers' probabilities and standardize.
"""

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
    lacks_inverse,
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
from fastkd import _C, reference
from fastkd._core.dense import DIVERGENCES


class Case(NamedTuple):
    """Hold the parameters of a call; the repr of a case is code, but for inf and nan."""

    leading: tuple[int, ...] = (3,)
    classes: int = 10
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    spread: float = 3.0
    apart: float = 1.0  # scale of the difference of teacher and student
    seed: int = 0
    special: tuple[tuple[int, int, int, float], ...] = ()  # (student or teacher, row, class, value)
    layout: str = "contiguous"
    labels: str = "indices"
    ignored: float = 0.2
    divergence: str = "forward_kl"
    temperature: float = 2.0
    teacher_t: float | None = None  # the teacher's temperature
    per_row: frozenset[str] = frozenset()  # options that are tensors with a number for each row
    # These options are tensors that repeat one number for every row or (class_weight) every class.
    constant: frozenset[str] = frozenset()
    weights: tuple[float, float] = (0.5, 0.5)
    smoothing: float = 0.0
    reduction: str = "mean"
    normalizer: float | None = None
    class_weight: bool = False
    mix: float | None = None  # for divergences that have a mix
    grad_output: float = 1.0
    ignore_index: int = -100
    unused: int = 0  # padded classes, removed by a slice
    dim: int = -1
    entry_point: str = "loss"
    isa: str = "default"
    threads: int = 1


ROW_SETTINGS = ("temperature", "teacher_temperature", "hard_weight", "soft_weight")
ENTRY_POINTS = ("loss", "terms", "module", "python", "inplace")
CASES = st.builds(
    Case,
    leading=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    classes=st.one_of(
        st.integers(1, 70),
        st.sampled_from([127, 157, 1000, 1025, 2049, _C.segment, _C.segment + 3]),
    ),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP32, BF16, FP16, FP64])] * 2),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 100.0, 1e4]),
    apart=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
    special=special_values(2),
    layout=st.sampled_from([*LAYOUTS, "same"]),
    labels=st.sampled_from(["indices", "none", "probabilities", *NARROW]),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
    divergence=st.sampled_from(["forward_kl", *fastkd.divergences()]),
    temperature=TEMPERATURES,
    teacher_t=st.one_of(st.none(), st.floats(0.25, 30.0)),
    per_row=draw_rarely(frozenset(), st.frozensets(st.sampled_from(ROW_SETTINGS))),
    constant=draw_rarely(
        frozenset(), st.frozensets(st.sampled_from([*ROW_SETTINGS, "class_weight"]))
    ),
    weights=WEIGHTS,
    smoothing=SMOOTHING,
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalizer=draw_rarely(None, st.sampled_from([0.5, 7.0, 1e4])),
    class_weight=draw_rarely(False, st.booleans()),
    mix=draw_rarely(None, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    grad_output=GRAD_OUTPUTS,
    ignore_index=draw_rarely(-100, st.integers(-1, 3)),
    unused=draw_rarely(0, st.integers(1, 9)),
    dim=draw_rarely(-1, st.just(1)),
    entry_point=st.sampled_from(ENTRY_POINTS),
    isa=st.sampled_from(_C.available_isas()),
    threads=st.integers(1, 3),
)


class Problem(NamedTuple):
    """Hold tensors and options of a case; ``exact`` has the options for the reference."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    options: dict[str, Any]
    exact: dict[str, Any]


def build(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    if case.divergence == "dkd":  # dkd refuses a single class
        case = case._replace(classes=max(case.classes, 2))
    shape = (*case.leading, case.classes + case.unused)
    student = torch.randn(shape, generator=generator, dtype=FP64) * case.spread
    teacher = student + torch.randn(shape, generator=generator, dtype=FP64) * case.apart
    values = [student.to(case.dtypes[0]), teacher.to(case.dtypes[1])]
    write_special_values(values, case.special)
    dim = case.dim if case.leading else -1
    student, teacher = (copy_to_layout(x.movedim(-1, dim).to(device), case.layout) for x in values)
    if case.layout == "same" and case.dtypes[0] is case.dtypes[1] and case.entry_point != "inplace":
        teacher = student
    labels = labels_of(case, generator, device, dim)
    options: dict[str, Any] = {"reduction": case.reduction, "divergence": case.divergence}
    options |= {"temperature": case.temperature, "dim": dim}
    if case.teacher_t is not None:
        options["teacher_temperature"] = case.teacher_t
    if labels is not None:
        options |= {"label_smoothing": case.smoothing, "ignore_index": case.ignore_index}
        options |= dict(zip(("hard_weight", "soft_weight"), case.weights, strict=True))
        if case.class_weight:
            weight = torch.rand(case.classes, generator=generator, dtype=FP64) + 0.1
            options["class_weight"] = weight.to(device)
    if case.normalizer is not None and case.reduction == "mean":
        options["normalizer"] = case.normalizer
    kind = reference.DIVERGENCES[case.divergence]
    if case.mix is not None and kind.mix is not None:
        # In float32, mix is rounded to a multiple of 2^-24 (docs/maths.md, section 10).
        options["mix"] = min(max(case.mix, 2**-23), 1 - 2**-23) if kind.mix_open else case.mix
    rows = math.prod(case.leading)
    growing = torch.linspace(1, 2, max(rows, 1), dtype=FP64)[:rows].view(case.leading).to(device)
    for name in case.per_row & options.keys():
        options[name] = options[name] * growing
    exact = dict(options)
    for name in case.constant & options.keys() - {"class_weight"} - case.per_row:
        options[name] = torch.full_like(growing, options[name])
    if "class_weight" in case.constant and labels is not None and not case.class_weight:
        options["class_weight"] = torch.ones(case.classes, device=device)
    if labels is None:
        exact |= {"hard_weight": 0.0, "soft_weight": 1.0}
    return Problem(student, teacher, labels, options, exact)


def labels_of(
    case: Case, generator: torch.Generator, device: torch.device, dim: int
) -> Tensor | None:
    if case.labels == "probabilities" and case.divergence != "dkd":
        shape = (*case.leading, case.classes)
        return torch.rand(shape, generator=generator).softmax(-1).movedim(-1, dim).to(device)
    if case.labels == "none" and case.divergence != "dkd":
        return None
    labels = torch.randint(case.classes, case.leading, generator=generator)
    is_ignored = torch.rand(case.leading, generator=generator) < case.ignored
    labels = labels.masked_fill(is_ignored, case.ignore_index).to(device)
    return narrow_labels(labels, case.labels, case.classes, case.ignore_index)


def sliced(case: Case, logits: Tensor, dim: int) -> Tensor:
    return logits.narrow(dim, 0, logits.shape[dim] - case.unused) if case.unused else logits


def is_fused(case: Case) -> bool:
    """Return True if one pass of the kernels computes the case."""
    has_class_weight = case.class_weight or "class_weight" in case.constant
    return (
        case.divergence in DIVERGENCES
        and case.labels != "probabilities"
        and not (has_class_weight and case.labels != "none" and case.smoothing)
    )


def compute(case: Case, problem: Problem) -> tuple[Tensor, Tensor]:
    """Compute (loss, gradient) by the entry point of the case."""
    student, teacher, labels, options, _ = problem
    leaf = student.detach().requires_grad_()
    logits, teacher = (sliced(case, x, options["dim"]) for x in (leaf, teacher))
    allows_inplace = case.reduction != "none" and case.layout == "contiguous"
    allows_inplace = allows_inplace and case.dim == -1 and not case.unused
    if case.entry_point == "inplace" and allows_inplace and is_fused(case):
        hidden = leaf * 1
        value = fastkd.loss(hidden, teacher, labels, **options, inplace=True)
    elif case.entry_point == "terms":
        value = fastkd.terms(logits, teacher, labels, **options).loss
    elif case.entry_point == "module":
        module = fastkd.KDLoss(**options)
        value = module(logits, teacher, labels)
    else:
        value = fastkd.loss(logits, teacher, labels, **options)
    value.backward(torch.full_like(value, case.grad_output))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def soft_terms(case: Case, problem: Problem) -> Tensor:
    *logits, labels, options, _ = problem
    student, teacher = (sliced(case, x, options["dim"]) for x in logits)
    options = {k: v for k, v in options.items() if k != "normalizer"}
    return fastkd.terms(student, teacher, labels, **options | {"reduction": "none"}).soft


def check_constants(case: Case, device: torch.device, problem: Problem, soft: Tensor) -> None:
    """Assert that options given as repeated numbers lose no accuracy of the soft term."""
    baseline = soft_terms(case, build(case._replace(constant=frozenset()), device)).double()
    finite = soft.isfinite() & baseline.isfinite()
    got, baseline, soft = (x[finite] for x in (soft_terms(case, problem).double(), baseline, soft))
    error, of_baseline = (got - soft).abs(), (baseline - soft).abs()
    eps = torch.finfo(compute_dtype(problem.student, problem.teacher)).eps
    least = min(case.temperature, case.teacher_t or case.temperature)
    ratio = 1 + largest_of(problem.student, problem.teacher) / least
    limit = 64 * eps * ratio * soft.abs() + 4 * (of_baseline.max() if len(of_baseline) else 0.0)
    assert bool((error <= limit).all()), f"{error} beside {of_baseline}"


def roundings(case: Case, problem: Problem) -> tuple[Tensor, Tensor]:
    """Bound the rounding errors of squared errors, as (row losses, gradient entries).

    The squared error of a class has rounding errors of the class's logits and, if centered, of the
    mean.
    """
    student, teacher, exact = problem.student.double(), problem.teacher.double(), problem.exact
    dim, classes = exact["dim"], case.classes
    t, teacher_t, soft = (
        torch.as_tensor(exact.get(name, exact["temperature"]), dtype=FP64).unsqueeze(-1)
        for name in ("temperature", "teacher_temperature", "soft_weight")
    )
    student, teacher = (x.movedim(dim, -1)[..., :classes].abs() for x in (student, teacher))
    size = student / t.to(student) + teacher / teacher_t.to(teacher)
    if case.divergence == "centered_mse":
        size = size + size.mean(-1, keepdim=True)
    gain = soft.to(size) * t.to(size) / exact.get("normalizer", 1.0)
    rows = (gain * t.to(size)).squeeze(-1) * size.square().mean(-1)
    of_classes = 2 * gain / classes * size
    padding = of_classes.new_zeros((*of_classes.shape[:-1], case.unused))
    return rows, torch.cat((of_classes, padding), -1).movedim(-1, dim)


def check(case: Case, device: torch.device) -> None:
    """Assert that the call equals the float64 reference up to rounding in the call's dtypes."""
    problem = build(case, device)
    student, teacher, labels, _, exact = problem
    dim = exact["dim"]
    before = [None if x is None else x.clone() for x in problem[:3]]
    value, grad = compute(case, problem)
    for tensor, copy in zip(problem[:3], before, strict=True):
        assert tensor is None or has_equal_bits(tensor, copy), "an input was written"
    leaf = student.detach().double().requires_grad_()
    host = labels if labels is None or labels.is_floating_point() else labels.long()
    logits, wide = (sliced(case, x, dim) for x in (leaf, teacher.double()))
    rows = reference.terms(logits.detach(), wide, host, **{**exact, "reduction": "none"})
    want = reference.loss(logits, wide, host, **exact)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    gradient = gradient * case.grad_output

    size = sensitivity(case, problem)
    if reference.DIVERGENCES[case.divergence].compares == "logits" and not all(
        bool(x.isfinite().all()) for x in (student, teacher)
    ):
        return  # the bounds below do not hold for infinite logits
    acc = compute_dtype(student, teacher)
    eps = torch.finfo(acc).eps
    assert value.dtype == acc and grad.dtype == student.dtype
    assert value.shape == want.shape and grad.shape == student.shape
    if size > 1e30:  # float32 overflows where float64 does not
        return
    count = max(1, want.numel() if case.reduction == "none" else rows.loss.numel())
    in_value, in_gradient = torch.tensor(size * count), torch.tensor(size)
    hard = torch.as_tensor(exact.get("hard_weight", 0.0))
    if case.divergence in ("mse", "centered_mse") and is_fused(case) and not hard.any():
        # Squared errors of small logits stay accurate beside large logits, so entries have separate
        # bounds.
        of_rows, in_gradient = roundings(case, problem)
        in_value = of_rows.sum().clamp(min=1e-30) * count
    check_close(value, want.detach(), 8 * eps, 64 * eps * in_value, "loss")
    if is_fused(case) and not hard.any():
        assert not bool((value < 0).any()), "a divergence is negative"
    if case.constant and is_fused(case) and rows.loss.numel():
        check_constants(case, device, problem, rows.soft)
    if case.divergence == "total_variation":
        return  # the gradient jumps at p = q, where roundings differ
    is_comparable = rows.loss.isfinite().unsqueeze(dim) & gradient.isfinite()
    info = torch.finfo(grad.dtype)
    check_close(
        grad.where(is_comparable, torch.zeros_like(grad)),
        gradient.where(is_comparable, torch.zeros_like(gradient)),
        0.51 * info.eps + 8 * eps,
        64 * eps * max(abs(case.grad_output), 1e-30) * in_gradient
        + info.smallest_normal * info.eps,
        "gradient",
    )


def sensitivity(case: Case, problem: Problem) -> float:
    """Bound errors of loss and gradient, in units of eps, from rounding logits / temperature."""
    student, teacher, exact = problem.student, problem.teacher, problem.exact
    if not student.numel():
        return 1.0
    t, teacher_t, hard, soft = (
        torch.as_tensor(exact.get(name, exact["temperature"]), dtype=FP64) for name in ROW_SETTINGS
    )
    largest, greatest = largest_of(student, teacher), float(t.max())
    in_exponent = 1 + largest / float(torch.minimum(t.min(), teacher_t.min()))
    fused = is_fused(case)
    if not fused and in_exponent > 1e30:
        return math.inf  # a logit over its temperature may overflow float32
    # PyTorch rounds log-probabilities relative to their size, and sums classes sequentially in
    # eight SIMD lanes. The float64 reference does so, too, which matters for calls in float64.
    if not fused or compute_dtype(student, teacher) is FP64:
        in_exponent += math.log(case.classes) + case.classes / 8 / 64
    size = float(hard.max()) * (1 + largest) + float(soft.max()) * greatest**2 * in_exponent
    size /= exact.get("normalizer", 1.0)
    if case.class_weight:
        size *= 10  # class weights are at least 0.1, and the mean divides by their sum
    if reference.DIVERGENCES[case.divergence].compares == "logits":
        size *= in_exponent
    if case.divergence == "cosine":  # the cosine's gradient grows as the logits shrink
        lengths = [
            logits.double().movedim(exact["dim"], -1)[..., : case.classes].norm(dim=-1)
            for logits in (student, teacher)
        ]
        if any(lacks_inverse(each, compute_dtype(student, teacher)) for each in lengths):
            return math.inf
        size *= 1 + float(1 / lengths[0].clamp(min=1e-30).min())
    if case.divergence == "dkd":
        size *= 10  # dkd's mix is at most 8
    return size


def run(case: Case, device: torch.device) -> None:
    with execution_settings(case.isa, case.threads, in_python=case.entry_point == "python"):
        check(case, device)


# Each case failed once, as the comment above it says.
REGRESSIONS = [
    # A batch without rows and with invalid strides was refused by a message about inplace.
    Case(leading=(3, 5, 0), classes=35, layout="transposed", entry_point="python"),
    Case(leading=(0,), classes=127, layout="classes apart"),
    # Empty tensors were treated as if they shared the teacher's memory.
    Case(leading=(0,), classes=60, entry_point="inplace"),
    # The gradient was NaN (0 / 0) where the student's probability of a class is subnormal.
    Case((2,), 2049, spread=100.0, divergence="skewed_reverse_kl", temperature=1.0),
    Case((4,), 2049, (BF16, BF16), spread=100.0, divergence="skewed_reverse_kl", temperature=1.0),
    # The gradient was NaN at weight 0: the teacher masks a class whose student probability
    # underflows.
    Case(
        (1,),
        16,
        spread=1e4,
        special=((1, 0, 0, -math.inf),),
        divergence="reverse_kl",
        weights=(0.0, 0.0),
    ),
    Case(
        (1,),
        2,
        spread=0.0,
        special=((0, 0, 0, 1e38), (1, 0, 1, -math.inf)),
        divergence="reverse_kl",
        temperature=1.0,
        weights=(0.0, 0.0),
    ),
    # The gradient was NaN at weight 0: the divergence and its derivatives are infinite.
    Case(
        (1,),
        2,
        special=((1, 0, 0, 1e38),),
        divergence="reverse_kl",
        temperature=0.25,
        weights=(0.0, 0.0),
    ),
    Case(
        (1,),
        1000,
        special=((1, 0, 0, 1e38),),
        divergence="reverse_kl",
        temperature=0.25,
        weights=(0.0, 0.0),
    ),
    # The gradient had the rounding error of sequential sums of many exponentials.
    Case(
        (),
        32768,
        (FP64, FP32),
        spread=3.0,
        apart=100.0,
        layout="classes apart",
        divergence="reverse_kl",
        temperature=0.25,
        weights=(0.0, 0.3),
    ),
    # The test's bound did not include PyTorch's rounding of log(classes).
    Case(
        (),
        32768,
        spread=0.0,
        apart=1e-4,
        labels="probabilities",
        temperature=1.0,
        teacher_t=8.0,
        weights=(0.0, 0.3),
    ),
    # The test's bound did not include the error of PyTorch's sequential sums.
    Case(
        (),
        32768,
        spread=0.0,
        apart=1e-4,
        labels="probabilities",
        divergence="soft_cross_entropy",
        temperature=1.0,
        teacher_t=8.0,
        weights=(0.0, 0.3),
    ),
    # The reference's divergence was -1e-13, since PyTorch sums the classes sequentially.
    Case(
        (),
        32768,
        (FP32, FP64),
        0.0,
        0.0,
        special=((0, 0, 0, 6e-8),),
        labels="none",
        temperature=1.0,
    ),
    # The gradient was NaN: the KL of weight 0 has an infinite derivative for a class that the
    # teacher masks.
    *(
        Case(
            (2,),
            n,
            special=((1, 0, 1, -math.inf), (1, 1, 1, -math.inf)),
            divergence="symmetric_kl",
            labels="none",
            mix=1.0,
            entry_point="python",
        )
        for n in (6, 1000)
    ),
    # Subtracting one huge logit from a row rounded away the differences of smaller logits.
    *(
        Case(
            (3,),
            n,
            special=((0, 0, 1, 1e38 if n == 7 else 3e4),),
            divergence=name,
            labels="none",
            temperature=1.5,
            teacher_t=teacher_t,
        )
        for n in (7, 1000)
        for name in ("mse", "centered_mse")
        for teacher_t in (None, 0.7)
    ),
    # The loss was less accurate if an option was a tensor that repeats one number.
    *(
        Case((20,), n, spread=3.0, apart=1e-4, temperature=3.0, constant=frozenset([name]))
        for n in (10, 100)
        for name in ("temperature", "soft_weight", "class_weight")
    ),
    # The gradient was wrong for a grad_output other than 1.
    *(
        Case((3,), n, reduction=reduction, grad_output=factor, special=((0, 0, 1, -math.inf),))
        for n in (10, 1000)
        for reduction in ("mean", "none")
        for factor in (-0.5, 0.0)
    ),
    # The reference was NaN (0 * inf) for a masked label of weight 0.
    Case(
        (2,),
        5,
        special=((0, 0, 0, -math.inf), (1, 0, 0, -math.inf)),
        smoothing=1.0,
        weights=(0.0, 1.0),
    ),
    # A teacher temperature for each row and one student temperature were refused.
    Case(teacher_t=3.0, per_row=frozenset(["teacher_temperature"])),
    Case(leading=(0,), teacher_t=2.0, per_row=frozenset(["teacher_temperature"])),
]


@pytest.mark.filterwarnings("ignore:.*torch.frombuffer")
@settings(max_examples=300)
@given(case=CASES)
def test_random_calls_equal_the_reference(device, case):
    run(case, device)


@pytest.mark.parametrize("case", REGRESSIONS)
def test_earlier_failures_equal_the_reference(device, case):
    run(case, device)


if __name__ == "__main__":
    program(CASES, run)
