"""Define inputs, expected results in float64, results of eager PyTorch, and error bounds."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import Head, TopK, reference

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP64, FP32, BF16, FP16)
# Numbers of classes at which the CUDA launch changes. One kernel computes rows of up to 32 classes,
# except in float64. Another kernel computes rows of up to 256 (float64), 512 (float32) or 1024 (16
# bits) classes. Thread blocks are larger from 1024 and from 8192 classes on. The last number stands
# for the largest vocabularies.
CUDA_SIZE_CLASSES = (32, 512, 1024, 8192, 425984)


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return test cases, one value per factor, that cover each pair of two factors' values."""
    lists = [list(factor) for factor in factors]

    def pairs(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        places = list(enumerate(row))
        return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(places, 2)}

    candidates = {
        row: pairs(row) for row in itertools.product(*(range(len(values)) for values in lists))
    }
    missing, chosen = set().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda row: len(candidates[row] & missing))
        missing -= candidates[best]
        chosen.append(best)
    return [tuple(values[i] for values, i in zip(lists, row, strict=True)) for row in chosen]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor | None


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = FP32,
    teacher_dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    labels: bool = True,
    ignored: float = 0.2,
    spread: float = 3.0,
    seed: int = 0,
) -> Problem:
    """Draw logits and labels on the CPU; a share ``ignored`` of the labels is -100."""
    generator = torch.Generator().manual_seed(seed)
    # Drawing in float32 is faster than in float64.
    wide = FP64 if FP64 in (dtype, teacher_dtype) else FP32
    student = torch.randn(shape, generator=generator, dtype=wide).mul_(spread)
    teacher = torch.randn(shape, generator=generator, dtype=wide).mul_(spread)
    index = None
    if labels:
        index = torch.randint(shape[-1], shape[:-1], generator=generator)
        masked = torch.rand(shape[:-1], generator=generator) < ignored
        index = index.masked_fill(masked, -100).to(device)
    return Problem(
        student.to(dtype).to(device), teacher.to(teacher_dtype or dtype).to(device), index
    )


WIDTH, TEACHER_WIDTH = 24, 40


class Heads(NamedTuple):
    student: Head
    teacher: Any
    labels: Tensor | None

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student.hidden, self.student.weight, self.student.bias

    def with_options(self, softcap: Any = None, scale: Any = None) -> "Heads":
        """Return a copy with soft caps and scales, each one value or a pair (student, teacher)."""
        caps, scales = (x if isinstance(x, tuple) else (x, x) for x in (softcap, scale))
        student = self.student._replace(softcap=caps[0], scale=scales[0])
        if not isinstance(self.teacher, Head):
            return self._replace(student=student)
        teacher = self.teacher._replace(softcap=caps[1], scale=scales[1])
        return self._replace(student=student, teacher=teacher)


