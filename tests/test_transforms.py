"""Test torch.func, also compiled, forward-mode differentiation and batched gradients."""

from typing import Any

import pytest
import torch
from support import BF16, FP32, FP64, make, truth, weights
from torch import Tensor
from torch.autograd import forward_ad

import fastkd
from fastkd import reference

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def expected(student: Tensor, teacher: Tensor, labels: Tensor | None, **options) -> Tensor:
    return reference.loss(student, teacher, labels, **weights(options, labels is not None))


OLD_SCRIPT = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def problem64(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return make((4, 7), FP64, device=device)


@OLD_SCRIPT
def test_func_grad_and_hessian_equal_the_references(device):
    student, teacher, labels = problem64(device)
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev, torch.func.jacfwd):
        ours = transform(lambda x: fastkd.loss(x, teacher, labels))(student)
        theirs = transform(lambda x: expected(x, teacher, labels))(student)
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_vmap_gives_the_gradients_of_samples(device):
    generator = torch.Generator().manual_seed(0)
    students = torch.randn(3, 4, 7, generator=generator, dtype=FP64).to(device)
    _, teacher, labels = problem64(device)
    alone = torch.stack([fastkd.loss(x, teacher, labels) for x in students])
    together = torch.func.vmap(lambda x: fastkd.loss(x, teacher, labels))(students)
    torch.testing.assert_close(together, alone, **EXACT)
    grads = torch.func.vmap(torch.func.grad(lambda x: fastkd.loss(x, teacher, labels)))(students)
    for row, x in zip(grads, students, strict=True):
        torch.testing.assert_close(row, truth(x, teacher, labels).grad, **EXACT)


@OLD_SCRIPT
def test_func_jvp_of_functional_call_is_right(device):
    student, teacher, labels = problem64(device)
    tangent = student.roll(1, 0)
    value, derivative = torch.func.jvp(
        lambda x: fastkd.loss(x, teacher, labels), (student,), (tangent,)
    )
    exact = truth(student, teacher, labels)
    torch.testing.assert_close(value, exact.loss, **EXACT)
    torch.testing.assert_close(derivative, (exact.grad * tangent).sum(), **EXACT)


@OLD_SCRIPT
def test_forward_mode_equals_reverse_mode(device):
    student, teacher, labels = problem64(device)
    tangent = student.roll(1, 0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(student, tangent)
        value = torch.autograd.forward_ad.unpack_dual(fastkd.loss(dual, teacher, labels))
    exact = truth(student, teacher, labels)
    torch.testing.assert_close(value.tangent, (exact.grad * tangent).sum(), **EXACT)


# ---- compiled transforms


def topk(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    lists = fastkd.TopK(*(teacher / 2.0).log_softmax(-1).topk(3))
    return fastkd.loss(student, lists, labels, temperature=2.0)


def linear(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    head = torch.eye(student.shape[-1], dtype=student.dtype)
    return fastkd.loss(fastkd.Head(student, head), fastkd.Head(teacher, head), labels)


LOSSES = {"logits": fastkd.loss, "TopK": topk, "Head": linear}
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x[0, 0]))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.roll(1, 0),))[1],
    "vmap": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
}


@OLD_SCRIPT
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if i else ()) for i, n in enumerate(LOSSES)]
)
def test_compiled_transforms_equal_eager_ones(name, transform):
    student, teacher, labels = problem64(torch.device("cpu"))

    def function(x: Tensor) -> Tensor:
        return TRANSFORMS[transform](lambda z: LOSSES[name](z, teacher, labels), x)

    torch.compiler.reset()  # Dynamo compiles nothing beyond its recompilation limit
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = function(student)
    assert want.abs().max() > 0
    torch.testing.assert_close(compiled(student), want, **EXACT)


# ---- batches of gradients, and gradients that are negated views


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("name", LOSSES)
def test_batched_grad_outputs_give_batched_gradients(name):
    student, teacher, labels = problem64(torch.device("cpu"))
    leaf = student.requires_grad_()
    value = LOSSES[name](leaf, teacher, labels)
    (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=FP64)
    (batched,) = torch.autograd.grad(value, leaf, factors, is_grads_batched=True)
    torch.testing.assert_close(batched, factors.view(3, 1, 1) * once, **EXACT)


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
def test_a_vectorized_jacobian_is_right():
    student, teacher, labels = problem64(torch.device("cpu"))

    def function(x: Tensor) -> Tensor:
        return fastkd.loss(x, teacher, labels, reduction="none")

    one_by_one = torch.autograd.functional.jacobian(function, student)
    together = torch.autograd.functional.jacobian(function, student, vectorize=True)
    torch.testing.assert_close(together, one_by_one, **EXACT)


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("dtype", [FP32, FP64, BF16])
def test_grad_outputs_may_be_negative_views(device, dtype):
    student, teacher, labels = make((4, 7), dtype, device=device)
    value = fastkd.loss(student.requires_grad_(), teacher, labels)
    (once,) = torch.autograd.grad(value, student, retain_graph=True)
    minus_one = torch.complex(torch.zeros_like(value), torch.ones_like(value)).conj().imag
    assert minus_one.is_neg() and minus_one == -1
    assert torch.equal(torch.autograd.grad(value, student, minus_one)[0], -once)
    value = fastkd.loss(student, teacher, labels)
    nothing = torch._efficientzerotensor((), dtype=value.dtype, device=device)
    assert not torch.autograd.grad(value, student, nothing)[0].any()


# ---- tangents that are refused, inplace without effect


@OLD_SCRIPT
@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("name", ["teacher", "normalizer", "class_weight"])
def test_tangents_of_other_inputs_are_refused(name):
    student, teacher, labels = problem64(torch.device("cpu"))
    static: dict[str, Any] = {
        "teacher": teacher,
        "normalizer": torch.tensor(3.0, dtype=FP64),
        "class_weight": torch.ones(7, dtype=FP64),
    }

    def function(x: Tensor) -> Tensor:
        options = {"teacher": teacher, name: x}
        return fastkd.loss(student, labels=labels, **options)

    with pytest.raises(ValueError, match=rf"{name}.* (the teacher none|no gradient)"):
        torch.func.jvp(function, (static[name],), (torch.ones_like(static[name]),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(static[name], torch.ones_like(static[name]))
        with pytest.raises(ValueError, match=name):
            function(dual)


@OLD_SCRIPT
def test_inplace_has_no_effect_under_transforms():
    student, teacher, labels = problem64(torch.device("cpu"))
    before = student.clone()

    def function(x: Tensor, inplace: bool = True) -> Tensor:
        return fastkd.loss(x, teacher, labels, inplace=inplace)

    want = torch.func.grad(lambda x: function(x, False))(student)
    assert torch.equal(torch.func.grad(function)(student), want)
    assert torch.equal(torch.func.grad(lambda x: function(x * 1))(student), want)
    assert torch.equal(torch.func.vmap(function)(student.expand(2, 4, 7))[0], function(student))
    assert torch.equal(student, before)
