"""Time calls in turns, in one process.

- In turns: each round takes one sample of every call. The order of the calls rotates and reverses
  between rounds, so that clock drift, other processes and cached data favor no call.
- Cold: a call alternates between sets of inputs that fill the last-level cache three times. A call
  has at most 16 sets, so the inputs of small cases stay in the caches.
- On a GPU, large cases are timed by events around a queued call, so that only the device's time
  counts. The wall clock times cases with fewer than 2^22 logits, which spend much time on the host.
- Results are the median and the 20th and 80th percentiles.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines import LossFunction
from benchmarks.cases import DTYPES, Case

WALL_LIMIT = 2**22
"""Number of logits below which GPU cases are timed by the wall clock."""
SLEEP_CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Inputs:
    """Hold the tensors of one call."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def get_cache_bytes(device: str) -> int:
    """Return the bytes of the last-level cache, or 32 MiB if a CPU's cache size is unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    size = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        size = max(size, int(text.rstrip("KMG")) * unit)
    return size or 32 * 2**20


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Draw labels and logits; the student's logits are correlated with the teacher's."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, dtype = (case.rows, case.classes), DTYPES[case.dtype]
    teacher = torch.randn(shape, generator=generator, device=device).mul_(2.5)
    student = (
        torch.randn(shape, generator=generator, device=device).mul_(1.5).add_(teacher, alpha=0.5)
    )
    labels = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    if case.ignored:
        skip = torch.rand(case.rows, generator=generator, device=device) < case.ignored
        labels.masked_fill_(skip, -100)
    student, teacher = student.to(dtype), teacher.to(dtype)
    if case.pixels:
        student, teacher = (logits.t().contiguous().t() for logits in (student, teacher))
    return Inputs(student.requires_grad_(case.gradient), teacher, labels)


def make_sets(case: Case, device: str) -> list[Inputs]:
    """Draw 2 to 16 sets of inputs, as many as fill the last-level cache three times."""
    each = 2 * case.tensor_bytes
    count = max(2, min(16, -(-3 * get_cache_bytes(device) // each)))
    return [make_inputs(case, device, seed) for seed in range(count)]


class _Produce(torch.autograd.Function):
    """Return the logits as a tensor that is not a leaf, so that a loss may overwrite them."""

    @staticmethod
    def forward(ctx: object, logits: Tensor, anchor: Tensor, sink: list[Tensor]) -> Tensor:  # type: ignore[override]
        ctx.sink = sink  # type: ignore[attr-defined]
        return logits.detach()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.sink[:] = [gradient]  # type: ignore[attr-defined]
        return None, None, None


@dataclass
class Step:
    """Run the loss and, for a case with gradient, the backward pass, on sets of inputs in turn."""

    case: Case
    function: LossFunction
    sets: Sequence[Inputs]
    non_leaf: bool = False
    turn: int = 0
    scale: Tensor | None = None
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))

    def __call__(self) -> None:
        """Run the step on the next set of inputs."""
        self.run(self.sets[self.turn])
        self.turn = (self.turn + 1) % len(self.sets)

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Return the loss of ``inputs``, and the gradient if the case has a gradient."""
        if not self.case.gradient:
            with torch.no_grad():
                return self.function(inputs.student, inputs.teacher, inputs.labels), None
        if self.non_leaf:
            sink: list[Tensor] = []
            student = _Produce.apply(inputs.student, self.anchor, sink)
            loss = self.function(student, inputs.teacher, inputs.labels)
            self._backward(loss)
            return loss, sink[0]
        inputs.student.grad = None
        loss = self.function(inputs.student, inputs.teacher, inputs.labels)
        self._backward(loss)
        gradient, inputs.student.grad = inputs.student.grad, None
        return loss, gradient

    def _backward(self, loss: Tensor) -> None:
        if self.case.grad_scale == 1.0:
            loss.backward()
            return
        if self.scale is None or self.scale.dtype != loss.dtype:
            self.scale = torch.full_like(loss, self.case.grad_scale)
        loss.backward(self.scale)


@dataclass(frozen=True)
class Times:
    """Hold percentiles of a call's seconds, and the number of samples."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def from_samples(cls, samples: list[float]) -> Times:
        """Compute the percentiles of samples in seconds."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3], len(samples))


class Clock:
    """Time calls by the wall clock ("wall") or by events on the GPU ("device")."""

    def __init__(self, device: str, kind: str) -> None:
        """Store the kind of clock, which is "wall" on a CPU."""
        self.cuda = device == "cuda"
        self.kind = kind if self.cuda else "wall"

    def time_wall(self, call: Callable[[], object], count: int) -> float:
        """Return the mean seconds of ``count`` consecutive calls."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        if self.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    def record_events(
        self, call: Callable[[], object], host: float
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Queue a call between two events while the GPU sleeps, and return the events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(1.5 * host + 5e-5, 5e-3) * SLEEP_CYCLES_PER_SECOND))
        start.record()
        call()
        end.record()
        return start, end


def _measure_host_seconds(call: Callable[[], object]) -> float:
    """Return the seconds that the host takes to send a call's work to the device."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def time_in_turns(
    calls: dict[str, Callable[[], object]],
    device: str,
    kind: str,
    seconds: float,
    least_rounds: int = 9,
) -> dict[str, Times]:
    """Time calls in turns for about ``seconds``, in ``least_rounds`` to 200 rounds."""
    clock = Clock(device, kind)
    estimates: dict[str, float] = {}
    host: dict[str, float] = {}
    for name, call in calls.items():
        call()
        estimates[name] = min(clock.time_wall(call, 1) for _ in range(2))
        if clock.kind == "device":
            host[name] = _measure_host_seconds(call)
    # The wall clock is too coarse for one short call, so its sample is the mean of several calls.
    shortest = 2e-3 if device == "cuda" else 3e-4
    counts = {
        name: 1 if clock.kind == "device" else max(1, min(1000, round(shortest / estimate)))
        for name, estimate in estimates.items()
    }
    round_seconds = sum(estimates[name] * counts[name] for name in calls)
    rounds = max(least_rounds, min(200, int(seconds / max(round_seconds, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn // 2 % len(names)
            order = names[shift:] + names[:shift]
            order = order[::-1] if turn % 2 else order
            events = {}
            for name in order:
                if clock.kind == "device":
                    events[name] = clock.record_events(calls[name], host[name])
                else:
                    samples[name].append(clock.time_wall(calls[name], counts[name]))
            if events:
                torch.cuda.synchronize()
                for name, (start, end) in events.items():
                    samples[name].append(start.elapsed_time(end) * 1e-3)
    finally:
        if was_enabled:
            gc.enable()
    return {name: Times.from_samples(values) for name, values in samples.items()}


def measure_cuda_peak(step: Step) -> float:
    """Return the peak memory of a call beyond its inputs, in tensors of logits."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / step.case.tensor_bytes
