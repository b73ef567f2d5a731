"""Time losses with a teacher's k most probable classes, or with one sampled class, and a parser.

The loss of k classes is timed beside the loss with all logits, the loss of a sampled class beside
cross entropies, and the parser of :func:`fastkd.teachers.served.from_vllm` alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks.cases import Case, make_case
from benchmarks.measure import WALL_LIMIT, Inputs, Step, make_sets, time_in_turns
from fastkd import Sampled, TopK
from fastkd.teachers import served

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative error of a loss or gradient; larger errors fail the case."""


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the terms of KL(p || q), one for each class."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True)


def _mixture(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """Return log(mix p + (1 - mix) q)."""
    return torch.logaddexp(log_p + math.log(mix), log_q + math.log(1 - mix))


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = _mixture(log_p, log_q, 0.5)
    return 0.5 * _kl(log_p, log_m) + 0.5 * _kl(log_q, log_m)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _kl,
    "soft_cross_entropy": lambda log_p, log_q: -log_p.exp() * log_q,
    "reverse_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "symmetric_kl": lambda log_p, log_q: 0.5 * (_kl(log_p, log_q) + _kl(log_q, log_p)),
    "jsd": _jsd,
    "skewed_forward_kl": lambda log_p, log_q: _kl(log_p, _mixture(log_p, log_q, 0.1)),
    "skewed_reverse_kl": lambda log_p, log_q: _kl(log_q, _mixture(log_q, log_p, 0.1)),
    "total_variation": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs(),
}
"""Divergences in eager PyTorch, as functions of log-probabilities that return a term per class."""


@dataclass(frozen=True)
class SparseCase:
    """Describe a case whose teacher is known only by its k most probable classes."""

    dense: Case
    divergence: str = "forward_kl"
    k: int = 64

    @property
    def title(self) -> str:
        """Return k, the dense case and the divergence as text."""
        return f"top {self.k} of {self.dense.title}, {self.divergence}"


def list_cases(device: str) -> list[SparseCase]:
    """Return a case for each divergence with Llama 3's vocabulary, in fp32 and bf16."""
    return [
        SparseCase(make_case("llama-3", device, dtype, temperature=2.0), divergence)
        for dtype in ("fp32", "bf16")
        for divergence in DIVERGENCES
    ]


def fused(sparse: SparseCase) -> Callable[[Tensor, TopK, Tensor], Tensor]:
    """Make a loss function that calls fastkd.loss with a sparse teacher."""
    options = {"temperature": sparse.dense.temperature, "alpha": sparse.dense.alpha}
    return lambda s, top, y: fastkd.loss(s, top, y, divergence=sparse.divergence, **options)


def plain(sparse: SparseCase) -> Callable[[Tensor, TopK, Tensor], Tensor]:
    """Make a loss of PyTorch operations, in which one class stands for all beyond the top k."""
    t, alpha, divergence = (
        sparse.dense.temperature,
        sparse.dense.alpha,
        DIVERGENCES[sparse.divergence],
    )

    def with_ghost(log_probs: Tensor) -> Tensor:
        log_sum = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([log_probs, torch.log(-torch.expm1(log_sum))], -1)

    def loss(student: Tensor, top: TopK, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student.to(top.log_probs.dtype) / t, -1).gather(-1, top.indices)
        soft = divergence(with_ghost(top.log_probs), with_ghost(log_q)).sum(-1).mean()
        return alpha * F.cross_entropy(student, labels) + (1 - alpha) * t**2 * soft

    return loss


def dense(sparse: SparseCase) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Make a loss function that calls fastkd.loss with all of the teacher's logits."""
    options = {"temperature": sparse.dense.temperature, "alpha": sparse.dense.alpha}
    return lambda s, t, y: fastkd.loss(s, t, y, **options)


def find_top(sparse: SparseCase, teacher: Tensor) -> TopK:
    """Return the teacher's k most probable classes at the case's temperature."""
    return TopK(*F.log_softmax(teacher.float() / sparse.dense.temperature, -1).topk(sparse.k))


def compute_errors(sparse: SparseCase, step: Step, rows: int = 4) -> tuple[float, float]:
    """Return the relative errors of a step's loss and gradient on a few rows, against float64."""
    inputs = step.sets[0]
    log_probs, indices, _ = inputs.teacher  # type: ignore[misc]
    top = TopK(log_probs[:rows], indices[:rows])
    few = Inputs(
        inputs.student.detach()[:rows].clone().requires_grad_(),
        top,
        inputs.labels[:rows],  # type: ignore[arg-type]
    )
    loss, gradient = step.run(few)
    leaf = few.student.detach().double().requires_grad_()
    wide = TopK(top.log_probs.double(), top.indices)
    exact = plain(sparse)(leaf, wide, few.labels)
    (exact_gradient,) = torch.autograd.grad(exact, leaf)
    assert gradient is not None
    gradient_error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    return abs(loss.item() / exact.item() - 1), gradient_error.item()


