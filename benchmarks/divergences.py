"""Time every divergence beside the forward KL, eager PyTorch, torchtune and Liger-Kernel.

The timed losses have no hard term, which would hide differences between divergences. The report
marks divergences without a kernel, which fastkd computes by PyTorch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks import baselines
from benchmarks.baselines import LossFunction
from benchmarks.cases import MODELS, Case, make_case
from benchmarks.measure import WALL_LIMIT, Step, make_sets, time_in_turns
from benchmarks.suite import record_failure
from benchmarks.truth import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from fastkd import reference
from fastkd._core.dense import DIVERGENCES

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest relative error of fastkd's loss or gradient; truth.py has the baselines' bounds."""
SIGN_TOLERANCE = 1e-2
"""Largest relative error of the total variation's gradient, which depends on the sign of p - q.
Rounding flips this sign where the probabilities p and q are close."""
FUSED, BASE, PLAIN = "fastkd", "forward_kl", "PyTorch"
CHUNK = 2**21
"""Largest number of logits that the check computes at once, unless a row has more classes."""


@dataclass(frozen=True)
class DivergenceCase:
    """Describe a case: a shape, and a divergence with its default ``mix``."""

    dense: Case
    name: str

    @property
    def title(self) -> str:
        """Return the divergence, shape and dtype as text."""
        dense = self.dense
        return f"divergences: {self.name}, {dense.rows} x {dense.classes} {dense.dtype}"


def list_cases(device: str) -> list[DivergenceCase]:
    """Return every divergence at 32000 classes, and the JSD at 128256, each in fp32 and bf16."""

    def dense(model: str, dtype: str) -> Case:
        soft_alone: dict[str, Any] = {"temperature": 2.0, "alpha": 0.0}
        if device == "cpu":
            return Case(model, 64, MODELS[model].classes, dtype, **soft_alone)
        return make_case(model, device, dtype, **soft_alone)

    dtypes = ("fp32", "bf16")
    return [
        DivergenceCase(dense("llama-2", dtype), name)
        for dtype in dtypes
        for name in fastkd.divergences()
    ] + [DivergenceCase(dense("llama-3", dtype), "jsd") for dtype in dtypes]


def fused(dense: Case, name: str) -> LossFunction:
    """Make a loss function that calls fastkd.loss with a divergence."""
    options: dict[str, Any] = {"temperature": dense.temperature, "alpha": dense.alpha}
    return lambda s, t, y: fastkd.loss(s, t, y, divergence=name, **options)


# ---- formulas of papers and libraries: row losses of logits / T of student (z) and teacher (w)

Plain = Callable[[Tensor, Tensor, Tensor], Tensor]


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    shares = torch.tensor([weight, 1 - weight], device=log_a.device).log()
    return torch.logsumexp(torch.stack([log_a + shares[0], log_b + shares[1]]), 0)


def _of_probabilities(compute: Callable[[Tensor, Tensor], Tensor]) -> Plain:
    return lambda z, w, _: compute(F.log_softmax(w, -1), F.log_softmax(z, -1))


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = _log_mixture(log_p, log_q, 0.5)
    return 0.5 * _kl(log_p, log_m) + 0.5 * _kl(log_q, log_m)


