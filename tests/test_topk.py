"""Test that the loss of sparse teachers of k classes per row equals the definition."""

import math

import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    TopKProblem,
    assert_same,
    check_topk,
    make_topk,
    name_of,
    run_topk,
    topk_truth,
)
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import _C, Head, TopK, reference
from fastkd._core import autograd, native
from fastkd._core.arguments import SPARSE_DIVERGENCES
from fastkd._core.values import TAILS

S = _C.segment
INF, NAN = math.inf, math.nan


# ---- options and dtypes

# Each value is (shape, k). Sizes lie around units of the kernel: words of 64 bits, vectors, and
# segments of S classes.
SHAPES = [
    *(((5, 10), 3), ((5, 10), 9), ((6, 2), 1), ((4, 1000), 64), ((3, 333), 130)),
    *(((2, 1025), 20), ((2, S + 65), 64), ((2, 3, 40), 5), ((7,), 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_value_and_gradient_equal_the_definition(device, shape, k, tail, dtype):
    check_topk(make_topk(shape, k, dtype, device=device), tail)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
def test_every_instruction_set_equals_the_definition(isa, tail, dtype):
    check_topk(make_topk((3, 2100), 70, dtype), tail, label_smoothing=0.1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
def test_temperatures_equal_the_definition(device, tail, temperature):
    problem = make_topk((4, 1000), 64, device=device, temperature=temperature)
    check_topk(problem, tail, temperature=temperature)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"label_smoothing": 0.3},
        {"label_smoothing": 1.0},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"normalizer": 7.0},
        {"grad_output": torch.tensor(-3.0)},
        {"grad_output": torch.linspace(-2, 3, 5), "reduction": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
def test_options_equal_the_definition(device, tail, dtype, options):
    check_topk(make_topk((5, 300), 20, dtype, device=device), tail, **options)


@pytest.mark.parametrize("tail", TAILS)
def test_the_soft_term_needs_no_labels(device, tail):
    check_topk(make_topk((5, 300), 20, labels=False, device=device), tail)


@pytest.mark.usefixtures("formula")
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("shape", "k"), [((5, 10), 3), ((4, 300), 20), ((2, 3, 40), 5)], ids=str)
def test_the_fallback_equals_the_definition(shape, k, tail, dtype):
    problem = make_topk(shape, k, FP64, padding=0.3)
    problem = problem._replace(
        student=problem.student.to(dtype), log_probs=problem.log_probs.to(dtype)
    )
    value, grad = run_topk(problem, tail, label_smoothing=0.1)
    exact = topk_truth(problem, tail, label_smoothing=0.1)
    tolerance = {FP64: 1e-12, FP32: 1e-5}[dtype]
    torch.testing.assert_close(value.double(), exact.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_two_weights_weigh_both_terms(device):
    problem = make_topk((5, 300), 20, device=device)
    hard = run_topk(problem, alpha=1.0)[0]
    soft = run_topk(problem, alpha=0.0)[0]
    both = run_topk(problem, hard_weight=0.3, soft_weight=2.0)[0]
    torch.testing.assert_close(both, 0.3 * hard + 2.0 * soft)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.3, "reduction": "sum", "tail": "ignore"},
        {"hard_weight": 0.25, "tail": "renormalize"},
        {"soft_weight": 3, "temperature": 3},
        {"normalizer": 17, "label_smoothing": 0.1},
        {"temperature": 1, "alpha": 0},
    ],
    ids=str,
)
def test_autograd_in_cpp_and_in_python_give_the_same_bits(options, dtype):
    if native.EAGER is None:
        pytest.skip("fastkd._eager was not built, or with another torch")
    options = dict(options)
    tail = options.pop("tail", "ghost")
    problem = make_topk((12, 181), 20, dtype)

    def run_topk() -> tuple[Tensor, Tensor, Tensor, str]:
        leaf = problem.student.clone().requires_grad_()
        loss = fastkd.loss(leaf, problem.teacher(tail), problem.labels, **options)
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        loss.backward(torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert second.requires_grad
        return loss.detach(), once, leaf.grad, loss.grad_fn.name()

    *results, in_cpp = run_topk()
    with autograd.without_cpp():
        *expected, by_python = run_topk()
    assert "FastKDTopkLoss" in in_cpp and "_FusedLoss" in by_python
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.usefixtures("each_autograd")
def test_an_entry_of_minus_infinity_is_padding(device, tail, requires_grad):
    # The class of padding may be any number.
    student, indices, log_probs, labels = make_topk((6, 40), 5, device=device)
    labels = indices[:, 1]  # one of the "listed classes" below
    shorter = (indices[:, :3], log_probs[:, :3])
    minus_infinity = torch.full((6, 2), -math.inf, dtype=log_probs.dtype, device=device)
    padded = torch.cat((shorter[1], minus_infinity), -1)
    padding = {
        "a negative class": torch.full((6, 2), -1),
        "class 0 twice": torch.zeros(6, 2, dtype=torch.int64),
        "listed classes": indices[:, :2].cpu(),
        "other classes": indices[:, 3:].cpu(),
        "no class": torch.full((6, 2), 99),
    }

    def run_list(ids: Tensor, logs: Tensor) -> list[Tensor]:
        leaf = student.clone().requires_grad_(requires_grad)
        value = fastkd.loss(leaf, TopK(logs, ids, tail), labels, temperature=2.0)
        if requires_grad:
            value.backward()
            return [value.detach(), leaf.grad]
        return [value]

    expected = run_list(*shorter)
    for name, classes in padding.items():
        ids = torch.cat((shorter[0], classes.to(device)), -1)
        for ours, theirs in zip(run_list(ids, padded), expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
        with torch.no_grad():  # a Head, and the formula under vmap, give equal results
            head, teacher = Head(student, torch.eye(40, device=device)), TopK(padded, ids, tail)
            linear = fastkd.loss(head, teacher, labels, temperature=2.0)
            torch.testing.assert_close(linear, expected[0])
            value = torch.func.vmap(
                lambda s, p, i, y: fastkd.loss(s, TopK(p, i, tail), y, temperature=2.0)
            )(student, padded, ids, labels)
            torch.testing.assert_close(value.mean(), expected[0])


def test_the_default_temperature_is_1():
    # The results of log_softmax have temperature 1.
    logits = make_topk((6, 40), 5).student
    teacher = TopK(*logits.log_softmax(-1).topk(40))
    student = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    expected = fastkd.loss(student, logits, temperature=1.0)
    module, softer = fastkd.KDLoss(), fastkd.loss(student, logits, temperature=2.0)
    for inputs in (student, Head(student, torch.eye(40))):
        torch.testing.assert_close(fastkd.loss(inputs, teacher), expected)
        torch.testing.assert_close(fastkd.terms(inputs, teacher).loss, expected)
        torch.testing.assert_close(module(inputs, teacher), expected)
        torch.testing.assert_close(module.terms(inputs, teacher).loss, expected)
        torch.testing.assert_close(module(inputs, logits), softer)


def test_the_normalizer_may_be_a_tensor(device):
    problem = make_topk((5, 300), 20, device=device)
    assert_same(
        run_topk(problem, normalizer=torch.tensor(7, device=device))[0],
        run_topk(problem, normalizer=7.0)[0],
    )


# ---- tails


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("classes", [7, 64, 1100])
def test_every_class_listed_is_the_dense_loss(device, classes, tail, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = FP64 if dtype == FP64 else FP32
    logits = [3 * torch.randn(6, classes, generator=generator, dtype=wide) for _ in range(2)]
    student, teacher = logits[0].to(dtype).to(device), logits[1].to(device)
    labels = torch.randint(classes, (6,), generator=generator).to(device)
    log_probs, indices = torch.log_softmax(teacher / 2, -1).sort(-1)
    ours = run_topk(TopKProblem(student, indices, log_probs, labels), tail)
    leaf = student.requires_grad_()
    dense = fastkd.loss(leaf, teacher, labels)
    dense.backward()
    acc = FP64 if dtype == FP64 else FP32
    # The teacher's log-probabilities were rounded to `acc`.
    bound = 20 * torch.finfo(acc).eps
    torch.testing.assert_close(ours[0], dense.detach(), rtol=bound, atol=bound)
    torch.testing.assert_close(
        ours[1], leaf.grad, rtol=max(bound, 2 * torch.finfo(dtype).eps), atol=bound
    )


def make_perfect(tail: str, dtype: torch.dtype = FP32) -> TopKProblem:
    student = make_topk((8, 500), 1, dtype).student
    log_probs, indices = torch.log_softmax(student.double() / 2, -1).topk(30)
    return TopKProblem(student, indices, log_probs.to(FP64 if dtype == FP64 else FP32), None)


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_a_perfect_student_has_no_loss(device, tail):
    problem = TopKProblem(*(x if x is None else x.to(device) for x in make_perfect(tail)))
    value, grad = run_topk(problem, tail, reduction="none")
    assert (value.abs() < 1e-10).all()
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_a_student_close_to_its_teacher_has_an_exact_loss(tail, noise):
    # In float64, terms of both signs may cancel to a millionth of the terms' size.
    problem = make_perfect(tail, FP64)
    generator = torch.Generator().manual_seed(1)
    student = problem.student + noise * torch.randn(8, 500, generator=generator, dtype=FP64)
    value, _ = run_topk(problem._replace(student=student), tail, reduction="none")
    log_q = student.div(2).log_softmax(-1)
    others = torch.ones(8, 500, dtype=torch.bool).scatter(-1, problem.indices, False)
    log_q_list, log_p = log_q.gather(-1, problem.indices), problem.log_probs
    if tail == "ghost":
        rest = log_q.masked_fill(~others, -INF).logsumexp(-1, keepdim=True)
        log_q_list = torch.cat([log_q_list, rest], -1)
        log_p = torch.cat([log_p, (-log_p.exp().sum(-1, keepdim=True)).log1p()], -1)
    d = log_p.log_softmax(-1) - log_q_list.log_softmax(-1)
    exact = 4 * (log_p.softmax(-1) * (d**2 / 2 - d**3 / 6 + d**4 / 24)).sum(-1)
    torch.testing.assert_close(value, exact, rtol=1e-6, atol=0)


def make_near_teacher(classes: int, k: int, spread: float, t: float) -> TopKProblem:
    """Make float32 students whose KL(teacher || student), with a ghost class, is about 5e-7."""
    generator = torch.Generator().manual_seed(0)
    teacher = spread * torch.randn(4, classes, generator=generator, dtype=FP64)
    noise = 1e-3 * t * torch.randn(4, classes, generator=generator, dtype=FP64)
    log_probs, indices = (teacher / t).log_softmax(-1).topk(k)
    kl = reference.topk.terms(
        teacher + noise, log_probs, indices, None, temperature=t, reduction="none",
        hard_weight=0.0, soft_weight=1 / t**2,
    ).loss  # fmt: skip
    student = teacher + noise * (5e-7 / kl).sqrt()[:, None]
    return TopKProblem(student.float(), indices, log_probs.float(), None)


@pytest.mark.parametrize("name", sorted({*SPARSE_DIVERGENCES} - {"soft_cross_entropy"}))
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
@pytest.mark.parametrize(
    ("classes", "k", "spread", "t"),
    [(500, 30, 1.5, 1.0), (500, 64, 3.0, 1.7), (5000, 64, 1.5, 1.7), (128256, 64, 3.0, 1.0)],
)
def test_rows_near_the_teacher_are_exact_in_float32(classes, k, spread, t, tail, name):
    # These bounds detect an error of 1e-8 in the tail's mass.
    problem = make_near_teacher(classes, k, spread, t)
    options = {"divergence": name, "temperature": t, "reduction": "none"}
    value, grad = run_topk(problem, tail, **options)
    leaf = problem.student.double().requires_grad_()
    exact = reference.topk.terms(
        leaf, problem.log_probs.double(), problem.indices, None, tail=tail,
        mix=reference.DIVERGENCES[name].mix, hard_weight=0.0, soft_weight=1.0, **options,
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(exact.sum(), leaf)
    assert ((value.double() - exact).abs() <= 2e-6 * exact).all()
    assert ((grad.double() - gradient).norm(dim=-1) <= 2e-6 * gradient.norm(dim=-1)).all()


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=name_of)
def test_the_loss_is_exact_if_the_list_has_nearly_all_mass(gap, dtype):
    # With a large gap, 1 minus the sum of the student's listed probabilities rounds to 0.
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 200, generator=generator, dtype=dtype)
    student[:, :5] += gap
    log_probs = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.01], dtype=dtype).log().expand(4, 5)
    problem = TopKProblem(student, torch.arange(5).expand(4, 5), log_probs.contiguous(), None)
    check_topk(problem, temperature=1.0)
    _, grad = run_topk(problem, temperature=1.0)
    # The teacher leaves 0.14 to the unlisted classes.
    q = student.double().softmax(-1)[:, 5:].sum(-1).mean()
    torch.testing.assert_close(grad[:, 5:].sum().double(), q - 0.14, rtol=1e-5, atol=0)


