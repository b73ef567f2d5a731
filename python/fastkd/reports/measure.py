"""A report's figures."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import batches

BINS = 15
# Calls in a turn; the first, after another model's turn, is not counted.
BURST = 6
LEAST_BURSTS = 4


class Size(NamedTuple):
    """How large a model is."""

    parameters: int
    bytes: int
    """Of its weights and buffers, as a file of them has."""


class Bin(NamedTuple):
    """Rows whose confidence, the largest probability, is in one of 15 equal parts of [0, 1]."""

    rows: int
    confidence: float
    accuracy: float


class Answers(NamedTuple):
    """How well a model answers; what needs labels is None without them."""

    rows: int
    accuracy: float | None
    accuracy_low: float | None
    """The 95 % Wilson interval, rows taken as independent."""
    accuracy_high: float | None
    cross_entropy: float | None
    agreement: float
    calibration_error: float | None
    bins: tuple[Bin, ...]


class Latency(NamedTuple):
    """Seconds of one forward pass, and samples in a second at the median."""

    p50: float
    p95: float
    throughput: float
    calls: int


def size(model: nn.Module) -> Size:
    """Parameters and bytes, shared ones once."""
    # Quantised layers keep theirs in tuples.
    tensors = list(batches.tensors(model.state_dict()))
    held = {(t.device, t.data_ptr() or id(t), t.nbytes): t.nbytes for t in tensors}
    return Size(sum(parameter.numel() for parameter in model.parameters()), sum(held.values()))


class _Tally:
    """Sums over rows."""

    def __init__(self) -> None:
        self.rows = self.agreeing = 0
        self.labelled = True
        self.confidence = self.cross_entropy = 0.0
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # rows, confidence, correct

    def add(self, logits: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        """Logits ``[rows, C]`` of the model, the teacher's classes and the labels, ``[rows]``."""
        # Of the logits, as the teacher's: where they hardly differ, rounding makes log_p equal.
        chosen = logits.argmax(-1)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        confidence = log_p.amax(-1)
        self.rows += len(logits)
        self.confidence += float(confidence.sum())
        self.agreeing += int((chosen == teacher).sum())
        if labels is None:
            self.labelled = False
            return
        confidence = confidence.exp().double()
        self.cross_entropy += float(F.nll_loss(log_p, labels, reduction="sum").double())
        # Bins are open below, closed above: (0, 1/15], ...
        bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, (chosen == labels).double()])
        self.bins.index_add_(1, bins.cpu(), values.cpu())

    @property
    def total(self) -> float:
        """Not finite once anything was not."""
        return self.confidence + self.cross_entropy

    def result(self) -> Answers:
        """Means."""
        agreement = self.agreeing / self.rows
        if not self.labelled:
            return Answers(self.rows, None, None, None, None, agreement, None, ())
        rows, confidence, correct = self.bins
        accuracy = float(correct.sum()) / self.rows
        error = float((confidence - correct).abs().sum()) / self.rows
        bins = tuple(
            Bin(int(n), float(c / n) if n else 0.0, float(a / n) if n else 0.0)
            for n, c, a in zip(rows, confidence, correct, strict=True)
        )
        return Answers(
            self.rows,
            accuracy,
            *wilson(accuracy, self.rows),
            self.cross_entropy / self.rows,
            agreement,
            error,
            bins,
        )


