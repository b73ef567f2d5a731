"""Test chunks of classes: results, matrix products and memory."""

import math
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
)
from test_linear import CLASSES, ROWS, Products, compute_on_full_logits, run

import fastkd
from fastkd import Head, TopK
from fastkd._core import checks
from fastkd._core.objective import Objective
from fastkd.linear import loss as linear_loss
from fastkd.linear import products
from fastkd.linear.class_statistics import RowStatistics


def chunk_by_classes(size: Any = "auto") -> dict[str, Any]:
    return {"chunk_by": "classes", "chunk_size": size}


def chunk_by_rows(size: Any = "auto") -> dict[str, Any]:
    return {"chunk_by": "rows", "chunk_size": size}


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"reduction": "sum"},
    "soft alone": {"soft_weight": 1.0, "hard_weight": 0.0},
    "hard alone": {"alpha": 1.0},
    "temperature 1": {"temperature": 1.0},
    "temperatures": {"temperature": 3.0, "teacher_temperature": 1.5, "alpha": 0.1},
    "not whole": {"temperature": 2.5},
    "normalizer tensor": {"normalizer": torch.tensor(7)},
    "soft cap": {"softcap": 3.0},
    "pairs": {"softcap": (4.0, None), "scale": (0.5, 2.0)},
    "row temperatures": {"temperature": torch.linspace(1, 4, ROWS)},
    "row weights": {"hard_weight": torch.linspace(0, 1, ROWS), "soft_weight": 0.5},
    "reverse_kl": {"divergence": "reverse_kl"},
    "soft_cross_entropy": {"divergence": "soft_cross_entropy", "temperature": 1.5},
}


