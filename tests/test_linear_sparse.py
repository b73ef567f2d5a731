"""Test the loss of a Head with a sparse teacher against the definition on full logits."""

from typing import Any

import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    Heads,
    distance,
    loss_in_chunks,
    make_heads,
    name_of,
    peak_bytes,
)
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import Head, TopK
from fastkd._core import dispatch
from fastkd._core.values import TAILS

ROWS, CLASSES, K = 37, 203, 9


def make(dtype=FP32, device="cpu", rows=ROWS, classes=CLASSES, ignored=0.3) -> Heads:
    """Make heads with a TopK teacher, whose log-probabilities have temperature 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((rows, classes), generator=generator, dtype=FP64) * 2
    log_probs, indices = torch.log_softmax(logits, -1).topk(min(K, classes - 1))
    teacher = TopK(log_probs.to(device, dtype), indices.to(device))
    return make_heads(dtype, device, rows, classes, ignored)._replace(teacher=teacher)


def loss(heads: Heads, *, softcap=None, scale=None, tail="ghost", **options) -> Tensor:
    heads = heads._replace(teacher=heads.teacher._replace(tail=tail)).with_options(softcap, scale)
    return loss_in_chunks(*heads, **{"temperature": 2.0, **options})


def run(heads: Heads, outgoing: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss, and the gradients of hidden states, weight and bias."""
    value = loss(heads, **options)
    outgoing = torch.ones_like(value) if outgoing is None else outgoing.to(value)
    return value.detach(), list(torch.autograd.grad(value, heads.leaves(), outgoing))


def divergence(log_q: Tensor, indices: Tensor, log_p: Tensor, tail: str) -> Tensor:
    """Compute the divergence of each row as fastkd.TopK defines it."""
    log_q = log_q.gather(-1, indices)
    if tail == "ignore":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if tail == "ghost":
        log_q, log_p = (
            torch.cat([value, (1 - value.exp().sum(-1, keepdim=True)).log()], -1)
            for value in (log_q, log_p)
        )
    pair = log_q.log_softmax(-1), log_p.log_softmax(-1)
    return F.kl_div(*pair, log_target=True, reduction="none").sum(-1)


