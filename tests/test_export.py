"""Test that programs of torch.export and compiled autograd train like eager calls."""

import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from support import BF16, FP16, FP32, make
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import fastkd

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def sparse(student: Tensor, teacher: Tensor, labels: Tensor, **options) -> Tensor:
    top = fastkd.TopK(*teacher.log_softmax(-1).topk(4))
    return fastkd.loss(student, top, labels, **options)


def linear(student: Tensor, teacher: Tensor, labels: Tensor, **options) -> Tensor:
    head = fastkd.Head(student, torch.eye(student.shape[-1]))
    return fastkd.loss(head, teacher, labels, **options)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda s, t, y: fastkd.loss(s, t, y, temperature=3.0, alpha=0.3),
    "none": lambda s, t, y: fastkd.loss(s, t, y, reduction="none").sum(),
    "terms": lambda s, t, y: fastkd.terms(s, t, y).loss,
    "jsd": lambda s, t, y: fastkd.loss(s, t, y, divergence="jsd"),
    "several teachers": lambda s, t, y: fastkd.loss(s, [t, -t], y),
    "class weights": lambda s, t, y: fastkd.loss(s, t, y, class_weight=torch.arange(1.0, 51)),
    "row temperatures": lambda s, t, y: fastkd.loss(s, t, y, temperature=t.abs().amax(-1)),
    "standardize": lambda s, t, y: fastkd.loss(s, t, y, standardize=True),
    "topk": sparse,
    "topk none": lambda s, t, y: sparse(s, t, y, reduction="none").sum(),
    "topk terms": lambda s, t, y: fastkd.terms(s, fastkd.TopK(*t.log_softmax(-1).topk(4)), y).loss,
    "linear": linear,
    "linear none": lambda s, t, y: linear(s, t, y, reduction="none").sum(),
}


# `make test` exports and compiles only these losses, and `make test-all` all losses.
QUICK = ("mean", "linear", "learned temperature")


def names_of(names: Iterable[str]) -> list:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


class Student(nn.Module):
    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 50, generator=generator))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.loss = loss

    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.loss(x @ self.weight, teacher, labels)


class Learning(Student):
    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return fastkd.loss(x @ self.weight, teacher, labels, temperature=self.temperature)


def gradients(step: Callable[[], Tensor], module: nn.Module) -> list[Tensor]:
    """Return the loss of a step and the parameters' gradients, for a grad_output of 3."""
    for parameter in module.parameters():
        parameter.grad = None
    value = step()
    (3 * value).backward()
    return [value.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def assert_same_step(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = FP32) -> None:
    assert len(ours) == len(theirs) > 1
    bound = {FP32: 1e-5, BF16: 2e-2, FP16: 2e-3}[dtype]
    for ours_grad, theirs_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            ours_grad, theirs_grad, rtol=bound, atol=bound * float(theirs_grad.abs().max())
        )


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "strict"]
)
@pytest.mark.parametrize("name", names_of([*LOSSES, "learned temperature"]))
def test_exported_programs_train_as_eager_calls_do(name, strict):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    _, teacher, labels = make((8, 50))
    module = Learning(linear) if name not in LOSSES else Student(LOSSES[name])
    expected = gradients(lambda: module(x, teacher, labels), module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns if an op has no gradient
        exported = torch.export.export(module, (x, teacher, labels), strict=strict).module()
        ours = gradients(lambda: exported(x, teacher, labels), exported)
    assert_same_step(ours, expected)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("each_autograd", "fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", names_of(LOSSES))
def test_compiled_autograd_gives_the_gradients_of_autograd(name, backend):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    _, teacher, labels = make((8, 50))
    dtype = FP32  # the backend "eager" is tested in 16 bits, except for heads
    if backend == "eager" and not name.startswith("linear"):
        dtype = (BF16, FP16)[len(name) % 2]
    module = Student(lambda s, t, y: LOSSES[name](s.to(dtype), t, y))
    expected = gradients(lambda: module(x, teacher, labels), module)
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        value = 3 * module(x, teacher, labels)
        for last in (False, True):  # the first pass must not change saved tensors
            module.weight.grad = None
            value.backward(retain_graph=not last)
            assert module.weight.grad is not None
            assert_same_step([value.detach() / 3, module.weight.grad], expected, dtype)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.usefixtures("each_autograd", "fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", names_of(LOSSES))
def test_rows_chosen_by_a_mask_are_compiled(name, backend):
    # The number of selected rows is unknown during tracing.
    student, teacher, labels = make((8, 50))
    mask = torch.arange(8) % 3 != 0
    leaf = student.requires_grad_()

    def step(s: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return LOSSES[name](s[mask], t[mask], y[mask])

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    ours, theirs = (
        (value, torch.autograd.grad(value, leaf)[0])
        for value in (f(leaf, teacher, labels, mask) for f in (compiled, step))
    )
    for actual, expected_grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected_grad)