def run(sparse: SparseCase, device: str, seconds: float) -> dict[str, Any]:
    """Check the sparse losses, then time them and the dense loss in turns, with backward passes."""
    sets = make_sets(sparse.dense, device)
    short = [
        Inputs(each.student, find_top(sparse, each.teacher), each.labels)  # type: ignore[arg-type]
        for each in sets
    ]
    steps = {
        "fastkd.loss, TopK": Step(sparse.dense, fused(sparse), short),  # type: ignore[arg-type]
        "PyTorch": Step(sparse.dense, plain(sparse), short),  # type: ignore[arg-type]
    }
    records: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        loss_error, gradient_error = compute_errors(sparse, step)
        if not max(loss_error, gradient_error) <= TOLERANCE[sparse.dense.dtype]:
            raise RuntimeError(f"{name}: loss off by {loss_error}, gradient by {gradient_error}")
        records[name] = {"loss_error": loss_error, "gradient_error": gradient_error}
    steps["fastkd.loss, all classes"] = Step(sparse.dense, dense(sparse), sets)
    kind = "device" if sparse.dense.elements >= WALL_LIMIT else "wall"
    times = time_in_turns(dict(steps), device, kind, seconds)
    for name, measured in times.items():
        records.setdefault(name, {})["times"] = asdict(measured)
    ours = times["fastkd.loss, TopK"].median
    return {
        "title": sparse.title,
        "k": sparse.k,
        "lanes": records,
        "of the dense loss": ours / times["fastkd.loss, all classes"].median,
        "of PyTorch": ours / times["PyTorch"].median,
    }


@dataclass(frozen=True)
class SampledCase:
    """Describe a case whose teacher is known by the log-probability of one sampled class a row."""

    dense: Case

    @property
    def title(self) -> str:
        """Return the dense case as text."""
        return f"a sampled token of {self.dense.title}"


def list_sampled_cases(device: str) -> list[SampledCase]:
    """Return a case with Llama 3's vocabulary, in fp32."""
    return [SampledCase(make_case("llama-3", device, "fp32", temperature=1.0))]


def run_sampled(case: SampledCase, device: str, seconds: float) -> dict[str, Any]:
    """Time the loss of a sampled token for each row beside cross entropies by fastkd and PyTorch.

    fastkd's cross entropy is its loss with ``alpha=1``.
    """
    dense = case.dense
    sets = []
    for each in make_sets(dense, device):
        tokens = each.student.detach().softmax(-1).multinomial(1)
        log_probs = F.log_softmax(each.teacher, -1).gather(-1, tokens)  # type: ignore[arg-type]
        sets.append(Inputs(each.student, TopK(log_probs, tokens), tokens.squeeze(-1)))  # type: ignore[arg-type]

    def sampled(student: Tensor, top: TopK, _: Tensor) -> Tensor:
        return fastkd.loss(student, Sampled(top.log_probs.squeeze(-1), top.indices.squeeze(-1)))

    functions: dict[str, Callable[..., Tensor]] = {
        "fastkd.loss, Sampled": sampled,
        "fastkd.loss, labels alone": lambda s, top, y: fastkd.loss(s, top, y, alpha=1.0),
        "PyTorch, labels alone": lambda s, top, y: F.cross_entropy(s, y),
    }
    steps = {name: Step(dense, function, sets) for name, function in functions.items()}
    kind = "device" if dense.elements >= WALL_LIMIT else "wall"
    times = time_in_turns(dict(steps), device, kind, seconds)
    ours, fused, eager = (times[name] for name in functions)
    return {
        "title": case.title,
        "lanes": {name: {"times": asdict(measured)} for name, measured in times.items()},
        "of the cross entropy": ours.median / fused.median,
        "of PyTorch's cross entropy": ours.median / eager.median,
    }


def time_parsing(tokens: int = 4096, k: int = 20, repeats: int = 11) -> float:
    """Return the median seconds to parse a reply of vLLM with ``k`` log-probabilities a token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32000, (tokens, k), generator=generator).sort().values
    log_probs = torch.randn(tokens, k, generator=generator).log_softmax(-1)
    positions = [
        {
            str(token): {"logprob": log_prob, "rank": rank, "decoded_token": "a"}
            for rank, (token, log_prob) in enumerate(zip(*of_position, strict=True), 1)
        }
        for of_position in zip(ids.tolist(), log_probs.tolist(), strict=True)
    ]
    reply = {"prompt_logprobs": [None, *positions[1:]]}
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        served.from_vllm(reply, tokens=ids[:, 0])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
