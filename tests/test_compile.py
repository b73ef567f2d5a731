"""Test torch.compile, torch.export, fake and meta tensors, and torch's checks of the ops."""

import pytest
import torch
from support import BF16, DTYPES, FLOOR, FP16, FP32, FP64, ROUNDING, distance, make, name_of, truth
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd._core import shapes
from fastkd._core.dense import Arguments

pytestmark = [
    # Some versions of torch's compiler and exporter warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, student, *rest):
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf, *rest)
    first = value[0] if isinstance(value, tuple) else value
    (first.sum() * 3).backward()
    return [leaf.grad, *(value if isinstance(value, tuple) else (value,))]


def recorder(graphs: list):
    """Return a backend like aot_eager that also appends each graph to ``graphs``."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


CALLS = {
    "mean": lambda s, t, y: fastkd.loss(s, t, y, temperature=3.0, alpha=0.3),
    "none": lambda s, t, y: fastkd.loss(s, t, y, reduction="none", label_smoothing=0.1),
    "no labels": lambda s, t, y: fastkd.loss(s, t, reduction="sum"),
    "terms": lambda s, t, y: tuple(fastkd.terms(s, t, y)),
    "module": fastkd.KDLoss(hard_weight=0.2, soft_weight=2.0),
    "normalizer tensor": lambda s, t, y: fastkd.loss(s, t, y, normalizer=(y != -100).sum() * 2),
    "row temperatures": lambda s, t, y: fastkd.loss(s, t, y, temperature=s.detach().abs().amax(-1)),
    "int32 labels": lambda s, t, y: fastkd.loss(s, t, y.int()),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_compiled_loss_equals_the_eager_one(device, call):
    student, teacher, labels = make((3, 4, 50), device=device)
    graphs = []
    compiled = torch.compile(CALLS[call], fullgraph=True, backend=recorder(graphs))
    for ours, theirs in zip(
        run(compiled, student, teacher, labels),
        run(CALLS[call], student, teacher, labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert len(graphs) == 2
    forward, backward = (
        [f"{node.target} {node.args}" for node in graph.graph.nodes] for graph in graphs
    )
    assert any("fastkd" in target for target in forward)
    for target in forward + backward:
        assert "softmax" not in target


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_compiled_16_bit_gradients_are_exact(device, dtype):
    # A traced forward pass does not know the loss scale, which only backward receives.
    student, teacher, labels = make((64, 8000), dtype, device=device, spread=1.0)
    compiled = torch.compile(
        lambda *a: fastkd.loss(*a, temperature=4.0, alpha=0.1), fullgraph=True, backend="aot_eager"
    )
    leaf = student.clone().requires_grad_()
    (compiled(leaf, teacher, labels) * 65536.0).backward()
    exact = truth(student, teacher, labels, temperature=4.0, alpha=0.1).grad * 65536.0
    limit = ROUNDING * distance(exact.to(dtype), exact) + FLOOR[FP32] * float(exact.norm())
    assert distance(leaf.grad, exact) <= limit


def test_dynamic_shapes_need_one_graph(device):
    graphs = []
    compiled = torch.compile(CALLS["mean"], fullgraph=True, dynamic=True, backend=recorder(graphs))
    for shape in ((5, 50), (7, 33), (12, 130)):
        problem = make(shape, device=device)
        for ours, theirs in zip(run(compiled, *problem), run(CALLS["mean"], *problem), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inductor_gives_the_eager_gradient(device):
    student, teacher, labels = make((6, 50), device=device)

    def step(s, t, y):
        return fastkd.loss(s * 2 + 1, t - t.mean(), y, temperature=3.0) + s.square().mean()

    for ours, theirs in zip(
        run(torch.compile(step, fullgraph=True), student, teacher, labels),
        run(step, student, teacher, labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_compiled_loss_without_a_gradient_equals_the_eager_one(device):
    student, teacher, labels = make((6, 50), device=device)
    compiled = torch.compile(CALLS["mean"], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(
            compiled(student, teacher, labels), CALLS["mean"](student, teacher, labels)
        )


def test_inplace_under_compile_has_no_effect(device):
    student, teacher, labels = make((6, 50), device=device)
    compiled = torch.compile(
        lambda s, t, y: fastkd.loss(s * 1, t, y, inplace=True), fullgraph=True, backend="aot_eager"
    )
    for ours, theirs in zip(
        run(compiled, student, teacher, labels),
        run(fastkd.loss, student, teacher, labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_arguments_are_checked_while_tracing():
    compiled = torch.compile(
        lambda s, t, y: fastkd.loss(s, t, y, temperature=-1.0), backend="eager"
    )
    with pytest.raises(Exception, match=r"temperature must be positive and finite; got -1\.0"):
        compiled(*make((6, 50)))


def test_data_is_checked_by_a_compiled_graph():
    student, teacher, _ = make((6, 50))
    compiled = torch.compile(lambda *a: fastkd.loss(*a), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 50\).*row 0 has 50"):
        compiled(student, teacher, torch.full((6,), 50))


def test_an_exported_loss_equals_the_eager_one(device):
    student, teacher, labels = make((6, 50), device=device)
    criterion = fastkd.KDLoss(temperature=3.0)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(
        criterion, (student, teacher, labels), dynamic_shapes=({0: rows}, {0: rows}, {0: rows})
    )
    assert "fastkd.loss" in program.graph_module.code
    for shape in ((6, 50), (9, 50)):
        problem = make(shape, device=device)
        assert torch.equal(program.module()(*problem), criterion(*problem))


EVERY_OPTION = {
    "labels and teachers": {
        "divergence": "jsd",
        "mix": 0.2,
        "temperature": torch.tensor(3.0, requires_grad=True),
        "teacher_form": "probs",
        "teacher_weights": [1.0, 3.0],
        "teacher_temperature": torch.linspace(1, 2, 6),
        "hard_weight": torch.linspace(0, 1, 6),
        "class_weight": torch.linspace(0.5, 2, 50),
    },
    "logits": {"divergence": "dkd", "standardize": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_OPTION)
def test_every_option_compiles(name):
    student, teacher, labels = make((6, 50))
    labels, options = labels.clamp(max=39), EVERY_OPTION[name]
    student.requires_grad_()
    teachers = [teacher.softmax(-1), student.softmax(-1).detach()]
    tensors = teachers if "teacher_weights" in options else teacher

    def function(s, t, y):
        return fastkd.loss(s, t, y, **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for each in (function, compiled):
        value = each(student, tensors, labels)
        results.append((value, *torch.autograd.grad(value, student)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", ["jsd", "cosine"])
def test_function_transforms_accept_every_option(device, name):
    student, teacher, _ = make((3, 6, 10), FP64, device=device, labels=False)
    labels = make((3, 6, 10), device=device).labels
    weights = torch.linspace(0, 1, 18, device=device).view(3, 6)

    def function(s, t, y, w):
        return fastkd.loss(s, t, y, divergence=name, hard_weight=w)

    batched = torch.func.vmap(torch.func.grad(function))(student, teacher, labels, weights)
    for got, *problem in zip(batched, student, teacher, labels, weights, strict=True):
        leaf = problem[0].clone().requires_grad_()
        function(leaf, *problem[1:]).backward()
        torch.testing.assert_close(got, leaf.grad)


# ---- shapes without data

SHAPES = [((6, 50), (6,)), ((2, 3, 50), (2, 3)), ((50,), ()), ((0, 50), (0,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_meta_tensors_give_shapes_and_dtypes(shape, rows, reduction, dtype):
    student = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    teacher = torch.empty(shape, dtype=dtype, device="meta")
    labels = torch.empty(rows, dtype=torch.int64, device="meta")
    value = fastkd.loss(student, teacher, labels, reduction=reduction)
    assert value.device.type == "meta" and value.dtype == torch.promote_types(dtype, FP32)
    assert value.shape == (rows if reduction == "none" else ())
    value.sum().backward()
    assert student.grad.shape == shape and student.grad.dtype == dtype
    got = fastkd.terms(student, teacher, labels, reduction=reduction)
    assert all(term.shape == value.shape for term in got)


def test_fake_tensors_are_shaped_like_real_ones(device):
    for reduction in ("mean", "none"):
        student, teacher, labels = make((2, 3, 50), BF16, device=device)
        real = fastkd.terms(student, teacher, labels, reduction=reduction)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in (student, teacher, labels)]
            leaf = fakes[0].requires_grad_()
            fake = fastkd.terms(leaf, *fakes[1:], reduction=reduction)
            fake.loss.sum().backward()
            assert leaf.grad.shape == student.shape and leaf.grad.dtype == BF16
        for ours, theirs in zip(fake, real, strict=True):
            assert (ours.shape, ours.dtype, ours.device) == (
                theirs.shape,
                theirs.dtype,
                theirs.device,
            )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_make_fx_traces_the_op(device, reduction):
    from torch.fx.experimental.proxy_tensor import make_fx

    student, teacher, labels = make((6, 50), device=device)

    def function(s, t, y):
        return fastkd.loss(s, t, y, reduction=reduction)

    traced = make_fx(function)(student, teacher, labels)
    assert torch.equal(traced(student, teacher, labels), function(student, teacher, labels))


# ---- torch.library.opcheck

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments_of(teacher, labels, rows, reduction, *, smoothing=0.1, with_terms=False):
    """Return the op's arguments after the student."""
    return tuple(Arguments(
        (teacher,), labels=labels, row_settings=rows, temperature=2.0, teacher_temperature=2.0,
        hard_weight=0.5, soft_weight=0.5, label_smoothing=smoothing,
        reduction=shapes.REDUCTIONS.index(reduction), with_terms=with_terms,
    ))  # fmt: skip


