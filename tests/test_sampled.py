"""Test sampled teachers: estimates of KL(student || teacher) from one token per row."""
# ruff: noqa: E501 - one mistake per line

import math

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd._core.values import ESTIMATORS

ROWS, CLASSES = 6, 50
FP64 = torch.float64


def make(device, dtype=FP64):
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(ROWS, CLASSES, generator=generator, dtype=FP64)).to(dtype)
    teacher = student.double() + torch.randn(ROWS, CLASSES, generator=generator, dtype=FP64)
    return student.to(device).requires_grad_(), teacher.log_softmax(-1).to(device)


def value_and_gradient(d, estimator):
    """Return Schulman's estimate, and the factor of grad log q in its gradient.

    ``d`` is log p - log q: the teacher's log-probability of the sampled token minus the student's.
    """
    if estimator == "k1":
        return -d, -d
    if estimator == "k2":
        return d.square() / 2, -d
    return d.exp() - 1 - d, 1 - d.exp()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_schulmans(device, estimator, temperature, dtype):
    student, log_p = make(device, dtype)
    tokens = torch.arange(ROWS, device=device) * 7
    log_probs = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    log_probs = log_probs if dtype is FP64 else log_probs.float()
    teacher = fastkd.Sampled(log_probs, tokens, estimator)
    loss = fastkd.loss(student, teacher, temperature=temperature, reduction="none")
    loss.sum().backward()
    log_q = (student.detach().double() / temperature).log_softmax(-1)
    d = log_probs.double() - log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    value, slope = value_and_gradient(d, estimator)
    one_hot = torch.zeros_like(log_q).scatter_(-1, tokens.unsqueeze(-1), 1.0)
    gradient = temperature * slope.unsqueeze(-1) * (one_hot - log_q.exp())
    bound = {FP64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(
        loss.double(), temperature**2 * value, rtol=min(bound, 3e-6), atol=min(bound, 3e-6)
    )
    torch.testing.assert_close(student.grad.double(), gradient, rtol=bound, atol=bound)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_values_and_gradients_are_those_of_the_docstring(device, estimator):
    # Weighting each token by its student probability gives expectations over the student's tokens.
    student, log_p = make(device)
    student = student.detach()[:1].expand(CLASSES, -1).contiguous().requires_grad_()
    tokens = torch.arange(CLASSES, device=device)
    q = student.detach()[0].softmax(-1)
    teacher = fastkd.Sampled(log_p[0], tokens, estimator)
    loss = fastkd.loss(student, teacher, soft_weight=q, reduction="sum")
    loss.backward()
    leaf = student.detach()[:1].requires_grad_()
    name = "forward_kl" if estimator == "k3" else "reverse_kl"
    reverse = reference.loss(
        leaf, log_p[:1], temperature=1.0, divergence="reverse_kl", soft_weight=1.0, hard_weight=0.0
    )
    same_gradient = reference.loss(
        leaf, log_p[:1], temperature=1.0, divergence=name, soft_weight=1.0, hard_weight=0.0
    )
    if estimator != "k2":  # k2 is biased
        torch.testing.assert_close(loss, reverse)
    expected = torch.autograd.grad(same_gradient, leaf)[0][0]
    torch.testing.assert_close(student.grad.sum(0), expected)


def test_terms_are_those_of_the_definition(device):
    student, log_p = make(device)
    tokens = torch.arange(ROWS, device=device)
    log_probs = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    labels = torch.zeros(ROWS, dtype=torch.int64, device=device)
    got = fastkd.terms(student, fastkd.Sampled(log_probs, tokens), labels)
    log_q = student.detach().log_softmax(-1)
    torch.testing.assert_close(got.student_entropy, -(log_q.exp() * log_q).sum(-1).mean())
    torch.testing.assert_close(got.student_mass, log_q.diagonal().exp().mean())
    torch.testing.assert_close(got.teacher_mass, log_probs.exp().mean())
    torch.testing.assert_close(got.hard, -log_q[:, 0].mean())
    assert got.teacher_entropy.isnan() and got.agreement.isnan()


def test_padding_has_no_soft_term(device):
    student, log_p = make(device)
    tokens = torch.tensor([-1, 1, 2, 3, 4, 5], device=device)
    log_probs = log_p[:, 0].clone()
    log_probs[1] = -math.inf
    loss = fastkd.loss(student, fastkd.Sampled(log_probs, tokens), reduction="none")
    loss.sum().backward()
    assert (loss[:2] == 0).all() and (loss[2:] != 0).all()
    assert (student.grad[:2] == 0).all()


@pytest.mark.parametrize("in_python", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_that_the_student_masks_has_an_infinite_loss_and_no_gradient(
    device, estimator, weight, in_python
):
    student, log_p = make(device)
    logits = student.detach().clone()
    logits[0, 7] = -math.inf
    logits.requires_grad_()
    tokens = torch.full((ROWS,), 7, device=device)
    teacher = fastkd.Sampled(log_p[:, 7].contiguous(), tokens, estimator)
    options = {"soft_weight": weight, "reduction": "none"}
    if in_python:
        loss = reference.topk.terms(
            logits,
            teacher.log_probs.unsqueeze(-1),
            tokens.unsqueeze(-1),
            estimator=estimator,
            **options,
        ).loss
    else:
        loss = fastkd.loss(logits, teacher, **options)
    loss.sum().backward()
    infinite = -math.inf if estimator == "k1" else math.inf
    assert loss[0] == (infinite if weight else 0.0)
    assert (logits.grad[0] == 0).all() and logits.grad.isfinite().all()


def test_the_student_may_be_a_head(device):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, 8, generator=generator).to(device).requires_grad_()
    weight = torch.randn(CLASSES, 8, generator=generator).to(device).requires_grad_()
    teacher = fastkd.Sampled(
        torch.full((ROWS,), -2.0, device=device), torch.arange(ROWS, device=device), "k3"
    )
    weights = torch.arange(ROWS, device=device) / 2.0
    results = []
    for student in (fastkd.Head(hidden, weight), hidden @ weight.T):
        loss = fastkd.loss(student, teacher, soft_weight=weights)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", ["double backward", "compile", "vmap of grad"])
def test_function_transforms_give_the_gradient(device, transform):
    student, log_p = make(device)
    teacher = fastkd.Sampled(
        log_p[:, 0].contiguous(), torch.zeros(ROWS, dtype=torch.int64, device=device)
    )

    def loss(logits):
        return fastkd.loss(logits, teacher)

    (expected,) = torch.autograd.grad(loss(student), student)
    if transform == "double backward":
        (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
        torch.testing.assert_close(gradient, expected)
        assert gradient.requires_grad
    elif transform == "compile":
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)
    else:
        torch.testing.assert_close(torch.func.grad(loss)(student), expected)


F, L = torch.zeros(ROWS), torch.zeros(ROWS, dtype=torch.int64)
BAD = {
    "tokens of other rows": (F, L[1:], {}, ValueError, "must have the same shape (...)"),
    "tokens of floats": (F, F, {}, TypeError, "Sampled.tokens must be class indices of an integer"),
    "no tensor": ([0.0], L, {}, TypeError, "Sampled.log_probs must be a tensor; got list"),
    "estimator": (F, L, {"estimator": "k4"}, ValueError, "Sampled.estimator must be one of 'k1', 'k2', 'k3'"),
    "rows": (F[1:], L[1:], {}, ValueError, "teacher.log_probs must have one entry for each row of logits, shape (6,)"),
    "a token out of range": (F - 1, L + CLASSES, {}, ValueError, "teacher.tokens must be in [0, 50)"),
    "divergence": (F, L, {"divergence": "jsd"}, ValueError, "divergence must be 'forward_kl' with a Sampled"),
    "dim": (F, L, {"dim": 1}, ValueError, "dim must be -1 with a Sampled"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    log_probs, tokens, options, error, message = BAD[case]
    with pytest.raises(error) as raised:
        estimator = options.pop("estimator", "k1") if case == "estimator" else "k1"
        fastkd.loss(
            torch.zeros(ROWS, CLASSES), fastkd.Sampled(log_probs, tokens, estimator), **options
        )
    assert message in str(raised.value)
