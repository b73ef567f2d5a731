"""linear_loss against float64 on full logits, and against what PyTorch makes of the same dtypes."""

import pathlib
import re
from typing import Any, NamedTuple

import pytest
import torch
from support import BF16, DTYPES, FP16, FP32, FP64, distance, name_of, peak_bytes, weights
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import reference
from fastkd.linear import chunks, row_loop

ROWS, WIDTH, TEACHER_WIDTH, CLASSES = 37, 24, 40, 203


class Heads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    labels: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def make_heads(dtype=FP32, device="cpu", rows=ROWS, classes=CLASSES, ignored=0.3, seed=0) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return Heads(
        draw(rows, WIDTH).requires_grad_(),
        draw(classes, WIDTH, scale=0.3).requires_grad_(),
        draw(classes).requires_grad_(),
        draw(rows, TEACHER_WIDTH),
        draw(classes, TEACHER_WIDTH, scale=0.3),
        draw(classes),
        labels.to(device),
    )


def run(given: Heads, outgoing: Tensor | None = None, **options) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of hidden states, weight and bias, by linear_loss."""
    given = given._replace(**{n: v.detach().requires_grad_() for n, v in leaves_of(given)})
    value = fastkd.linear_loss(
        given.hidden,
        given.weight,
        given.teacher_hidden,
        given.teacher_weight,
        given.labels,
        student_bias=given.bias,
        teacher_bias=given.teacher_bias,
        **options,
    )
    outgoing = torch.ones_like(value) if outgoing is None else outgoing.to(value)
    return value.detach(), list(torch.autograd.grad(value, given.leaves(), outgoing))


def leaves_of(given: Heads) -> list[tuple[str, Tensor]]:
    return [(name, getattr(given, name)) for name in ("hidden", "weight", "bias")]


def on_full_logits(
    given: Heads,
    dtype: torch.dtype,
    outgoing: Tensor | None = None,
    loss_dtype: torch.dtype | None = None,
    *,
    softcap: Any = None,
    logit_scale: Any = None,
    **options,
) -> tuple[Tensor, list[Tensor]]:
    """The same by PyTorch's own operations, products in ``dtype``, the loss in ``loss_dtype``."""
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)

    def logits(hidden, weight, bias, cap, scale):
        z = F.linear(hidden, weight, bias) * (1.0 if scale is None else scale)
        return z if cap is None else cap * torch.tanh(z / cap)

    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in given.leaves()]
    teachers = [getattr(given, f"teacher_{n}").to(dtype) for n in ("hidden", "weight", "bias")]
    z, w = logits(*leaves, caps[0], scales[0]), logits(*teachers, caps[1], scales[1])
    if loss_dtype is not None:
        z, w = z.to(loss_dtype), w.to(loss_dtype)
    value = loss_in(z, w, given.labels, options)
    outgoing = torch.ones_like(value) if outgoing is None else outgoing.to(value)
    return value.detach(), list(torch.autograd.grad(value, leaves, outgoing))


def loss_in(z: Tensor, w: Tensor, labels: Tensor, options: dict) -> Tensor:
    """The reference's loss; in 16 bits, which it would leave, the loss as tutorials write it."""
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
    "logit scale": {"logit_scale": 0.25},
    "pairs": {"softcap": (4.0, None), "logit_scale": (0.5, 2.0)},
    "row temperatures": {"temperature": torch.linspace(1, 4, ROWS)},
    "row weights": {"hard_weight": torch.linspace(0, 1, ROWS), "soft_weight": 0.5},
    "class weight": {"class_weight": torch.linspace(0.1, 2, CLASSES)},
    "standardize": {"standardize": True},
    **{name: {"divergence": name} for name in reference.DIVERGENCES},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=name_of)