@pytest.mark.parametrize(  # covers every pair of values
    ("labels", "reduction", "dtype"),
    [
        (True, "none", FP32),
        pytest.param(True, "mean", BF16, marks=pytest.mark.slow),
        pytest.param(True, "sum", FP32, marks=pytest.mark.slow),
        pytest.param(False, "none", BF16, marks=pytest.mark.slow),
        pytest.param(False, "mean", FP32, marks=pytest.mark.slow),
        pytest.param(False, "sum", BF16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.usefixtures("each_autograd")
def test_opcheck_passes_for_the_loss(device, labels, reduction, dtype):
    student, teacher, index = make((6, 50), dtype, device=device, labels=labels)
    rows = torch.linspace(1, 2, 4 * 6, device=device)
    for with_terms, with_stats in ((False, True), (True, False)):
        arguments = arguments_of(teacher, index, rows, reduction, with_terms=with_terms)
        for leaf in (student, student.clone().requires_grad_()):
            torch.library.opcheck(
                torch.ops.fastkd.loss.default, (leaf, *arguments), test_utils=CHECKS
            )
        grads = (None,) if reduction == "none" else (None, torch.empty_like(student))
        for grad in grads:
            torch.library.opcheck(
                torch.ops.fastkd.loss_into.default,
                (grad, student, *arguments, with_stats),
                test_utils=CHECKS,
            )


def test_opcheck_passes_for_the_backward_op(device):
    student, teacher, labels = make((6, 50), device=device)
    arguments = arguments_of(teacher, labels, None, "mean")
    grad_output = torch.ones((), device=device)
    for filled in (False, True):
        grad = torch.empty_like(student)
        _, stats = torch.ops.fastkd.loss_into.default(grad, student, *arguments, True)
        torch.library.opcheck(
            torch.ops.fastkd.loss_backward_.default,
            (grad, grad_output * 3, stats, student, *arguments, filled),
            test_utils=CHECKS,
        )
