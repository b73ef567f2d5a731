"""Measure sizes, answers and latencies of models for a report."""

from __future__ import annotations

import contextlib
import copy
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import batches, deployment

BINS = 15
TURNS = 10  # timed turns of each model, after a turn that warms up
LEAST_CALLS = 3  # least number of a model's timed calls in a turn, after one that fills the caches
QUIET = 0.9  # least share of the needed processor time that the process gets in a quiet turn
DISAGREE = 1.5  # a ratio is withheld if its two estimates differ by more than this factor
WIDE = 2.0  # a 95th percentile of more than WIDE times the median gives a warning


class Size(NamedTuple):
    """Hold the size of a model; a field is None if unknown."""

    parameters: int | None
    bytes: int | None
    """Bytes of a program's file, or of a module's weights and buffers."""


class Bin(NamedTuple):
    """Hold means over the rows whose confidence lies in one of 15 equal parts of [0, 1].

    The confidence of a row is the largest probability.
    """

    rows: int
    confidence: float
    accuracy: float


class Answers(NamedTuple):
    """Hold the quality of a model's predictions.

    Without labels, ``bins`` is empty, and the other fields but ``rows`` and ``agreement`` are None.
    """

    rows: int
    accuracy: float | None
    accuracy_low: float | None
    """Lower end of the 95 % Wilson interval, which assumes independent rows."""
    accuracy_high: float | None
    cross_entropy: float | None
    agreement: float
    calibration_error: float | None
    bins: tuple[Bin, ...]

    @property
    def quality(self) -> float:
        """Return the accuracy, or the agreement if there are no labels."""
        return self.agreement if self.accuracy is None else self.accuracy


class Latency(NamedTuple):
    """Hold the seconds of a forward pass, and the samples per second at the median."""

    p50: float
    p95: float
    throughput: float
    calls: int
    speedup: float | None
    """The teacher's duration divided by this model's duration; None if withheld, with a warning."""


class Turn(NamedTuple):
    """Hold the durations of each model's calls in one turn."""

    share: float
    """Processor time that the process got, divided by the processor time that it needed."""
    times: dict[str, list[float]]
    """Seconds of each call, by the name of the model."""


def measure_size(model: nn.Module) -> Size:
    """Count parameters and bytes; shared memory counts once."""
    if isinstance(model, deployment.DeployedModel):
        return Size(model.parameter_count, model.bytes)
    # Quantized layers keep tensors in tuples of the state dict.
    state = [part for tensor in batches.tensors(model.state_dict()) for part in _unwrap(tensor)]
    sizes = {(t.device, t.data_ptr() or id(t), t.nbytes): t.nbytes for t in state}
    # Layers of torch.ao.quantization have packed weights in place of parameters.
    is_packed = any(tensor.is_quantized for tensor in state)
    count = None if is_packed else sum(parameter.numel() for parameter in model.parameters())
    return Size(count, sum(sizes.values()))