def test_renormalize_depends_only_on_the_list():
    problem = make_topk((5, 300), 20, labels=False)
    value, grad = run_topk(problem, "renormalize")
    listed = torch.zeros(5, 301).scatter(-1, problem.indices.where(problem.indices >= 0, 300), 1)
    assert (grad[listed[:, :300] == 0] == 0).all() and (grad != 0).sum() == (
        problem.indices >= 0
    ).sum()
    student = problem.student + 2 * (1 - listed[:, :300])
    torch.testing.assert_close(run_topk(problem._replace(student=student), "renormalize")[0], value)


def test_ignore_of_a_normalized_list_is_the_truncated_teacher(device):
    problem = make_topk((5, 300), 20, labels=False, padding=0.0, device=device)
    normal = problem.log_probs - problem.log_probs.logsumexp(-1, keepdim=True)
    value, _ = run_topk(problem._replace(log_probs=normal), "ignore")
    dense = torch.zeros_like(problem.student).scatter(-1, problem.indices, normal.exp())
    log_q = F.log_softmax(problem.student / 2, -1)
    torch.testing.assert_close(value, 4 * F.kl_div(log_q, dense, reduction="batchmean"))


def test_ignore_may_be_negative():
    student = torch.tensor([[9.0, 0.0, 0.0]])
    lists = torch.tensor([[0.5]]).log(), torch.tensor([[0]])
    assert fastkd.loss(student, TopK(*lists, tail="ignore")) < 0
    assert fastkd.loss(student, TopK(*lists, tail="ghost")) > 0


