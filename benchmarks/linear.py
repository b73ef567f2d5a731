"""Measure time and memory of the loss of two linear heads: ``python -m benchmarks.linear``.

All implementations are checked against float64, then timed in turns. The tables also show each time
divided by the GEMM time, which is the time of four necessary matrix products: the logits of student
and teacher, and the gradients of hidden states and weight. Memory is the peak of a step without its
inputs. On a CPU, a child process measures the memory, as in memory.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks import environment, memory, report
from benchmarks.baselines import UnavailableError
from benchmarks.cases import DTYPES
from benchmarks.linear_baselines import (
    ALPHA,
    LANES,
    TEMPERATURE,
    Inputs,
    LinearCase,
    LossFunction,
    list_cases,
    make_inputs,
    make_products,
)
from benchmarks.measure import time_in_turns
from fastkd import Head
from fastkd.linear.planner import MIB

PAGE = Path(__file__).parent.parent / "docs" / "linear.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


# ---- measuring


def run_step(function: LossFunction, inputs: Inputs) -> Tensor:
    """Drop the gradients of the previous step, compute new gradients, and return the loss."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss = function(inputs)
    loss.backward()
    return loss


def compute_truth(inputs: Inputs, rows: int = 256) -> tuple[float, Tensor, Tensor]:
    """Compute loss and gradients in float64, ``rows`` rows at a time."""
    wide = [value.detach().double() for value in inputs[:4]]
    hidden, weight = wide[0], wide[1].requires_grad_()
    count = int((inputs.labels != -100).sum())
    total, hidden_grads = 0.0, []
    weight_grad = torch.zeros_like(wide[1])
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        leaf = hidden[part].clone().requires_grad_()
        loss = fastkd.reference.loss(
            F.linear(leaf, weight),
            F.linear(wide[2][part], wide[3]),
            inputs.labels[part],
            temperature=TEMPERATURE,
            hard_weight=ALPHA,
            soft_weight=1 - ALPHA,
            normalizer=float(count),
        )
        grads = torch.autograd.grad(loss, [leaf, weight])
        total += loss.item()
        hidden_grads.append(grads[0])
        weight_grad += grads[1]
    return total, torch.cat(hidden_grads), weight_grad


def _compute_error(grad: Tensor | None, right: Tensor) -> float:
    assert grad is not None
    squares = sum(
        (part.double() - exact).square().sum().item()
        for part, exact in zip(grad.split(4096), right.split(4096), strict=True)
    )
    return float(squares**0.5 / right.norm().item())


def measure_peak_mib(case: LinearCase, name: str, device: str) -> float | None:
    """Return the peak memory of a step beyond its inputs in MiB; None if a child process fails."""
    if device == "cuda":
        function, inputs = LANES[name](case), make_inputs(case, device)
        run_step(function, inputs)
        inputs.hidden.grad = inputs.weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_step(function, inputs)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    command = [sys.executable, "-m", "benchmarks.linear", "--peak", json.dumps(asdict(case)), name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=Path(__file__).parent.parent,
            check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        )
        return float(done.stdout.splitlines()[-1]) / MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _measure_peak_here(case: LinearCase, name: str) -> int:
    """Return the peak memory of a step beyond its inputs in bytes, measured in this process."""
    function, inputs = LANES[name](case), make_inputs(case, "cpu")
    run_step(function, inputs)
    inputs.hidden.grad = inputs.weight.grad = None
    memory.release_free_memory()
    before = memory.read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run_step(function, inputs)
    return max(0, memory.read_status("VmHWM") - before)


