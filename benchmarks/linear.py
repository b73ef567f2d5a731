"""Time two linear heads with their loss, and measure memory: ``python -m benchmarks.linear``.

All implementations are checked against float64, then timed in turns. Times are also multiples of
the GEMM time, the duration of the four necessary matrix products: the logits of student and
teacher, and the gradients of hidden states and weight. Memory is that of a step beyond its inputs;
on a CPU it is measured in a process of its own (memory.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks import environment, memory, report
from benchmarks.baselines import UnavailableError, _import
from benchmarks.cases import DTYPES
from benchmarks.measure import time_in_turns
from fastkd import Head
from fastkd.linear.planner import MIB

TEMPERATURE, ALPHA = 2.0, 0.5
PAGE = Path(__file__).parent.parent / "docs" / "linear.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


@dataclass(frozen=True)
class LinearCase:
    """Shape with its bounds: multiples of the GEMM time, and memory in MiB."""

    name: str
    rows: int
    student_width: int
    teacher_width: int
    classes: int
    dtype: str
    ignored: float = 0.0
    """The share of rows whose label is ignored."""
    small_mib: int = 0
    """Memory bound for fastkd in small chunks; 0 to leave it out."""
    must: tuple[float, float] | None = None
    """Required time and memory of fastkd."""
    small_must: tuple[float, float] | None = None
    smallest_must: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """Describe the case in words."""
        ignored = f", {self.ignored:.0%} of the rows ignored" if self.ignored else ""
        return (
            f"{self.name}: {self.rows} rows, {self.student_width} (teacher {self.teacher_width}) x "
            f"{self.classes} {self.dtype}{ignored}"
        )


def cases(device: str) -> list[LinearCase]:
    """Return heads of language models for a GPU, and one large head for a CPU."""
    if device == "cuda":
        llama = ("llama-3", 4096, 2048, 4096, 128256, "bf16")
        qwen = ("qwen", 8192, 1024, 4096, 151936, "bf16")
        return [
            LinearCase(
                *llama,
                small_mib=1200,
                must=(1.18, 2100),
                small_must=(1.30, 1200),
                smallest_must=(2.0, 564),
            ),
            LinearCase(
                *qwen,
                small_mib=1200,
                must=(1.20, 2300),
                small_must=(1.35, 1200),
                smallest_must=(2.0, 334),
            ),
            LinearCase(*llama, ignored=0.6),
        ]
    head = ("llama-2", 512, 512, 512, 32000)
    return [
        LinearCase(*head, "fp32", small_mib=80),
        LinearCase(*head, "bf16", small_mib=60),
        LinearCase(*head, "fp32", ignored=0.6),
    ]


class Inputs(NamedTuple):
    """Tensors of a case, in the order of Liger's arguments."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def heads(self) -> tuple[Head, Head]:
        """Return student and teacher as Heads."""
        return Head(*self[:2]), Head(*self[2:4])


def make_inputs(case: LinearCase, device: str) -> Inputs:
    """Draw inputs whose logits have a standard deviation of 3 and a few outstanding classes."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, width: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, width, generator=generator, device=device)
        return values.mul_(scale).to(DTYPES[case.dtype])

    labels = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    if case.ignored:
        drawn = torch.rand(case.rows, generator=generator, device=device)
        labels.masked_fill_(drawn < case.ignored, -100)
    return Inputs(
        draw(case.rows, case.student_width).requires_grad_(),
        draw(case.classes, case.student_width, 3 * case.student_width**-0.5).requires_grad_(),
        draw(case.rows, case.teacher_width),
        draw(case.classes, case.teacher_width, 3 * case.teacher_width**-0.5),
        labels,
    )


# ---- the ways to compute it

LossFunction = Callable[[Inputs], Tensor]


def _fastkd(**chunks: Any) -> LossFunction:
    """Return a call of fastkd.loss with a plan of these options."""

    def loss(inputs: Inputs) -> Tensor:
        arguments = (*inputs.heads, inputs.labels)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA}
        if chunks:
            options["chunks"] = fastkd.chunks.plan(*arguments, **chunks, **options)
        return fastkd.loss(*arguments, **options)

    return loss


def fused(case: LinearCase) -> LossFunction:
    """Compute the loss by fastkd with default options."""
    return _fastkd()


def fused_small(case: LinearCase) -> LossFunction:
    """Compute the loss in bounded chunks of rows, the weight's gradient summed in its own dtype."""
    if not case.small_mib:
        raise UnavailableError("not tried")
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    return _fastkd(chunk_by="rows", max_workspace=case.small_mib * MIB, accumulate_dtype=dtype)


def fused_smallest(case: LinearCase) -> LossFunction:
    """Compute the loss in chunks of classes, which compute the logits twice."""
    return _fastkd(chunk_by="classes")


def _eager(inputs: Inputs, upcast: bool) -> Tensor:
    with torch.no_grad():
        teacher = F.linear(inputs.teacher_hidden, inputs.teacher_weight)
    student = F.linear(inputs.hidden, inputs.weight)
    valid = inputs.labels != -100
    if not valid.all():
        student, teacher = student[valid], teacher[valid]
    if upcast:
        student, teacher = student.float(), teacher.float()
    log_q = F.log_softmax(student / TEMPERATURE, -1)
    soft = F.kl_div(log_q, F.softmax(teacher / TEMPERATURE, -1), reduction="batchmean")
    hard = F.cross_entropy(student, inputs.labels[valid])
    return ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft


def eager(case: LinearCase) -> LossFunction:
    """Compute the loss by the usual PyTorch operations."""
    return lambda inputs: _eager(inputs, upcast=False)


def eager_upcast(case: LinearCase) -> LossFunction:
    """Compute the loss by PyTorch operations on logits cast to float32."""
    if case.dtype == "fp32":
        raise UnavailableError("the same as eager in float32")
    return lambda inputs: _eager(inputs, upcast=True)


def _liger_chunked(case: LinearCase, compiled: bool) -> LossFunction:
    liger = _import("liger_kernel.chunked_loss", "liger-kernel")
    # Liger has no T^2, which the weights replace; its beta=0 is the forward KL.
    criterion = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=ALPHA,
        weight_soft_loss=(1 - ALPHA) * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=1024,
    )
    return lambda inputs: criterion(*inputs)


def liger(case: LinearCase) -> LossFunction:
    """Compute the loss by Liger-Kernel's chunked loss, compiled."""
    return _liger_chunked(case, compiled=True)


def liger_plain(case: LinearCase) -> LossFunction:
    """Compute the loss by Liger-Kernel's chunked loss, not compiled."""
    return _liger_chunked(case, compiled=False)


LANES: dict[str, Callable[[LinearCase], LossFunction]] = {
    "fastkd": fused,
    "fastkd, small": fused_small,
    "fastkd, smallest": fused_smallest,
    "eager": eager,
    "eager fp32": eager_upcast,
    "Liger chunked, compiled": liger,
    "Liger chunked": liger_plain,
}


def products_alone(case: LinearCase, inputs: Inputs) -> Callable[[], None]:
    """Compute the four matrix products of the valid rows into allocated memory."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    valid = inputs.labels != -100
    hidden, teacher_hidden = hidden[valid], inputs.teacher_hidden[valid]
    logits = torch.empty(len(hidden), case.classes, dtype=hidden.dtype, device=hidden.device)
    teacher = torch.empty_like(logits)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(teacher_hidden, inputs.teacher_weight.t(), out=teacher)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.t(), hidden, out=weight_grad)

    return run


# ---- measuring


def step(function: LossFunction, inputs: Inputs) -> Tensor:
    """Compute loss and gradients, which replace those of the previous step."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss = function(inputs)
    loss.backward()
    return loss


def truth(inputs: Inputs, rows: int = 256) -> tuple[float, Tensor, Tensor]:
    """Compute the loss and its gradients in float64, some rows at a time."""
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


def _distance(grad: Tensor | None, right: Tensor) -> float:
    assert grad is not None
    squares = sum(
        (part.double() - exact).square().sum().item()
        for part, exact in zip(grad.split(4096), right.split(4096), strict=True)
    )
    return float(squares**0.5 / right.norm().item())


def peak_mib(case: LinearCase, name: str, device: str) -> float | None:
    """Return the peak memory of a step beyond its inputs, in MiB."""
    if device == "cuda":
        function, inputs = LANES[name](case), make_inputs(case, device)
        step(function, inputs)
        inputs.hidden.grad = inputs.weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(function, inputs)
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


def _peak_here(case: LinearCase, name: str) -> int:
    """Return the peak memory of a step in this process, in bytes."""
    function, inputs = LANES[name](case), make_inputs(case, "cpu")
    step(function, inputs)
    inputs.hidden.grad = inputs.weight.grad = None
    memory._settle()
    before = memory._status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(function, inputs)
    return max(0, memory._status("VmHWM") - before)