# ---- lists


@pytest.mark.parametrize("tail", TAILS)
def test_the_order_of_a_list_does_not_matter(device, tail):
    problem = make_topk((5, 300), 90, device=device)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = problem._replace(
        indices=problem.indices[:, order], log_probs=problem.log_probs[:, order]
    )
    for ours, theirs in zip(run_topk(problem, tail), run_topk(shuffled, tail), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("filler", [0.0, NAN, INF, 1e30])
@pytest.mark.parametrize("tail", TAILS)
def test_padding_contributes_0(device, tail, filler):
    problem = make_topk((5, 300), 20, padding=0.0, device=device)
    some = torch.full((5, 3), filler, device=device)
    nothing = torch.tensor([-1, -100, -(2**62)], device=device).expand(5, 3)
    padded = problem._replace(
        indices=torch.cat([nothing, problem.indices], -1),
        log_probs=torch.cat([some, problem.log_probs], -1),
    )
    for ours, theirs in zip(run_topk(problem, tail), run_topk(padded, tail), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("content", ["negative classes", "log-probabilities of -inf"])
def test_an_empty_list_has_no_soft_term(device, tail, content):
    problem = make_topk((4, 40), 3, padding=0.0, device=device)
    if content == "negative classes":
        empty = problem._replace(indices=torch.full_like(problem.indices, -1))
    else:
        empty = problem._replace(log_probs=torch.full_like(problem.log_probs, -INF))
    value, grad = run_topk(empty, tail, hard_weight=1.0)
    hard, hard_grad = run_topk(problem, tail, alpha=1.0)
    torch.testing.assert_close(value, hard)
    torch.testing.assert_close(grad, hard_grad)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_narrow_dtypes_are_accepted(device, index_dtype, dtype):
    student = make_topk((3, 300), 1, device=device).student
    indices = torch.arange(155, device=device).expand(3, 155)
    log_probs = torch.full((3, 155), -math.log(155), device=device).to(dtype)
    assert log_probs.double().exp().sum(-1).min() > 1.0004
    wide = TopKProblem(student, indices, log_probs.float(), None)
    narrow = TopKProblem(student, indices.to(index_dtype), log_probs, None)
    for ours, theirs in zip(run_topk(narrow), run_topk(wide), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tail", TAILS)
def test_a_rounded_mass_above_1_is_accepted(device, tail):
    # If the listed probabilities add up to more than 1, the gradient is exact, and a loss with a
    # ghost class is at least 0.
    problem = make_topk((6, 40), 10, FP64, labels=False, padding=0.0, device=device)
    normal = problem.log_probs.log_softmax(-1) + math.log(1.05)
    problem = problem._replace(log_probs=normal)
    if tail == "ghost":
        make_perfect = problem.student.scatter(-1, problem.indices, 2 * normal + 200)
        assert (run_topk(problem._replace(student=make_perfect), reduction="none")[0] >= 0).all()
    leaf = problem.student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fastkd.loss(s, problem.teacher(tail)), leaf)


# ---- masked classes, special values, ignored rows


@pytest.mark.parametrize("tail", TAILS)
def test_unlisted_masked_classes_have_no_effect(device, tail):
    problem = make_topk((4, 300), 20, device=device, labels=False)
    wide = torch.cat([problem.student, torch.full((4, 2000), -INF, device=device)], -1)
    value, grad = run_topk(problem, tail)
    wide_value, wide_grad = run_topk(problem._replace(student=wide), tail)
    torch.testing.assert_close(wide_value, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(wide_grad[:, :300], grad)
    assert (wide_grad[:, 300:] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_listed_class_that_the_student_masks_has_infinite_loss(device, tail):
    problem = make_topk((4, 300), 20, device=device, labels=False, padding=0.0)
    rows = torch.arange(4, device=device)
    problem.student[rows, problem.indices[:, 0]] = -INF
    value, grad = run_topk(problem, tail, reduction="none")
    assert (value == INF).all()
    assert grad.isfinite().all()
    assert (grad[rows, problem.indices[:, 0]] < 0).all()
    # If the teacher masks the class, too, the loss is finite.
    problem.log_probs[:, 0] = -INF
    check_topk(problem, tail, reduction="none")
    assert (run_topk(problem, tail)[1][rows, problem.indices[:, 0]] == 0).all()


@pytest.mark.parametrize("rest", ["listed", "masked"])
def test_there_is_no_ghost_without_other_classes(device, rest):
    # If all unmasked classes are listed, the listed probabilities are divided by their sum.
    student = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=FP64).to(device)
    log_probs = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.1, 0.2], dtype=FP64, device=device).log()
    problem = TopKProblem(
        student, torch.arange(6, device=device).expand(3, 6), log_probs.expand(3, 6), None
    )
    if rest == "masked":
        student = torch.cat([student, torch.full((3, 9), -INF, device=device)], -1)
        problem = problem._replace(student=student)
    value, grad = run_topk(problem, reduction="none")
    q = F.log_softmax(student[:, :6] / 2, -1)
    p = log_probs.exp() / 0.8
    torch.testing.assert_close(value, 4 * (p * (p.log() - q)).sum(-1))
    torch.testing.assert_close(grad[:, :6], 2 * (q.exp() - p))
    assert grad.isfinite().all() and (value > 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column_kind", ["listed", "rest"])
@pytest.mark.parametrize("tail", TAILS)
def test_nan_and_inf_stay_in_their_row(device, tail, column_kind, bad):
    problem = make_topk((4, 300), 20, device=device, labels=False, padding=0.0)
    column = int(problem.indices[1, 0])
    if column_kind == "rest":
        column = next(c for c in range(300) if c not in problem.indices[1].tolist())
    good_value, good_grad = run_topk(problem, tail, reduction="none")
    problem.student[1, column] = bad
    value, grad = run_topk(problem, tail, reduction="none")
    assert value.isnan().tolist() == [False, True, False, False]
    assert grad[1].isnan().all()
    others = [0, 2, 3]
    torch.testing.assert_close(value[others], good_value[others])
    torch.testing.assert_close(grad[others], good_grad[others])


@pytest.mark.parametrize("tail", TAILS)
def test_ignored_rows_are_not_read(device, tail):
    problem = make_topk((4, 300), 20, device=device)
    problem.labels[1] = -100
    expected = run_topk(problem, tail)
    problem.student[1], problem.indices[1], problem.log_probs[1] = NAN, 10**9, 50.0
    for ours, theirs in zip(run_topk(problem, tail), expected, strict=True):
        assert_same(ours, theirs)
    assert (run_topk(problem, tail)[1][1] == 0).all()


def test_all_rows_ignored_give_zero(device):
    problem = make_topk((4, 300), 20, device=device)
    problem.labels.fill_(-100)
    value, grad = run_topk(problem)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_zero(device, reduction):
    problem = make_topk((0, 40), 5, device=device)
    value, grad = run_topk(problem, reduction=reduction)
    assert value.sum() == 0 and grad.shape == (0, 40)


@pytest.mark.parametrize("constant", [1e4, 2.0**52])
def test_huge_logits_keep_their_differences(constant):
    problem = make_topk((4, 64), 6, FP64, labels=False)
    student = problem.student.round()
    assert torch.equal(student + constant - constant, student)
    value, _ = run_topk(problem._replace(student=student + constant))
    torch.testing.assert_close(value, run_topk(problem._replace(student=student))[0])


# ---- layouts, threads


def test_views_equal_copies(device):
    problem = make_topk((2, 5, 300), 20, device=device)
    expected = run_topk(problem)
    wide = torch.zeros(2, 6, 320, device=device)
    wide[:, :-1, :300] = problem.student
    columns = problem.student.transpose(0, 2).contiguous().transpose(0, 2)
    for student in (wide[:, :-1, :300], columns):
        leaf = student.detach().requires_grad_()
        value = fastkd.loss(leaf, problem.teacher(), problem.labels, temperature=2.0)
        (grad,) = torch.autograd.grad(value, leaf)
        assert_same(value.detach(), expected[0])
        assert_same(grad, expected[1])
    lists = problem._replace(
        indices=problem.indices.transpose(0, 2).contiguous().transpose(0, 2),
        log_probs=problem.log_probs.expand(2, 5, 20),
    )
    assert_same(run_topk(lists)[0], expected[0])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("shape", "k"), [((64, 10), 3), ((30, 3000), 64), ((3, S + 9), 64)], ids=str
)
def test_bits_are_equal_for_any_number_of_threads(shape, k, reduction, dtype):
    problem = make_topk(shape, k, dtype)
    torch.set_num_threads(1)
    alone = run_topk(problem, reduction=reduction)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for ours, theirs in zip(run_topk(problem, reduction=reduction), alone, strict=True):
            assert torch.equal(ours, theirs), f"{count} threads"