def move_options(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("size", [16, "auto"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=name_of)
def test_every_option_equals_the_truth(device, dtype, options, size):
    if device.type == "cuda" and "teacher_temperature" in options:
        pytest.skip("CUDA: chunks of classes have no teacher_temperature")
    heads, options = make_heads(dtype, device), move_options(device, options)
    exact, exact_grads = compute_on_full_logits(heads, FP64, **options)
    value, grads = run(heads, chunks=chunk_by_classes(size), **options)
    bound = 64 * torch.finfo(dtype).eps
    assert value.dtype == dtype and abs(value - exact) <= bound * abs(exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype and grad.is_contiguous()
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_grad_output_scales_the_gradients(device, dtype, reduction):
    heads = make_heads(dtype, device)
    outgoing = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(3.0)
    options = {"reduction": reduction, "softcap": 5.0}
    exact, exact_grads = compute_on_full_logits(heads, FP64, outgoing.to(device), **options)
    value, grads = run(heads, outgoing.to(device), chunks=chunk_by_classes(32), **options)
    bound = 16 * torch.finfo(dtype).eps
    assert distance(value, exact) <= bound * exact.norm()
    for grad, right in zip(grads, exact_grads, strict=True):
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_16_bit_errors_are_at_most_pytorchs(device, dtype):
    heads = make_heads(dtype, device, rows=300, classes=1000)
    _, exact = compute_on_full_logits(heads, FP64)
    _, grads = run(heads, chunks=chunk_by_classes(64))
    _, in_rows = run(heads, chunks=chunk_by_rows(64))
    _, upcast = compute_on_full_logits(heads, dtype, loss_dtype=FP32)
    _, eager = compute_on_full_logits(heads, dtype)
    baselines = (upcast, eager, in_rows)
    for name, grad, right, *others in zip("xwb", grads, exact, *baselines, strict=True):
        error = distance(grad, right)
        of_cast, of_eager, of_rows = (distance(baseline, right) for baseline in others)
        assert error <= of_eager and error <= 1.1 * of_cast, name
        assert error <= 1.01 * of_rows, name


def test_float16_gradients_survive_a_loss_scale(device):
    heads = make_heads(FP16, device, rows=300, classes=1000)
    outgoing = torch.tensor(2.0**13, device=device)
    _, exact = compute_on_full_logits(heads, FP64, outgoing, normalizer=1e5)
    _, grads = run(heads, outgoing, normalizer=1e5, chunks=chunk_by_classes(64))
    for grad, right in zip(grads, exact, strict=True):
        assert distance(grad, right) <= 2e-3 * right.norm()


@pytest.mark.parametrize("chunks_of", [chunk_by_rows(8), chunk_by_classes()], ids=str)
@pytest.mark.parametrize("largest", [2.0**13, 1e6])
def test_float16_gradients_of_rows_survive_a_loss_scale(device, largest, chunks_of):
    heads = make_heads(FP16, device)
    with torch.no_grad():
        heads.student.hidden[:, 0] = 20.0
    outgoing = torch.linspace(-1, 0.1, ROWS, device=device).mul(largest)
    outgoing[heads.labels == -100] = torch.inf
    small = torch.where(heads.labels == -100, 0.0, outgoing / largest)
    options = {"reduction": "none", "hard_weight": 1e-3, "soft_weight": 1e-3, "chunks": chunks_of}
    _, expected = run(heads, small, **options)
    with torch.autocast(device.type, dtype=FP16):  # gradients of weights are in float32
        hidden, weight, bias = heads.leaves()
        wide = heads._replace(student=Head(hidden, weight.float(), bias.float()))
        _, grads = run(wide, outgoing, **options)
    for grad, right in zip(grads[1:], expected[1:], strict=True):
        assert grad.dtype == FP32
        assert distance(grad / largest, right.double()) <= 1e-3 * right.double().norm()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_nothing_cancels_near_the_teacher(device, divergence, size):
    torch.manual_seed(0)
    teacher = torch.randn(8, 5000, device=device) * 3
    weight = (teacher + size * torch.randn_like(teacher)).t().contiguous()
    hidden = torch.eye(8, device=device)
    options = {"reduction": "none", "temperature": 1.0, "divergence": divergence}
    value = loss_in_chunks(Head(hidden, weight), teacher, chunks=chunk_by_classes(), **options)
    exact = fastkd.loss(weight.t().double(), teacher.double(), **options)
    assert exact.max() < size**2
    # The loss is of the order size^2, and the rounding of the statistics adds an error of eps *
    # size.
    bound = torch.finfo(FP32).eps / size
    torch.testing.assert_close(value.double(), exact, rtol=bound, atol=0)


MASKS = {
    "both": (slice(32, 96), slice(32, 96)),
    "teacher": (None, slice(32, 96)),
    "student": (slice(32, 96), None),
    "apart": (slice(0, 40), slice(30, 80)),
    "student throughout": (slice(None), None),
    "teacher throughout": (None, slice(None)),
}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "soft_cross_entropy"])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_masked_chunks_equal_chunks_of_rows(device, masks, divergence):
    heads = make_heads(FP64, device)
    with torch.no_grad():
        for bias, mask in zip((heads.student.bias, heads.teacher.bias), masks, strict=True):
            if mask is not None:
                bias[mask] = -math.inf
    for reduction in ("none", "sum"):
        options = {"divergence": divergence, "reduction": reduction}
        value, grads = run(heads, chunks=chunk_by_classes(32), **options)
        expected, right = run(heads, chunks=chunk_by_rows(8), **options)
        torch.testing.assert_close(value, expected, equal_nan=True)
        for grad, expected_grad in zip(grads, right, strict=True):
            torch.testing.assert_close(grad, expected_grad, equal_nan=True)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_stays_in_its_row(device, wrong):
    heads = make_heads(device=device, ignored=0.0)
    with torch.no_grad():
        heads.student.hidden[3, 0] = wrong
    value, _ = run(heads, chunks=chunk_by_classes(32), reduction="none")
    assert value[3].isnan() and value.isnan().sum() == 1


@pytest.mark.parametrize("temperature", [1.0, 2.5, 3.0])
def test_statistics_of_chunks_add_up_far_from_zero(temperature):
    torch.manual_seed(0)
    objective = Objective(
        temperature, temperature, 0.5, 0.5, -100, "none", 0.0, None, None, "forward_kl", None,
        "logits", None, "probs", False,
    )  # fmt: skip
    rows = RowStatistics(50, objective, torch.empty(()))
    logits = (torch.randn(50, 96) * 4 + torch.linspace(-3000, 3000, 50)[:, None]).float()
    log2e = torch.tensor(math.log2(math.e))
    slope = log2e / temperature

    def scale(z, factor):
        above = z.double() - z.max(1, keepdim=True).values.double()
        return (above * factor.double()).exp2().sum(1).reciprocal()

    for z in logits.split(32, 1):
        top = z.max(1).values
        hard, tempered = scale(z, log2e), scale(z, slope)
        nothing = top * 0
        stats = torch.stack([top, tempered, hard, top, tempered, nothing, nothing])
        stats = stats.float().flatten()
        rows.add(torch.zeros(50), torch.cat([stats, stats.new_ones(1)]), top)
    top, tempered, hard, *_ = rows.stats(torch.ones(()), True)[:-1].view(7, 50)
    assert torch.equal(top, logits.max(1).values)
    torch.testing.assert_close(tempered.double(), scale(logits, slope), rtol=2e-7, atol=0)
    torch.testing.assert_close(hard.double(), scale(logits, log2e), rtol=2e-7, atol=0)


# ---- matrix products that are not computed


def test_ignored_rows_take_part_in_no_product(device):
    heads = make_heads(device=device, ignored=0.6)
    counted = int((heads.labels != -100).sum())
    with torch.no_grad():
        heads.student.hidden[heads.labels == -100] = float("nan")
        heads.teacher.hidden[heads.labels == -100] = float("inf")
    with Products() as products:
        value, grads = run(heads, chunks=chunk_by_classes(32))
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert not grads[0][heads.labels == -100].any()
    assert counted < 32
    assert all(counted in shape or shape[1] in (1, WIDTH) for shape in products.shapes)


def test_all_rows_ignored_give_zero(device):
    heads = make_heads(device=device, ignored=1.0)
    value, grads = run(heads, chunks=chunk_by_classes())
    assert value == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"soft_weight": 1.0, "hard_weight": 0.0}])