def _dkd(z: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Compute decoupled KD as in its authors' code, which subtracts 1000 from the label's logit."""
    chosen = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, labels.unsqueeze(-1), True)

    def split_label(logits: Tensor) -> Tensor:
        probs = F.softmax(logits, -1)
        parts = [(probs * chosen).sum(-1), (probs * ~chosen).sum(-1)]
        return torch.stack(parts, -1)

    target = F.kl_div(split_label(z).log(), split_label(w), reduction="none").sum(-1)
    others = _kl(*(F.log_softmax(x - 1000.0 * chosen, -1) for x in (w, z)))
    return target + 8 * others


FORMULAS: dict[str, Plain] = {
    "forward_kl": _of_probabilities(_kl),
    "reverse_kl": _of_probabilities(lambda log_p, log_q: _kl(log_q, log_p)),
    "symmetric_kl": _of_probabilities(
        lambda log_p, log_q: 0.5 * _kl(log_p, log_q) + 0.5 * _kl(log_q, log_p)
    ),
    "jsd": _of_probabilities(_jsd),
    "skewed_forward_kl": _of_probabilities(
        lambda log_p, log_q: _kl(log_p, _log_mixture(log_p, log_q, 0.1))
    ),
    "skewed_reverse_kl": _of_probabilities(
        lambda log_p, log_q: _kl(log_q, _log_mixture(log_q, log_p, 0.1))
    ),
    "total_variation": _of_probabilities(
        lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    ),
    "soft_cross_entropy": lambda z, w, _: F.cross_entropy(z, F.softmax(w, -1), reduction="none"),
    "mse": lambda z, w, _: F.mse_loss(z, w, reduction="none").mean(-1),
    "centered_mse": lambda z, w, _: F.mse_loss(
        z - z.mean(-1, keepdim=True), w - w.mean(-1, keepdim=True), reduction="none"
    ).mean(-1),
    "cosine": lambda z, w, _: 1 - F.cosine_similarity(z, w, dim=-1),
    "dkd": _dkd,
}


def plain(dense: Case, name: str) -> LossFunction:
    """Make a loss function of eager PyTorch on logits cast to float32."""
    t, formula = dense.temperature, FORMULAS[name]
    return lambda s, w, y: t**2 * formula(s.float() / t, w.float() / t, y).mean()


# ---- packages

# torchtune's forward KL omits the teacher's entropy, and so is the soft cross entropy.
_TORCHTUNE = {
    "reverse_kl": "ReverseKLLoss",
    "symmetric_kl": "SymmetricKLLoss",
    "soft_cross_entropy": "ForwardKLLoss",
}


def torchtune(dense: Case, name: str) -> LossFunction:
    """Make torchtune's loss of logits / T, multiplied by T^2."""
    t = dense.temperature
    criterion = getattr(baselines.load_torchtune_losses(), _TORCHTUNE[name])()
    return lambda s, w, y: t**2 * criterion(s / t, w / t, y)


def liger(dense: Case, name: str) -> LossFunction:
    """Make Liger-Kernel's JSD, multiplied by the squared temperature."""
    loss = baselines.find_baseline("Liger JSD").make(dense)
    return lambda s, w, y: dense.temperature**2 * loss(s, w, y)


def list_makers(name: str) -> dict[str, Callable[[Case, str], LossFunction]]:
    """Return the functions that make a divergence's loss functions, by implementation."""
    functions: dict[str, Callable[[Case, str], LossFunction]] = {FUSED: fused, PLAIN: plain}
    if name in _TORCHTUNE:
        functions["torchtune"] = torchtune
    if name == "jsd":
        functions["Liger"] = liger
    return functions


# ---- measuring


def compute_errors(case: DivergenceCase, step: Step) -> tuple[float, float]:
    """Return the relative errors of a step's loss and gradient against float64."""
    inputs, dense = step.sets[0], case.dense
    loss, gradient = step.run(inputs)
    assert gradient is not None
    options = {"temperature": dense.temperature, "hard_weight": 0.0, "soft_weight": 1.0}
    exact = squares = squared_errors = 0.0
    rows = max(1, CHUNK // dense.classes)
    for start in range(0, dense.rows, rows):
        part = slice(start, start + rows)
        leaf = inputs.student.detach()[part].double().requires_grad_()
        truth = reference.loss(
            leaf,
            inputs.teacher[part].double(),
            inputs.labels[part],
            divergence=case.name,
            normalizer=float(dense.rows),
            **options,
        )
        (exact_gradient,) = torch.autograd.grad(truth, leaf)
        exact += truth.item()
        squares += exact_gradient.square().sum().item()
        squared_errors += (gradient[part].double() - exact_gradient).square().sum().item()
    return abs(loss.item() / exact - 1), (squared_errors / squares) ** 0.5


def check_errors(case: DivergenceCase, name: str, step: Step) -> dict[str, float]:
    """Return a step's errors, or raise RuntimeError if an error exceeds its bound."""
    loss_error, gradient_error = compute_errors(case, step)
    dtype = case.dense.dtype
    loss_limit, limit = LOSS_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    if name == FUSED:
        loss_limit = limit = TOLERANCE[dtype]
    # torchtune's symmetric KL omits the teacher's entropy, which changes the loss by a constant.
    has_other_value = name == "torchtune" and case.name == "symmetric_kl"
    is_loss_right = loss_error <= loss_limit or has_other_value
    if case.name == "total_variation":
        limit = max(limit, SIGN_TOLERANCE)
    if not (is_loss_right and gradient_error <= limit):
        raise RuntimeError(f"loss off by {loss_error:.1e}, gradient by {gradient_error:.1e}")
    return {"loss_error": loss_error, "gradient_error": gradient_error}


def run(case: DivergenceCase, device: str, seconds: float) -> dict[str, Any]:
    """Check all implementations of a divergence, then time loss and backward pass in turns."""
    sets = make_sets(case.dense, device)
    records: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, make in list_makers(case.name).items():
        records[name] = {"status": "ok"}
        with record_failure(records[name]):
            step = Step(case.dense, make(case.dense, case.name), sets)
            records[name].update(check_errors(case, name, step))
            steps[name] = step
    if FUSED not in steps:
        raise RuntimeError(records[FUSED]["status"])
    if case.name != BASE:
        records[BASE] = {"status": "ok"}
        steps[BASE] = Step(case.dense, fused(case.dense, BASE), sets)
    kind = "device" if case.dense.elements >= WALL_LIMIT else "wall"
    times = time_in_turns(dict(steps), device, kind, seconds)
    for name, measured in times.items():
        records[name]["times"] = asdict(measured)
    ours = times[FUSED].median
    base = times.get(BASE, times[FUSED]).median
    return {
        "title": case.title,
        "divergence": case.name,
        "classes": case.dense.classes,
        "fused": case.name in DIVERGENCES,
        "lanes": records,
        "of the forward KL": ours / base,
        "baselines": {
            name: measured.median / ours
            for name, measured in times.items()
            if name not in (FUSED, BASE)
        },
    }
