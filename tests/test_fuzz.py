"""Random calls held against the reference in float64: sizes, layouts, dtypes, options, odd numbers.

``make fuzz CASES=20000 SEED=7`` runs this file as a program, in batches of 500 from consecutive
seeds, each printed when it fails, with the case that hypothesis has shrunk it to. Such a case is
then added to REGRESSIONS, fix and all.
"""

import json
import math
import os
import sys
import time
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as conftest.py, for the program

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BF16, FP16, FP32, FP64, compute_dtype
from torch import Tensor

import fastkd
from fastkd import _C, ops, reference

ODD = (0.0, -0.0, 1e-40, 1e-45, 6e-8, 1e38, -1e38, 3e4, -math.inf, math.inf, math.nan)
BATCH = 500


class Case(NamedTuple):
    """A call, in numbers that print as they are typed."""

    leading: tuple[int, ...] = (3,)
    classes: int = 10
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    spread: float = 3.0
    apart: float = 1.0  # how far the teacher is from the student
    seed: int = 0
    odd: tuple[tuple[int, int, int, float], ...] = ()  # (student or teacher, row, class, value)
    layout: str = "contiguous"
    labels: str = "indices"
    ignored: float = 0.2
    divergence: str = "forward_kl"
    temperature: float = 2.0
    own: float | None = None  # the teacher's temperature
    per_row: bool = False
    weights: tuple[float, float] = (0.5, 0.5)
    smoothing: float = 0.0
    reduction: str = "mean"
    way: str = "loss"
    isa: str = "default"
    threads: int = 1


LAYOUTS = ("contiguous", "rows apart", "sliced", "transposed", "classes apart", "odd bytes", "same")
WAYS = ("loss", "terms", "module", "python", "inplace")
CASES = st.builds(
    Case,
    leading=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    classes=st.one_of(
        st.integers(1, 70), st.sampled_from([127, 1000, 1025, 2049, _C.segment, _C.segment + 3])
    ),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP32, BF16, FP16, FP64])] * 2),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 100.0, 1e4]),
    apart=st.sampled_from([0.0, 1e-4, 1e-2, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
    odd=st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, 4), st.integers(0, 2**14), st.sampled_from(ODD)
        ),
        max_size=4,
    ).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    labels=st.sampled_from(["indices", "none", "probabilities", "int32"]),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
    divergence=st.sampled_from(["forward_kl", *fastkd.divergences()]),
    temperature=st.one_of(st.sampled_from([1.0, 2.0, 3.0, 4.0]), st.floats(0.25, 30.0)),
    own=st.one_of(st.none(), st.floats(0.25, 30.0)),
    per_row=st.booleans(),
    weights=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 2.5])] * 2),
    smoothing=st.sampled_from(
        [0.0, 0.1, 0.9]
    ),  # at 1 the reference has 0 * inf where -inf is the label
    reduction=st.sampled_from(["mean", "sum", "none"]),
    way=st.sampled_from(WAYS),
    isa=st.sampled_from(_C.available_isas()),
    threads=st.integers(1, 3),
)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory; what surrounds them is NaN."""
    shape = values.shape
    if layout == "odd bytes" and values.device.type == "cpu" and values.numel():
        size = values.element_size()
        memory = bytearray(values.numel() * size + 1)
        view = torch.frombuffer(memory, dtype=values.dtype, offset=1, count=values.numel())
        return view.view(shape).copy_(values)
    if layout == "sliced":  # as logits[..., :vocabulary] and logits[:, :-1] are
        more = [n + (1 if i else 0) for i, n in enumerate(shape)]
        base = values.new_full(more, math.nan)
        view = base[tuple(slice(0, n) for n in shape)]
    elif layout == "rows apart":
        view = values.new_full((*shape[:-1], 2, shape[-1]), math.nan)[..., 1, :]
    elif layout == "transposed" and len(shape) > 2:
        order = [shape[1], shape[0], *shape[2:]]
        view = values.new_full(order, math.nan).transpose(0, 1)
    elif layout == "classes apart":
        view = values.new_full((*shape, 2), math.nan)[..., 0]
    else:
        return values.clone(memory_format=torch.contiguous_format)
    return view.copy_(values)


class Problem(NamedTuple):
    """A case's tensors and options; the options as the reference has them, too."""

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    options: dict[str, Any]
    exact: dict[str, Any]