def test_labels_out_of_range_are_nan_rows(device, monkeypatch, options):
    # The patch mimics CUDA, where labels are not checked.
    monkeypatch.setattr(checks, "is_readable", lambda tensor: False)
    heads = make_heads(device=device, ignored=0.0)
    expected = loss_in_chunks(*heads, chunks=chunk_by_classes(64), reduction="none", **options)
    heads.labels[2], heads.labels[4], heads.labels[5] = CLASSES, -5, -100
    rows = loss_in_chunks(*heads, chunks=chunk_by_classes(64), reduction="none", **options)
    (grad,) = torch.autograd.grad(rows.sum(), heads.student.hidden)
    is_invalid = torch.tensor([row in (2, 4) for row in range(ROWS)], device=rows.device)
    assert torch.equal(rows.isnan(), is_invalid) and torch.equal(grad.isnan().any(1), is_invalid)
    valid = [row for row in range(ROWS) if row not in (2, 4, 5)]
    torch.testing.assert_close(rows[valid], expected[valid])


@pytest.mark.parametrize("ignore_index", [0, 5, CLASSES - 1])
@pytest.mark.parametrize("captured", [False, True])
def test_ignore_index_may_be_a_class(device, ignore_index, captured, monkeypatch):
    heads = make_heads(FP64, device, rows=300)
    heads = heads._replace(labels=heads.labels.masked_fill(heads.labels == -100, ignore_index))
    expected, right = run(heads, chunks=chunk_by_rows(64), ignore_index=ignore_index)
    if captured:  # mimics graph capture, where all rows are computed
        monkeypatch.setattr(linear_loss, "find_counted_rows", lambda labels, ignore_index: None)
    value, grads = run(heads, chunks=chunk_by_classes(32), ignore_index=ignore_index)
    torch.testing.assert_close(value, expected)
    for grad, expected_grad in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_frozen_tensors_need_no_products(device, frozen):
    heads = make_heads(device=device)
    _, expected = run(heads, chunks=chunk_by_rows(8))
    names = Head._fields[:3]
    for name, leaf in zip(names, heads.leaves(), strict=True):
        leaf.requires_grad_(frozen not in (name, "all"))
    with Products() as products:
        value = loss_in_chunks(*heads, chunks=chunk_by_classes(1000))
    counted = int((heads.labels != -100).sum())
    widths = {"hidden": (counted, WIDTH), "weight": WIDTH, "bias": 1}
    for name, shape in widths.items():
        requires_grad = any(
            product == shape or (product[0] != counted and product[1] == shape)
            for product in products.shapes
        )
        assert requires_grad == (frozen not in (name, "all")), name
    if frozen == "all":
        assert not value.requires_grad
        return
    value.backward()
    for name, leaf, right in zip(names, heads.leaves(), expected, strict=True):
        assert (leaf.grad is None) == (name == frozen)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, right)


