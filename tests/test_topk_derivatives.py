"""Test sparse teachers: derivatives, torch.library, torch.compile, training on text."""

import collections
import itertools
import pydoc_data.topics
import warnings

import pytest
import torch
from support import (
    BF16,
    FP16,
    FP32,
    FP64,
    TopKProblem,
    assert_grad,
    make_topk,
    name_of,
    run_topk,
    topk_truth,
)
from torch import Tensor

import fastkd
from fastkd import TopK
from fastkd._core.values import TAILS

# ---- derivatives


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_equal_finite_differences(device, tail, reduction):
    problem = make_topk((3, 12), 5, FP64, device=device)
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
    student, indices, log_probs, labels = make_topk((3, 12), 5, FP64, device=device)
    expected = run_topk(TopKProblem(student, indices, log_probs, labels), tail, reduction="sum")[1]

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
    problem = make_topk((5, 300), 20, dtype, device=device)
    leaf = problem.student.requires_grad_()
    value = fastkd.loss(leaf, problem.teacher(), problem.labels, reduction=reduction).sum()
    (first,) = torch.autograd.grad(3 * value, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, leaf)
    torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_fp16_gradients_survive_a_loss_scale(device):
    # Backward recomputes the gradient with the loss scale, so fewer entries underflow.
    problem = make_topk((64, 2000), 20, FP16, device=device)
    scale = torch.tensor(2.0**15)
    grad = run_topk(problem, grad_output=scale)[1]
    exact = topk_truth(problem, grad_output=scale).grad
    assert_grad(grad, exact, FP32)
    assert (run_topk(problem)[1] == 0).sum() > (grad == 0).sum()


def test_gradients_are_computed_only_for_leaves():
    problem = make_topk((5, 300), 20)
    student, teacher, labels = problem.student, problem.teacher(), problem.labels
    expected = run_topk(problem)[0]
    assert torch.equal(fastkd.loss(student, teacher, labels, temperature=2.0), expected)
    with torch.no_grad():
        value = fastkd.loss(student.requires_grad_(), teacher, labels, temperature=2.0)
    assert torch.equal(value, expected) and not value.requires_grad


# ---- torch.library, torch.compile


@pytest.mark.parametrize(  # any two values of different parameters occur together
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
    problem = make_topk((4, 50), 5, dtype)
    settings = (None, None, 2.0, 0.5, 0.5, 0.1, -100, 0, 0.5, 0, 0, reduction, 0.0, reduction == 1)
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
    problem = make_topk((4, 50), 5, dtype, device=device)

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
        run_topk(make_topk((4, 50), 5))


# ---- real text


def test_a_student_learns_from_four_classes_per_row():
    # Each row is a character of pydoc_data.topics; the teacher lists the four most probable next
    # characters.
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
    # With the ghost class, which has the unlisted mass, the student comes closest to the teacher.
    assert divergence["ghost"] < divergence["renormalize"] < untrained
    assert divergence["ghost"] < 0.5 * untrained and divergence["ghost"] < divergence["ignore"]
