"""Test the fast path (fast_path.py) and autograd: hooks, modes, second backward passes.

Tests with the fixture ``each_autograd`` run with autograd in C++ and in Python.
"""

import pytest
import torch
from support import BF16, FP32, FP64, make, name_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import losses
from fastkd._core import fast_path


def dense(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    return fastkd.loss(student, teacher, labels, **options)


def topk(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options) -> Tensor:
    log_probs, indices = torch.log_softmax(teacher.double(), -1).topk(4)
    acc = FP64 if student.dtype == FP64 else FP32
    return fastkd.loss(student, fastkd.TopK(log_probs.to(acc), indices), labels, **options)


LOSSES = {"loss": dense, "topk": topk}
each_loss = pytest.mark.parametrize("name", LOSSES)


def assert_near(gradient: Tensor, expected: Tensor) -> None:
    """Assert that gradients are equal up to the rounding of scaling or recomputing a gradient."""
    rtol = 1e-2 if expected.dtype == BF16 else 1e-5
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=1e-7)


@pytest.mark.usefixtures("each_autograd")
@each_loss
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=name_of)
def test_eligible_calls_take_the_fast_path(name, dtype, monkeypatch):
    loss = LOSSES[name]
    monkeypatch.setattr(losses, "prepare", None)
    student, teacher, labels = make((6, 5, 20), dtype)
    student.requires_grad_()
    sliced = [logits[:, :-1, :15] for logits in (student, teacher)]
    calls = [
        loss(student, teacher),
        loss(student, teacher, labels),
        loss(student, teacher, labels=labels, temperature=3, reduction="sum", label_smoothing=0.1),
        loss(*sliced),
        loss(student[0, 0], teacher[0, 0]),
        loss(student[:0], teacher[:0], normalizer=2.5),
    ]
    for value in calls:
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.shape == student.shape


@pytest.mark.usefixtures("each_autograd")
@each_loss
def test_both_paths_give_the_same_bits(name, monkeypatch):
    loss = LOSSES[name]
    student, teacher, labels = make((6, 20))
    raw = bytearray(b"0" + teacher.numpy().tobytes())
    odd = torch.frombuffer(raw, dtype=FP32, offset=1).view(6, 20)
    calls = {
        "none": lambda s: loss(s, teacher, reduction="none").sum(),
        "labels, every other": lambda s: loss(s, teacher, labels.repeat_interleave(2)[::2]),
        "int32 labels": lambda s: loss(s, teacher, labels.int()),
        "a normalizer that is a tensor": lambda s: loss(s, teacher, normalizer=torch.tensor(2.0)),
        "classes apart": lambda s: loss(s.t().contiguous().t(), teacher),
        "a negative": lambda s: loss(torch._neg_view(s), teacher),
        "an odd address": lambda s: loss(s, odd),
    }

    def run(function) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    results = {case: run(function) for case, function in calls.items()}
    monkeypatch.setattr(fast_path, "is_eligible", lambda *_: False)
    for case, function in calls.items():
        value, gradient = run(function)
        assert torch.equal(value, results[case][0]), case
        assert torch.equal(gradient, results[case][1]), case


def test_dispatch_modes_see_the_op(device):
    student, teacher, labels = make((6, 20), device=device)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        fastkd.loss(student.requires_grad_(), teacher, labels).backward()
    assert any(name.startswith("fastkd.loss") for name in seen)


@pytest.mark.usefixtures("each_autograd")
@each_loss
@pytest.mark.parametrize("grad", [False, True])
def test_the_profiler_sees_the_loss(name, grad):
    student, teacher, labels = make((6, 20))
    with torch.profiler.profile(record_shapes=True) as profile:
        LOSSES[name](student.requires_grad_(grad), teacher, labels)
        with torch.inference_mode():
            inference_tensor = teacher + 1  # an inference tensor, which autograd cannot save
        LOSSES[name](student, inference_tensor, labels)
    op = {"loss": "fastkd::loss", "topk": "fastkd::topk_loss"}[name]
    recorded = [event for event in profile.events() if event.name == (f"{op}_into" if grad else op)]
    assert [event.input_shapes[1 if grad else 0] for event in recorded] == 2 * [[6, 20]]


# ---- backward passes that recompute the gradient


@pytest.mark.usefixtures("each_autograd")
@each_loss
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_hooks_may_save_tensors_elsewhere(name, dtype):
    # Hooks such as ``save_on_cpu`` may move, compress or re-stride saved tensors.
    student, teacher, labels = make((6, 20), dtype)
    leaf = student.requires_grad_()
    value = LOSSES[name](leaf, teacher, labels)
    (expected,) = torch.autograd.grad(value, leaf, torch.tensor(3.0))
    hooks = {
        "a copy": (Tensor.clone, lambda saved: saved),
        "a transposed copy": (lambda x: x.t().contiguous(), Tensor.t),
        "a negative": (Tensor.neg, lambda saved: torch._neg_view(saved)),
    }
    for kind, (pack, unpack) in hooks.items():
        if name == "topk" and kind == "a negative":
            continue  # the op refuses labels or indices that are negative views
        with saved_tensors_hooks(lambda x, f=pack: f(x), lambda x, f=unpack: f(x)):
            value = LOSSES[name](leaf, teacher, labels)
        torch.autograd.grad(value, leaf, retain_graph=True)
        for _ in range(2):  # the pass above used up the forward pass's gradient
            (again,) = torch.autograd.grad(value, leaf, torch.tensor(3.0), retain_graph=True)
            assert_near(again, expected)


