"""Check every baseline of a case against float64, then time all baselines in turns."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

import fastkd
from benchmarks import baselines, environment, memory
from benchmarks.baselines import Baseline, UnavailableError
from benchmarks.cases import Case, Duel
from benchmarks.measure import (
    WALL_LIMIT,
    Inputs,
    Step,
    make_sets,
    measure_cuda_peak,
    time_in_turns,
)
from benchmarks.stream import make_streams
from benchmarks.truth import Truth

FLOOR = "s.sum()"
FLOOR_LIMIT = 2**18
"""Number of logits below which ``s.sum().backward()`` is also timed, as PyTorch's overhead."""
STREAM_LIMIT = 2**19
"""Number of logits below which times are not compared with the memory bandwidth: smaller cases fit
the caches, or take little longer than a kernel launch."""


@dataclass
class Settings:
    """Hold the device, durations and baselines of a run."""

    device: str
    seconds: float
    """Duration of timing for each case."""
    deadline: float = math.inf
    """Value of time.monotonic() after which compiled baselines are left out."""
    names: Sequence[str] = ()
    """Names of the baselines to measure; empty for all baselines."""
    missing: dict[str, str] = field(default_factory=dict)
    """Baselines that cannot be measured on this machine, with the reason."""


@contextlib.contextmanager
def record_failure(record: dict[str, Any]) -> Iterator[None]:
    """Store an exception as the record's status, which the report shows."""
    try:
        yield
    except UnavailableError as reason:
        record["status"] = f"not available: {reason}"
    except torch.OutOfMemoryError:
        record["status"] = "out of memory"
    except Exception as error:
        text = " ".join(str(error).split())
        record["status"] = f"failed: {type(error).__name__}: {text[:120]}"


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _copy_inputs(baseline: Baseline, sets: list[Inputs]) -> list[Inputs]:
    """Return the inputs, with copies of the student's logits if the baseline overwrites them."""
    if not baseline.overwrites:
        return sets
    return [
        Inputs(
            inputs.student.detach().clone().requires_grad_(inputs.student.requires_grad),
            inputs.teacher,
            inputs.labels,
        )
        for inputs in sets
    ]


def _prepare(
    baseline: Baseline, case: Case, sets: list[Inputs], truth: Truth, settings: Settings
) -> tuple[dict[str, Any], Step | None]:
    """Return a baseline's record, and its step if the errors of the first run are acceptable."""
    record: dict[str, Any] = {"status": "ok"}
    if baseline.name in settings.missing:
        record["status"] = settings.missing[baseline.name]
        return record, None
    if baseline.compiles != "no" and time.monotonic() > settings.deadline:
        record["status"] = "skipped: out of time"
        return record, None
    step = None
    with record_failure(record):
        function = baseline.make(case)
        first = _copy_inputs(baseline, sets[:1])
        step = Step(case, function, first, baseline.non_leaf)
        if baseline.compiles != "no":
            torch._dynamo.utils.counters.clear()
        start = time.perf_counter()
        loss, gradient = step.run(first[0])
        if settings.device == "cuda":
            torch.cuda.synchronize()
        if baseline.compiles != "no":
            record["compile_seconds"] = time.perf_counter() - start
            if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
                raise RuntimeError("torch.compile ran eagerly")
        errors = truth.compute_errors(baseline.truth, loss, gradient)
        record.update(
            loss_error=errors.loss,
            gradient_error=errors.gradient,
            gradient_max_error=errors.gradient_max,
        )
        if not errors.is_acceptable(case):
            record["status"] = "wrong answer"
        else:
            del loss, gradient
            step.sets = first + _copy_inputs(baseline, sets[1:]) if baseline.overwrites else sets
    if record["status"].startswith("not available"):
        settings.missing[baseline.name] = record["status"]
    if record["status"] != "ok":
        step = None
        _release(settings.device)
    return record, step


