"""Measure the figures of a report: sizes, answers and latencies of models."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import batches, deployment

BINS = 15
BURST = 6  # calls in a turn; the first one, after another model's turn, is not counted
LEAST_BURSTS = 4


class Size(NamedTuple):
    """How large a model is; a field is None if it is unknown."""

    parameters: int | None
    bytes: int | None
    """Bytes of its file, or for a module of its weights and buffers, as in a file of them."""


class Bin(NamedTuple):
    """Rows whose confidence, the largest probability, is in one of 15 equal parts of [0, 1]."""

    rows: int
    confidence: float
    accuracy: float


class Answers(NamedTuple):
    """Quality of a model's predictions; fields that need labels are None without labels."""

    rows: int
    accuracy: float | None
    accuracy_low: float | None
    """Lower end of the 95 % Wilson interval, which takes rows as independent."""
    accuracy_high: float | None
    cross_entropy: float | None
    agreement: float
    calibration_error: float | None
    bins: tuple[Bin, ...]


class Latency(NamedTuple):
    """Seconds of a forward pass, and samples per second at the median."""

    p50: float
    p95: float
    throughput: float
    calls: int


def measure_size(model: nn.Module) -> Size:
    """Count parameters and bytes; shared memory counts once."""
    if isinstance(model, deployment.DeployedModel):
        return Size(model.parameter_count, model.bytes)
    # Quantized layers keep tensors in tuples of the state dict.
    tensors = list(batches.tensors(model.state_dict()))
    sizes = {(t.device, t.data_ptr() or id(t), t.nbytes): t.nbytes for t in tensors}
    return Size(sum(parameter.numel() for parameter in model.parameters()), sum(sizes.values()))


