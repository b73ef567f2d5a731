"""Test the kernel that converts several teachers, or probabilities, to one teacher's logits."""

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from support import BF16, DTYPES, FP32, FP64, pairwise, peak_bytes
from torch import Tensor

import fastkd
from fastkd._core import dense, dispatch, objective, shapes
from fastkd._core.arguments import Call, check_tensors
from fastkd._core.objective import Options

INF = math.inf
# Absolute tolerance of probabilities. Log-probabilities have this tolerance times their largest
# magnitude, or times 1 if the magnitudes are smaller.
BOUND = {FP32: 4e-7, FP64: 1e-14}
CPU = torch.device("cpu")


def teachers_of(
    form: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    count: int,
    device: torch.device = CPU,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    teachers = [4 * torch.randn(shape, generator=generator, dtype=FP64) for _ in range(count)]
    if form == "probs":
        teachers = [logits.softmax(-1) for logits in teachers]
    if form == "log_probs":
        teachers = [logits.log_softmax(-1) for logits in teachers]
    return [logits.to(device, dtype) for logits in teachers]


def mixed_logits(teachers: list[Tensor], dtype: torch.dtype = FP32, **options: Any) -> Tensor:
    """Return the mixture as one teacher's logits."""
    resolved = objective.resolve(Options(**options), has_labels=False, teachers=len(teachers))
    resolved = check_tensors(resolved, teachers[0], None, dtype)
    call = Call(teachers[0], tuple(teachers), None, resolved, dtype)
    return dense.mix_teachers(dense.make_arguments(call, False), dtype)


def mix(teachers: list[Tensor], dtype: torch.dtype = FP32, **options: Any) -> Tensor:
    """Return the mixture's logits, divided by the student's temperature, in float64 on the CPU."""
    logits = mixed_logits(teachers, dtype, **options)
    assert logits.is_contiguous() and logits.dtype == dtype
    temperature = options.get("temperature", 2.0)
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return (logits.double() / temperature).cpu()


def check(teachers: list[Tensor], dtype: torch.dtype = FP32, **options: Any) -> None:
    """Assert that the mixture has the oracle's probabilities, and masks the right classes."""
    classes = teachers[0].shape[-1]
    got = mix(teachers, dtype, **options).log_softmax(-1).reshape(-1, classes)
    form, teacher_t = options.get("teacher_form", "logits"), options.get("teacher_temperature")
    default = options.get("temperature", 2.0) if form == "logits" else 1.0
    teacher_t = default if teacher_t is None else teacher_t
    t = teacher_t.double().cpu().numpy()[:, None] if isinstance(teacher_t, Tensor) else teacher_t
    shared = [teacher.double().reshape(-1, classes).cpu().numpy() for teacher in teachers]
    weights, ensemble = options.get("teacher_weights"), options.get("ensemble", "probs")
    with np.errstate(divide="ignore"):
        p = torch.from_numpy(oracle.teacher(shared, t, form, weights, ensemble, False)[1])
    torch.testing.assert_close(got.exp(), p, rtol=0, atol=BOUND[dtype])
    masked = [torch.from_numpy(x) == (0 if form == "probs" else -INF) for x in shared]
    together = torch.stack(masked).all(0) if ensemble == "probs" else torch.stack(masked).any(0)
    assert torch.equal(got == -INF, together)
    positive = p > 0  # the oracle's p may underflow where the log-probability does not
    bound = BOUND[dtype] * p[positive].log().abs().max().clamp(min=1)
    torch.testing.assert_close(got[positive], p[positive].log(), rtol=0, atol=float(bound))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("classes", "ensemble", "form"),
    pairwise(
        [1, 2, 31, 33, 1000, 1024, 1025, 3001],
        ["probs", "logits"],
        ["logits", "log_probs", "probs"],
    ),
    ids=str,
)
def test_mixtures_equal_the_truth(device, form, ensemble, classes):
    for dtype in DTYPES:
        acc = FP64 if dtype == FP64 else FP32
        for count in (1, 2, 5) if form == "probs" else (2, 5):
            teachers = teachers_of(form, (3, classes), dtype, count, device)
            check(teachers, acc, teacher_form=form, ensemble=ensemble)