def run(case: LinearCase, device: str, seconds: float, names: list[str]) -> dict[str, Any]:
    """Check all implementations, time them in turns, and measure their memory."""
    inputs = make_inputs(case, device)
    exact = truth(inputs)
    records: dict[str, dict[str, Any]] = {}
    lanes: dict[str, Callable[[], object]] = {"products alone": products_alone(case, inputs)}
    for name in names:
        try:
            function = LANES[name](case)
            loss = step(function, inputs)
            records[name] = {
                "status": "ok",
                "loss_error": abs(loss.item() / exact[0] - 1),
                "hidden_error": _distance(inputs.hidden.grad, exact[1]),
                "weight_error": _distance(inputs.weight.grad, exact[2]),
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
        lanes[name] = lambda function=function: step(function, inputs)
    del exact
    gc.collect()
    kind = "device" if device == "cuda" else "wall"
    times = time_in_turns(lanes, device, kind, seconds)
    del lanes
    inputs.hidden.grad = inputs.weight.grad = None
    gc.collect()
    floor = times["products alone"]
    for name, measured in times.items():
        record = records.setdefault(name, {"status": "ok"})
        record["times"] = asdict(measured)
        record["of the products"] = measured.median / floor.median
        if name in LANES:
            record["peak_mib"] = peak_mib(case, name, device)
    return {**asdict(case), "title": case.title, "lanes": records}


# ---- showing


def verdicts(results: dict[str, Any]) -> list[str]:
    """Return each bound with the measured value and the verdict."""
    lanes = results["lanes"]

    def held(name: str, bound: tuple[float, float]) -> str:
        record = lanes.get(name, {})
        if "of the products" not in record or record.get("peak_mib") is None:
            return f"{name}: not measured"
        time, peak = record["of the products"], record["peak_mib"]
        verdict = "reached" if time <= bound[0] and peak <= bound[1] else "missed"
        return f"{name}: target of {bound[0]:.2f}x the GEMM time and {bound[1]:.0f} MiB {verdict}"

    result = []
    if results["small_mib"] and "fastkd, small" in lanes:
        summed = "bfloat16" if results["dtype"] == "bf16" else "float32"
        result.append(f"small: max_workspace of {results['small_mib']} MiB, dW summed in {summed}")
    for name, key in (
        ("fastkd", "must"),
        ("fastkd, small", "small_must"),
        ("fastkd, smallest", "smallest_must"),
    ):
        if results.get(key):  # older results lack some keys
            result.append(held(name, results[key]))
    theirs = lanes.get("eager", {})
    for name in ("fastkd", "fastkd, smallest"):
        ours = lanes.get(name, {})
        if all("times" in one and one.get("peak_mib") for one in (theirs, ours)):
            time = ours["times"]["median"] / theirs["times"]["median"]
            memory_share = ours["peak_mib"] / theirs["peak_mib"]
            result.append(
                f"{name}: {time:.2f}x the time and {memory_share:.2f}x the memory of eager"
            )
    result += error_verdicts(lanes)
    return result


def error_verdicts(lanes: dict[str, Any]) -> list[str]:
    """Check 16-bit gradients: at most eager's errors, and 1.1 times those with float32 logits."""
    bounds = {"eager": 1.0, "eager fp32": 1.1}
    if any("weight_error" not in lanes.get(name, {}) for name in bounds):
        return []
    missed = [
        f"{name}: {title} error above the target"
        for name, record in lanes.items()
        if name.startswith("fastkd") and "weight_error" in record
        for title, key in (("dX", "hidden_error"), ("dW", "weight_error"))
        if any(record[key] > factor * lanes[baseline][key] for baseline, factor in bounds.items())
    ]
    return missed or ["errors of dX and dW: at most eager's, and at most 1.1x eager fp32's"]


def table(results: dict[str, Any]) -> str:
    """Return a case as Markdown."""
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
            report.duration(record["times"]["median"]),
            f"{record['of the products']:.2f}",
        ]
        peak = record.get("peak_mib")
        cells.append("" if peak is None else f"{peak:,.0f}")
        for key in ("loss_error", "hidden_error", "weight_error"):
            cells.append(f"{record[key]:.1e}" if key in record else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """Return all cases as Markdown."""
    load = results["environment"]["load at the start"]
    busy = f" Other programs ran (load {load}), so the times are too long." if load > 0.5 else ""
    parts = [f"{report.headline(results)}.{busy}"]
    for each in results["cases"]:
        notes = "; ".join(verdicts(each))
        parts += [f"**{each['title']}**", table(each)] + ([f"{notes}."] if notes else [])
    return "\n\n".join(parts) + "\n"


def planned() -> str:
    """Return the planner's least memory on a GPU, where nothing was measured."""
    lines = [
        "Planned for a GPU by `fastkd.chunks.plan`, not measured (Liger: its fused kernel, H100):",
        "",
        '| `chunk_by="classes"` | chunks | most classes | MiB | if rows are ignored | Liger |',
        "|---|---|---|---|---|---|",
    ]
    for case in cases("cuda"):
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
    """Write every saved run's tables, and the plans, between the page's marks."""
    saved = sorted(report.RESULTS.glob("*/linear.json"))
    body = "\n".join([*(markdown(json.loads(path.read_text())) for path in saved), planned()])
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{body}{END}{after}")
    return f"{PAGE.name}: {len(saved)} runs"


def main() -> None:
    """Parse the command line, and run the chosen part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose title contains this")
    parser.add_argument("--lanes", nargs="+", default=list(LANES), choices=LANES)
    parser.add_argument("--seconds", type=float, help="of timing for each case")
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
        print(_peak_here(LinearCase(**fields), chosen.peak[1]))
        return
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"environment": environment.describe(device), "cases": []}
    for case in cases(device):
        if chosen.only and chosen.only not in case.title:
            continue
        record = run(
            case, device, chosen.seconds or (2.0 if device == "cuda" else 20.0), chosen.lanes
        )
        results["cases"].append(record)
        print(f"{record['title']}\n{table(record)}\n" + "\n".join(verdicts(record)), flush=True)
        print()
    if chosen.no_save:
        return
    output = chosen.output or report.RESULTS / environment.slug(device)
    output.mkdir(parents=True, exist_ok=True)
    (output / "linear.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "linear.md").write_text("# Linear heads\n\n" + markdown(results))
    print(f"saved under {output}")


if __name__ == "__main__":
    main()