def test_without_gradients_the_logits_are_computed_once(device):
    heads = make_heads(device=device)
    with torch.no_grad(), Products() as products:
        loss_in_chunks(heads.student, heads.teacher, chunks=chunk_by_classes(CLASSES))
    assert len(products.shapes) == 2
    with Products() as products:
        run(heads, chunks=chunk_by_classes(1000), reduction="none")
    forward = [shape for shape in products.shapes if shape[1] != WIDTH]
    assert len(forward) >= 2


def test_all_rows_are_computed_while_a_graph_is_captured(device, monkeypatch):
    heads = make_heads(device=device)
    expected = run(heads, chunks=chunk_by_rows(8))
    monkeypatch.setattr(linear_loss, "find_counted_rows", lambda labels, ignore_index: None)
    value, grads = run(heads, chunks=chunk_by_classes(32))
    torch.testing.assert_close(value, expected[0])
    for grad, right in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, right)


# ---- memory


def wide_heads(dtype, rows=256, width=256, classes=8000) -> Heads:
    """Make heads whose largest tensors are the weight and its gradient, as in language models."""
    torch.manual_seed(0)
    heads = make_heads(dtype, rows=rows, classes=classes, ignored=0.0)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width) / 8).to(dtype).requires_grad_()
    return heads._replace(student=Head(hidden, weight, heads.student.bias))


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_peak_memory_is_that_of_the_plan(dtype, cap):
    heads = wide_heads(dtype)._replace(labels=None)
    rows, width = heads.student.hidden.shape
    classes = len(heads.student.weight)
    chosen = fastkd.chunks.plan(*heads.with_options(cap), **chunk_by_classes())
    gradients = (rows * max(4, dtype.itemsize) + classes * dtype.itemsize) * width
    scratch = products.compute_scratch_bytes(rows, width) if dtype == BF16 else 0
    assert gradients < chosen.peak_bytes < 1.1 * gradients + scratch
    small = 2**18  # allowance for small tensors
    if dtype == BF16:  # oneDNN packs one matrix of each product
        small += 4 * chosen.chunk * width
    peak = peak_bytes(lambda: run(heads, softcap=cap, chunks=chunk_by_classes()))
    assert gradients <= peak <= chosen.peak_bytes + small


def test_ignored_rows_are_not_copied_with_the_teachers_logits():
    heads = wide_heads(FP32)._replace(teacher=torch.randn(256, 8000))
    heads.labels[::2] = -100
    peak = peak_bytes(lambda: loss_in_chunks(*heads, chunks=chunk_by_classes()).backward())
    assert peak < (8000 + 4 * 256) * 256 * 4 + 2**20
    value = loss_in_chunks(*heads, chunks=chunk_by_classes())
    torch.testing.assert_close(value, fastkd.loss(*heads))