def run_case(
    case: Case, settings: Settings, show_status: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Check all baselines of a case, and measure time and memory."""
    device = settings.device
    torch.compiler.reset()  # Dynamo silently runs eagerly beyond its recompilation limit
    _release(device)
    kind = "device" if device == "cuda" and case.elements >= WALL_LIMIT else "wall"
    wanted = [
        baseline
        for baseline in baselines.BASELINES
        if baseline.is_for(case) and (not settings.names or baseline.name in settings.names)
    ]
    sets = make_sets(case, device)
    truth = Truth(case, sets[0].student, sets[0].teacher, sets[0].labels)
    records: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for baseline in wanted:
        show_status(f"{case.title}: {baseline.name}, first call and check")
        records[baseline.name], step = _prepare(baseline, case, sets, truth, settings)
        if step is not None:
            steps[baseline.name] = step
    rounding = truth.compute_rounding()
    del truth
    _release(device)

    show_status(f"{case.title}: timing")
    if device == "cuda":
        for name, step in steps.items():
            with record_failure(records[name]):
                records[name]["peak_tensors"] = measure_cuda_peak(step)
        steps = {name: step for name, step in steps.items() if records[name]["status"] == "ok"}
    calls: dict[str, Callable[[], object]] = dict(steps)
    if case.gradient and case.elements < FLOOR_LIMIT:
        calls[FLOOR] = Step(case, baselines.floor(case), sets)
        records[FLOOR] = {"status": "ok"}
    streams = make_streams(device) if case.elements >= STREAM_LIMIT else []
    calls |= {f"stream {stream.name}": stream.run for stream in streams}
    times = _time_working(calls, records, device, kind, settings.seconds)
    for name, record in records.items():
        if name in times:
            record["times"] = asdict(times[name])
    result: dict[str, Any] = {
        **case.asdict(),
        "title": case.title,
        "clock": kind,
        "sets": len(sets),
        "rounding": rounding,
        "lanes": records,
        "streams": {
            stream.name: stream.bytes / times[f"stream {stream.name}"].median
            for stream in streams
            if f"stream {stream.name}" in times
        },
        "clocks": environment.read_clocks(device),
    }
    _add_bandwidth(result, case)
    if device == "cpu" and case.memory:
        show_status(f"{case.title}: peak memory, in a child process")
        peaks = memory.measure_peaks_in_child(case, list(steps), torch.get_num_threads())
        for name, peak in peaks.items():
            records[name]["peak_tensors"] = peak
    del sets, steps, calls
    _release(device)
    return result


def _time_working(
    calls: dict[str, Callable[[], object]],
    records: dict[str, dict[str, Any]],
    device: str,
    kind: str,
    seconds: float,
) -> dict[str, Any]:
    """Time the calls in turns; after a failure, leave out calls that also fail by themselves."""
    try:
        return dict(time_in_turns(calls, device, kind, seconds))
    except Exception:
        _release(device)
    working: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        record = records.get(name, {"status": "ok"})
        with record_failure(record):
            time_in_turns({name: call}, device, kind, 0.0, least_rounds=1)
        if record["status"] == "ok":
            working[name] = call
        else:
            _release(device)
    try:
        return dict(time_in_turns(working, device, kind, seconds))
    except Exception as error:
        for name in working:
            if name in records:
                records[name]["status"] = f"failed while timed: {type(error).__name__}"
        return {}


def _add_bandwidth(result: dict[str, Any], case: Case) -> None:
    """Add each baseline's bytes per second, and their share of the measured memory bandwidth."""
    best = next(iter(result["streams"].values()), None)
    for name, record in result["lanes"].items():
        if "times" in record and name != FLOOR:
            record["bytes_per_second"] = case.least_bytes / record["times"]["median"]
            if best:
                record["share"] = record["bytes_per_second"] / best


def run_duel(duel: Duel, settings: Settings) -> dict[str, Any]:
    """Time fastkd on two cases in turns; return the times, and the ratio of times per logit."""
    device = settings.device
    _release(device)
    kind = "device" if duel.first.elements >= WALL_LIMIT else "wall"
    steps: dict[str, Callable[[], object]] = {}
    result: dict[str, Any] = {"name": duel.name, "status": "ok"}
    with record_failure(result):
        for name, case in (("first", duel.first), ("second", duel.second)):
            steps[name] = Step(case, baselines.fused(case), make_sets(case, device))
        times = time_in_turns(steps, device, kind, settings.seconds)
        first = times["first"].median / duel.first.elements
        second = times["second"].median / duel.second.elements
        result["ratio"] = first / second
        for name, case in (("first", duel.first), ("second", duel.second)):
            result[name] = {"title": case.title, **asdict(times[name])}
    return result


def measure_close_to_teacher(device: str, rows: int = 32, classes: int = 32000) -> dict[str, Any]:
    """Return the errors of fastkd and F.kl_div in float32 at a KL of 5e-7, where terms cancel."""
    generator = torch.Generator(device).manual_seed(0)
    teacher = torch.randn(rows, classes, generator=generator, device=device)
    noise = torch.randn(rows, classes, generator=generator, device=device)
    student = teacher + 1e-3 * noise
    log_p, log_q = F.log_softmax(teacher.double(), -1), F.log_softmax(student.double(), -1)
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    with torch.no_grad():
        ours = fastkd.loss(student, teacher, temperature=1.0, reduction="none")
        log_q, p = F.log_softmax(student, -1), F.softmax(teacher, -1)
        theirs = F.kl_div(log_q, p, reduction="none").sum(-1)

    def compute_errors(values: torch.Tensor) -> dict[str, float]:
        error = (values.double() - truth).abs() / truth
        return {"median": error.median().item(), "worst": error.max().item()}

    return {
        "what": f"KL of {truth.mean().item():.1e} ({rows} x {classes} fp32, T = 1), relative error",
        "kl": truth.mean().item(),
        "fastkd": compute_errors(ours),
        "F.kl_div": compute_errors(theirs),
    }


def run_scaling(
    series: dict[str, list[Case]], settings: Settings, show_status: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Time fastkd and eager PyTorch over rows, classes and, on a CPU, threads."""
    short = Settings(settings.device, settings.seconds / 6, names=("fastkd", "eager"))
    result: dict[str, list[dict[str, Any]]] = {}
    for name, cases in series.items():
        points: list[dict[str, Any]] = []
        if name != "threads":
            points = [run_case(case, short, show_status) for case in cases]
        else:
            before = torch.get_num_threads()
            for threads in range(1, before + 1):
                torch.set_num_threads(threads)
                points += [
                    {**run_case(case, short, show_status), "threads": threads} for case in cases
                ]
            torch.set_num_threads(before)
        result[name] = points
    return result