def test_options(device, dtype, options):
    """Loss and gradients of every option, in several chunks of which the last is smaller."""
    given = make_heads(dtype, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    exact, exact_grads = on_full_logits(given, FP64, **options)
    value, grads = run(given, chunk_size=8, **options)
    bound = 64 * torch.finfo(dtype).eps
    assert value.dtype == dtype and abs(value - exact) <= bound * abs(exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_grad_output(device, dtype, reduction):
    """What comes from above multiplies the gradients; of "none", each row's."""
    given = make_heads(dtype, device)
    outgoing = torch.linspace(0.5, 2, ROWS) if reduction == "none" else torch.tensor(3.0)
    options = {"reduction": reduction, "softcap": 5.0}
    exact, exact_grads = on_full_logits(given, FP64, outgoing.to(device), **options)
    value, grads = run(given, outgoing.to(device), chunk_size=8, **options)
    bound = 16 * torch.finfo(dtype).eps
    assert distance(value, exact) <= bound * exact.norm()
    for grad, right in zip(grads, exact_grads, strict=True):
        assert distance(grad, right) <= bound * right.norm()


@pytest.mark.parametrize("chunk_size", [8, 100, "auto"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_16_bit_errors(device, dtype, chunk_size):
    """No more than those of PyTorch in 16 bits, nor 1.1 times those of logits cast to float32."""
    given = make_heads(dtype, device, rows=300, classes=1000)
    _, exact = on_full_logits(given, FP64)
    _, grads = run(given, chunk_size=chunk_size)
    _, upcast = on_full_logits(given, dtype, loss_dtype=FP32)
    _, eager = on_full_logits(given, dtype)
    for name, grad, right, cast, own in zip("xwb", grads, exact, upcast, eager, strict=True):
        error = distance(grad, right)
        assert error <= distance(own, right), name
        assert error <= 1.1 * distance(cast, right), name


def test_float16_under_a_loss_scale(device):
    """Gradients too small for float16 arrive all the same once the loss is scaled."""
    given = make_heads(FP16, device, rows=300, classes=1000)
    outgoing = torch.tensor(2.0**13, device=device)
    options = {"normalizer": 1e5}
    _, exact = on_full_logits(given, FP64, outgoing, **options)
    _, grads = run(given, outgoing, chunk_size=64, **options)
    for grad, right in zip(grads, exact, strict=True):
        assert distance(grad, right) <= 2e-3 * right.norm()


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=name_of)
def test_chunks_change_rounding_alone(device, dtype):
    given = make_heads(dtype, device)
    whole, whole_grads = run(given, chunk_size=ROWS)
    bound = 16 * torch.finfo(dtype).eps
    for size in (1, 7, 8, 36, 1000):
        value, grads = run(given, chunk_size=size)
        torch.testing.assert_close(value, whole, rtol=1e-5 if dtype != FP64 else 1e-14, atol=0)
        for grad, right in zip(grads, whole_grads, strict=True):
            assert distance(grad, right.double()) <= bound * right.double().norm()


def test_summing_in_16_bits(device):
    """It costs accuracy, less than 16-bit logits do."""
    given = make_heads(BF16, device, rows=300, classes=1000)
    _, (_, exact, _) = on_full_logits(given, FP64)
    _, (_, upcast, _) = on_full_logits(given, BF16, loss_dtype=FP32)
    errors = [
        distance(run(given, chunk_size=16, accumulate_dtype=how)[1][1], exact)
        for how in (FP32, BF16)
    ]
    assert errors[0] < errors[1] < 2 * distance(upcast, exact)


# ---- what is not computed


class Products(TorchDispatchMode):
    """Counts matrix products, and the rows that they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(result.shape))
        return result


def test_ignored_rows_take_part_in_no_product(device):
    given = make_heads(device=device, ignored=0.6)
    counted = int((given.labels != -100).sum())
    with Products() as products:
        run(given, chunk_size=8)
    chunk_count = -(-counted // 8)
    for width in (CLASSES, WIDTH):  # logits, and the gradient of the hidden states
        rows = [shape[0] for shape in products.shapes if shape[1] == width and shape[0] < CLASSES]
        assert sum(rows) == counted * (2 if width == CLASSES else 1)
        assert max(rows) - min(rows) <= chunk_count
    with torch.no_grad():
        given.hidden[given.labels == -100] = float("nan")
        given.teacher_hidden[given.labels == -100] = float("inf")
    value, grads = run(given, chunk_size=8)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert not grads[0][given.labels == -100].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_frozen_parts_cost_nothing(device, frozen):
    given = make_heads(device=device)
    for name, leaf in leaves_of(given):
        leaf.requires_grad_(frozen not in (name, "all"))
    with Products() as products:
        value = fastkd.linear_loss(*given[:2], *given[3:5], student_bias=given.bias, chunk_size=64)
    shapes = {"hidden": (ROWS, WIDTH), "weight": (CLASSES, WIDTH), "bias": (CLASSES, 1)}
    for name, shape in shapes.items():
        assert (shape in products.shapes) == (frozen not in (name, "all"))
    if frozen == "all":
        assert not value.requires_grad
        return
    value.backward()
    assert [leaf.grad is None for name, leaf in leaves_of(given)] == [
        name == frozen for name, leaf in leaves_of(given)
    ]


def test_no_grad(device):
    given = make_heads(device=device)
    with torch.no_grad(), Products() as products:
        value = fastkd.linear_loss(*given[:2], *given[3:5], given.labels, chunk_size=64)
    assert len(products.shapes) == 2 and not value.requires_grad


def test_rows_are_kept_while_a_graph_is_captured(device, monkeypatch):
    """Then nothing may be waited for; the answer is the same."""
    given = make_heads(device=device)
    expected = run(given, chunk_size=8)
    monkeypatch.setattr(row_loop, "counted_rows", lambda labels, ignore_index: None)
    value, grads = run(given, chunk_size=8)
    torch.testing.assert_close(value, expected[0])
    for grad, right in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, right)


# ---- memory


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=name_of)
def test_peak_memory_is_what_the_plan_says(dtype, cap):
    given = make_heads(dtype, rows=512, classes=16000, ignored=0.0)
    for options in ({"chunk_size": 64}, {"max_workspace": 2**24}, {"chunk_size": 512}):
        options["chunk_by"] = "rows"
        chosen = chunks.plan(
            512, 16000, WIDTH, dtype=dtype, logits_per_row=2.0 if cap is None else 3.0, **options
        )
        peak = peak_bytes(lambda options=options: run(given, softcap=cap, **options))
        small = 2**21  # biases, row statistics
        if dtype == BF16:  # a factor of a product, which oneDNN packs for itself
            small += chosen.chunk * 16000 * dtype.itemsize
        assert 0.5 * chosen.peak_bytes <= peak <= chosen.peak_bytes + small


def test_a_bound_holds_without_kernels_too():
    given = make_heads(rows=512, classes=2000, ignored=0.0)
    options = {"divergence": "jsd", "standardize": True, "max_workspace": 2**23}
    assert peak_bytes(lambda: run(given, **options)) <= 2**23


def test_a_quarter_of_the_memory_of_full_logits():
    given = make_heads(rows=512, classes=8000, ignored=0.0)
    ours = peak_bytes(lambda: run(given))
    theirs = peak_bytes(lambda: on_full_logits(given, FP32))
    assert ours <= theirs / 4


# ---- other ways in


def test_teacher_logits(device):
    given = make_heads(device=device)
    with torch.no_grad():
        logits = F.linear(given.teacher_hidden, given.teacher_weight, given.teacher_bias)
    expected, grads = run(given)
    x, w, b = (leaf.detach().requires_grad_() for leaf in given.leaves())
    value = fastkd.linear_loss(
        x, w, labels=given.labels, student_bias=b, teacher_logits=logits, chunk_size=8
    )
    value.backward()
    torch.testing.assert_close(value.detach(), expected)
    for leaf, right in zip((x, w, b), grads, strict=True):
        torch.testing.assert_close(leaf.grad, right)


def test_labels_of_probabilities(device):
    given = make_heads(FP64, device)
    given = given._replace(labels=torch.rand(ROWS, CLASSES, device=device, dtype=FP64).softmax(-1))
    exact, exact_grads = on_full_logits(given, FP64)
    value, grads = run(given, chunk_size=8)
    torch.testing.assert_close(value, exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, right)


def test_batch_dimensions(device):
    given = make_heads(device=device)
    x, t = given.hidden[:36].view(3, 12, -1), given.teacher_hidden[:36].view(3, 12, -1)
    labels = given.labels[:36].view(3, 12)
    flat = fastkd.linear_loss(
        given.hidden[:36], given.weight, given.teacher_hidden[:36], given.teacher_weight,
        given.labels[:36], reduction="none",
    )  # fmt: skip
    value = fastkd.linear_loss(x, given.weight, t, given.teacher_weight, labels, reduction="none")
    assert value.shape == (3, 12) and torch.equal(value.flatten(), flat)
    value.sum().backward()
    assert given.hidden.grad.shape == given.hidden.shape


@pytest.mark.parametrize("labels", ["none", "all ignored"])
def test_no_rows(device, labels):
    given = make_heads(device=device, rows=0 if labels == "none" else ROWS, ignored=1.0)
    for reduction in ("mean", "sum", "none"):
        value, grads = run(given, reduction=reduction)
        assert not value.any() and not any(grad.any() for grad in grads)


def test_a_weight_that_is_tied(device):
    """To the embedding below it, and to the teacher's head, which gets no gradient."""
    given = make_heads(FP64, device)
    tokens = torch.arange(ROWS, device=device)

    def step(loss):
        weight = given.weight.detach().requires_grad_()
        hidden = F.embedding(tokens, weight).tanh()
        loss(hidden, weight).backward()
        return weight.grad

    ours = step(lambda x, w: fastkd.linear_loss(x, w, x.detach() * 2, w, chunk_size=8))
    right = step(lambda x, w: fastkd.loss(F.linear(x, w), F.linear(x.detach() * 2, w.detach())))
    torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
def test_autocast(device, dtype):
    """Products in 16 bits; the gradients of float32 weights are summed, and stay, in float32."""
    given = make_heads(FP32, device, rows=300, classes=1000)
    with torch.autocast(device.type, dtype=dtype):
        value, grads = run(given, chunk_size=64)
    assert value.dtype == FP32 and all(grad.dtype == FP32 for grad in grads)
    _, exact = on_full_logits(given, FP64)
    with torch.autocast(device.type, dtype=dtype):
        _, eager = on_full_logits(given, FP32, loss_dtype=FP32)
    for grad, right, own in zip(grads, exact, eager, strict=True):
        assert 0 < distance(grad, right) <= 1.1 * distance(own, right)


def test_module(device):
    given = make_heads(device=device)
    module = fastkd.LinearKDLoss(temperature=3.0, alpha=0.2, chunk_size=8)
    arguments = (*given[:2], *given[3:5], given.labels)
    expected = fastkd.linear_loss(*arguments, temperature=3.0, alpha=0.2, chunk_size=8)
    assert torch.equal(module(*arguments), expected)
    assert "temperature=3.0" in repr(module) and not list(module.parameters())
    without = module(*arguments[:4], student_bias=given.bias)
    assert torch.equal(
        without,
        fastkd.linear_loss(*arguments[:4], student_bias=given.bias, temperature=3.0, chunk_size=8),
    )


def test_options_of_the_module_that_are_tensors():
    """They are where the module is, and no part of its state."""
    weight = torch.linspace(0.1, 2, CLASSES)
    module = fastkd.LinearKDLoss(class_weight=weight).to("meta")
    assert module.options["class_weight"].is_meta and not module.state_dict()
    given = make_heads()
    module = fastkd.LinearKDLoss(class_weight=weight)
    arguments = (*given[:2], *given[3:5], given.labels)
    assert torch.equal(module(*arguments), fastkd.linear_loss(*arguments, class_weight=weight))


def test_options_of_the_module_are_attributes():
    given = make_heads()
    module = fastkd.LinearKDLoss(temperature=3.0)
    assert module.temperature == 3.0 and module.softcap is None
    module.temperature, module.softcap = 1.0, 20.0
    arguments = (*given[:2], *given[3:5], given.labels)
    expected = fastkd.linear_loss(*arguments, temperature=1.0, softcap=20.0)
    assert torch.equal(module(*arguments), expected)
    with pytest.raises(ValueError, match="softcap"):
        module.softcap = -1.0


def test_layouts(device):
    """Slices, transposed weights, narrow labels, another ignore_index: as if copied."""
    given = make_heads(FP64, device)
    expected, grads = run(given, chunk_size=8)
    wide = torch.randn(ROWS, 2 * WIDTH, dtype=FP64, device=device)
    wide[:, ::2] = given.hidden.detach()
    x = wide[:, ::2].requires_grad_()
    w = given.weight.detach().t().contiguous().t().requires_grad_()
    b = given.bias.detach().clone().requires_grad_()
    t = given.teacher_hidden.t().contiguous().t()
    labels = given.labels.masked_fill(given.labels == -100, 255).short()
    value = fastkd.linear_loss(
        x, w, t, given.teacher_weight.t().contiguous().t(), labels, student_bias=b,
        teacher_bias=given.teacher_bias.repeat(2)[:CLASSES], ignore_index=255, chunk_size=8,
    )  # fmt: skip
    value.backward()
    torch.testing.assert_close(value.detach(), expected)
    for leaf, right in zip((x, w, b), grads, strict=True):
        torch.testing.assert_close(leaf.grad, right)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"), [(FP32, BF16), (BF16, FP32), (FP32, FP64), (FP16, BF16)]
)
def test_a_teacher_of_another_dtype(device, dtype, teacher_dtype):
    given = make_heads(dtype, device)
    given = given._replace(
        **{
            name: getattr(given, name).to(teacher_dtype)
            for name in ("teacher_hidden", "teacher_weight", "teacher_bias")
        }
    )
    exact, exact_grads = on_full_logits(given, FP64)
    value, grads = run(given, chunk_size=8)
    bound = (2 if BF16 in (dtype, teacher_dtype) else 64) * max(
        torch.finfo(kind).eps for kind in (dtype, teacher_dtype)
    )
    assert value.dtype == (FP64 if teacher_dtype == FP64 else FP32)
    assert abs(value - exact) <= bound * abs(exact)
    for grad, right in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype and distance(grad, right) <= bound * right.norm()


def test_the_page_runs():
    """The Python blocks of docs/linear.md, as a reader would type them."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "linear.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec("\n".join(blocks), {})


# ---- bad input

BAD = {
    "no teacher": ({"teacher_hidden": None}, "the teacher needs teacher_hidden and teacher_weight"),
    "both teachers": ({"teacher_logits": torch.zeros(ROWS, CLASSES)}, "takes the place of"),
    "widths": ({"student_hidden": torch.zeros(ROWS, 3)}, r"student_hidden must have shape"),
    "classes": ({"teacher_weight": torch.zeros(3, TEACHER_WIDTH)}, "same number of classes"),
    "rows": ({"teacher_hidden": torch.zeros(3, TEACHER_WIDTH)}, "the same rows"),
    "bias": ({"student_bias": torch.zeros(3)}, r"student_bias must have shape \(203,\)"),
    "dtype": ({"student_weight": torch.zeros(CLASSES, WIDTH).half()}, "student_hidden's dtype"),
    "label": ({"labels": torch.full((ROWS,), CLASSES)}, r"labels must be in \[0, 203\).*row 0"),
    "softcap": ({"softcap": -1.0}, "softcap must be positive"),
    "pair": ({"logit_scale": (1.0, 2.0, 3.0)}, "logit_scale must be a number or a pair"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be a positive number of rows"),
    "teacher_grad": ({"teacher_grad": "maybe"}, "teacher_grad must be one of"),
    "temperature": (
        {"temperature": torch.tensor(-1.0), "labels": None},
        "temperature must be positive and finite; row 0 has -1.0",
    ),
    "budget": ({"max_workspace": 1.5}, "max_workspace must be a positive number of bytes"),
    "memory": ({"max_workspace": 100}, "max_workspace=100 is too small"),
    "accumulate": (
        {"accumulate_dtype": FP16},
        "accumulate_dtype must be .auto. or torch.float32 for",
    ),
    "teacher grad": (
        {"teacher_hidden": torch.zeros(ROWS, TEACHER_WIDTH, requires_grad=True)},
        "teacher_hidden requires grad",
    ),
    "learned": (
        {"temperature": torch.tensor(2.0, requires_grad=True)},
        "temperature gets no gradient from linear_loss",
    ),
    "core option": ({"divergence": "kl"}, "divergence must be one of"),
}


@pytest.mark.parametrize(
    "options", [{"softcap": (3.0, 3.0)}, {"logit_scale": (None, 3.0)}], ids=str
)
def test_no_cap_nor_scale_of_a_teacher_without_a_head(options):
    given = make_heads()
    teacher_logits = torch.zeros(ROWS, CLASSES)
    (name, (student, _)) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{name} must be a number or a pair \\(student's, None"):
        fastkd.linear_loss(*given[:2], teacher_logits=teacher_logits, **options)
    fastkd.linear_loss(*given[:2], teacher_logits=teacher_logits, **{name: (student, None)})
    fastkd.linear_loss(*given[:2], teacher_logits=teacher_logits, **{name: 3.0})


def test_teacher_logits_of_another_shape():
    given = make_heads()
    message = r"^teacher_logits must have student_hidden's rows .* \(37, 203\); got \(37, 200\)"
    with pytest.raises(ValueError, match=message):
        fastkd.linear_loss(*given[:2], teacher_logits=torch.zeros(ROWS, 200))


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input(wrong, message):
    given = make_heads()
    arguments = {
        "student_hidden": given.hidden,
        "student_weight": given.weight,
        "teacher_hidden": given.teacher_hidden,
        "teacher_weight": given.teacher_weight,
        "labels": given.labels,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.linear_loss(**{**arguments, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"alpha": 0.5, "hard_weight": 1.0}, "alpha cannot be given together"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"logit_scale": (1.0, 2.0, 3.0)}, "logit_scale must be a number or a pair"),
        ({"chunk_size": 0}, "chunk_size must be a positive number of rows"),
        ({"max_workspace": 0}, "max_workspace must be a positive number of bytes"),
        ({"chunk_by": "columns"}, "chunk_by must be one of 'auto', 'rows', 'classes'"),
        ({"accumulate_dtype": "fp32"}, "accumulate_dtype must be 'auto' or a floating"),
        ({"tail": "cut"}, "tail must be one of"),
    ],
)
def test_module_checks_options_when_it_is_made(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.LinearKDLoss(**wrong)


def test_module_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="LinearKDLoss has no option 'temprature'"):
        fastkd.LinearKDLoss(temprature=2.0)