class _Tally:
    """Sums over a model's rows."""

    def __init__(self, name: str) -> None:
        self.name, self.is_labelled = name, True
        self.rows = self.agreeing = 0
        self.cross_entropy = 0.0
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # rows, confidence, correct

    def add(self, logits: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        """Add logits ``[rows, C]`` of the model, the teacher's classes and the labels."""
        # Not the argmax of log_p: rounding makes log_p equal where logits hardly differ.
        predicted = logits.argmax(-1)
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        confidence = log_p.amax(-1)
        total = confidence.sum()
        if labels is not None:
            total = F.nll_loss(log_p, labels, reduction="sum").double()
        if not total.isfinite():
            raise ValueError(f"{self.name}: its logits, or their cross entropy, are not finite")
        self.rows += len(logits)
        self.agreeing += int((predicted == teacher).sum())
        if labels is None:
            self.is_labelled = False
            return
        self.cross_entropy += float(total)
        confidence = confidence.exp().double()
        # Bins are open below and closed above: (0, 1/15], ...
        bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        correct = (predicted == labels).double()
        values = torch.stack([torch.ones_like(confidence), confidence, correct])
        self.bins.index_add_(1, bins.cpu(), values.cpu())

    def average(self) -> Answers:
        """Return the means over rows."""
        agreement = self.agreeing / self.rows
        if not self.is_labelled:
            return Answers(self.rows, None, None, None, None, agreement, None, ())
        rows, confidence, correct = self.bins
        accuracy = float(correct.sum()) / self.rows
        error = float((confidence - correct).abs().sum()) / self.rows
        means = (self.bins[1:] / rows.clamp(min=1)).T.tolist()
        bins = tuple(Bin(int(n), *mean) for n, mean in zip(rows, means, strict=True))
        interval = compute_wilson_interval(accuracy, self.rows)
        cross_entropy = self.cross_entropy / self.rows
        return Answers(self.rows, accuracy, *interval, cross_entropy, agreement, error, bins)


def compute_wilson_interval(share: float, rows: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share that was observed in ``rows`` (Wilson, 1927)."""
    z = 1.959964
    center = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def measure_answers(
    models: Mapping[str, nn.Module], loader: Iterable[Any], ignore_index: int, dim: int
) -> tuple[dict[str, Answers], Any]:
    """Measure each model's answers to all batches; return them and the first batch's inputs.

    The first model is the teacher. All models get the same batch, so the loader may shuffle.
    """
    tallies = {name: _Tally(name) for name in models}
    first = None
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(batches.evaluating(model))
        for batch in loader:
            inputs, labels, _ = batches.split(batch)
            first = inputs if first is None else first
            teacher = None
            for name, model in models.items():
                logits = batches.logits(model, _move(inputs, model)).movedim(dim, -1)
                rows, row_labels = _select_rows(name, logits, labels, ignore_index)
                teacher = rows.argmax(-1).cpu() if teacher is None else teacher
                if len(teacher) != len(rows):
                    raise ValueError(
                        f"{name}: its logits {tuple(logits.shape)} have {len(rows)} rows that "
                        f"count, the teacher's {len(teacher)}"
                    )
                tallies[name].add(rows, teacher.to(rows.device), row_labels)
    if any(tally.rows == 0 for tally in tallies.values()):
        raise ValueError("loader: it has no rows to measure on (none at all, or all are ignored)")
    return {name: tally.average() for name, tally in tallies.items()}, first


def _move(inputs: Any, model: nn.Module) -> Any:
    return batches.to(inputs, batches.device_of(model), batches.dtype_of(model))


def _select_rows(
    name: str, logits: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Return the logits of the rows that are not ignored, ``[rows, C]``, and their labels."""
    if labels is None:
        return logits.flatten(0, -2), None
    labels = labels.to(logits.device)
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be class ids of shape {tuple(logits.shape[:-1])}, as {name}'s logits "
            f"{tuple(logits.shape)} have rows; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()  # a uint8 comparison would wrap -100 to 156
    mask = labels != ignore_index
    labels = labels[mask]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise ValueError(
            f"labels must be in 0 to {logits.shape[-1] - 1}, the classes of {name}, or "
            f"{ignore_index}; got {int(labels.min())} to {int(labels.max())}"
        )
    return logits[mask], labels


def resize(inputs: Any, count: int) -> Any:
    """Take the first ``count`` samples of a batch's inputs, repeating them if there are fewer."""

    def take(tensor: Tensor) -> Tensor:
        index = torch.arange(count, device=tensor.device)
        return tensor[index % len(tensor)] if tensor.dim() else tensor  # 0-d: of no sample

    return batches.map_tensors(take, inputs)


def measure_latencies(
    models: Mapping[str, nn.Module],
    inputs: Any,
    devices: Sequence[torch.device],
    batch_sizes: Sequence[int],
    seconds: float,
) -> dict[str, dict[str, dict[int, Latency]]]:
    """Measure latencies by model, then by device, then by batch size."""
    latencies: Any = {name: {str(device): {} for device in devices} for name in models}
    quantiles = torch.tensor([0.5, 0.95], dtype=torch.float64)
    for device in devices:
        moved = {
            name: model if batches.device_of(model) == device else copy.deepcopy(model).to(device)
            for name, model in models.items()
        }
        with ExitStack() as stack:
            for model in moved.values():
                stack.enter_context(batches.evaluating(model))
            for batch_size in batch_sizes:
                resized = resize(inputs, batch_size)
                for name, times in _time_in_turns(moved, resized, device, seconds).items():
                    p50, p95 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
                    latency = Latency(p50, p95, batch_size / p50, len(times))
                    latencies[name][str(device)][batch_size] = latency
    return latencies  # type: ignore[no-any-return]


def _time_in_turns(
    models: Mapping[str, nn.Module], inputs: Any, device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Time single calls; models take turns until each has been timed for ``seconds``."""
    arguments = {
        name: batches.arguments(model, _move(inputs, model)) for name, model in models.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    spent = dict.fromkeys(models, 0.0)
    turn = 0
    while turn < LEAST_BURSTS or min(spent.values()) < seconds:
        for name, (positional, keywords) in arguments.items():
            if turn >= LEAST_BURSTS and spent[name] >= seconds:
                continue
            for call in range(BURST):
                start = time.perf_counter()
                models[name](*positional, **keywords)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                elapsed = time.perf_counter() - start
                spent[name] += elapsed
                if turn and call:  # the first turn is a warm-up
                    times[name].append(elapsed)
        turn += 1
    return times
