"""Test the loss of a student Head against the float64 reference and PyTorch."""

from typing import Any

import pytest
import torch
from support import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    WIDTH,
    Heads,
    distance,
    loss_in_chunks,
    make_heads,
    name_of,
    peak_bytes,
    weights,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import Head, TopK, reference
from fastkd._core import checks
from fastkd.linear import loss as linear_loss

ROWS, CLASSES = 37, 203


def run(
    heads: Heads,
    outgoing: Tensor | None = None,
    *,
    softcap: Any = None,
    scale: Any = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the loss, and the gradients of hidden states, weight and bias."""
    heads = heads.with_options(softcap, scale)
    leaves = [leaf.detach().requires_grad_() for leaf in heads.leaves()]
    value = loss_in_chunks(Head(*leaves, *heads.student[3:]), *heads[1:], **options)
    outgoing = torch.ones_like(value) if outgoing is None else outgoing.to(value)
    return value.detach(), list(torch.autograd.grad(value, leaves, outgoing))


def compute_on_full_logits(
    heads: Heads,
    dtype: torch.dtype,
    outgoing: Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    *,
    softcap: Any = None,
    scale: Any = None,
    **options,
) -> tuple[Tensor, list[Tensor]]:
    """Compute loss and gradients from full logits in ``dtype``, cast to ``loss_dtype`` if given."""

    def logits(hidden, weight, bias, cap, scale):
        z = F.linear(hidden, weight, bias) * (1.0 if scale is None else scale)
        return z if cap is None else cap * torch.tanh(z / cap)

    heads = heads.with_options(softcap, scale)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in heads.leaves()]
    z = logits(*leaves, *heads.student[3:])
    w = logits(*(value.to(dtype) for value in heads.teacher[:3]), *heads.teacher[3:])
    if loss_dtype is not None:
        z, w = z.to(loss_dtype), w.to(loss_dtype)
    value = loss_in(z, w, heads.labels, options)
    outgoing = torch.ones_like(value) if outgoing is None else outgoing.to(value)
    return value.detach(), list(torch.autograd.grad(value, leaves, outgoing))


def loss_in(z: Tensor, w: Tensor, labels: Tensor, options: dict) -> Tensor:
    """Compute the loss by the reference or, in 16 bits, by PyTorch's functions."""
    if z.dtype in (FP32, FP64):
        options = {k: v.to(z.dtype) if is_real(v) else v for k, v in options.items()}
        return reference.loss(z, w, labels, **weights(options, True))
    assert not options
    valid = labels != -100
    soft = F.kl_div(F.log_softmax(z / 2, -1), F.softmax(w / 2, -1), reduction="none").sum(-1)
    return 0.5 * F.cross_entropy(z, labels) + 0.5 * 4 * soft[valid].mean()


def is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"reduction": "sum"},
    "soft alone": {"soft_weight": 1.0, "hard_weight": 0.0},
    "temperatures": {"temperature": 3.0, "teacher_temperature": 1.5, "alpha": 0.1},
    "smoothing": {"label_smoothing": 0.1, "normalizer": 12.0},
    "normalizer tensor": {"normalizer": torch.tensor(7)},
    "soft cap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "pairs": {"softcap": (4.0, None), "scale": (0.5, 2.0)},
    "row temperatures": {"temperature": torch.linspace(1, 4, ROWS)},
    "row weights": {"hard_weight": torch.linspace(0, 1, ROWS), "soft_weight": 0.5},
    "class weight": {"class_weight": torch.linspace(0.1, 2, CLASSES)},
    "standardize": {"standardize": True},
    **{name: {"divergence": name} for name in reference.DIVERGENCES},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=name_of)