def test_a_small_max_workspace_gives_chunks_of_classes():
    heads = wide_heads(FP32)
    bound = 10 * 2**20
    with Products() as products:
        value, grads = run(heads, chunks={"max_workspace": bound})
    assert sum(shape[0] == 256 and shape[1] != 256 for shape in products.shapes) > 4
    assert peak_bytes(lambda: run(heads, chunks={"max_workspace": bound})) <= bound
    expected, right = run(heads)
    torch.testing.assert_close(value, expected)
    for grad, expected_grad in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    with pytest.raises(ValueError, match=r"max_workspace=1048576 is too small"):
        run(heads, chunks={"max_workspace": 2**20})
    with pytest.raises(ValueError, match=r"too small for chunks of classes"):
        run(heads, chunks={"max_workspace": 2**20, "chunk_by": "classes"})
    # Calls that chunks of classes do not support get chunks of few rows.
    run(heads, chunks={"max_workspace": bound}, label_smoothing=0.1)


@pytest.mark.parametrize("chunk_by", ["rows", "classes"])
def test_max_workspace_holds_if_16_bit_products_use_float32(monkeypatch, chunk_by):
    monkeypatch.setattr(products, "_has_products", lambda dtype: False)
    heads = make_heads(BF16, rows=512, classes=16000, ignored=0.0)
    for bound in (5 * 2**20, 9 * 2**20):
        options = {"max_workspace": bound, "chunk_by": chunk_by}
        peak = peak_bytes(lambda options=options: run(heads, chunks=options))
        assert peak <= bound + 2**17  # allowance for small tensors


# ---- tied weights, unsupported calls


def test_tied_weights_train_under_autocast(device):
    # Student and teacher share the float32 weight; matrix products are in bfloat16.
    heads = make_heads(device=device)
    teacher_hidden = torch.randn(ROWS, WIDTH, device=device)

    def step(chunks):
        leaf = heads.student.weight.detach().requires_grad_()
        with torch.autocast(device.type, dtype=BF16):
            student, teacher = Head(heads.student.hidden, leaf), Head(teacher_hidden, leaf)
            value = loss_in_chunks(student, teacher, heads.labels, chunks=chunks)
        value.backward()
        assert leaf.grad.dtype == FP32
        return value.detach(), leaf.grad

    value, grad = step(chunk_by_classes(32))
    expected, right = step(chunk_by_rows(8))
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
    assert distance(grad, right) <= 2e-3 * right.norm()


LACKS = {
    "label_smoothing": ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
    "divergence": ({"divergence": "jsd"}, 'divergence="jsd"'),
    "standardize": ({"standardize": True}, "standardize=True"),
    "class weight": ({"class_weight": torch.ones(CLASSES)}, "class_weight="),
}


@pytest.mark.parametrize(("options", "message"), LACKS.values(), ids=LACKS)
def test_unsupported_calls_are_refused(options, message):
    heads = make_heads()
    with pytest.raises(ValueError, match=f'chunk_by must be "auto" or "rows" with {message}'):
        run(heads, chunks=chunk_by_classes(), **options)
    plan = fastkd.chunks.plan(*heads, chunk_by="classes")
    with pytest.raises(
        ValueError, match=rf'must be a plan of rows \(chunk_by="rows"\) with {message}'
    ):
        fastkd.loss(*heads, chunks=plan, **options)


def test_terms_are_refused():
    heads = make_heads()
    plan = fastkd.chunks.plan(*heads, chunk_by="classes")
    with pytest.raises(ValueError, match=r"must be a plan of rows .* with fastkd.terms"):
        fastkd.terms(*heads, chunks=plan)


def test_sparse_teachers_are_refused():
    heads = make_heads()
    teacher = TopK(*heads.teacher.logits().log_softmax(-1).topk(4))
    with pytest.raises(ValueError, match="with a TopK or Sampled as teacher"):
        run(heads._replace(teacher=teacher), chunks=chunk_by_classes())