def run(case: LinearCase, device: str, seconds: float, names: list[str]) -> dict[str, Any]:
    """Check all implementations, time them in turns, and measure their memory."""
    inputs = make_inputs(case, device)
    exact = compute_truth(inputs)
    records: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {"products alone": make_products(case, inputs)}
    for name in names:
        try:
            function = LANES[name](case)
            loss = run_step(function, inputs)
            records[name] = {
                "status": "ok",
                "loss_error": abs(loss.item() / exact[0] - 1),
                "hidden_error": _compute_error(inputs.hidden.grad, exact[1]),
                "weight_error": _compute_error(inputs.weight.grad, exact[2]),
            }
        except UnavailableError as reason:
            if str(reason) not in ("not tried", "the same as eager in float32"):
                records[name] = {"status": f"not available: {reason}"}
            continue
        except Exception as error:
            records[name] = {"status": f"failed: {type(error).__name__}: {str(error)[:120]}"}
            continue
        if max(records[name]["hidden_error"], records[name]["weight_error"]) > 0.25:
            records[name]["status"] = "wrong answer"
            continue
        calls[name] = lambda function=function: run_step(function, inputs)
    del exact
    gc.collect()
    kind = "device" if device == "cuda" else "wall"
    times = time_in_turns(calls, device, kind, seconds)
    del calls
    inputs.hidden.grad = inputs.weight.grad = None
    gc.collect()
    floor = times["products alone"]
    for name, measured in times.items():
        record = records.setdefault(name, {"status": "ok"})
        record["times"] = asdict(measured)
        record["of the products"] = measured.median / floor.median
        if name in LANES:
            record["peak_mib"] = measure_peak_mib(case, name, device)
    return {**asdict(case), "title": case.title, "lanes": records}


# ---- showing


def list_verdicts(results: dict[str, Any]) -> list[str]:
    """Return the verdict on each bound, and comparisons with eager PyTorch."""
    records = results["lanes"]

    def judge(name: str, bound: tuple[float, float]) -> str:
        record = records.get(name, {})
        if "of the products" not in record or record.get("peak_mib") is None:
            return f"{name}: not measured"
        time, peak = record["of the products"], record["peak_mib"]
        verdict = "reached" if time <= bound[0] and peak <= bound[1] else "missed"
        return f"{name}: target of {bound[0]:.2f}x the GEMM time and {bound[1]:.0f} MiB {verdict}"

    result = []
    if results["small_mib"] and "fastkd, small" in records:
        summed = "bfloat16" if results["dtype"] == "bf16" else "float32"
        result.append(f"small: max_workspace of {results['small_mib']} MiB, dW summed in {summed}")
    for name, key in (
        ("fastkd", "must"),
        ("fastkd, small", "small_must"),
        ("fastkd, smallest", "smallest_must"),
    ):
        if results.get(key):  # some cases have no bound
            result.append(judge(name, results[key]))
    theirs = records.get("eager", {})
    for name in ("fastkd", "fastkd, smallest"):
        ours = records.get(name, {})
        if all("times" in record and record.get("peak_mib") for record in (theirs, ours)):
            time = ours["times"]["median"] / theirs["times"]["median"]
            memory_share = ours["peak_mib"] / theirs["peak_mib"]
            result.append(
                f"{name}: {time:.2f}x the time and {memory_share:.2f}x the memory of eager"
            )
    result += list_error_verdicts(records)
    return result


def list_error_verdicts(records: dict[str, Any]) -> list[str]:
    """Compare fastkd's gradient errors with those of eager, and 1.1 times those of eager fp32."""
    bounds = {"eager": 1.0, "eager fp32": 1.1}
    if any("weight_error" not in records.get(name, {}) for name in bounds):
        return []
    missed = [
        f"{name}: {title} error above the target"
        for name, record in records.items()
        if name.startswith("fastkd") and "weight_error" in record
        for title, key in (("dX", "hidden_error"), ("dW", "weight_error"))
        if any(record[key] > factor * records[baseline][key] for baseline, factor in bounds.items())
    ]
    return missed or ["errors of dX and dW: at most eager's, and at most 1.1x eager fp32's"]