def make_heads(
    dtype: torch.dtype = FP32,
    device: torch.device | str = "cpu",
    rows: int = 37,
    classes: int = 203,
    ignored: float = 0.3,
    seed: int = 0,
) -> Heads:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    labels = torch.randint(classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100

    def head(width: int) -> Head:
        return Head(draw(rows, width), draw(classes, width, scale=0.3), draw(classes))

    student, teacher = head(WIDTH), head(TEACHER_WIDTH)
    for leaf in student[:3]:
        leaf.requires_grad_()
    return Heads(student, teacher, labels.to(device))


def loss_in_chunks(
    student: Head,
    teacher: Any,
    labels: Tensor | None = None,
    *,
    chunks: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Compute fastkd.loss; ``chunks``, if given, are arguments of fastkd.chunks.plan."""
    plan: Any = "auto"
    if chunks is not None:
        plan = fastkd.chunks.plan(student, teacher, labels, **chunks, **options)
    return fastkd.loss(student, teacher, labels, chunks=plan, **options)


def weights(options: dict[str, Any], has_labels: bool) -> dict[str, Any]:
    """Replace alpha by the two weights that fastkd.reference takes."""
    in_two_weights = dict(options)
    alpha = in_two_weights.pop("alpha", None)
    hard, soft = in_two_weights.pop("hard_weight", None), in_two_weights.pop("soft_weight", None)
    if hard is None and soft is None:
        hard = (0.5 if alpha is None else alpha) if has_labels else 0.0
        soft = 1.0 - hard
    return {
        **in_two_weights,
        "hard_weight": 1.0 if hard is None else hard,
        "soft_weight": 1.0 if soft is None else soft,
    }


class Answer(NamedTuple):
    terms: reference.Terms
    loss: Tensor
    grad: Tensor
    noise: float
    """Bound of the float64 loss's rounding error; the terms of a KL divergence partly cancel."""


def truth(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    **options: Any,
) -> Answer:
    """Compute fastkd.reference's terms and the gradient of the loss in float64."""
    leaf = student.detach().double().requires_grad_()
    terms = reference.terms(
        leaf, teacher.detach().double(), labels, **weights(options, labels is not None)
    )
    valid = None
    if labels is not None and not labels.is_floating_point():
        valid = labels != options.get("ignore_index", -100)
    reducing = (options.get("reduction", "mean"), options.get("normalizer"))
    denominator = reference.reduce(torch.ones_like(leaf[..., 0]), valid, *reducing).detach()
    terms = terms._replace(student_mass=denominator, teacher_mass=denominator)
    outgoing = torch.ones_like(terms.loss) if grad_output is None else grad_output.double()
    (grad,) = torch.autograd.grad(terms.loss, leaf, outgoing)
    t = torch.as_tensor(options.get("temperature", 2.0))
    size = (
        float((terms.teacher_entropy + terms.soft).norm()) * float(t.max() if t.numel() else 0) ** 2
    )
    return Answer(terms, terms.loss.detach(), grad, 4 * torch.finfo(FP64).eps * size)


def eager(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    grad_output: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute (loss, gradient) by F.kl_div and F.cross_entropy."""
    in_two_weights = weights(options, labels is not None)
    leaf = student.detach().clone().requires_grad_()
    teacher = teacher.detach().to(torch.promote_types(student.dtype, teacher.dtype))
    t = (
        temperature.unsqueeze(-1).to(student.dtype)
        if isinstance(temperature, Tensor)
        else temperature
    )
    squared = t.squeeze(-1) ** 2 if isinstance(t, Tensor) else t**2
    total = (
        in_two_weights["soft_weight"]
        * squared
        * F.kl_div(
            F.log_softmax(leaf / t, -1),
            F.log_softmax(teacher / t, -1),
            reduction="none",
            log_target=True,
        ).sum(-1)
    )
    if labels is not None:
        hard = F.cross_entropy(
            leaf.reshape(-1, leaf.shape[-1]),
            labels.reshape(-1),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        total = in_two_weights["hard_weight"] * hard.view(total.shape) + total
        total = total.masked_fill(labels == ignore_index, 0)
    if reduction != "none":
        total = total.sum()
    if reduction == "mean":
        count = (
            math.prod(student.shape[:-1]) if labels is None else int((labels != ignore_index).sum())
        )
        total = total / (max(count, 1) if normalizer is None else normalizer)
    outgoing = torch.ones_like(total) if grad_output is None else grad_output.to(total.dtype)
    (grad,) = torch.autograd.grad(total, leaf, outgoing)
    return total.detach(), grad


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return FP64 if FP64 in (student.dtype, teacher.dtype) else FP32


# Bounds of relative errors. Row losses are non-negative, so their sum's relative error is at most
# the largest relative error of a row.
VALUE_BOUND = {FP32: 2e-6, FP64: 1e-14}
GRAD_BOUND = {FP32: 2e-6, FP64: 1e-14}
# Eager PyTorch's error may be 0 by chance, so comparisons with eager PyTorch allow an additional
# relative error of 2 * FLOOR.
FLOOR = {FP32: torch.finfo(FP32).eps, FP64: torch.finfo(FP64).eps}
# A 16-bit gradient's error may be ROUNDING times the error of rounding the exact gradient.
ROUNDING = 1.5


def distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm())


def assert_value(
    value: Tensor, truth: Answer, acc: torch.dtype, theirs: Tensor | None = None
) -> None:
    """Assert that the loss's error is within bounds; ``theirs`` is eager PyTorch's loss."""
    exact = truth.loss
    assert value.dtype == acc
    assert value.shape == exact.shape
    error, size = distance(value.detach(), exact), float(exact.norm())
    # A log-probability near 0 is a small difference of larger numbers, so its error is absolute.
    noise = FLOOR[acc] * math.sqrt(exact.numel())
    noise += truth.noise if truth.noise < math.inf else 0.0
    limit = VALUE_BOUND[acc] * size + noise
    assert error <= limit, f"off by {error:.2e} of {size:.2e}, allowed {limit:.2e}"
    if theirs is not None:
        limit = distance(theirs, exact) + 2 * FLOOR[acc] * size + noise
        assert error <= limit, f"off by {error:.2e} of {size:.2e}, eager and floor {limit:.2e}"


def assert_grad(
    grad: Tensor | None,
    exact: Tensor,
    acc: torch.dtype,
    theirs: Tensor | None = None,
    *,
    weight: float | None = None,
) -> None:
    """Assert that the gradient's error is within bounds, in the norm and in each entry.

    ``weight`` is the largest factor of a row's probabilities in the gradient; the factor bounds the
    rounding error of probabilities near 1. ``theirs`` is eager PyTorch's gradient.
    """
    assert grad is not None
    assert grad.shape == exact.shape
    error, size = distance(grad, exact), float(exact.norm())
    # With one or two classes, the gradient can be a small difference of probabilities near 1.
    cancellation = 2 * FLOOR[acc] * math.sqrt(exact.numel()) if exact.shape[-1] <= 2 else 0.0
    if weight is not None:
        cancellation = 2 * FLOOR[acc] * math.sqrt(exact.numel() / exact.shape[-1]) * weight
    if grad.dtype == acc:
        limit = GRAD_BOUND[acc] * size + cancellation
    else:  # a gradient of a narrower dtype than acc is rounded once
        limit = ROUNDING * distance(exact.to(grad.dtype), exact) + FLOOR[acc] * size + cancellation
    assert error <= limit, f"off by {error:.2e} of {size:.2e}, allowed {limit:.2e}"
    if theirs is not None:
        limit = distance(theirs, exact) + 2 * FLOOR[acc] * size + cancellation
        assert error <= limit, f"off by {error:.2e} of {size:.2e}, eager and floor {limit:.2e}"
    if exact.numel() == 0:
        return
    # The norm hides an error in one entry, so each entry has a bound, too.
    info, largest = torch.finfo(grad.dtype), float(exact.abs().max())
    rounding = 0.51 * max(info.eps, torch.finfo(acc).eps) * exact.abs()
    allowed = (
        rounding
        + 8 * torch.finfo(acc).eps * largest
        + info.smallest_normal * info.eps
        + cancellation
    )
    worst = float(((grad.double() - exact).abs() - allowed).max())
    assert worst <= 0, (
        f"a class is off by {worst:.2e} more than allowed, largest entry {largest:.2e}"
    )


def assert_same(value: Tensor | None, expected: Tensor | None) -> None:
    """Assert that tensors are equal: exactly on the CPU, up to rounding on CUDA."""
    assert value is not None and expected is not None
    if value.device.type == "cpu":
        assert torch.equal(value, expected)
        return
    eps = torch.finfo(value.dtype).eps
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(value, expected, rtol=8 * eps, atol=8 * FLOOR[FP32] * largest)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the largest number of bytes that a call holds on the CPU at a time."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class TopKProblem(NamedTuple):
    student: Tensor
    indices: Tensor
    log_probs: Tensor
    labels: Tensor | None

    def teacher(self, tail: str = "ghost") -> TopK:
        return TopK(self.log_probs, self.indices, tail)


def make_topk(
    shape: tuple[int, ...],
    k: int,
    dtype: torch.dtype = FP32,
    *,
    device: torch.device | str = "cpu",
    labels: bool = True,
    spread: float = 3.0,
    padding: float = 0.2,
    temperature: float = 2.0,
    seed: int = 0,
) -> TopKProblem:
    """Draw a student, shuffled top-k lists of a teacher with similar logits, and labels."""
    generator = torch.Generator().manual_seed(seed)
    *rows, classes = shape
    wide = FP64 if dtype == FP64 else FP32
    teacher = torch.randn(shape, generator=generator, dtype=wide) * spread
    student = (teacher / 2 + torch.randn(shape, generator=generator, dtype=wide)).to(dtype)
    log_probs, indices = torch.log_softmax(teacher / temperature, -1).topk(k)
    order = torch.rand(indices.shape, generator=generator).argsort(-1)
    log_probs, indices = log_probs.gather(-1, order), indices.gather(-1, order)
    indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < padding, -1)
    index = None
    if labels:
        index = torch.randint(classes, rows, generator=generator)
        listed = indices[..., 0].clamp(min=0)
        index = index.where(torch.rand(rows, generator=generator) < 0.5, listed)
        index = index.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100).to(device)
    return TopKProblem(student.to(device), indices.to(device), log_probs.to(device), index)


def topk_row_divergence(z: Tensor, indices: Tensor, log_probs: Tensor, tail: str) -> Tensor:
    """Compute one row's divergence, for a mode of the tail, by F.kl_div."""
    listed = indices >= 0
    ids, p = indices[listed], log_probs[listed].exp()

    def kl(log_q: Tensor, p: Tensor) -> Tensor:  # 0 log 0 = 0, also where log_q is -inf
        return F.kl_div(log_q[p > 0], p[p > 0], reduction="sum")

    if tail == "renormalize":
        if len(ids) == 0:
            return z.sum() * 0
        return kl(z[ids].log_softmax(-1), p / p.sum())
    if tail == "ignore":
        return kl(z.log_softmax(-1)[ids], p)
    others = [c for c in range(len(z)) if c not in set(ids.tolist())]
    log_q = z.log_softmax(-1)[ids]
    if others:
        log_q = torch.cat([log_q, z.log_softmax(-1)[others].logsumexp(-1, keepdim=True)])
        p = torch.cat([p, (1 - p.sum()).clamp(min=0)[None]])
    return kl(log_q, p)


def topk_truth(
    problem: TopKProblem,
    tail: str = "ghost",
    *,
    temperature: float = 2.0,
    alpha: float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
    grad_output: Tensor | None = None,
) -> Answer:
    """Compute the loss by topk_row_divergence and F.cross_entropy in float64, and its gradient."""
    student, indices, log_probs, labels = (x if x is None else x.cpu() for x in problem)
    leaf = student.detach().double().requires_grad_()
    classes = leaf.shape[-1]
    hard_weight = 0.0 if labels is None else 0.5 if alpha is None else alpha
    flat, ids = leaf.reshape(-1, classes), indices.reshape(-1, indices.shape[-1])
    lists = log_probs.double().reshape(ids.shape)
    losses, counted, size = [], 0, 0.0
    for row in range(len(flat)):
        y = None if labels is None else labels.reshape(-1)[row]
        if y == -100:
            losses.append(flat[row].sum() * 0)
            continue
        counted += 1
        soft = topk_row_divergence(flat[row] / temperature, ids[row], lists[row], tail)
        loss = (1 - hard_weight) * temperature**2 * soft
        if y is not None:
            hard = F.cross_entropy(flat[row], y, label_smoothing=label_smoothing)
            loss = loss + hard_weight * hard
        size += float(soft.detach().abs() + math.log(classes)) ** 2
        losses.append(loss)
    total = torch.stack(losses).reshape(leaf.shape[:-1])
    if reduction != "none":
        total = total.sum()
    if reduction == "mean":
        total = total / (normalizer or max(counted, 1))
    outgoing = torch.ones_like(total) if grad_output is None else grad_output.double().cpu()
    (grad,) = torch.autograd.grad(total, leaf, outgoing)
    noise = 4 * torch.finfo(FP64).eps * math.sqrt(size) * temperature**2
    return Answer(
        None, total.detach().to(problem.student.device), grad.to(problem.student.device), noise
    )  # type: ignore[arg-type]


def run_topk(
    problem: TopKProblem, tail: str = "ghost", grad_output: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = problem.student.detach().requires_grad_()
    options = {"temperature": 2.0, **options}  # make_topk's lists have temperature 2 by default
    value = fastkd.loss(leaf, problem.teacher(tail), problem.labels, **options)
    outgoing = torch.ones_like(value) if grad_output is None else grad_output.to(value)
    (grad,) = torch.autograd.grad(value, leaf, outgoing)
    return value.detach(), grad


def check_topk(problem: TopKProblem, tail: str = "ghost", **options: Any) -> None:
    """Assert that the loss and the gradient equal those of topk_truth, up to rounding."""
    value, grad = run_topk(problem, tail, **options)
    exact = topk_truth(problem, tail, **options)
    acc = FP64 if FP64 in (problem.student.dtype, problem.log_probs.dtype) else FP32
    assert_value(value, exact, acc)
    assert_grad(grad, exact.grad, acc)