def build(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(case.seed)
    if case.divergence == "dkd":  # refuses a single class
        case = case._replace(classes=max(case.classes, 2))
    shape = (*case.leading, case.classes)
    rows = math.prod(case.leading)
    student = torch.randn(shape, generator=generator, dtype=FP64) * case.spread
    teacher = student + torch.randn(shape, generator=generator, dtype=FP64) * case.apart
    values = [student.to(case.dtypes[0]), teacher.to(case.dtypes[1])]
    for which, row, index, value in case.odd:
        if rows:
            values[which].view(rows, -1)[row % rows, index % case.classes] = value
    student, teacher = (laid_out(x.to(device), case.layout) for x in values)
    if case.layout == "same" and case.dtypes[0] is case.dtypes[1] and case.way != "inplace":
        teacher = student
    labels = None
    if case.labels == "probabilities" and case.divergence != "dkd":
        labels = torch.rand(shape, generator=generator).softmax(-1).to(device)
    elif case.labels != "none" or case.divergence == "dkd":
        labels = torch.randint(case.classes, case.leading, generator=generator)
        gone = torch.rand(case.leading, generator=generator) < case.ignored
        labels = labels.masked_fill(gone, -100).to(device)
        if case.labels == "int32":
            labels = labels.int()
    t: float | Tensor = case.temperature
    if case.per_row:
        t = torch.full(case.leading, t, dtype=FP64).to(device) * torch.linspace(
            1, 2, max(rows, 1), dtype=FP64, device=device
        )[:rows].view(case.leading)
    exact: dict[str, Any] = {"temperature": t, "reduction": case.reduction}
    exact["divergence"] = case.divergence
    if case.own is not None:
        exact["teacher_temperature"] = case.own
    options = dict(exact)
    if labels is not None:
        exact |= {"label_smoothing": case.smoothing}
        options |= {"label_smoothing": case.smoothing}
        options |= dict(zip(("hard_weight", "soft_weight"), case.weights, strict=True))
    hard, soft = case.weights if labels is not None else (0.0, 1.0)
    exact |= {"hard_weight": hard, "soft_weight": soft}
    return Problem(student, teacher, labels, options, exact)


def compute(case: Case, problem: Problem) -> tuple[Tensor, Tensor]:
    """(loss, gradient), by one of the ways in."""
    student, teacher, labels, options, _ = problem
    leaf = student.detach().requires_grad_()
    fused = case.divergence in ops.DIVERGENCES and case.labels != "probabilities"
    whole = case.reduction != "none" and case.layout == "contiguous"
    if case.way == "inplace" and fused and whole:
        hidden = leaf * 1
        value = fastkd.loss(hidden, teacher, labels, **options, inplace=True)
    elif case.way == "terms":
        value = fastkd.terms(leaf, teacher, labels, **options).loss
    elif case.way == "module":
        module = fastkd.KDLoss(**options)
        value = module(leaf, teacher, labels)
    else:
        value = fastkd.loss(leaf, teacher, labels, **options)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def check(case: Case, device: torch.device) -> None:
    """The call gives what the reference gives in float64, as far as the dtypes carry."""
    problem = build(case, device)
    student, teacher, labels, _, exact = problem
    before = [None if x is None else x.clone() for x in problem[:3]]
    value, grad = compute(case, problem)
    for tensor, copy in zip(problem[:3], before, strict=True):
        assert tensor is None or same_bits(tensor, copy), "an input was written"
    leaf = student.detach().double().requires_grad_()
    host = labels if labels is None or labels.is_floating_point() else labels.long()
    rows = reference.terms(leaf.detach(), teacher.double(), host, **{**exact, "reduction": "none"})
    want = reference.loss(leaf, teacher.double(), host, **exact)
    (gradient,) = torch.autograd.grad(want.sum(), leaf)

    acc = compute_dtype(student, teacher)
    eps = torch.finfo(acc).eps
    t = float(torch.as_tensor(exact["temperature"]).max()) if math.prod(case.leading) else 1.0
    least = min(case.temperature, case.own or case.temperature)
    hard, soft = exact["hard_weight"], exact["soft_weight"]
    finite = [x.double().nan_to_num(0, 0, 0).abs() for x in (student, teacher)]
    largest = max([float(x.max()) for x in finite if x.numel()], default=0.0)
    # What a rounding of a logit over its temperature becomes in the loss and in its gradient.
    size = hard * (1 + largest) + soft * t * t * (1 + largest / least)
    if reference.DIVERGENCES[case.divergence].compares == "logits":
        size *= 1 + largest / least
        if not all(bool(x.isfinite().all()) for x in (student, teacher)):
            return  # their infinities are not written down; the call has come back, which is all
    if case.divergence == "cosine" and leaf.numel():  # its gradient grows as the logits shrink
        size *= 1 + float(1 / leaf.detach().norm(dim=-1).clamp(min=1e-30).min())
    if case.divergence == "dkd":
        size *= 10  # mix weighs 8
    assert value.dtype == acc and grad.dtype == student.dtype
    assert value.shape == want.shape and grad.shape == student.shape
    if size > 1e30:  # float32 overflows where float64 does not: no number is held to another
        return
    # A class that the student alone masks makes the loss infinite; float64 says so unless the
    # teacher's probability of it underflows.
    alone = ((student == -math.inf) & (teacher > -math.inf)).any(-1)
    if bool(alone.any()) and not bool(value.isfinite().all()):
        return
    count = max(1, want.numel() if case.reduction == "none" else rows.loss.numel())
    close(value, want.detach(), 8 * eps, 64 * eps * size * count, "loss")
    if case.divergence == "total_variation":
        return  # the gradient jumps where p = q: roundings of the two fall on either side
    told = rows.loss.isfinite().unsqueeze(-1) & gradient.isfinite()
    info = torch.finfo(grad.dtype)
    close(
        grad.where(told, torch.zeros_like(grad)),
        gradient.where(told, torch.zeros_like(gradient)),
        0.51 * info.eps + 8 * eps,
        64 * eps * size + info.smallest_normal * info.eps,
        "gradient",
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0)) and torch.equal(
        a.isnan(), b.isnan()
    )