def make_table(results: dict[str, Any]) -> str:
    """Return a case's results as a Markdown table."""
    lines = [
        "| | time | time / GEMM time | MiB | loss error | dX error | dW error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, record in results["lanes"].items():
        if record["status"] != "ok":
            lines.append(f"| {name} | {record['status']} | | | | | |")
            continue
        cells = [
            name,
            report.format_duration(record["times"]["median"]),
            f"{record['of the products']:.2f}",
        ]
        peak = record.get("peak_mib")
        cells.append("" if peak is None else f"{peak:,.0f}")
        for key in ("loss_error", "hidden_error", "weight_error"):
            cells.append(f"{record[key]:.1e}" if key in record else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_markdown(results: dict[str, Any]) -> str:
    """Return the results of all cases as Markdown."""
    load = results["environment"]["load at the start"]
    busy = f" Other programs ran (load {load}), so the times are too long." if load > 0.5 else ""
    parts = [f"{report.describe_run(results)}.{busy}"]
    for each in results["cases"]:
        notes = "; ".join(list_verdicts(each))
        parts += [f"**{each['title']}**", make_table(each)] + ([f"{notes}."] if notes else [])
    return "\n\n".join(parts) + "\n"


def describe_plans() -> str:
    """Return a Markdown table of the memory that the planner predicts for a GPU."""
    lines = [
        "Planned for a GPU by `fastkd.chunks.plan`, not measured "
        "(Liger: memory of its fused kernel on an H100):",
        "",
        '| `chunk_by="classes"` | chunks | classes in the largest chunk | MiB '
        "| MiB if rows are ignored | MiB of Liger |",
        "|---|---|---|---|---|---|",
    ]
    for case in list_cases("cuda"):
        if case.smallest_must is None:
            continue
        student, teacher = (
            Head(
                *(
                    torch.empty(size, width, dtype=DTYPES[case.dtype], device="meta")
                    for size in (case.rows, case.classes)
                )
            )
            for width in (case.student_width, case.teacher_width)
        )
        student.weight.requires_grad_()
        labels = torch.empty(case.rows, dtype=torch.int64, device="meta")
        both, ignoring = (
            fastkd.chunks.plan(student, teacher, some, chunk_by="classes")
            for some in (None, labels)
        )
        lines.append(
            f"| {case.title} | {both.chunks} | {both.chunk} | {both.peak_bytes / MIB:,.0f} "
            f"| at most {ignoring.peak_bytes / MIB:,.0f} | {case.smallest_must[1]} |"
        )
    return "\n".join(lines) + "\n"


def rewrite_page() -> str:
    """Write the tables of all saved runs, and the plans, in docs/linear.md; return a summary."""
    saved = sorted(report.RESULTS.glob("*/linear.json"))
    runs = [format_markdown(json.loads(path.read_text())) for path in saved]
    body = "\n".join([*runs, describe_plans()])
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{body}{END}{after}")
    return f"{PAGE.name}: {len(saved)} runs"


def main() -> None:
    """Measure the cases and save the results, or rewrite docs/linear.md with ``--docs``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose title contains this")
    parser.add_argument("--lanes", nargs="+", default=list(LANES), choices=LANES)
    parser.add_argument("--seconds", type=float, help="duration of timing for each case")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--no-save", action="store_true", help="only show")
    parser.add_argument("--docs", action="store_true", help="only rewrite the figures of the docs")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.docs:
        print(rewrite_page())
        return
    if chosen.peak:
        fields = json.loads(chosen.peak[0])
        print(_measure_peak_here(LinearCase(**fields), chosen.peak[1]))
        return
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"environment": environment.describe(device), "cases": []}
    for case in list_cases(device):
        if chosen.only and chosen.only not in case.title:
            continue
        record = run(
            case, device, chosen.seconds or (2.0 if device == "cuda" else 20.0), chosen.lanes
        )
        results["cases"].append(record)
        lines = [record["title"], make_table(record), *list_verdicts(record), ""]
        print("\n".join(lines), flush=True)
    if chosen.no_save:
        return
    output = chosen.output or report.RESULTS / environment.make_slug(device)
    output.mkdir(parents=True, exist_ok=True)
    (output / "linear.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "linear.md").write_text("# Linear heads\n\n" + format_markdown(results))
    print(f"saved under {output}")


if __name__ == "__main__":
    main()
