"""Sparse teachers of k classes per row: the loss equals the definition in float64."""
# ruff: noqa: E501 - one mistake a line

import collections
import itertools
import math
import pydoc_data.topics
import re
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    Answer,
    assert_grad,
    assert_same,
    assert_value,
    name_of,
)
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import _C, Head, TopK, reference
from fastkd._core import autograd, native, topk
from fastkd._core.arguments import SPARSE_DIVERGENCES
from fastkd._core.objective import Options
from fastkd._core.values import TAILS

S = _C.segment
INF, NAN = math.inf, math.nan


class Problem(NamedTuple):
    student: Tensor
    indices: Tensor
    log_probs: Tensor
    labels: Tensor | None

    def teacher(self, tail: str = "ghost") -> TopK:
        return TopK(self.log_probs, self.indices, tail)


def make(
    shape: tuple[int, ...],
    k: int,
    dtype: torch.dtype = FP32,
    *,
    device: torch.device | str = "cpu",
    labels: bool = True,
    spread: float = 3.0,
    padding: float = 0.2,
    temperature: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Make a student near its teacher, with shuffled and padded lists and ignored rows."""
    generator = torch.Generator().manual_seed(seed)
    *rows, classes = shape
    wide = FP64 if dtype == FP64 else FP32
    teacher = torch.randn(shape, generator=generator, dtype=wide) * spread
    student = (teacher / 2 + torch.randn(shape, generator=generator, dtype=wide)).to(dtype)
    log_probs, indices = torch.log_softmax(teacher / temperature, -1).topk(k)
    order = torch.rand(indices.shape, generator=generator).argsort(-1)
    log_probs, indices = log_probs.gather(-1, order), indices.gather(-1, order)
    indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < padding, -1)
    index = None
    if labels:
        index = torch.randint(classes, rows, generator=generator)
        listed = indices[..., 0].clamp(min=0)
        index = index.where(torch.rand(rows, generator=generator) < 0.5, listed)
        index = index.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100).to(device)
    return Problem(student.to(device), indices.to(device), log_probs.to(device), index)


def row_divergence(z: Tensor, indices: Tensor, log_probs: Tensor, tail: str) -> Tensor:
    """Compute the divergence of the merged classes by torch's kl_div."""
    listed = indices >= 0
    ids, p = indices[listed], log_probs[listed].exp()

    def kl(log_q: Tensor, p: Tensor) -> Tensor:  # 0 log 0 = 0, also where log_q is -inf
        return F.kl_div(log_q[p > 0], p[p > 0], reduction="sum")

    if tail == "renormalize":
        if len(ids) == 0:
            return z.sum() * 0
        return kl(z[ids].log_softmax(-1), p / p.sum())
    if tail == "ignore":
        return kl(z.log_softmax(-1)[ids], p)
    others = [c for c in range(len(z)) if c not in set(ids.tolist())]
    log_q = z.log_softmax(-1)[ids]
    if others:
        log_q = torch.cat([log_q, z.log_softmax(-1)[others].logsumexp(-1, keepdim=True)])
        p = torch.cat([p, (1 - p.sum()).clamp(min=0)[None]])
    return kl(log_q, p)


def truth(
    problem: Problem,
    tail: str = "ghost",
    *,
    temperature: float = 2.0,
    alpha: float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
    grad_output: Tensor | None = None,
) -> Answer:
    student, indices, log_probs, labels = (x if x is None else x.cpu() for x in problem)
    leaf = student.detach().double().requires_grad_()
    classes = leaf.shape[-1]
    hard_weight = 0.0 if labels is None else 0.5 if alpha is None else alpha
    flat, ids = leaf.reshape(-1, classes), indices.reshape(-1, indices.shape[-1])
    lists = log_probs.double().reshape(ids.shape)
    losses, counted, size = [], 0, 0.0
    for row in range(len(flat)):
        y = None if labels is None else labels.reshape(-1)[row]
        if y == -100:
            losses.append(flat[row].sum() * 0)
            continue
        counted += 1
        soft = row_divergence(flat[row] / temperature, ids[row], lists[row], tail)
        loss = (1 - hard_weight) * temperature**2 * soft
        if y is not None:
            hard = F.cross_entropy(flat[row], y, label_smoothing=label_smoothing)
            loss = loss + hard_weight * hard
        size += float(soft.detach().abs() + math.log(classes)) ** 2
        losses.append(loss)
    total = torch.stack(losses).reshape(leaf.shape[:-1])
    if reduction != "none":
        total = total.sum()
    if reduction == "mean":
        total = total / (normalizer or max(counted, 1))
    outgoing = torch.ones_like(total) if grad_output is None else grad_output.double().cpu()
    (grad,) = torch.autograd.grad(total, leaf, outgoing)
    noise = 4 * torch.finfo(FP64).eps * math.sqrt(size) * temperature**2
    return Answer(
        None, total.detach().to(problem.student.device), grad.to(problem.student.device), noise
    )  # type: ignore[arg-type]


def run(
    problem: Problem, tail: str = "ghost", grad_output: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = problem.student.detach().requires_grad_()
    options = {"temperature": 2.0, **options}  # the lists of make() have temperature 2
    value = fastkd.loss(leaf, problem.teacher(tail), problem.labels, **options)
    outgoing = torch.ones_like(value) if grad_output is None else grad_output.to(value)
    (grad,) = torch.autograd.grad(value, leaf, outgoing)
    return value.detach(), grad


def check(problem: Problem, tail: str = "ghost", **options: Any) -> None:
    value, grad = run(problem, tail, **options)
    exact = truth(problem, tail, **options)
    acc = FP64 if FP64 in (problem.student.dtype, problem.log_probs.dtype) else FP32
    assert_value(value, exact, acc)
    assert_grad(grad, exact.grad, acc)


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the PyTorch formula instead of the kernel."""
    monkeypatch.setattr(topk, "KERNEL_DEVICES", ())


# ---- options and dtypes

# (shape, k): more mass outside the list, and less; one listed class; a list longer than the
# kernel's chunk of 64; rows that end within a vector, a word of 64, a block and a segment; leading
# dimensions.
SHAPES = [
    *(((5, 10), 3), ((5, 10), 9), ((6, 2), 1), ((4, 1000), 64), ((3, 333), 130)),
    *(((2, 1025), 20), ((2, S + 65), 64), ((2, 3, 40), 5), ((7,), 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
def test_value_and_gradient_equal_the_definition(device, shape, k, tail, dtype):
    check(make(shape, k, dtype, device=device), tail)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
def test_every_instruction_set_equals_the_definition(isa, tail, dtype):
    check(make((3, 2100), 70, dtype), tail, label_smoothing=0.1)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
def test_temperatures_equal_the_definition(device, tail, temperature):
    problem = make((4, 1000), 64, device=device, temperature=temperature)
    check(problem, tail, temperature=temperature)


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
    check(make((5, 300), 20, dtype, device=device), tail, **options)


@pytest.mark.parametrize("tail", TAILS)
def test_the_soft_term_needs_no_labels(device, tail):
    check(make((5, 300), 20, labels=False, device=device), tail)


@pytest.mark.usefixtures("formula")
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=name_of)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("shape", "k"), [((5, 10), 3), ((4, 300), 20), ((2, 3, 40), 5)], ids=str)
def test_the_fallback_equals_the_definition(shape, k, tail, dtype):
    """The PyTorch formula, for devices without kernels, equals the definition."""
    problem = make(shape, k, FP64, padding=0.3)
    problem = problem._replace(
        student=problem.student.to(dtype), log_probs=problem.log_probs.to(dtype)
    )
    value, grad = run(problem, tail, label_smoothing=0.1)
    exact = truth(problem, tail, label_smoothing=0.1)
    tolerance = {FP64: 1e-12, FP32: 1e-5}[dtype]
    torch.testing.assert_close(value.double(), exact.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_two_weights_weigh_both_terms(device):
    problem = make((5, 300), 20, device=device)
    hard = run(problem, alpha=1.0)[0]
    soft = run(problem, alpha=0.0)[0]
    both = run(problem, hard_weight=0.3, soft_weight=2.0)[0]
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
    problem = make((12, 181), 20, dtype)

    def run() -> tuple[Tensor, Tensor, Tensor, str]:
        leaf = problem.student.clone().requires_grad_()
        loss = fastkd.loss(leaf, problem.teacher(tail), problem.labels, **options)
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        loss.backward(torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert second.requires_grad
        return loss.detach(), once, leaf.grad, loss.grad_fn.name()

    *results, in_cpp = run()
    with autograd.without_cpp():
        *expected, by_python = run()
    assert "FastKDTopkLoss" in in_cpp and "_FusedLoss" in by_python
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.usefixtures("each_autograd")
def test_an_entry_of_minus_infinity_is_padding(device, tail, requires_grad):
    """Padding may have any class: 0 in TRL, consecutive ids in a server's reply."""
    student, indices, log_probs, labels = make((6, 40), 5, device=device)
    labels = indices[:, 1]  # includes the padding's classes
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
        with torch.no_grad():  # the formula agrees, too
            head, teacher = Head(student, torch.eye(40, device=device)), TopK(padded, ids, tail)
            linear = fastkd.loss(head, teacher, labels, temperature=2.0)
            torch.testing.assert_close(linear, expected[0])
            value = torch.func.vmap(
                lambda s, p, i, y: fastkd.loss(s, TopK(p, i, tail), y, temperature=2.0)
            )(student, padded, ids, labels)
            torch.testing.assert_close(value.mean(), expected[0])


def test_the_default_temperature_is_1():
    """The default temperature is 1, as in servers' replies and in log_softmax."""
    logits = make((6, 40), 5).student
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
    problem = make((5, 300), 20, device=device)
    assert_same(
        run(problem, normalizer=torch.tensor(7, device=device))[0], run(problem, normalizer=7.0)[0]
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
    ours = run(Problem(student, indices, log_probs, labels), tail)
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


def perfect(tail: str, dtype: torch.dtype = FP32) -> Problem:
    student = make((8, 500), 1, dtype).student
    log_probs, indices = torch.log_softmax(student.double() / 2, -1).topk(30)
    return Problem(student, indices, log_probs.to(FP64 if dtype == FP64 else FP32), None)


@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_a_perfect_student_has_no_loss(device, tail):
    problem = Problem(*(x if x is None else x.to(device) for x in perfect(tail)))
    value, grad = run(problem, tail, reduction="none")
    assert (value.abs() < 1e-10).all()
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
def test_a_student_close_to_its_teacher_has_an_exact_loss(tail, noise):
    """In float64, terms of both signs may cancel to a millionth of their size."""
    problem = perfect(tail, FP64)
    generator = torch.Generator().manual_seed(1)
    student = problem.student + noise * torch.randn(8, 500, generator=generator, dtype=FP64)
    value, _ = run(problem._replace(student=student), tail, reduction="none")
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


def near_teacher(classes: int, k: int, spread: float, t: float) -> Problem:
    """Make students in float32 at KL(teacher || student) = 5e-7, with one class as the tail."""
    generator = torch.Generator().manual_seed(0)
    teacher = spread * torch.randn(4, classes, generator=generator, dtype=FP64)
    noise = 1e-3 * t * torch.randn(4, classes, generator=generator, dtype=FP64)
    log_probs, indices = (teacher / t).log_softmax(-1).topk(k)
    kl = reference.topk.terms(
        teacher + noise, log_probs, indices, None, temperature=t, reduction="none",
        hard_weight=0.0, soft_weight=1 / t**2,
    ).loss  # fmt: skip
    student = teacher + noise * (5e-7 / kl).sqrt()[:, None]
    return Problem(student.float(), indices, log_probs.float(), None)


@pytest.mark.parametrize("name", sorted({*SPARSE_DIVERGENCES} - {"soft_cross_entropy"}))
@pytest.mark.parametrize("tail", ["ghost", "renormalize"])
@pytest.mark.parametrize(
    ("classes", "k", "spread", "t"),
    [(500, 30, 1.5, 1.0), (500, 64, 3.0, 1.7), (5000, 64, 1.5, 1.7), (128256, 64, 3.0, 1.0)],
)
def test_rows_near_the_teacher_are_exact_in_float32(classes, k, spread, t, tail, name):
    """Value and gradient of each row are right; an error of 1e-8 in the tail's mass would show."""
    problem = near_teacher(classes, k, spread, t)
    options = {"divergence": name, "temperature": t, "reduction": "none"}
    value, grad = run(problem, tail, **options)
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
    """The loss is right where 1 minus the listed probabilities rounds to 0."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 200, generator=generator, dtype=dtype)
    student[:, :5] += gap
    log_probs = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.01], dtype=dtype).log().expand(4, 5)
    problem = Problem(student, torch.arange(5).expand(4, 5), log_probs.contiguous(), None)
    check(problem, temperature=1.0)
    _, grad = run(problem, temperature=1.0)
    # The teacher leaves 0.14 to the other classes.
    q = student.double().softmax(-1)[:, 5:].sum(-1).mean()
    torch.testing.assert_close(grad[:, 5:].sum().double(), q - 0.14, rtol=1e-5, atol=0)


def test_renormalize_depends_only_on_the_list():
    problem = make((5, 300), 20, labels=False)
    value, grad = run(problem, "renormalize")
    listed = torch.zeros(5, 301).scatter(-1, problem.indices.where(problem.indices >= 0, 300), 1)
    assert (grad[listed[:, :300] == 0] == 0).all() and (grad != 0).sum() == (
        problem.indices >= 0
    ).sum()
    student = problem.student + 2 * (1 - listed[:, :300])
    torch.testing.assert_close(run(problem._replace(student=student), "renormalize")[0], value)


def test_ignore_of_a_normalized_list_is_the_truncated_teacher(device):
    problem = make((5, 300), 20, labels=False, padding=0.0, device=device)
    normal = problem.log_probs - problem.log_probs.logsumexp(-1, keepdim=True)
    value, _ = run(problem._replace(log_probs=normal), "ignore")
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
    problem = make((5, 300), 90, device=device)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = problem._replace(
        indices=problem.indices[:, order], log_probs=problem.log_probs[:, order]
    )
    for ours, theirs in zip(run(problem, tail), run(shuffled, tail), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("filler", [0.0, NAN, INF, 1e30])
@pytest.mark.parametrize("tail", TAILS)
def test_padding_contributes_0(device, tail, filler):
    """Padding contributes 0, whatever its log-probability."""
    problem = make((5, 300), 20, padding=0.0, device=device)
    some = torch.full((5, 3), filler, device=device)
    nothing = torch.tensor([-1, -100, -(2**62)], device=device).expand(5, 3)
    padded = problem._replace(
        indices=torch.cat([nothing, problem.indices], -1),
        log_probs=torch.cat([some, problem.log_probs], -1),
    )
    for ours, theirs in zip(run(problem, tail), run(padded, tail), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("content", ["negative classes", "log-probabilities of -inf"])
def test_an_empty_list_has_no_soft_term(device, tail, content):
    problem = make((4, 40), 3, padding=0.0, device=device)
    if content == "negative classes":
        empty = problem._replace(indices=torch.full_like(problem.indices, -1))
    else:
        empty = problem._replace(log_probs=torch.full_like(problem.log_probs, -INF))
    value, grad = run(empty, tail, hard_weight=1.0)
    hard, hard_grad = run(problem, tail, alpha=1.0)
    torch.testing.assert_close(value, hard)
    torch.testing.assert_close(grad, hard_grad)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_narrow_dtypes_are_accepted(device, index_dtype, dtype):
    """Ids have any integer dtype; rounded log-probabilities may add up to more than 1."""
    student = make((3, 300), 1, device=device).student
    indices = torch.arange(155, device=device).expand(3, 155)
    log_probs = torch.full((3, 155), -math.log(155), device=device).to(dtype)
    assert log_probs.double().exp().sum(-1).min() > 1.0004
    wide = Problem(student, indices, log_probs.float(), None)
    narrow = Problem(student, indices.to(index_dtype), log_probs, None)
    for ours, theirs in zip(run(narrow), run(wide), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tail", TAILS)
def test_a_rounded_mass_above_1_is_accepted(device, tail):
    """With a rounded mass above 1, the gradient is that of the value, and "ghost" is at least 0."""
    problem = make((6, 40), 10, FP64, labels=False, padding=0.0, device=device)
    normal = problem.log_probs.log_softmax(-1) + math.log(1.05)
    problem = problem._replace(log_probs=normal)
    if tail == "ghost":
        perfect = problem.student.scatter(-1, problem.indices, 2 * normal + 200)
        assert (run(problem._replace(student=perfect), reduction="none")[0] >= 0).all()
    leaf = problem.student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fastkd.loss(s, problem.teacher(tail)), leaf)


# ---- masked classes, special values, ignored rows


@pytest.mark.parametrize("tail", TAILS)
def test_unlisted_masked_classes_have_no_effect(device, tail):
    """Unlisted masked classes have no effect."""
    problem = make((4, 300), 20, device=device, labels=False)
    wide = torch.cat([problem.student, torch.full((4, 2000), -INF, device=device)], -1)
    value, grad = run(problem, tail)
    wide_value, wide_grad = run(problem._replace(student=wide), tail)
    torch.testing.assert_close(wide_value, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(wide_grad[:, :300], grad)
    assert (wide_grad[:, 300:] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
def test_a_listed_class_that_the_student_masks_has_infinite_loss(device, tail):
    problem = make((4, 300), 20, device=device, labels=False, padding=0.0)
    rows = torch.arange(4, device=device)
    problem.student[rows, problem.indices[:, 0]] = -INF
    value, grad = run(problem, tail, reduction="none")
    assert (value == INF).all()
    assert grad.isfinite().all()
    assert (grad[rows, problem.indices[:, 0]] < 0).all()
    # The teacher masks the class, too.
    problem.log_probs[:, 0] = -INF
    check(problem, tail, reduction="none")
    assert (run(problem, tail)[1][rows, problem.indices[:, 0]] == 0).all()


@pytest.mark.parametrize("rest", ["listed", "masked"])
def test_there_is_no_ghost_without_other_classes(device, rest):
    """Without other classes, the listed probabilities are divided by their sum."""
    student = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=FP64).to(device)
    log_probs = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.1, 0.2], dtype=FP64, device=device).log()
    problem = Problem(
        student, torch.arange(6, device=device).expand(3, 6), log_probs.expand(3, 6), None
    )
    if rest == "masked":
        student = torch.cat([student, torch.full((3, 9), -INF, device=device)], -1)
        problem = problem._replace(student=student)
    value, grad = run(problem, reduction="none")
    q = F.log_softmax(student[:, :6] / 2, -1)
    p = log_probs.exp() / 0.8
    torch.testing.assert_close(value, 4 * (p * (p.log() - q)).sum(-1))
    torch.testing.assert_close(grad[:, :6], 2 * (q.exp() - p))
    assert grad.isfinite().all() and (value > 0).all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("column_kind", ["listed", "rest"])
@pytest.mark.parametrize("tail", TAILS)
def test_nan_and_inf_stay_in_their_row(device, tail, column_kind, bad):
    problem = make((4, 300), 20, device=device, labels=False, padding=0.0)
    column = int(problem.indices[1, 0])
    if column_kind == "rest":
        column = next(c for c in range(300) if c not in problem.indices[1].tolist())
    good_value, good_grad = run(problem, tail, reduction="none")
    problem.student[1, column] = bad
    value, grad = run(problem, tail, reduction="none")
    assert value.isnan().tolist() == [False, True, False, False]
    assert grad[1].isnan().all()
    others = [0, 2, 3]
    torch.testing.assert_close(value[others], good_value[others])
    torch.testing.assert_close(grad[others], good_grad[others])


@pytest.mark.parametrize("tail", TAILS)
def test_ignored_rows_are_not_read(device, tail):
    problem = make((4, 300), 20, device=device)
    problem.labels[1] = -100
    expected = run(problem, tail)
    problem.student[1], problem.indices[1], problem.log_probs[1] = NAN, 10**9, 50.0
    for ours, theirs in zip(run(problem, tail), expected, strict=True):
        assert_same(ours, theirs)
    assert (run(problem, tail)[1][1] == 0).all()


def test_all_rows_ignored_give_zero(device):
    problem = make((4, 300), 20, device=device)
    problem.labels.fill_(-100)
    value, grad = run(problem)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_give_zero(device, reduction):
    problem = make((0, 40), 5, device=device)
    value, grad = run(problem, reduction=reduction)
    assert value.sum() == 0 and grad.shape == (0, 40)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_keep_their_differences(scale):
    """A constant added to huge logits changes nothing, since differences are exact."""
    problem = make((4, 64), 6, FP64, labels=False)
    student = problem.student.round() + 2.0**60 * (scale > 1e20)
    value, _ = run(problem._replace(student=student))
    expected, _ = run(problem._replace(student=student - 2.0**60 * (scale > 1e20)))
    if scale < 1e20:
        value, _ = run(problem._replace(student=student + scale))
        torch.testing.assert_close(value, expected)


# ---- layouts, threads


def test_views_equal_copies(device):
    problem = make((2, 5, 300), 20, device=device)
    expected = run(problem)
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
    assert_same(run(lists)[0], expected[0])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("shape", "k"), [((64, 10), 3), ((30, 3000), 64), ((3, S + 9), 64)], ids=str
)
def test_bits_are_equal_for_any_number_of_threads(shape, k, reduction, dtype):
    problem = make(shape, k, dtype)
    torch.set_num_threads(1)
    alone = run(problem, reduction=reduction)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for ours, theirs in zip(run(problem, reduction=reduction), alone, strict=True):
            assert torch.equal(ours, theirs), f"{count} threads"


# ---- derivatives


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_equal_finite_differences(device, tail, reduction):
    problem = make((3, 12), 5, FP64, device=device)
    leaf = problem.student.requires_grad_()

    def function(student: Tensor) -> Tensor:
        return fastkd.loss(
            student,
            problem.teacher(tail),
            problem.labels,
            reduction=reduction,
            label_smoothing=0.1,
        )

    assert torch.autograd.gradcheck(function, leaf)
    assert torch.autograd.gradgradcheck(function, leaf)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_function_transforms_give_the_gradient(device, tail):
    student, indices, log_probs, labels = make((3, 12), 5, FP64, device=device)
    expected = run(Problem(student, indices, log_probs, labels), tail, reduction="sum")[1]

    def row_loss(z: Tensor, ids: Tensor, p: Tensor, y: Tensor) -> Tensor:
        return fastkd.loss(z, TopK(p, ids, tail), y, reduction="sum", temperature=2.0)

    torch.testing.assert_close(
        torch.func.grad(row_loss)(student, indices, log_probs, labels), expected
    )
    rows = torch.func.vmap(torch.func.grad(row_loss))(student, indices, log_probs, labels)
    torch.testing.assert_close(rows, expected)
    direction = torch.ones_like(student).cumsum(-1)
    _, slope = torch.func.jvp(
        lambda z: row_loss(z, indices, log_probs, labels), (student,), (direction,)
    )
    torch.testing.assert_close(slope, (expected * direction).sum())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_is_right(device, reduction, dtype):
    problem = make((5, 300), 20, dtype, device=device)
    leaf = problem.student.requires_grad_()
    value = fastkd.loss(leaf, problem.teacher(), problem.labels, reduction=reduction).sum()
    (first,) = torch.autograd.grad(3 * value, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, leaf)
    torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_fp16_gradients_survive_a_loss_scale(device):
    """Gradients are recomputed for the loss scale, so no gradient has underflowed."""
    problem = make((64, 2000), 20, FP16, device=device)
    scale = torch.tensor(2.0**15)
    grad = run(problem, grad_output=scale)[1]
    exact = truth(problem, grad_output=scale).grad
    assert_grad(grad, exact, FP32)
    assert (run(problem)[1] == 0).sum() > (grad == 0).sum()


def test_gradients_are_computed_only_for_leaves():
    problem = make((5, 300), 20)
    student, teacher, labels = problem.student, problem.teacher(), problem.labels
    expected = run(problem)[0]
    assert torch.equal(fastkd.loss(student, teacher, labels, temperature=2.0), expected)
    with torch.no_grad():
        value = fastkd.loss(student.requires_grad_(), teacher, labels, temperature=2.0)
    assert torch.equal(value, expected) and not value.requires_grad


# ---- torch.library, torch.compile


@pytest.mark.parametrize(  # every pair of values occurs
    ("reduction", "requires_grad", "dtype"),
    [
        (0, True, FP32),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                *((1, True, BF16), (2, True, FP32), (0, False, BF16)),
                *((1, False, FP32), (2, False, BF16)),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("each_autograd")
def test_opcheck_passes_for_lists(dtype, reduction, requires_grad):
    problem = make((4, 50), 5, dtype)
    settings = (None, None, 2.0, 0.5, 0.5, 0.1, -100, 0, 0.5, 0, 0, reduction, 0.0)
    leaf = problem.student.clone().requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastkd.topk_loss.default, (leaf, *problem[1:], *settings))
    if reduction > 0:
        torch.library.opcheck(
            torch.ops.fastkd.topk_loss_into.default,
            (torch.zeros_like(problem.student), *problem, *settings),
        )
    torch.library.opcheck(
        torch.ops.fastkd.topk_loss_backward_.default,
        (
            torch.zeros_like(problem.student),
            torch.ones(4 if reduction == 0 else ()),
            *problem,
            *settings,
            False,
        ),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_loss_equals_the_eager_one(device, reduction, dtype):
    problem = make((4, 50), 5, dtype, device=device)

    def step(student: Tensor) -> tuple[Tensor, Tensor]:
        value = fastkd.loss(student, problem.teacher(), problem.labels, reduction=reduction)
        return value, (2 * value).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        leaf = problem.student.detach().requires_grad_()
        value, total = function(leaf)
        total.backward()
        grads.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*(value for value, _ in grads))
    torch.testing.assert_close(*(grad for _, grad in grads))


def test_the_formula_raises_no_warning(formula):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make((4, 50), 5))


# ---- invalid arguments


def good() -> dict[str, Any]:
    student = torch.arange(15.0).view(3, 5)
    return {
        "student": student,
        "indices": torch.tensor([[0, 1], [2, -1], [4, 3]]),
        "log_probs": torch.full((3, 2), 0.25).log(),
        "labels": torch.tensor([0, 1, 4]),
    }


Z, L = torch.zeros, torch.int64
# (changes of a valid call, the error, a part of the error's message)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student a list": ({"student": [1.0]}, TypeError, "student must be a tensor; got list"),
    "integer student": ({"student": Z(3, 5, dtype=L)}, TypeError, "student must be float64, float32, bfloat16 or float16; got torch.int64"),
    "no class": ({"student": Z(3, 0)}, ValueError, "student must have shape (..., classes) with at least one class; got (3, 0)"),
    "indices a list": ({"indices": [[0, 1]] * 3}, TypeError, "TopK.indices must be a tensor of class indices; got list"),
    "floating indices": ({"indices": Z(3, 2)}, TypeError, "TopK.indices must be class indices of an integer dtype; got torch.float32"),
    "indices of other rows": ({"indices": Z(2, 2, dtype=L)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 2) and (2, 2)"),
    "indices of fewer dimensions": ({"indices": Z(3, dtype=L)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 2) and (3,)"),
    "k = 0": ({"indices": Z(3, 0, dtype=L), "log_probs": Z(3, 0)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 0) and (3, 0)"),
    "swapped": ({"indices": Z(3, 2), "log_probs": Z(3, 2, dtype=L)}, TypeError, "TopK.log_probs must be float64, float32, bfloat16 or float16; got torch.int64"),
    "log_probs None": ({"log_probs": None}, TypeError, "TopK.log_probs must be a tensor; got NoneType"),
    "integer log_probs": ({"log_probs": Z(3, 2, dtype=L)}, TypeError, "TopK.log_probs must be float64, float32, bfloat16 or float16; got torch.int64"),
    "log_probs of other rows": ({"log_probs": Z(1, 2)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (1, 2) and (3, 2)"),
    "log_probs of another k": ({"log_probs": Z(3, 4)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 4) and (3, 2)"),
    "lists of other rows": ({"indices": Z(2, 2, dtype=L), "log_probs": Z(2, 2)}, ValueError, "teacher.log_probs must have k >= 1 entries for each row of logits, shape (3, k) for logits of shape (3, 5); got (2, 2)"),
    "lists of one row": ({"indices": Z(1, 2, dtype=L), "log_probs": Z(1, 2)}, ValueError, "teacher.log_probs must have k >= 1 entries for each row of logits, shape (3, k) for logits of shape (3, 5); got (1, 2)"),
    "lists of fewer dimensions": ({"indices": Z(3, dtype=L), "log_probs": Z(3)}, ValueError, "teacher.log_probs must have k >= 1 entries for each row of logits, shape (3, k) for logits of shape (3, 5); got (3,)"),
    "lists without a dimension": ({"indices": Z((), dtype=L), "log_probs": Z(())}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got () and ()"),
    "a trained teacher": ({"log_probs": Z(3, 2, requires_grad=True)}, ValueError, "teacher.log_probs requires grad, but the loss gives the teacher none"),
    "indices elsewhere": ({"indices": Z(3, 2, dtype=L, device="meta")}, ValueError, "teacher.indices must be on the logits' device, cpu; got meta"),
    "log_probs elsewhere": ({"log_probs": Z(3, 2, device="meta")}, ValueError, "teacher.log_probs must be on the logits' device, cpu; got meta"),
    "index too large": ({"indices": torch.tensor([[0, 1], [2, 5], [4, 3]])}, ValueError, "teacher.indices must be in [0, 5), or negative for padding; row 1 has 5"),
    "index huge": ({"indices": torch.tensor([[0, 1], [2, 2**62], [4, 3]])}, ValueError, f"row 1 has {2**62}"),
    "index twice": ({"indices": torch.tensor([[0, 1], [2, 3], [4, 4]])}, ValueError, "teacher.indices must not list a class twice; row 2 has 4"),
    "probabilities": ({"log_probs": torch.full((3, 2), 0.25)}, ValueError, "teacher.log_probs must be logarithms of probabilities at the temperature of the loss, which add up to at most 1 (1.1 with rounding) in each row; row 0 has 2.56"),
    "logits": ({"log_probs": torch.tensor([[-1.0, -2.0], [-1.0, -2.0], [7.0, 6.0]])}, ValueError, "row 2 has 1500"),
    "NaN log_probs": ({"log_probs": torch.tensor([[-1.0, -2.0], [NAN, -2.0], [-1.0, -2.0]])}, ValueError, "row 1 has nan"),
    "one-hot labels": ({"labels": torch.eye(3, 5)}, TypeError, "labels must be class indices of an integer dtype with a TopK as teacher; got torch.float32"),
    "too few labels": ({"labels": Z(2, dtype=L)}, ValueError, "labels must have one entry for each row of logits, shape (3,)"),
    "label too large": ({"labels": torch.tensor([0, 5, 1])}, ValueError, "labels must be in [0, 5) or ignore_index=-100; row 1 has 5"),
    "unknown tail": ({"tail": "drop"}, ValueError, "TopK.tail must be one of 'ghost', 'renormalize', 'ignore'; got 'drop'"),
    "tail None": ({"tail": None}, ValueError, "TopK.tail must be one of 'ghost', 'renormalize', 'ignore'; got None"),
    "temperature 0": ({"temperature": 0}, ValueError, "temperature must be positive and finite; got 0"),
    "alpha above 1": ({"alpha": 1.5}, ValueError, "alpha must be in [0, 1]; got 1.5"),
    "alpha without labels": ({"alpha": 0.5, "labels": None}, ValueError, "alpha weighs the hard term, which needs labels"),
    "alpha and hard_weight": ({"alpha": 0.5, "hard_weight": 1.0}, ValueError, "alpha cannot be given together with hard_weight or soft_weight"),
    "unknown reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'sum', 'mean'; got 'batchmean'. \"mean\" divides by the rows, as torch's batchmean does"),
    "label_smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1]; got -0.1"),
    "ignore_index a float": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int; got float"),
    "ignore_index beyond 64 bits": ({"ignore_index": 2**70}, ValueError, "ignore_index must be an int of 64 bits; got"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer must be positive and finite; got 0"),
    "normalizer that requires grad": ({"normalizer": torch.tensor(3.0, requires_grad=True)}, ValueError, "normalizer gets no gradient; got a tensor that requires grad"),
    "a class_weight": ({"class_weight": torch.ones(5)}, ValueError, "class_weight must be None with a TopK as teacher; got a tensor of shape (5,)"),
    "a divergence of logits": ({"divergence": "mse"}, ValueError, "'soft_cross_entropy' with a TopK as teacher, which lists probabilities of some classes; got 'mse'"),
    "tail ignore with a divergence": ({"divergence": "jsd", "tail": "ignore"}, ValueError, "divergence must be 'forward_kl' with tail=\"ignore\""),
    "a mix": ({"mix": 0.5}, ValueError, "mix belongs to the divergences"),
    "teacher_temperature": ({"teacher_temperature": 2.0}, ValueError, "teacher_temperature must be None with a TopK as teacher; got 2.0"),
    "teacher_form": ({"teacher_form": "log_probs"}, ValueError, "teacher_form must be 'logits' with a TopK as teacher; got 'log_probs'"),
    "teacher_weights": ({"teacher_weights": [1.0]}, ValueError, "teacher_weights must be None with a TopK as teacher; got [1.0]"),
    "ensemble": ({"ensemble": "logits"}, ValueError, "ensemble must be 'probs' with a TopK as teacher; got 'logits'"),
    "standardize": ({"standardize": True}, ValueError, "standardize must be False with a TopK as teacher; got True"),
    "dim": ({"dim": 1}, ValueError, "dim must be -1 with a TopK as teacher; got 1"),
    "inplace": ({"inplace": True}, ValueError, "inplace must be False with a TopK as teacher; got True"),
    "chunks": ({"chunks": 8}, ValueError, "chunks must be \"auto\" unless student is a Head; got 8"),
    "normalizer with sum": ({"normalizer": 3.0, "reduction": "sum"}, ValueError, "normalizer goes with reduction=\"mean\"; got reduction='sum'"),
}  # fmt: skip


def loss_of(arguments: dict[str, Any], **options: Any) -> Tensor:
    """Compute the loss with these lists, which TopK checks."""
    teacher_and_labels = {**arguments, **options}
    fields = {
        name: teacher_and_labels.pop(name) for name in TopK._fields if name in teacher_and_labels
    }
    return fastkd.loss(teacher_and_labels.pop("student"), TopK(**fields), **teacher_and_labels)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("grad", [False, True])
def test_the_message_names_argument_and_values(mistake, grad):
    changed, error, message = MISTAKES[mistake]
    arguments = {**good(), **changed}
    if (
        grad
        and isinstance(arguments["student"], Tensor)
        and arguments["student"].is_floating_point()
    ):
        arguments["student"].requires_grad_()
    with pytest.raises(error, match=re.escape(message)):
        loss_of(arguments)


def test_the_table_changes_a_valid_call():
    assert loss_of(good()).isfinite()
    for changed, _, _ in MISTAKES.values():
        assert set(changed) <= {*good(), *TopK._fields, *Options._fields}


DATA = [name for name, (_, _, message) in MISTAKES.items() if re.search(r"row \d has", message)]


@pytest.mark.parametrize("mistake", DATA)
@pytest.mark.parametrize(
    "implementation", ["formula", pytest.param("cuda", marks=pytest.mark.cuda)]
)
def test_an_unchecked_mistake_makes_its_row_nan(mistake, implementation, request):
    """The formula and the CUDA kernels, which cannot check data, give NaN for an invalid row."""
    changed, _, message = MISTAKES[mistake]
    arguments = {**good(), **changed}
    if implementation == "formula":
        request.getfixturevalue("formula")
    else:
        arguments = {
            name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()
        }
    arguments["student"].requires_grad_()
    value = loss_of(arguments, reduction="none")
    value.sum().backward()
    bad = {int(re.search(r"row (\d)", message)[1])} if mistake != "probabilities" else {0, 1, 2}
    # exp(0.25) of a single listed class is too large, too.
    for row in range(3):
        assert bool(value[row].isnan()) == (row in bad)
        assert bool(arguments["student"].grad[row].isnan().all()) == (row in bad)


# ---- real text


def test_a_student_learns_from_four_classes_per_row():
    """A student learns character pairs of pydoc_data.topics from four successors per row."""
    text = "".join(pydoc_data.topics.topics.values()).lower()[:200_000]
    characters = [character for character, _ in collections.Counter(text).most_common(40)]
    place = {character: i for i, character in enumerate(characters)}
    counts = torch.full((40, 40), 0.5)
    for a, b in itertools.pairwise(text):
        if a in place and b in place:
            counts[place[a], place[b]] += 1
    log_p = (counts / counts.sum(-1, keepdim=True)).log()
    log_probs, indices = log_p.topk(4)

    def learn(tail: str) -> float:
        student = torch.zeros(40, 40, requires_grad=True)
        optimiser = torch.optim.Adam([student], lr=0.3)
        for _ in range(60):
            optimiser.zero_grad()
            fastkd.loss(student, TopK(log_probs, indices, tail), temperature=1.0).backward()
            optimiser.step()
        return float(fastkd.loss(student.detach(), log_p, temperature=1.0))

    untrained = float(fastkd.loss(torch.zeros(40, 40), log_p, temperature=1.0))
    divergence = {tail: learn(tail) for tail in TAILS}
    # With the ghost class, which has the rest's mass, the student comes closest to the teacher.
    assert divergence["ghost"] < divergence["renormalize"] < untrained
    assert divergence["ghost"] < 0.5 * untrained and divergence["ghost"] < divergence["ignore"]
