"""Several teachers, or probabilities, as the logits of one: the kernel that mixes them."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from support import BF16, DTYPES, FP32, FP64
from torch import Tensor

import fastkd
from fastkd import losses, mixture, objective

INF = math.inf
# Of log p, beside its own size; of p, absolute.
BOUND = {FP32: 4e-7, FP64: 1e-14}


def teachers_of(form: str, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    many = [4 * torch.randn(shape, generator=generator, dtype=FP64) for _ in range(count)]
    if form == "probs":
        many = [logits.softmax(-1) for logits in many]
    if form == "log_probs":
        many = [logits.log_softmax(-1) for logits in many]
    return [logits.to(dtype) for logits in many]


def mixed(teachers: list[Tensor], dtype: torch.dtype = FP32, **options: Any) -> Tensor:
    """The mixture's logits at temperature 1, in float64."""
    given = {**losses.DEFAULTS, **options}
    resolved = objective.resolve(given, has_labels=False, teachers=len(teachers))
    resolved = objective.fit(resolved, teachers[0], dtype)
    logits, temperature = mixture.one_teacher(tuple(teachers), resolved, dtype)
    assert logits.is_contiguous() and logits.dtype == dtype
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return logits.double() / temperature


def check(teachers: list[Tensor], dtype: torch.dtype = FP32, **options: Any) -> None:
    """p and its logarithm against float64, and which classes are masked."""
    classes = teachers[0].shape[-1]
    got = mixed(teachers, dtype, **options).log_softmax(-1).reshape(-1, classes)
    form, own = options.get("teacher_form", "logits"), options.get("teacher_temperature")
    default = options.get("temperature", 2.0) if form == "logits" else 1.0
    own = default if own is None else own
    t = own.double().numpy()[:, None] if isinstance(own, Tensor) else own
    given = [teacher.double().reshape(-1, classes).numpy() for teacher in teachers]
    weights, ensemble = options.get("teacher_weights"), options.get("ensemble", "probs")
    with np.errstate(divide="ignore"):
        p = torch.from_numpy(oracle.teacher(given, t, form, weights, ensemble, False)[1])
    torch.testing.assert_close(got.exp(), p, rtol=0, atol=BOUND[dtype])
    masked = [torch.from_numpy(x) == (0 if form == "probs" else -INF) for x in given]
    together = torch.stack(masked).all(0) if ensemble == "probs" else torch.stack(masked).any(0)
    assert torch.equal(got == -INF, together)
    there = p > 0  # float64 may underflow where the logarithm does not
    bound = BOUND[dtype] * p[there].log().abs().max().clamp(min=1)
    torch.testing.assert_close(got[there], p[there].log(), rtol=0, atol=float(bound))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("classes", [1, 2, 31, 33, 1000, 1024, 1025, 3001])
@pytest.mark.parametrize("ensemble", ["probs", "logits"])
@pytest.mark.parametrize("form", ["logits", "log_probs", "probs"])
def test_mixtures(form, ensemble, classes):
    for dtype in DTYPES:
        acc = FP64 if dtype == FP64 else FP32
        for count in (1, 2, 5) if form == "probs" else (2, 5):
            teachers = teachers_of(form, (3, classes), dtype, count)
            check(teachers, acc, teacher_form=form, ensemble=ensemble)


@pytest.mark.usefixtures("isa")
def test_options():
    teachers = teachers_of("logits", (4, 130), FP32, 3)
    check(teachers, teacher_weights=[1.0, 2.0, 0.5], temperature=3.0, teacher_temperature=0.7)
    check(teachers, teacher_weights=[1.0, 2.0, 0.5], ensemble="logits", teacher_temperature=0.7)
    check([teachers[0], teachers[1].to(BF16), teachers[2].to(FP64)], FP64)
    of_rows = torch.tensor([0.5, 1.0, 2.0, 8.0])
    check(teachers, temperature=of_rows)
    check(teachers, temperature=1.0, teacher_temperature=of_rows)