def close(got: Tensor, want: Tensor, relative: float, absolute: float, what: str) -> None:
    """NaN where NaN is due, an infinity where one is due, else within the bounds."""
    # Beyond, the dtype may say inf.
    largest = min(torch.finfo(got.dtype).max, torch.finfo(FP32).max) / 2
    huge = want.abs() > largest
    got = got.double()
    fits = (got - want).abs() <= relative * want.abs() + absolute
    fits |= (got == want) | (got.isnan() & want.isnan()) | huge
    if not bool(fits.all()):
        at = int((~fits).flatten().nonzero()[0])
        pair = (float(got.flatten()[at]), float(want.flatten()[at]))
        raise AssertionError(f"{what}[{at}] is {pair[0]!r}, float64 says {pair[1]!r}")


def run(case: Case, device: torch.device) -> None:
    """Checks a case with its instruction set, threads and way in; puts those back."""
    isa, threads, eager = _C.isa(), torch.get_num_threads(), ops.EAGER
    _C.use_isa(case.isa)
    torch.set_num_threads(case.threads)
    if case.way == "python":
        ops.EAGER = None
    try:
        check(case, device)
    finally:
        ops.EAGER = eager
        torch.set_num_threads(threads)
        _C.use_isa(isa)


# What was found, and fixed.
REGRESSIONS = [
    # No row, in strides that cannot be walked: was refused as if by inplace.
    Case(leading=(3, 5, 0), classes=35, layout="transposed", way="python"),
    Case(leading=(0,), classes=127, layout="classes apart"),
    # No memory at all was taken for the teacher's.
    Case(leading=(0,), classes=60, way="inplace"),
    # 0 / 0 where the student's probability of a class is subnormal: a gradient of NaN.
    Case((2,), 2049, spread=100.0, divergence="skewed_reverse_kl", temperature=1.0),
    Case((4,), 2049, (BF16, BF16), spread=100.0, divergence="skewed_reverse_kl", temperature=1.0),
]


@pytest.mark.filterwarnings("ignore:.*torch.frombuffer")
@settings(max_examples=300)
@given(case=CASES)
def test_fuzz(device, case):
    run(case, device)


@pytest.mark.parametrize("case", REGRESSIONS)
def test_regressions(device, case):
    run(case, device)


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures = []
    for seed in range(first, first + math.ceil(cases / BATCH)):
        fuzz = hypothesis.seed(seed)(given(case=CASES)(lambda case: run(case, device)))
        try:
            settings(
                max_examples=BATCH, deadline=None, database=None, derandomize=False,
                suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
            )(fuzz)()  # fmt: skip
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            print(f"seed {seed}: {type(error).__name__}: {error}\n{notes}", flush=True)
            failures.append(seed)
    figures = {"cases": cases, "first seed": first, "failures": len(failures)}
    print("figures: " + json.dumps(figures | {"device": device.type}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