def wilson(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share that was seen in ``rows`` (Wilson, 1927).

    Example:
        >>> low, high = wilson(1.0, 100)
        >>> round(low, 3), round(high, 3)
        (0.963, 1.0)
    """
    z = 1.959964
    centre = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def answers(
    models: Mapping[str, nn.Module], loader: Iterable[Any], ignore_index: int, dim: int
) -> tuple[dict[str, Answers], Any]:
    """What each model answers to every batch, and the inputs of the first one.

    The first model is the teacher. All see the same batch, so the loader may shuffle.
    """
    tallies = {name: _Tally() for name in models}
    first = None
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(batches.evaluating(model))
        for batch in loader:
            inputs, labels, _ = batches.split(batch)
            first = inputs if first is None else first
            teacher = None
            for name, model in models.items():
                logits = _ask(model, inputs).movedim(dim, -1)
                home = logits.device
                where, flat = _rows(name, logits, labels, ignore_index)
                chosen = logits[where]
                teacher = chosen.argmax(-1).cpu() if teacher is None else teacher
                if len(teacher) != len(chosen):
                    raise ValueError(
                        f"{name}: its logits {tuple(logits.shape)} have {len(chosen)} rows that "
                        f"count, the teacher's {len(teacher)}"
                    )
                tallies[name].add(chosen, teacher.to(home), flat)
                if not math.isfinite(tallies[name].total):
                    raise ValueError(f"{name}: its logits, or their cross entropy, are not finite")
    if any(tally.rows == 0 for tally in tallies.values()):
        raise ValueError("loader: it has no rows to measure on (none at all, or all are ignored)")
    return {name: tally.result() for name, tally in tallies.items()}, first


def _ask(model: nn.Module, inputs: Any) -> Tensor:
    device, dtype = batches.device_of(model), batches.dtype_of(model)
    return batches.logits(model, batches.to(inputs, device, dtype))


def _rows(
    name: str, logits: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Which rows count, ``(...)`` bool, and their labels, ``[rows]``."""
    if labels is None:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device), None
    labels = labels.to(logits.device)
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be class ids of shape {tuple(logits.shape[:-1])}, as {name}'s logits "
            f"{tuple(logits.shape)} have rows; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()  # what uint8 is compared with is wrapped to it
    where = labels != ignore_index
    found = labels[where]
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels must be in 0 to {logits.shape[-1] - 1}, the classes of {name}, or "
            f"{ignore_index}; got {int(found.min())} to {int(found.max())}"
        )
    return where, found


def _take(inputs: Any, count: int) -> Any:
    """Its first ``count`` samples, beginning anew where there are fewer."""
    if isinstance(inputs, Tensor):
        if not inputs.dim():  # no sample's
            return inputs
        return inputs[torch.arange(count, device=inputs.device) % len(inputs)]
    if isinstance(inputs, Mapping):
        return {key: _take(value, count) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        taken = [_take(value, count) for value in inputs]
        return type(inputs)(*taken) if hasattr(inputs, "_fields") else type(inputs)(taken)
    return inputs


def latencies(
    models: Mapping[str, nn.Module],
    sample: Any,
    device: torch.device,
    batch_sizes: tuple[int, ...],
    seconds: float,
) -> dict[str, dict[int, Latency]]:
    """By model, then by batch size."""
    found: dict[str, dict[int, Latency]] = {name: {} for name in models}
    there = {
        name: model if batches.device_of(model) == device else copy.deepcopy(model).to(device)
        for name, model in models.items()
    }
    with ExitStack() as stack:
        for model in there.values():
            stack.enter_context(batches.evaluating(model))
        for batch_size in batch_sizes:
            times = _turns(there, _take(sample, batch_size), device, seconds)
            for name, taken in times.items():
                p50, p95 = torch.tensor(taken, dtype=torch.float64).quantile(
                    torch.tensor([0.5, 0.95], dtype=torch.float64)
                )
                found[name][batch_size] = Latency(
                    float(p50), float(p95), batch_size / float(p50), len(taken)
                )
    return found


def _turns(
    models: Mapping[str, nn.Module], inputs: Any, device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of single calls; models take turns until each has had its time."""
    ready = {
        name: batches.arguments(model, batches.to(inputs, device, batches.dtype_of(model)))
        for name, model in models.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in models}
    spent = dict.fromkeys(models, 0.0)
    turn = 0
    while turn < LEAST_BURSTS or min(spent.values()) < seconds:
        for name, model in models.items():
            if turn >= LEAST_BURSTS and spent[name] >= seconds:
                continue
            positional, keywords = ready[name]
            for call in range(BURST):
                began = time.perf_counter()
                model(*positional, **keywords)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                elapsed = time.perf_counter() - began
                spent[name] += elapsed
                if turn and call:  # the first turn is for warming up
                    taken[name].append(elapsed)
        turn += 1
    return taken