def test_every_option_equals_the_truth(device, dtype, options):
    heads = make_heads(dtype, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    exact, exact_grads = compute_on_full_logits(heads, FP64, **options)
    value, grads = run(heads, chunks={"chunk_size": 8}, **options)
    bound = 64 * torch.finfo(dtype).eps
    assert value.dtype == dtype and abs(value - exact) <= bound * abs(exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_grad_output_scales_the_gradients(device, dtype, reduction):
    heads = make_heads(dtype, device)
    outgoing = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(3.0)
    options = {"reduction": reduction, "softcap": 5.0}
    exact, exact_grads = compute_on_full_logits(heads, FP64, outgoing.to(device), **options)
    value, grads = run(heads, outgoing.to(device), chunks={"chunk_size": 8}, **options)
    bound = 16 * torch.finfo(dtype).eps
    assert distance(value, exact) <= bound * exact.norm()
    for grad, right in zip(grads, exact_grads, strict=True):
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("chunk_size", [8, 100, "auto"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_16_bit_errors_are_at_most_pytorchs(device, dtype, chunk_size):
    heads = make_heads(dtype, device, rows=300, classes=1000)
    _, exact = compute_on_full_logits(heads, FP64)
    _, grads = run(heads, chunks={"chunk_size": chunk_size})
    _, upcast = compute_on_full_logits(heads, dtype, loss_dtype=FP32)
    _, eager = compute_on_full_logits(heads, dtype)
    for name, grad, right, cast, baseline in zip("xwb", grads, exact, upcast, eager, strict=True):
        error = distance(grad, right)
        assert error <= distance(baseline, right), name
        assert error <= 1.1 * distance(cast, right), name


def test_float16_gradients_survive_a_loss_scale(device):
    # Without the loss scale, the gradients are too small for float16.
    heads = make_heads(FP16, device, rows=300, classes=1000)
    outgoing = torch.tensor(2.0**13, device=device)
    options = {"normalizer": 1e5}
    _, exact = compute_on_full_logits(heads, FP64, outgoing, **options)
    _, grads = run(heads, outgoing, chunks={"chunk_size": 64}, **options)
    for grad, right in zip(grads, exact, strict=True):
        assert distance(grad, right) <= 2e-3 * right.norm()


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=name_of)
def test_chunks_change_only_rounding(device, dtype):
    heads = make_heads(dtype, device)
    expected, expected_grads = run(heads, chunks={"chunk_size": ROWS})
    bound = 16 * torch.finfo(dtype).eps
    for size in (1, 7, 8, 36, 1000):
        value, grads = run(heads, chunks={"chunk_size": size})
        torch.testing.assert_close(value, expected, rtol=1e-5 if dtype != FP64 else 1e-14, atol=0)
        for grad, right in zip(grads, expected_grads, strict=True):
            assert distance(grad, right.double()) <= bound * right.double().norm()


def test_sums_in_16_bits_are_less_exact(device):
    heads = make_heads(BF16, device, rows=300, classes=1000)
    _, (_, exact, _) = compute_on_full_logits(heads, FP64)
    _, (_, upcast, _) = compute_on_full_logits(heads, BF16, loss_dtype=FP32)
    errors = [
        distance(
            run(heads, chunks={"chunk_size": 16, "accumulate_dtype": dtype_of_sum})[1][1], exact
        )
        for dtype_of_sum in (FP32, BF16)
    ]
    assert errors[0] < errors[1] < 2 * distance(upcast, exact)


# ---- matrix products that are not computed


class Products(TorchDispatchMode):
    """Record the result shapes of matrix products within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(result.shape))
        return result


def test_ignored_rows_take_part_in_no_product(device):
    heads = make_heads(device=device, ignored=0.6)
    counted = int((heads.labels != -100).sum())
    with Products() as products:
        run(heads, chunks={"chunk_size": 8})
    chunk_count = -(-counted // 8)
    for width in (CLASSES, WIDTH):  # logits, and the gradient of the hidden states
        rows = [shape[0] for shape in products.shapes if shape[1] == width and shape[0] < CLASSES]
        assert sum(rows) == counted * (2 if width == CLASSES else 1)
        assert max(rows) - min(rows) <= chunk_count
    with torch.no_grad():
        heads.student.hidden[heads.labels == -100] = float("nan")
        heads.teacher.hidden[heads.labels == -100] = float("inf")
    value, grads = run(heads, chunks={"chunk_size": 8})
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert not grads[0][heads.labels == -100].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_frozen_tensors_need_no_products(device, frozen):
    heads = make_heads(device=device)
    names = Head._fields[:3]
    for name, leaf in zip(names, heads.leaves(), strict=True):
        leaf.requires_grad_(frozen not in (name, "all"))
    with Products() as products:
        value = loss_in_chunks(heads.student, heads.teacher, chunks={"chunk_size": 64})
    shapes = {"hidden": (ROWS, WIDTH), "weight": (CLASSES, WIDTH), "bias": (CLASSES, 1)}
    for name, shape in shapes.items():
        assert (shape in products.shapes) == (frozen not in (name, "all"))
    if frozen == "all":
        assert not value.requires_grad
        return
    value.backward()
    assert [leaf.grad is None for leaf in heads.leaves()] == [name == frozen for name in names]


def test_no_gradient_is_computed_under_no_grad(device):
    heads = make_heads(device=device)
    with torch.no_grad(), Products() as products:
        value = loss_in_chunks(*heads, chunks={"chunk_size": 64})
    assert len(products.shapes) == 2 and not value.requires_grad


def test_all_rows_are_computed_while_a_graph_is_captured(device, monkeypatch):
    # Graph capture forbids synchronization, so find_counted_rows() returns None under capture.
    heads = make_heads(device=device)
    expected = run(heads, chunks={"chunk_size": 8})
    monkeypatch.setattr(linear_loss, "find_counted_rows", lambda labels, ignore_index: None)
    value, grads = run(heads, chunks={"chunk_size": 8})
    torch.testing.assert_close(value, expected[0])
    for grad, right in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, right)


# ---- memory


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_peak_memory_is_that_of_the_plan(dtype, cap):
    heads = make_heads(dtype, rows=512, classes=16000, ignored=0.0).with_options(cap)
    for options in ({"chunk_size": 64}, {"max_workspace": 2**24}, {"chunk_size": 512}):
        options["chunk_by"] = "rows"
        chosen = fastkd.chunks.plan(*heads, **options)
        peak = peak_bytes(lambda options=options: run(heads, softcap=cap, chunks=options))
        small = 2**21  # bytes, an allowance for biases and row statistics
        if dtype == BF16:  # oneDNN packs one matrix of each product
            small += chosen.chunk * 16000 * dtype.itemsize
        assert 0.5 * chosen.peak_bytes <= peak <= chosen.peak_bytes + small


def test_the_gradient_of_a_large_weight_does_not_coexist_with_the_teachers_logits():
    heads = make_heads(rows=512, classes=4000, ignored=0.0)
    hidden = torch.randn(512, 512, requires_grad=True)
    weight = (torch.randn(4000, 512) / 8).requires_grad_()
    heads = heads._replace(student=Head(hidden, weight, heads.student.bias), labels=None)
    options = {"chunk_size": 512, "chunk_by": "rows"}
    chosen = fastkd.chunks.plan(*heads, **options)
    assert chosen.chunks == 1
    peak = peak_bytes(lambda: run(heads, chunks=options))
    assert 0.5 * chosen.peak_bytes <= peak <= chosen.peak_bytes + 2**18


def test_max_workspace_holds_without_kernels():
    heads = make_heads(rows=512, classes=2000, ignored=0.0)
    options = {"divergence": "jsd", "standardize": True}
    assert peak_bytes(lambda: run(heads, chunks={"max_workspace": 2**23}, **options)) <= 2**23


def test_memory_is_a_quarter_of_that_of_full_logits():
    heads = make_heads(rows=512, classes=8000, ignored=0.0)
    ours = peak_bytes(lambda: run(heads))
    theirs = peak_bytes(lambda: compute_on_full_logits(heads, FP32))
    assert ours <= theirs / 4


# ---- teachers, labels, KDLoss


def test_a_teacher_may_be_logits(device):
    heads = make_heads(device=device)
    expected, grads = run(heads)
    value, others = run(heads._replace(teacher=heads.teacher.logits()), chunks={"chunk_size": 8})
    torch.testing.assert_close(value, expected)
    for grad, right in zip(others, grads, strict=True):
        torch.testing.assert_close(grad, right)


def test_a_teacher_head_serves_full_logits(device):
    heads = make_heads(device=device)
    student = heads.student.logits()
    expected = fastkd.loss(student, heads.teacher.logits(), heads.labels)
    assert torch.equal(fastkd.loss(student, heads.teacher, heads.labels), expected)


def test_labels_may_be_probabilities(device):
    heads = make_heads(FP64, device)
    heads = heads._replace(labels=torch.rand(ROWS, CLASSES, device=device, dtype=FP64).softmax(-1))
    exact, exact_grads = compute_on_full_logits(heads, FP64)
    value, grads = run(heads, chunks={"chunk_size": 8})
    torch.testing.assert_close(value, exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, right)


def test_batch_dimensions_are_flattened(device):
    heads = make_heads(device=device)
    heads = Heads(
        *(head._replace(hidden=head.hidden[:36]) for head in heads[:2]), heads.labels[:36]
    )
    flat = fastkd.loss(*heads, reduction="none")
    value = fastkd.loss(
        *(head._replace(hidden=head.hidden.unflatten(0, (3, 12))) for head in heads[:2]),
        heads.labels.view(3, 12),
        reduction="none",
    )
    assert value.shape == (3, 12) and torch.equal(value.flatten(), flat)
    value.sum().backward()
    assert heads.student.weight.grad.shape == heads.student.weight.shape


@pytest.mark.parametrize("labels", ["none", "all ignored"])
def test_no_rows_give_zero(device, labels):
    heads = make_heads(device=device, rows=0 if labels == "none" else ROWS, ignored=1.0)
    for reduction in ("mean", "sum", "none"):
        value, grads = run(heads, reduction=reduction)
        assert not value.any() and not any(grad.any() for grad in grads)


def test_a_weight_may_be_tied(device):
    # The weight is also the embedding, and the teacher's head, which gets no gradient.
    heads = make_heads(FP64, device)
    tokens = torch.arange(ROWS, device=device)

    def step(loss):
        weight = heads.student.weight.detach().requires_grad_()
        hidden = F.embedding(tokens, weight).tanh()
        loss(hidden, weight).backward()
        return weight.grad

    def in_chunks(x, w):
        return loss_in_chunks(Head(x, w), Head(x.detach() * 2, w), chunks={"chunk_size": 8})

    ours = step(in_chunks)
    right = step(lambda x, w: fastkd.loss(F.linear(x, w), F.linear(x.detach() * 2, w.detach())))
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_autocast_keeps_float32_gradients(device, dtype):
    # Matrix products are in 16 bits; gradients of float32 weights are summed in float32.
    heads = make_heads(FP32, device, rows=300, classes=1000)
    with torch.autocast(device.type, dtype=dtype):
        value, grads = run(heads, chunks={"chunk_size": 64})
    assert value.dtype == FP32 and all(grad.dtype == FP32 for grad in grads)
    _, exact = compute_on_full_logits(heads, FP64)
    with torch.autocast(device.type, dtype=dtype):
        _, eager = compute_on_full_logits(heads, FP32, loss_dtype=FP32)
    for grad, right, baseline in zip(grads, exact, eager, strict=True):
        assert 0 < distance(grad, right) <= 1.1 * distance(baseline, right)


def test_the_module_takes_heads(device):
    heads = make_heads(device=device)
    plan = fastkd.chunks.plan(*heads, chunk_size=8)
    module = fastkd.KDLoss(temperature=3.0, alpha=0.2, chunks=plan)
    expected = fastkd.loss(*heads, temperature=3.0, alpha=0.2, chunks=plan)
    assert torch.equal(module(*heads), expected)
    assert "temperature=3.0" in repr(module) and not list(module.parameters())
    module = fastkd.KDLoss(temperature=3.0, chunks=plan)
    expected = fastkd.loss(*heads[:2], temperature=3.0, chunks=plan)
    assert torch.equal(module(*heads[:2]), expected)


def test_plans_accept_labels_out_of_range(monkeypatch):
    # The patch mimics CUDA, where labels are not checked before they index the class weights.
    heads = make_heads()._replace(labels=torch.full((ROWS,), CLASSES))
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    assert fastkd.chunks.plan(*heads, class_weight=torch.ones(CLASSES)).rows == ROWS


def test_tensor_options_move_with_the_module():
    weight = torch.linspace(0.1, 2, CLASSES)
    module = fastkd.KDLoss(class_weight=weight).to("meta")
    assert module.options["class_weight"].is_meta and not module.state_dict()
    heads = make_heads()
    module = fastkd.KDLoss(class_weight=weight)
    assert torch.equal(module(*heads), fastkd.loss(*heads, class_weight=weight))


def test_options_of_the_module_are_attributes():
    heads = make_heads()
    module = fastkd.KDLoss(temperature=3.0)
    assert module.temperature == 3.0 and module.chunks == "auto"
    module.temperature = 1.0
    module.chunks = fastkd.chunks.plan(*heads, chunk_size=8, temperature=1.0)
    assert torch.equal(module(*heads), fastkd.loss(*heads, temperature=1.0, chunks=module.chunks))


def test_chunks_of_the_module_are_checked_when_it_is_made():
    message = 'chunks must be "auto" or the result of fastkd.chunks.plan; got 8'
    with pytest.raises(TypeError, match=message):
        fastkd.KDLoss(chunks=8)
    with pytest.raises(TypeError, match=message):
        fastkd.KDLoss().chunks = 8


def test_layouts_give_the_results_of_copies(device):
    heads = make_heads(FP64, device)
    expected, grads = run(heads, chunks={"chunk_size": 8})
    wide = torch.randn(ROWS, 2 * WIDTH, dtype=FP64, device=device)
    wide[:, ::2] = heads.student.hidden.detach()
    x = wide[:, ::2].requires_grad_()
    w = heads.student.weight.detach().t().contiguous().t().requires_grad_()
    b = heads.student.bias.detach().clone().requires_grad_()
    t, tw = (value.t().contiguous().t() for value in heads.teacher[:2])
    teacher = Head(t, tw, heads.teacher.bias.repeat(2)[:CLASSES])
    labels = heads.labels.masked_fill(heads.labels == -100, 255).short()
    value = loss_in_chunks(
        Head(x, w, b), teacher, labels, ignore_index=255, chunks={"chunk_size": 8}
    )
    value.backward()
    torch.testing.assert_close(value.detach(), expected)
    for leaf, right in zip((x, w, b), grads, strict=True):
        torch.testing.assert_close(leaf.grad, right)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"), [(FP32, BF16), (BF16, FP32), (FP32, FP64), (FP16, BF16)]
)
def test_a_teacher_may_have_another_dtype(device, dtype, teacher_dtype):
    heads = make_heads(dtype, device)
    heads = heads._replace(teacher=Head(*(value.to(teacher_dtype) for value in heads.teacher[:3])))
    exact, exact_grads = compute_on_full_logits(heads, FP64)
    value, grads = run(heads, chunks={"chunk_size": 8})
    bound = (2 if BF16 in (dtype, teacher_dtype) else 64) * max(
        torch.finfo(kind).eps for kind in (dtype, teacher_dtype)
    )
    assert value.dtype == (FP64 if teacher_dtype == FP64 else FP32)
    assert abs(value - exact) <= bound * abs(exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype and distance(grad, right) <= bound * right.norm()


# ---- invalid arguments

STUDENT = {
    "widths": ({"hidden": torch.zeros(ROWS, 3)}, r"Head\.hidden must have shape \(\.\.\., width\)"),
    "bias": ({"bias": torch.zeros(3)}, r"Head\.bias must have shape \(203,\)"),
    "softcap": ({"softcap": -1.0}, r"Head\.softcap must be positive"),
    "scale": ({"scale": (1.0, 2.0)}, r"Head\.scale must be a number"),
}


@pytest.mark.parametrize(("wrong", "message"), STUDENT.values(), ids=STUDENT)
def test_bad_heads_are_refused(wrong, message):
    # The constructor checks a Head, and each call checks the Head again.
    head = make_heads().student
    with pytest.raises((ValueError, TypeError), match=message):
        Head(**{**head._asdict(), **wrong})
    with pytest.raises((ValueError, TypeError), match=message.replace("Head", "student", 1)):
        fastkd.loss(head._replace(**wrong), make_heads().teacher)


TEACHER = {
    "none": (
        None,
        "teacher must be a Head, TopK, Sampled or a tensor of logits .* got NoneType",
    ),
    "several": (
        [torch.zeros(ROWS, CLASSES)],
        "teacher must be a Head, TopK, Sampled or a tensor",
    ),
    "shape": (torch.zeros(ROWS, 200), r"\(37, 203\).*\(37, 200\)"),
    "classes": (
        Head(torch.zeros(ROWS, 3), torch.zeros(3, 3)),
        "teacher.weight and student.weight must have the same classes",
    ),
    "rows": (
        Head(torch.zeros(3, 3), torch.zeros(CLASSES, 3)),
        "teacher.hidden and student.hidden must have the same rows",
    ),
    "dtype": (
        Head(torch.zeros(ROWS, 3), torch.zeros(CLASSES, 3).half()),
        "teacher.weight must have the dtype of teacher.hidden, torch.float32, unless autocast",
    ),
    "device": (
        Head(*(torch.zeros(n, 3, device="meta") for n in (ROWS, CLASSES))),
        "teacher.hidden must be on the student's device, cpu; got meta",
    ),
    "grad": (
        Head(torch.zeros(ROWS, 3, requires_grad=True), torch.zeros(CLASSES, 3)),
        "teacher.hidden requires grad",
    ),
    "grad of logits": (torch.zeros(ROWS, CLASSES, requires_grad=True), "teacher requires grad"),
}


@pytest.mark.parametrize(("teacher", "message"), TEACHER.values(), ids=TEACHER)
def test_bad_teachers_are_refused(teacher, message):
    heads = make_heads()
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.loss(heads.student, teacher, heads.labels)
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.chunks.plan(heads.student, teacher, heads.labels)


BAD = {
    "dtype": (
        {"student": make_heads().student._replace(weight=torch.zeros(CLASSES, WIDTH).half())},
        "student.weight must have the dtype of student.hidden",
    ),
    "label": ({"labels": torch.full((ROWS,), CLASSES)}, r"labels must be in \[0, 203\).*row 0"),
    "temperature": (
        {"temperature": torch.tensor(-1.0), "labels": None},
        "temperature must be positive and finite; row 0 has -1.0",
    ),
    "learned": (
        {"temperature": torch.tensor(2.0, requires_grad=True)},
        r"temperature gets no gradient if student is a Head.*Pass student.logits\(\)",
    ),
    "divergence": ({"divergence": "kl"}, "divergence must be one of"),
    "inplace": ({"inplace": True}, "inplace must be False with a Head as student"),
    "dim": ({"dim": 1}, "dim must be -1 with a Head as student"),
    "teacher form": ({"teacher_form": "probs"}, "teacher_form must be 'logits' with a Head"),
    "teacher weights": ({"teacher_weights": [1.0]}, "teacher_weights must be None with a Head"),
    "chunks": ({"chunks": 8}, 'chunks must be "auto" or the result of fastkd.chunks.plan; got 8'),
    "few rows": (
        {"chunks": fastkd.chunks.plan(*make_heads(rows=ROWS - 1))},
        "chunks must be a plan for at least as many rows as the call has, 37; got one for 36",
    ),
    "accumulate": (
        {"chunks": fastkd.chunks.plan(*make_heads(BF16), accumulate_dtype=BF16)},
        "chunks.accumulate must be .auto. or torch.float32 for a weight in torch.float32",
    ),
    "unknown": ({"tau": 2.0}, r"loss\(\) got an unexpected keyword argument 'tau'"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.loss(**{**make_heads()._asdict(), **wrong})


def test_only_heads_have_chunks():
    heads = make_heads()
    plan = fastkd.chunks.plan(*heads)
    with pytest.raises(ValueError, match='chunks must be "auto" unless student is a Head'):
        fastkd.loss(heads.student.logits(), heads.teacher, heads.labels, chunks=plan)


@pytest.mark.parametrize("teacher", ["head", "logits", "lists"])
def test_terms_are_those_of_full_logits(device, teacher):
    heads = make_heads(FP64, device)
    logits = heads.teacher.logits()
    teachers: dict[str, Any] = {
        "head": heads.teacher,
        "logits": logits,
        "lists": TopK(*torch.log_softmax(logits / 2, -1).topk(5)),
    }
    for reduction in ("mean", "none"):
        options = {"temperature": 2.0, "reduction": reduction}
        plan = fastkd.chunks.plan(
            heads.student, teachers[teacher], heads.labels, chunk_size=8, **options
        )
        ours = fastkd.terms(heads.student, teachers[teacher], heads.labels, chunks=plan, **options)
        dense = teachers["lists"] if teacher == "lists" else logits
        theirs = fastkd.terms(heads.student.logits(), dense, heads.labels, **options)
        for ours_grad, theirs_grad in zip(ours, theirs, strict=True):
            torch.testing.assert_close(ours_grad, theirs_grad)
        grads = [torch.autograd.grad(t.loss.sum(), heads.leaves()) for t in (ours, theirs)]
        for ours_grad, theirs_grad in zip(*grads, strict=True):
            torch.testing.assert_close(ours_grad, theirs_grad)