@pytest.mark.usefixtures("each_autograd")
@each_loss
@pytest.mark.parametrize("with_labels", [False, True])
def test_checkpointing_may_stop_the_recomputation(name, with_labels):
    # Checkpointing stops the recomputation by an exception in the hook that saves tensors.
    _, teacher, labels = make((6, 40))
    hidden = torch.randn(6, 16, requires_grad=True)
    head = torch.randn(40, 16)

    def step(x: Tensor) -> Tensor:
        return LOSSES[name](x @ head.t(), teacher, labels if with_labels else None)

    checkpoint(step, hidden, use_reentrant=False).backward(torch.tensor(2.0))
    (expected,) = torch.autograd.grad(step(hidden), hidden, torch.tensor(2.0))
    torch.testing.assert_close(hidden.grad, expected)


@pytest.mark.usefixtures("each_autograd")
@each_loss
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_exceptions_of_hooks_are_raised(name, calls):
    student, teacher, labels = make((6, 20))
    student.requires_grad_()
    made = []

    def interrupted(saved: Tensor) -> Tensor:
        made.append(saved)
        if len(made) == calls:
            raise KeyboardInterrupt
        return saved

    with saved_tensors_hooks(interrupted, lambda x: x), pytest.raises(KeyboardInterrupt):
        LOSSES[name](student, teacher, labels)
    assert len(made) == calls


class Wrapper(Tensor):
    """Wrap a tensor in a subclass that owns no memory."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, result)


def unwrap(value: object) -> object:
    return value.inner if isinstance(value, Wrapper) else value


@pytest.mark.usefixtures("each_autograd")
@each_loss
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_hooks_may_return_wrappers(name, dtype):
    student, teacher, labels = make((6, 20), dtype)
    leaf = student.requires_grad_()
    expected = torch.autograd.grad(LOSSES[name](leaf, teacher, labels), leaf)[0]
    for wrapped in range(2, 4):  # number of the saved tensor that is wrapped
        seen = []

        def unpack(saved: Tensor, seen: list[Tensor] = seen, wrapped: int = wrapped) -> Tensor:
            seen.append(saved)
            return Wrapper(saved) if len(seen) == wrapped else saved

        with saved_tensors_hooks(lambda x: x, unpack):
            value = LOSSES[name](leaf, teacher, labels)
        # The first pass may return the gradient that forward computed. The second recomputes it.
        for _ in range(2):
            seen.clear()
            (again,) = torch.autograd.grad(value, leaf, retain_graph=True)
            assert_near(unwrap(again), expected)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=name_of)
@pytest.mark.parametrize("factor", [1.0, 3.0, float("inf")])
def test_terms_do_not_change_a_recomputed_gradient(dtype, factor):
    # With alpha=0, only fastkd.terms needs the hard term.
    student, teacher, labels = make((5, 170), dtype, ignored=0.0)
    leaf = student.requires_grad_()
    values = [
        fastkd.loss(leaf, teacher, labels, alpha=0),
        fastkd.terms(leaf, teacher, labels, alpha=0).loss,
    ]
    for _ in range(2):
        first, second = (
            torch.autograd.grad(value, leaf, torch.tensor(factor), retain_graph=True)[0]
            for value in values
        )
        assert torch.equal(first, second) or (first.isnan() == second.isnan()).all()


@pytest.mark.usefixtures("each_autograd")
def test_hooks_that_return_other_tensors_raise():
    student, teacher, labels = make((6, 20))
    leaf = student.requires_grad_()
    for change in (lambda x: x[..., :10], lambda x: x.to("meta"), lambda x: x[:3]):
        with saved_tensors_hooks(lambda x: x, change):
            value = fastkd.loss(leaf, teacher, labels)
        with pytest.raises(RuntimeError):
            value.backward(retain_graph=True)
            value.backward()


@pytest.mark.usefixtures("each_autograd")
@each_loss
def test_changed_logits_raise_in_a_second_backward_pass(name):
    student, teacher, labels = make((6, 20))
    leaf = student.requires_grad_()
    hidden = leaf * 1
    value = LOSSES[name](hidden, teacher, labels)
    value.backward(retain_graph=True)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=name_of)
@pytest.mark.parametrize("options", [{}, {"divergence": "jsd"}, {"divergence": "reverse_kl"}])
def test_a_second_backward_pass_gives_the_same_bits(dtype, options):
    student, teacher, labels = make((5, 170), dtype, ignored=0.0)
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, **options)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    for factor in (0.0, float("inf"), float("nan")):
        (of_factor,) = torch.autograd.grad(value, leaf, torch.tensor(factor), retain_graph=True)
        assert not of_factor.any() if factor == 0 else not of_factor.isfinite().any()
