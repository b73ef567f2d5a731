"""Test that losses of random heads equal the float64 reference on full logits."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import (
    GRAD_OUTPUTS,
    LAYOUTS,
    NARROW,
    SMOOTHING,
    TEMPERATURES,
    WEIGHTS,
    check_close,
    copy_to_layout,
    draw_rarely,
    execution_settings,
    has_equal_bits,
    lacks_inverse,
    largest_of,
    narrow_labels,
    program,
    special_values,
    write_special_values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BF16, FP32, FP64, loss_in_chunks
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import _C, Head, reference
from fastkd.linear import class_statistics

NAMES = ("student_hidden", "student_weight", "student_bias")


class Case(NamedTuple):
    """Hold the parameters of a call; the repr of a case is code, but for inf and nan."""

    leading: tuple[int, ...] = (3,)
    classes: int = 10
    widths: tuple[int, int] = (4, 6)
    dtype: torch.dtype = FP32
    spread: float = 1.0
    seed: int = 0
    # (student or teacher, row, column, value) of hidden states
    special: tuple[tuple[int, int, int, float], ...] = ()
    layout: str = "contiguous"
    labels: str = "indices"
    ignored: float = 0.2
    ignore_index: int = -100
    biases: tuple[bool, bool] = (True, False)
    masked: bool = False  # one class that both biases mask
    teacher: str = "head"
    divergence: str = "forward_kl"
    temperature: float = 2.0
    teacher_t: float | None = None
    per_row: bool = False
    weights: tuple[float, float] = (0.5, 0.5)
    smoothing: float = 0.0
    reduction: str = "mean"
    normalizer: float | None = None
    softcap: float | None = None
    scale: float | None = None
    chunk: int | None = None
    by_classes: bool = False  # chunks of classes, if the call supports them
    grad_output: float = 1.0
    isa: str = "default"
    threads: int = 1


CASES = st.builds(
    Case,
    leading=st.lists(st.integers(0, 6), max_size=2).map(tuple),
    classes=st.one_of(st.integers(1, 70), st.sampled_from([127, 157, 1000])),
    widths=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    dtype=st.sampled_from([FP32, FP64, BF16]),
    spread=st.sampled_from([0.0, 1e-2, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
    special=draw_rarely((), special_values(2)),
    layout=st.sampled_from(LAYOUTS),
    labels=st.sampled_from(["indices", "none", "probabilities", *NARROW]),
    ignored=st.sampled_from([0.0, 0.2, 1.0]),
    ignore_index=draw_rarely(-100, st.integers(-1, 3)),
    biases=st.tuples(st.booleans(), st.booleans()),
    masked=draw_rarely(False, st.booleans()),
    teacher=st.sampled_from(["head", "head", "logits"]),
    divergence=st.sampled_from(
        ["forward_kl", *(n for n in fastkd.divergences() if n != "total_variation")]
    ),
    temperature=TEMPERATURES,
    teacher_t=draw_rarely(None, st.floats(0.25, 30.0)),
    per_row=draw_rarely(False, st.booleans()),
    weights=WEIGHTS,
    smoothing=SMOOTHING,
    reduction=st.sampled_from(["mean", "sum", "none"]),
    normalizer=draw_rarely(None, st.sampled_from([0.5, 7.0, 1e4])),
    softcap=draw_rarely(None, st.floats(1.0, 50.0)),
    scale=draw_rarely(None, st.floats(0.1, 2.0)),
    chunk=st.one_of(st.none(), st.integers(1, 7)),
    by_classes=st.booleans(),
    grad_output=GRAD_OUTPUTS,
    isa=st.sampled_from(_C.available_isas()),
    threads=st.integers(1, 3),
)


def build(case: Case, device: torch.device) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Make (tensors, options) of the call; options["chunks"] has arguments of chunks.plan."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(case.dtype)

    hiddens = [draw(*case.leading, width, scale=case.spread) for width in case.widths]
    write_special_values(hiddens, case.special)
    hidden, teacher_hidden = (copy_to_layout(x.to(device), case.layout) for x in hiddens)
    weight, teacher_weight = (draw(case.classes, width) for width in case.widths)
    biases = [draw(case.classes) if is_given else None for is_given in case.biases]
    if case.masked and case.classes > 1:
        for bias in biases:
            if bias is not None and all(case.biases):
                bias[case.seed % case.classes] = -math.inf
    tensors: dict[str, Tensor | None] = {"student_hidden": hidden, "student_weight": weight}
    tensors |= {"student_bias": biases[0]}
    if case.teacher == "head":
        tensors |= {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
        tensors |= {"teacher_bias": biases[1]}
    else:
        tensors |= {"teacher_logits": draw(*case.leading, case.classes)}
    tensors = {k: None if v is None else v.to(device) for k, v in tensors.items()}
    tensors["labels"] = labels_of(case, generator, device)
    options: dict[str, Any] = {"reduction": case.reduction, "divergence": case.divergence}
    options |= {"temperature": case.temperature, "teacher_temperature": case.teacher_t}
    options["chunks"] = {"chunk_size": case.chunk or "auto"}
    if case.per_row:
        rows = math.prod(case.leading)
        growing = torch.linspace(1, 2, max(rows, 1))[:rows].view(case.leading).to(device)
        options["temperature"] = growing.double() * case.temperature
    if tensors["labels"] is not None:
        options |= {"label_smoothing": case.smoothing, "ignore_index": case.ignore_index}
        options |= dict(zip(("hard_weight", "soft_weight"), case.weights, strict=True))
    if case.normalizer is not None and case.reduction == "mean":
        options["normalizer"] = case.normalizer
    if case.by_classes and has_classes(case, options, device):
        options["chunks"] = {"chunk_by": "classes"}
        if case.chunk:
            options["chunks"]["chunk_size"] = 16 * case.chunk
    return tensors, options


def loss_of(case: Case, tensors: dict[str, Tensor | None], options: dict[str, Any]) -> Tensor:
    def head(which: str) -> Head:
        parts = (tensors[f"{which}_{name}"] for name in ("hidden", "weight", "bias"))
        return Head(*parts, case.softcap, case.scale)

    teacher = head("teacher") if case.teacher == "head" else tensors["teacher_logits"]
    return loss_in_chunks(head("student"), teacher, tensors["labels"], **options)


def has_classes(case: Case, options: dict[str, Any], device: torch.device) -> bool:
    """Return True if chunks of classes support the call."""
    return (
        case.divergence in class_statistics.DIVERGENCES
        and case.labels != "probabilities"
        and not options.get("label_smoothing")
        and (case.teacher_t is None or device.type == "cpu")
    )


def labels_of(case: Case, generator: torch.Generator, device: torch.device) -> Tensor | None:
    if case.labels == "probabilities" and case.divergence != "dkd":
        return torch.rand((*case.leading, case.classes), generator=generator).softmax(-1).to(device)
    if case.labels == "none" and case.divergence != "dkd":
        return None
    labels = torch.randint(case.classes, case.leading, generator=generator)
    is_ignored = torch.rand(case.leading, generator=generator) < case.ignored
    labels = labels.masked_fill(is_ignored, case.ignore_index).to(device)
    return narrow_labels(labels, case.labels, case.classes, case.ignore_index)


class Exact(NamedTuple):
    loss: Tensor
    grads: list[Tensor]
    student: Tensor  # logits
    teacher: Tensor


def exact(
    case: Case, tensors: dict[str, Tensor | None], options: dict[str, Any]
) -> tuple[Exact, Tensor]:
    """Return (loss and gradients from full logits in float64, mask of valid rows)."""
    wide = {k: None if v is None else v.detach().double() for k, v in tensors.items()}
    leaves = [wide[name].requires_grad_() for name in NAMES if wide[name] is not None]
    labels = tensors["labels"]
    counted = torch.ones(case.leading, dtype=torch.bool, device=wide["student_hidden"].device)
    if labels is not None and not labels.is_floating_point():
        labels = labels.long()
        counted = labels != case.ignore_index

    def logits(which: str, softcap: float | None, scale: float | None) -> Tensor:
        hidden = wide[f"{which}_hidden"]
        hidden = hidden.where(counted.unsqueeze(-1), torch.zeros_like(hidden))
        z = F.linear(hidden, wide[f"{which}_weight"], wide[f"{which}_bias"]) * (scale or 1.0)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    both = (case.softcap, case.scale)
    student = logits("student", *both)
    teacher = wide["teacher_logits"] if case.teacher == "logits" else logits("teacher", *both)
    chosen = {k: v for k, v in options.items() if k != "chunks"}
    if labels is None:
        chosen |= {"hard_weight": 0.0, "soft_weight": 1.0}
    # An infinite divergence of weight 0 counts as 0, but autograd would multiply its infinite
    # derivatives by 0. With the cosine, a class that only one side masks makes the row NaN, even
    # with weight 0.
    nothing = chosen.get("soft_weight") == 0 and case.divergence != "cosine"
    seen = student.detach() if nothing else teacher
    value = reference.loss(student, seen, labels, **chosen)
    grads = torch.autograd.grad(value.sum(), leaves)
    return Exact(value.detach(), list(grads), student.detach(), teacher.detach()), counted


def sensitivity(case: Case, tensors: dict[str, Tensor | None], want: Exact) -> float:
    """Bound errors of row losses and gradients, in units of eps, from rounding the logits.

    A logit's error is eps times the sum of the magnitudes of its products. If logits / temperature
    are at most L, log-ratios of teacher and student are of the order of R = 1 + 2 L. A divergence's
    first derivatives are of the order of R, and its second derivatives of the order of R^2.
    """
    sums = 1.0
    for side, width in zip(("student", "teacher"), case.widths, strict=True):
        hidden, weight, bias = (
            largest_of(*(x for x in [tensors.get(f"{side}_{name}")] if x is not None))
            for name in ("hidden", "weight", "bias")
        )
        sums = max(sums, (width * hidden * weight + bias) * (case.scale or 1.0))
    t = case.temperature * (2 if case.per_row else 1)
    least = min(case.temperature, case.teacher_t or case.temperature)
    ratio = 1 + 2 * largest_of(want.student, want.teacher) / least
    hard, soft = (0.0, 1.0) if tensors["labels"] is None else case.weights
    slope = sums * (2 * hard + 4 * soft * (t / min(least, 1.0) * ratio) ** 2)
    # The cosine's gradient grows as the logits shrink.
    if case.divergence == "cosine" and want.student.numel():
        lengths = torch.stack([x.norm(dim=-1) for x in (want.student, want.teacher)])
        if lacks_inverse(lengths, FP64 if case.dtype == FP64 else FP32):
            return math.inf
        lengths = want.student.norm(dim=-1).nan_to_num(1.0)  # NaN rows are not compared
        slope *= 1 + float((1 / lengths.clamp(min=1e-150)).max()) ** 2
    if case.divergence == "dkd":
        slope *= 10  # dkd's mix is 8
    return slope / (case.normalizer or 1.0)


def check(case: Case, device: torch.device) -> None:
    if case.divergence == "dkd":  # dkd refuses a single class
        case = case._replace(classes=max(case.classes, 2))
    if case.reduction != "mean":
        case = case._replace(normalizer=None)
    tensors, options = build(case, device)
    before = {k: None if v is None else v.clone() for k, v in tensors.items()}
    copies = dict(tensors)
    for name in NAMES:
        copies[name] = None if copies[name] is None else copies[name].detach().requires_grad_()
    value = loss_of(case, copies, options)
    value.backward(torch.full_like(value, case.grad_output))
    for name, tensor in tensors.items():
        assert tensor is None or has_equal_bits(tensor, before[name]), f"{name} was written"
    want, counted = exact(case, tensors, options)
    assert value.shape == want.loss.shape
    # Hidden states of ignored rows and of rows with special values must not widen the bound.
    hiddens = [x for k, x in before.items() if k.endswith("_hidden")]
    usual = torch.stack([(x.abs() < 1e5).all(-1) for x in hiddens]).all(0) | ~counted
    tame = {k: v.clone() if k.endswith("_hidden") else v for k, v in before.items()}
    for name in tame:
        if name.endswith("_hidden"):
            tame[name][~usual | ~counted] = 0
    slope, eps = sensitivity(case, tame, want), torch.finfo(case.dtype).eps
    rows = max(1, math.prod(case.leading))
    if bool(usual.all()):
        count = 1 if case.reduction == "none" else rows
        check_close(value.detach(), want.loss, 8 * eps, 16 * slope * eps * count, "loss")
        is_unweighted = case.divergence == "cosine" and options.get("soft_weight") == 0
        if is_unweighted and bool(want.loss.isnan().any()):
            return  # a NaN row of weight 0 has a gradient of NaN in the kernels, of 0 in exact()
        gains = {"student_hidden": largest_of(before["student_weight"]), "student_bias": rows}
        gains |= {"student_weight": largest_of(tame["student_hidden"]) * rows}
        names = [name for name in NAMES if copies[name] is not None]
        for name, gradient in zip(names, want.grads, strict=True):
            gain = gains[name] * (case.scale or 1.0)
            exact_gradient = gradient * case.grad_output
            limit = 16 * slope * eps * gain * max(1.0, abs(case.grad_output))
            check_close(copies[name].grad, exact_gradient, 8 * eps, limit, name)
    elif case.reduction == "none":
        got, true = value.detach()[usual], want.loss[usual]
        check_close(got, true, 8 * eps, 16 * slope * eps, "loss of the usual rows")


def run(case: Case, device: torch.device) -> None:
    with execution_settings(case.isa, case.threads, in_python=False):
        check(case, device)


@pytest.mark.filterwarnings("ignore:.*torch.frombuffer")
@settings(max_examples=150)
@given(case=CASES)
def test_random_heads_equal_the_reference(device, case):
    run(case, device)


@pytest.mark.parametrize("teacher", ["head", "logits"])
def test_earlier_failures_equal_the_reference(device, teacher):
    # The gradient differed from the hard term's, though the infinite squared error had weight 0.
    biases, weights = (True, True), (0.5, 0.0)
    case = Case(divergence="mse", masked=True, biases=biases, teacher=teacher, weights=weights)
    run(case, device)
    # The transposed layout gave the whole row a gradient of 0 if one class had an infinite
    # derivative.
    run(case._replace(leading=(), classes=2, weights=(0.0, 0.3)), device)
    # The whole gradient was 0 if one class's centered squared error had an infinite derivative.
    run(case._replace(biases=(True, False), divergence="centered_mse", weights=(0.0, 0.3)), device)
    # The gradient is below the least positive number of its dtype.
    run(
        Case(leading=(), classes=2, widths=(1, 1), special=((0, 0, 0, 1e-45),), labels="none"),
        device,
    )
    # AMX matrix products read the NaN that lies between rows of odd width.
    apart = Case(leading=(3, 6), classes=127, widths=(1, 3), dtype=BF16, layout="rows apart")
    run(apart._replace(teacher=teacher, ignored=0.0), device)
    # The cosine's gradient grows without limit as the student's logits shrink.
    small = Case(leading=(), classes=1, widths=(30, 1), dtype=FP64, spread=0.0, labels="none")
    small = small._replace(seed=1307, special=((0, 0, 0, 1e-45),), biases=(False, False))
    run(small._replace(divergence="cosine", teacher=teacher), device)
    # A label relative to a chunk of classes may equal ignore_index.
    run(Case(leading=(6, 6), ignore_index=0, chunk=1, classes=20, by_classes=True), device)


if __name__ == "__main__":
    program(CASES, run)