@pytest.mark.usefixtures("isa")
def test_options_equal_the_truth(device):
    teachers = teachers_of("logits", (4, 170), FP32, 3, device)
    check(teachers, teacher_weights=[1.0, 2.0, 0.5], temperature=3.0, teacher_temperature=0.7)
    check(teachers, teacher_weights=[1.0, 2.0, 0.5], ensemble="logits", teacher_temperature=0.7)
    check([teachers[0], teachers[1].to(BF16), teachers[2].to(FP64)], FP64)
    of_rows = torch.tensor([0.5, 1.0, 2.0, 8.0], device=device)
    check(teachers, temperature=of_rows)
    check(teachers, temperature=1.0, teacher_temperature=of_rows)


def test_rows_of_any_stride_are_mixed(device):
    wide = teachers_of("logits", (3, 6, 50), FP32, 2, device)
    check([logits[:, :-1, 3:44] for logits in wide])
    check([wide[0][:, 1:, :40], wide[1][:, :5, 9:49].contiguous()])
    check([logits[1:2].expand(3, 6, 50) for logits in wide])
    pixels = [logits.movedim(-1, 1).contiguous().movedim(1, -1) for logits in wide]
    torch.testing.assert_close(mix(pixels), mix(wide), rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_masked_classes_are_mixed(device):
    # If one teacher masks a class, only the other teacher adds to the probability of the class.
    first, second = teachers_of("logits", (3, 2100), FP32, 2, device)
    first[0, :1500] = -INF
    second[0, 1200:] = -INF
    first[1, 7] = second[1, 7] = -INF
    first[2, :] = -INF
    first[2, 2099] = 0.0
    check([first, second])
    probs = teachers_of("probs", (2, 40), FP32, 2, device)
    probs[0][0, :9] = 0.0
    probs[1][0, 5:12] = 0.0
    probs[0][1, 3] = 1e-42  # subnormal
    check(probs, teacher_form="probs")
    check(probs[:1], teacher_form="probs")
    huge = [logits * 1e30 for logits in teachers_of("logits", (2, 40), FP32, 2, device)]
    check(huge)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("value", [math.nan, INF])
def test_an_invalid_row_is_nan(device, value):
    for at in (0, 17, 1024):
        teachers = teachers_of("logits", (3, 1025), FP32, 2, device)
        teachers[1][1, at] = value
        result = mix(teachers)
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()
    teachers = teachers_of("logits", (3, 40), FP32, 2, device)
    teachers[0][2] = -INF
    assert mix(teachers)[2].isnan().all()
    probs = teachers_of("probs", (3, 40), FP32, 2, device)
    probs[0][0, 1] = -0.5
    assert mix(probs, teacher_form="probs")[0].isnan().all()


@pytest.mark.usefixtures("threads", "isa")
def test_bits_are_equal_for_any_number_of_threads():
    teachers = teachers_of("logits", (37, 5000), FP32, 3)
    torch.set_num_threads(1)
    expected = mix(teachers)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(mix(teachers), expected)


@pytest.mark.parametrize("of_rows", [None, torch.tensor([1.0, 2.0, 3.0, 1.5, 2.5, 3.5])])
def test_opcheck_passes_for_mixtures(of_rows):
    teachers = teachers_of("logits", (3, 40), FP32, 2)
    mixing = (teachers, of_rows, [0.25, 0.75], False, 0, 2.0, 3.0)
    ops = torch.ops.fastkd
    torch.library.opcheck(ops.mixture.default, (*mixing, False))
    student, grad = torch.zeros(3, 40), torch.zeros(3, 40)
    labels = torch.tensor([0, 1, 2])
    for reduction, out in (("mean", grad), ("mean", None), ("none", None)):
        index = shapes.REDUCTIONS.index(reduction)
        numbers = (2.0, 2.0, 0.5, 0.5, 0.0, -100, 0, 0.5, index, 0.0, False)
        arguments = (student, *mixing, labels, None, None, *numbers)
        torch.library.opcheck(ops.loss_into.default, (out, *arguments, True))
        _, stats = ops.loss_into(out, *arguments, True)
        backward = (grad, torch.ones(3 if reduction == "none" else ()), stats, *arguments, False)
        torch.library.opcheck(ops.loss_backward_.default, backward)
        torch.library.opcheck(ops.loss.default, (student.clone().requires_grad_(), *arguments[1:]))


def test_the_op_refuses_invalid_arguments():
    op = torch.ops.fastkd.mixture.default
    a, b = torch.zeros(3, 4), torch.zeros(3, 5)
    for teachers, shares in (([], []), ([a], [0.5, 0.5]), ([a, b], [0.5, 0.5])):
        with pytest.raises(RuntimeError):
            op(teachers, None, shares, False, 0, 1.0, 1.0, False)
    with pytest.raises(RuntimeError):
        op([a], torch.zeros(3), [1.0], False, 0, 1.0, 1.0, False)
    with pytest.raises(RuntimeError, match="same shape"):
        options = (None, None, None, 2.0, 2.0, 0.0, 1.0, 0.0, -100, 0, 0.5, 2, 0.0, False)
        torch.ops.fastkd.loss(a, [b], None, [1.0], False, 0, 1.0, 1.0, *options)


def test_no_rows_give_an_empty_mixture():
    assert mix([torch.zeros(0, 5), torch.zeros(0, 5)]).shape == (0, 5)


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher():
    student = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    (teacher,) = teachers_of("logits", (8, 100), FP32, 1)
    alone = fastkd.loss(student, teacher, temperature=3.0)
    torch.testing.assert_close(fastkd.loss(student, [teacher, teacher], temperature=3.0), alone)


# ---- mixtures inside a loss

SHAPES = [(70, 10), (300, 100), (3, 1000), (37, 5000), (3, 140_000)]


def call(student: Tensor, teacher: Any, *, scale: float = 1.0, **options: Any) -> list[Tensor]:
    """Return the loss, and the gradient of ``scale`` times the sum of the loss."""
    leaf = student.clone().requires_grad_()
    inplace = options.get("inplace", False)
    labels = torch.arange(student.shape[0]) % student.shape[-1]
    labels[::5] = -100
    value = fastkd.loss(leaf * 1 if inplace else leaf, teacher, labels, **options)
    (scale * value.sum()).backward()
    assert leaf.grad is not None
    return [value.detach(), leaf.grad]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [
    {}, {"reduction": "none"}, {"divergence": "jsd"}, {"divergence": "dkd"}, {"inplace": True},
    {"scale": 128.0}, {"teacher_form": "probs"}, {"divergence": "mse", "ensemble": "logits"},
])  # fmt: skip
def test_a_mixture_gives_the_bits_of_a_premixed_teacher(shape, options):
    threads = torch.get_num_threads()
    dtypes = DTYPES if shape[1] < 1000 else (FP32, BF16)
    mixes = {k: v for k, v in options.items() if k in ("teacher_form", "ensemble")}
    shared = {k: v for k, v in options.items() if k not in mixes}
    for dtype in dtypes:
        teachers = teachers_of(options.get("teacher_form", "logits"), shape, dtype, 2)
        acc = FP64 if dtype == FP64 else FP32
        student = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        before = mixed_logits(teachers, acc, temperature=3.0, **mixes)
        expected = call(student, before, temperature=3.0, **shared)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = call(student, teachers, temperature=3.0, **options)
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_may_have_their_own_options():
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(70, 300, generator=generator)
    teachers = teachers_of("logits", (70, 300), FP32, 2)
    teacher_t, temperature = (torch.rand(70, generator=generator) + 0.5 for _ in range(2))
    before = mixed_logits(teachers, temperature=temperature, teacher_temperature=teacher_t)
    shared = {"temperature": temperature, "soft_weight": teacher_t, "hard_weight": 0.5}
    expected = call(student, before, **shared)
    got = call(student, teachers, teacher_temperature=teacher_t, **shared)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(ValueError, match="temperature"):
        call(student, teachers, teacher_temperature=teacher_t * -1)