def test_layouts():
    """Rows of any stride are read where they are; classes that are not adjacent are mixed too."""
    wide = teachers_of("logits", (3, 6, 50), FP32, 2)
    check([logits[:, :-1, 3:44] for logits in wide])
    check([wide[0][:, 1:, :40], wide[1][:, :5, 9:49].contiguous()])
    check([logits[1:2].expand(3, 6, 50) for logits in wide])
    pixels = [logits.movedim(-1, 1).contiguous().movedim(1, -1) for logits in wide]
    dense = mixed(wide)
    given = {**losses.DEFAULTS}
    resolved = objective.resolve(given, has_labels=False, teachers=2)
    by_torch, _ = mixture.one_teacher(tuple(pixels), resolved, FP32)
    torch.testing.assert_close(by_torch.double() / 2.0, dense, rtol=0, atol=4e-6)


@pytest.mark.usefixtures("isa")
def test_masked_classes():
    """What one teacher masks has the others' share; what all mask is masked."""
    first, second = teachers_of("logits", (3, 2100), FP32, 2)
    first[0, :1500] = -INF
    second[0, 1200:] = -INF
    first[1, 7] = second[1, 7] = -INF
    first[2, :] = -INF
    first[2, 2099] = 0.0
    check([first, second])
    probs = teachers_of("probs", (2, 40), FP32, 2)
    probs[0][0, :9] = 0.0
    probs[1][0, 5:12] = 0.0
    probs[0][1, 3] = 1e-42  # subnormal
    check(probs, teacher_form="probs")
    check(probs[:1], teacher_form="probs")
    huge = [logits * 1e30 for logits in teachers_of("logits", (2, 40), FP32, 2)]
    check(huge)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [math.nan, INF])
def test_a_row_without_an_answer_is_nan(value):
    for at in (0, 17, 1024):
        teachers = teachers_of("logits", (3, 1025), FP32, 2)
        teachers[1][1, at] = value
        result = mixed(teachers)
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()
    teachers = teachers_of("logits", (3, 40), FP32, 2)
    teachers[0][2] = -INF
    assert mixed(teachers)[2].isnan().all()
    probs = teachers_of("probs", (3, 40), FP32, 2)
    probs[0][0, 1] = -0.5
    assert mixed(probs, teacher_form="probs")[0].isnan().all()


@pytest.mark.usefixtures("threads", "isa")
def test_same_bits_for_any_number_of_threads():
    teachers = teachers_of("logits", (37, 5000), FP32, 3)
    torch.set_num_threads(1)
    one = mixed(teachers)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(mixed(teachers), one)


def test_opcheck():
    teachers = teachers_of("logits", (3, 40), FP32, 2)
    rows = torch.tensor([1.0, 2.0, 3.0, 1.5, 2.5, 3.5])
    for of_rows in (None, rows):
        arguments = (teachers, [0.25, 0.75], False, 0, of_rows, 2.0, 3.0, False)
        torch.library.opcheck(torch.ops.fastkd.mixture.default, arguments)


def test_the_op_refuses_what_it_cannot_read():
    op = torch.ops.fastkd.mixture.default
    a, b = torch.zeros(3, 4), torch.zeros(3, 5)
    for teachers, shares in (([], []), ([a], [0.5, 0.5]), ([a, b], [0.5, 0.5])):
        with pytest.raises(RuntimeError):
            op(teachers, shares, False, 0, None, 1.0, 1.0, False)
    with pytest.raises(RuntimeError):
        op([a], [1.0], False, 0, torch.zeros(3), 1.0, 1.0, False)


def test_no_rows():
    assert mixed([torch.zeros(0, 5), torch.zeros(0, 5)]).shape == (0, 5)


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher():
    student = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    (teacher,) = teachers_of("logits", (8, 100), FP32, 1)
    alone = fastkd.loss(student, teacher, temperature=3.0)
    torch.testing.assert_close(fastkd.loss(student, [teacher, teacher], temperature=3.0), alone)