def _unwrap(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that a tensor subclass holds, such as torchao's 8-bit weights and scales.

    ``nbytes`` of such a subclass is that of the float32 weights.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _unwrap(getattr(tensor, name))


class _Tally:
    """Sum the measurements of one model over rows."""

    def __init__(self, name: str) -> None:
        self.name, self.is_labeled = name, True
        self.rows = self.agreeing = 0
        self.cross_entropy = 0.0
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # rows, confidence, correct

    def add(self, logits: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        """Add rows: logits ``[rows, classes]``, the teacher's most probable classes, and labels."""
        # Take the argmax of the logits, because rounding may make entries of log_p equal.
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
            self.is_labeled = False
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
        if not self.is_labeled:
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
    """Compute the 95 % interval of ``share``, which was observed in ``rows`` rows (Wilson 1927)."""
    z = 1.959964
    center = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def measure_answers(
    models: Mapping[str, nn.Module], loader: Iterable[Any], ignore_index: int, dim: int
) -> tuple[dict[str, Answers], Any]:
    """Measure each model's answers to all batches; return answers and the first batch's inputs.

    The first model is the teacher. All models get the same batch, so the loader may shuffle.
    """
    tallies = {name: _Tally(name) for name in models}
    first = None
    with contextlib.ExitStack() as stack:
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
    """Return the logits ``[rows, classes]`` and labels of the rows that are not ignored."""
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
    """Return ``count`` samples: the first samples of ``inputs``, repeated if there are fewer."""

    def take(tensor: Tensor) -> Tensor:
        index = torch.arange(count, device=tensor.device)
        return tensor[index % len(tensor)] if tensor.dim() else tensor

    return batches.map_tensors(take, inputs)


def measure_latencies(
    models: Mapping[str, nn.Module],
    inputs: Any,
    devices: Sequence[torch.device],
    batch_sizes: Sequence[int],
    seconds: float,
) -> tuple[dict[str, dict[str, dict[int, Latency]]], list[str]]:
    """Return latencies by model, then by device, then by batch size, and warnings."""
    latencies: Any = {name: {str(device): {} for device in devices} for name in models}
    warnings = []
    for device in devices:
        moved = {
            name: model if batches.device_of(model) == device else copy.deepcopy(model).to(device)
            for name, model in models.items()
        }
        with contextlib.ExitStack() as stack:
            for model in moved.values():
                stack.enter_context(batches.evaluating(model))
            for batch_size in batch_sizes:
                turns = _time_in_turns(moved, resize(inputs, batch_size), device, seconds)
                by_model, reasons = summarize_turns(turns, batch_size)
                place = f"{name_device(device)}, batch {batch_size}"
                warnings += [f"{place}: {reason}." for reason in reasons]
                for name, latency in by_model.items():
                    latencies[name][str(device)][batch_size] = latency
        for name in models:
            subject = f"{name_device(device)}: {name}'s"
            warnings += _compare_batches(subject, latencies[name][str(device)])
    return latencies, warnings


def name_device(device: object) -> str:
    """Return the name of a device for tables and plots."""
    return "CPU" if str(device) == "cpu" else f"GPU {device}"


def summarize_turns(turns: Sequence[Turn], batch_size: int) -> tuple[dict[str, Latency], list[str]]:
    """Compute each model's latency, the teacher's first, and warnings.

    The speedup is the median over turns of the teacher's fastest call divided by the model's
    fastest call, because other programs disturb fast calls least. The speedup is withheld if the
    ratio of the median latencies differs from the speedup by more than the factor ``DISAGREE``, or
    if the process waited for processors in most turns.
    """
    quiet = [turn for turn in turns if turn.share >= QUIET]
    is_quiet = 2 * len(quiet) >= len(turns)
    used = quiet if is_quiet else turns
    latencies: dict[str, Latency] = {}
    warnings, wide = [], []
    if not is_quiet:
        share = _compute_quantile([turn.share for turn in turns], 0.5)
        warnings.append(
            f"speed ratios are withheld; the process got {100 * share:.0f} % of the processor time "
            "it asked for: other programs ran, or it has more threads than processors"
        )
    teacher = next(iter(turns[0].times))
    for name in turns[0].times:
        times = [seconds for turn in used for seconds in turn.times[name]]
        p50, p95 = (_compute_quantile(times, share) for share in (0.5, 0.95))
        by_median = latencies[teacher].p50 / p50 if latencies else 1.0
        ratios = [min(turn.times[teacher]) / min(turn.times[name]) for turn in used]
        speedup = _compute_quantile(ratios, 0.5)
        is_consistent = 1 / DISAGREE <= by_median / speedup <= DISAGREE
        if is_quiet and not is_consistent:
            warnings.append(
                f"{name}'s speed ratio is withheld; it is {by_median:,.3g} by the medians, "
                f"{speedup:,.3g} by the fastest calls"
            )
        elif is_quiet and p95 > WIDE * p50:
            wide.append(name)
        latencies[name] = Latency(
            p50, p95, batch_size / p50, len(times), speedup if is_quiet and is_consistent else None
        )
    if wide:
        warnings.append(f"95th percentile over {WIDE:g}x the median: {', '.join(wide)}")
    return latencies, warnings


def _compare_batches(name: str, by_batch: Mapping[int, Latency]) -> list[str]:
    """Return a warning if samples take over 20 % longer in the largest batch than the smallest."""
    small, large = min(by_batch), max(by_batch)
    times, samples = by_batch[large].p50 / by_batch[small].p50, large / small
    if times <= 1.2 * samples:  # caches may explain up to 20 %
        return []
    return [f"{name} batch {large} takes {times:,.0f}x as long as its batch {small}."]


def _compute_quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def _time_in_turns(
    models: Mapping[str, nn.Module], inputs: Any, device: torch.device, seconds: float
) -> list[Turn]:
    """Time single calls in turns; the calls of each model take at least ``seconds`` in all."""
    arguments = {
        name: batches.arguments(model, _move(inputs, model)) for name, model in models.items()
    }

    def time_calls(name: str, seconds: float) -> list[float]:
        model, (positional, keywords) = models[name], arguments[name]
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) <= LEAST_CALLS or time.perf_counter() < end:
            start = time.perf_counter()
            model(*positional, **keywords)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return times[1:]

    for name in models:
        time_calls(name, 0.0)
    turns = []
    for _ in range(TURNS):
        before = _read_processor_time()
        times = {name: time_calls(name, seconds / TURNS) for name in models}
        after = _read_processor_time()  # may be less than before if threads have ended
        running, waiting = (max(0, b - a) for a, b in zip(before, after, strict=True))
        turns.append(Turn(1 - waiting / max(running + waiting, 1), times))
    return turns


def _read_processor_time() -> tuple[int, int]:
    """Return the nanoseconds that this process's threads ran, and waited for a processor.

    On systems other than Linux, return 0 and 0.
    """
    running = waiting = 0
    for file in pathlib.Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            counts = file.read_text().split()
            running, waiting = running + int(counts[0]), waiting + int(counts[1])
    return running, waiting