def test_pixels_are_mixed():
    # The teachers' classes are adjacent in memory, unlike the student's.
    student = torch.randn(2, 19, 5, 7, generator=torch.Generator().manual_seed(3))
    teachers = [x.movedim(-1, 1) for x in teachers_of("logits", (2, 5, 7, 19), FP32, 2)]
    got = fastkd.loss(student, teachers, dim=1)
    copies = [x.contiguous() for x in teachers]
    torch.testing.assert_close(got, fastkd.loss(student, copies, dim=1))


def test_many_teachers_are_mixed(device):
    # On CUDA, PyTorch's operations mix these teachers, which are more than the kernel accepts.
    student = torch.randn(3, 40, generator=torch.Generator().manual_seed(8)).to(device)
    first, second = teachers_of("logits", (3, 40), FP32, 2, device)
    got = fastkd.loss(student, [first, second] * 20, temperature=3.0)
    torch.testing.assert_close(got, fastkd.loss(student, [first, second], temperature=3.0))


def test_a_double_teacher_makes_the_loss_double():
    student = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    first, second = teachers_of("logits", (3, 40), FP32, 2)
    got, grad = call(student, [first, second.double()])
    assert got.dtype == FP64 and grad.dtype == FP32
    torch.testing.assert_close(got, call(student.double(), [first, second])[0])