def compute_on_full_logits(
    heads: Heads,
    outgoing: Tensor | None = None,
    *,
    dtype: torch.dtype = FP64,
    tail: str = "ghost",
    temperature: float = 2.0,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, list[Tensor]]:
    """Compute loss and gradients by PyTorch: logits in ``dtype``, the loss in float32 or wider."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in heads.leaves()]
    wide = torch.promote_types(dtype, FP32)
    z = F.linear(*leaves).to(wide) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_q = torch.log_softmax(z / temperature, -1)
    soft = divergence(log_q, heads.teacher.indices, heads.teacher.log_probs.to(wide), tail)
    value = soft_weight * temperature**2 * soft
    count: float | Tensor = len(z)
    if heads.labels is not None:
        options = {"label_smoothing": label_smoothing, "reduction": "none"}
        hard = F.cross_entropy(z, heads.labels, **options)
        valid = heads.labels != -100
        value, count = (value + hard_weight * hard).where(valid, 0.0), valid.sum()
    if reduction != "none":
        value = value.sum()
    if reduction == "mean":
        value = value / (count if normalizer is None else normalizer)
    outgoing = torch.ones_like(value) if outgoing is None else outgoing.to(value)
    return value.detach(), list(torch.autograd.grad(value, leaves, outgoing))


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"reduction": "sum"},
    "renormalize": {"tail": "renormalize", "temperature": 1.0},
    "ignore": {"tail": "ignore"},
    "soft alone": {"soft_weight": 1.0, "hard_weight": 0.0},
    "smoothing": {"label_smoothing": 0.1, "normalizer": 12.0},
    "normalizer tensor": {"normalizer": torch.tensor(7)},
    "soft cap": {"softcap": 3.0, "tail": "renormalize"},
    "scale": {"scale": 0.25},
}


@pytest.fixture(params=["kernel", "formula"])
def implementation(request, monkeypatch):
    """Run the test with the kernel, and with the formula for devices without a kernel."""
    if request.param == "formula":
        monkeypatch.setattr(dispatch, "is_fused", lambda *_: False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=name_of)
def test_every_option_equals_the_truth(device, implementation, dtype, options):
    heads = make(dtype, device)
    exact, exact_grads = compute_on_full_logits(heads, **options)
    bound = 64 * torch.finfo(dtype).eps
    for size in (8, ROWS):
        value, grads = run(heads, chunks={"chunk_size": size}, **options)
        assert value.dtype == dtype and abs(value - exact) <= bound * abs(exact)
        for grad, right in zip(grads, exact_grads, strict=True):
            assert grad.dtype == dtype
            assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_grad_output_scales_the_gradients(device, dtype, reduction):
    heads = make(dtype, device)
    outgoing = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(3.0)
    options = {"reduction": reduction, "softcap": 5.0}
    exact, exact_grads = compute_on_full_logits(heads, outgoing.to(device), **options)
    value, grads = run(heads, outgoing.to(device), chunks={"chunk_size": 8}, **options)
    bound = 16 * torch.finfo(dtype).eps
    assert distance(value, exact) <= bound * exact.norm()
    for grad, right in zip(grads, exact_grads, strict=True):
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_16_bit_errors_are_at_most_those_of_upcast_logits(device, dtype):
    heads = make(dtype, device, rows=300, classes=1000)
    _, exact = compute_on_full_logits(heads)
    _, cast = compute_on_full_logits(heads, dtype=dtype)
    for size in (8, 300):
        _, grads = run(heads, chunks={"chunk_size": size})
        for name, grad, right, baseline in zip("xwb", grads, exact, cast, strict=True):
            assert distance(grad, right) <= 1.1 * distance(baseline, right), name


def test_the_loss_is_that_of_full_logits(device):
    # The lists have narrow dtypes, padding, and two batch dimensions.
    heads = make(device=device)
    indices = heads.teacher.indices.int().clone()
    indices[::2, -3:] = -1
    teacher = TopK(heads.teacher.log_probs.to(BF16), indices)
    options = {"reduction": "none", "temperature": 2.0}
    expected = fastkd.loss(heads.student.logits(), teacher, heads.labels, **options)
    shape = (ROWS, 1)
    value = loss_in_chunks(
        heads.student._replace(hidden=heads.student.hidden.unflatten(0, shape)),
        TopK(*(value.unflatten(0, shape) for value in teacher[:2])),
        heads.labels.unflatten(0, shape),
        chunks={"chunk_size": 8},
        **options,
    )
    assert value.shape == shape
    torch.testing.assert_close(value.flatten(), expected)


def test_the_default_temperature_is_that_of_the_lists(device):
    heads = make(device=device)
    assert torch.equal(fastkd.loss(*heads), fastkd.loss(*heads, temperature=1.0))


def test_the_soft_term_needs_no_labels(device):
    heads = make(FP64, device)._replace(labels=None)
    exact, exact_grads = compute_on_full_logits(heads, soft_weight=1.0)
    value, grads = run(heads, chunks={"chunk_size": 8})
    torch.testing.assert_close(value, exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, right)


def test_ignored_rows_are_not_read(device):
    heads = make(device=device)
    expected = run(heads, chunks={"chunk_size": 8})
    ignored = heads.labels == -100
    with torch.no_grad():
        heads.student.hidden[ignored] = float("nan")
    heads.teacher.indices[ignored] = CLASSES + 5
    heads.teacher.log_probs[ignored] = float("inf")
    value, grads = run(heads, chunks={"chunk_size": 8})
    assert torch.equal(value, expected[0])
    for grad, right in zip(grads, expected[1], strict=True):
        assert torch.equal(grad, right)
    value, grads = run(heads._replace(labels=torch.full_like(heads.labels, -100)))
    assert not value.any() and not any(grad.any() for grad in grads)


def test_gradients_are_computed_only_for_leaves(device):
    heads = make(device=device)
    expected, _ = run(heads)
    with torch.no_grad():
        assert torch.equal(loss(heads), expected)
    hidden, weight, bias = heads.leaves()
    loss(heads._replace(student=Head(hidden, weight.detach(), bias.detach()))).backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_autocast_keeps_float32_gradients(device, dtype):
    heads = make(FP32, device, rows=300, classes=1000)
    with torch.autocast(device.type, dtype=dtype):
        value, grads = run(heads, chunks={"chunk_size": 64})
        _, eager = compute_on_full_logits(heads, dtype=FP32)
    _, exact = compute_on_full_logits(heads)
    assert value.dtype == FP32 and all(grad.dtype == FP32 for grad in grads)
    for grad, right, baseline in zip(grads, exact, eager, strict=True):
        assert 0 < distance(grad, right) <= 1.1 * distance(baseline, right)


# ---- memory


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "soft cap"])
def test_peak_memory_is_that_of_the_plan(cap):
    # With a sparse teacher, the gradient does not overwrite the logits, so the planned peak
    # includes both.
    heads = make(rows=512, classes=16000, ignored=0.0)
    for options in ({"chunk_size": 128}, {"max_workspace": 2**24}, {"chunk_size": 512}):
        options["chunk_by"] = "rows"
        chosen = fastkd.chunks.plan(*heads.with_options(cap), **options)
        peak = peak_bytes(lambda options=options: run(heads, softcap=cap, chunks=options))
        small = 2**22  # bytes, an allowance for a block of a matrix product, biases and lists
        assert 0.5 * chosen.peak_bytes <= peak <= chosen.peak_bytes + small


def test_max_workspace_holds_for_long_lists():
    # Checking long lists must fit into max_workspace, too.
    torch.manual_seed(0)
    student = Head(torch.randn(1024, 8, requires_grad=True), torch.randn(1000, 8))
    log_probs, indices = torch.randn(1024, 1000).log_softmax(-1).topk(512)
    teacher, bound = TopK(log_probs, indices.int()), {"max_workspace": 2**21}
    assert peak_bytes(lambda: loss_in_chunks(student, teacher, chunks=bound)) <= 2**21
    indices[700, 3] = 1000
    with pytest.raises(ValueError, match=r"teacher.indices must be in .*; row 700 has 1000"):
        fastkd.loss(student, TopK(log_probs, indices))


def test_max_workspace_holds_without_the_kernel(monkeypatch):
    heads = make(rows=512, classes=2000, ignored=0.0)
    monkeypatch.setattr(dispatch, "is_fused", lambda *_: False)
    assert peak_bytes(lambda: run(heads, chunks={"max_workspace": 2**23})) <= 2**23


# ---- derivatives, compilation


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_derivatives_equal_finite_differences(tail, reduction):
    heads = make(FP64, rows=5, classes=6)
    hidden, weight, bias = heads.leaves()
    leaves = [x[:, :3].detach().requires_grad_() for x in (hidden, weight)] + [bias]

    def compute_loss(x, w, b):
        options = {"tail": tail, "reduction": reduction, "softcap": 5.0}
        return loss(heads._replace(student=Head(x, w, b)), chunks={"chunk_size": 2}, **options)

    assert torch.autograd.gradcheck(compute_loss, leaves)
    assert torch.autograd.gradgradcheck(compute_loss, leaves)


def test_a_second_backward_pass_is_right():
    heads = make()
    value = loss(heads, chunks={"chunk_size": 8})
    first = torch.autograd.grad(value, heads.leaves(), retain_graph=True)
    copies = [grad.clone() for grad in first]
    second = torch.autograd.grad(value, heads.leaves())
    for before, copy, repeated in zip(first, copies, second, strict=True):
        assert torch.equal(before, copy) and torch.equal(before, repeated)


def test_function_transforms_give_the_gradient():
    heads = make(FP64, ignored=0.0)
    hidden, weight, bias = (leaf.detach() for leaf in heads.leaves())

    def compute_loss(x, log_probs, indices, labels):
        return loss(Heads(Head(x, weight, bias), TopK(log_probs, indices), labels))

    rows = (hidden, *heads.teacher[:2], heads.labels)
    _, (right, _, _) = run(heads)
    torch.testing.assert_close(torch.func.grad(compute_loss)(*rows), right)
    batch = [value[:36].unflatten(0, (4, 9)) for value in rows]
    each = torch.stack([compute_loss(*row) for row in zip(*batch, strict=True)])
    torch.testing.assert_close(torch.func.vmap(compute_loss)(*batch), each)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_loss_equals_the_eager_one(reduction):
    torch._dynamo.reset()
    heads, graphs = make(), []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    teacher = heads.teacher._replace(tail="renormalize")
    plan = fastkd.chunks.plan(heads.student, teacher, heads.labels, chunk_size=8)

    def compute_loss(x, w, b):
        return fastkd.loss(Head(x, w, b), teacher, heads.labels, reduction=reduction, chunks=plan)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(compute_loss, fullgraph=True, backend=backend)
    leaves = heads.leaves()
    grads = [torch.autograd.grad(call(*leaves).sum(), leaves) for call in (compiled, compute_loss)]
    for ours_grad, theirs_grad in zip(*grads, strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-7)
    assert "fastkd.linear_loss.default" in graphs[0]
    torch._dynamo.reset()


# ---- KDLoss, invalid arguments


def test_the_module_takes_heads_and_lists(device):
    heads = make(device=device)
    teacher = heads.teacher._replace(tail="renormalize")
    module = fastkd.KDLoss(temperature=1.0, alpha=0.2)
    expected = loss(heads, tail="renormalize", temperature=1.0, alpha=0.2)
    assert torch.equal(module(heads.student, teacher, heads.labels), expected)


LISTS = TopK(*torch.randn(ROWS, CLASSES).log_softmax(-1).topk(K))
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "half of it": ({"log_probs": None}, "teacher.log_probs must be a tensor; got NoneType"),
    "no indices": ({"indices": None}, "teacher.indices must be a tensor of class indices"),
    "index dtype": ({"indices": torch.zeros(ROWS, K)}, "teacher.indices must be class indices"),
    "rows": (
        {"log_probs": LISTS.log_probs[:3], "indices": LISTS.indices[:3]},
        r"teacher.log_probs must have k >= 1 entries",
    ),
    "k": (
        {"log_probs": torch.zeros(ROWS, K + 1)},
        "teacher.log_probs and teacher.indices must have the same shape",
    ),
    "index": (
        {"indices": torch.full((ROWS, K), CLASSES)},
        r"teacher.indices must be in \[0, 203\).*row 0 has 203",
    ),
    "twice": (
        {"indices": torch.full((ROWS, K), 1)},
        "teacher.indices must not list a class twice; row 0 has 1",
    ),
    "probabilities": (
        {"log_probs": torch.full((ROWS, K), 0.5)},
        "teacher.log_probs must be logarithms of probabilities",
    ),
    "teacher grad": (
        {"log_probs": torch.full((ROWS, K), -9.0, requires_grad=True)},
        "teacher.log_probs requires grad",
    ),
    "tail": ({"tail": "cut"}, "teacher.tail must be one of"),
    "divergence": ({"divergence": "mse"}, "'soft_cross_entropy' with a TopK as teacher"),
    "standardize": ({"standardize": True}, "standardize must be False with a TopK"),
    "teacher temperature": ({"teacher_temperature": 2.0}, "teacher_temperature must be None with"),
    "class weight": ({"class_weight": torch.ones(CLASSES)}, "class_weight must be None with"),
    "soft labels": (
        {"labels": torch.full((ROWS, CLASSES), 1 / CLASSES)},
        "labels must be class indices of an integer dtype with a TopK",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(wrong, message):
    heads = make()
    fields = {name: value for name, value in wrong.items() if name in TopK._fields}
    options = {"labels": heads.labels.clamp(min=0), **wrong}
    options = {name: value for name, value in options.items() if name not in TopK._fields}
    fastkd.loss(*heads)
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.loss(heads.student, heads.teacher._replace(**fields), **options)


def test_a_detached_teacher_is_accepted():
    heads = make()
    expected, _ = run(heads)
    learned = heads.teacher._replace(log_probs=heads.teacher.log_probs.clone().requires_grad_())
    detached = learned._replace(log_probs=learned.log_probs.detach())
    assert torch.equal(loss(heads._replace(teacher=detached)), expected)