def test_the_mixture_is_never_a_full_tensor():
    shape = (256, 8192)
    student = torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_()
    teachers = teachers_of("logits", shape, FP32, 3)
    for inplace, tensors in ((False, 1), (True, 0)):
        logits = student * 1

        def run(logits: Tensor = logits, inplace: bool = inplace) -> None:
            value = fastkd.loss(logits, teachers, inplace=inplace)
            torch.autograd.grad(value, logits)

        taken = peak_bytes(run) - tensors * student.nbytes
        assert 0 < taken < student.nbytes / 4


def test_second_passes_and_second_derivatives_are_right():
    student = torch.randn(3, 40, dtype=FP64, generator=torch.Generator().manual_seed(6))
    student.requires_grad_()
    teachers = teachers_of("logits", (3, 40), FP64, 2)
    value = fastkd.loss(student, teachers)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    assert torch.equal(
        torch.autograd.grad(value, student, 2 * torch.ones_like(value))[0], 2 * first
    )
    assert torch.autograd.gradgradcheck(lambda z: fastkd.loss(z, teachers), student)
    value = fastkd.loss(student * 1, teachers, inplace=True)
    torch.autograd.grad(value, student, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(value, student)


@pytest.mark.parametrize("ensemble", ["probs", "logits"])
def test_row_statistics_mix_teachers(ensemble):
    # fastkd/linear/class_loop.py calls compute_statistics() and write_gradient_().
    student = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    teachers = teachers_of("logits", (3, 40), FP32, 2)
    options = {"reduction": "none", "ensemble": ensemble}
    resolved = objective.resolve(Options(**options), has_labels=False, teachers=2)
    gradient = student.clone()
    call = Call(gradient, tuple(teachers), None, resolved, FP32)
    divergences, statistics = dispatch.compute_statistics(call)
    dispatch.write_gradient_(call, statistics)
    leaf = student.clone().requires_grad_()
    expected = fastkd.terms(leaf, teachers, **options)
    torch.testing.assert_close(divergences, expected.soft)
    (of_sum,) = torch.autograd.grad(expected.loss.sum(), leaf)
    torch.testing.assert_close(gradient, of_sum)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch warns while it traces
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_mixture_equals_the_eager_one(reduction):
    student = torch.randn(30, 40, generator=torch.Generator().manual_seed(7))
    teachers = teachers_of("logits", (30, 40), FP32, 2)
    of_rows = torch.linspace(1, 2, 30)

    def function(z: Tensor, first: Tensor, second: Tensor, t: Tensor) -> Tensor:
        return fastkd.loss(z, [first, second], temperature=t, reduction=reduction).sum() * 3

    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        value = run(leaf, *teachers, of_rows)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)
