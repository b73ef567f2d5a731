"""Write the README's sentences and tables from the newest saved results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import (
    RESULTS,
    Results,
    Rows,
    compute_ratio,
    describe_run,
    format_duration,
    format_markdown_table,
    format_optional,
    format_ratio,
    get_median,
)

README = Path(__file__).parents[1] / "README.md"
SHOWN_BASELINES = ("eager", "eager fp32", "torch.compile", "torch.compile best", "Liger KL + CE")
SHOWN_CASES = (
    ("llama-3", "bf16"),
    ("llama-2", "fp32"),
    ("imagenet-1k", "fp32"),
    ("digits", "fp32"),
)
PENDING = "benchmarks/results/PENDING.md"


def find_newest() -> list[tuple[Path, Results]]:
    """Return folder and results of the newest run on a GPU and of the newest run on a CPU."""
    latest: dict[str, tuple[Path, Results]] = {}
    for path in sorted(RESULTS.glob("*/results.json")):
        results = json.loads(path.read_text())
        kind = results["environment"]["kind"]
        if not results.get("standard"):
            continue
        if (
            kind not in latest
            or results["environment"]["date"] > latest[kind][1]["environment"]["date"]
        ):
            latest[kind] = (path.parent, results)
    return [latest[kind] for kind in ("cuda", "cpu") if kind in latest]


def _find_case(results: Results, name: str, dtype: str) -> Results | None:
    for case in results["cases"]:
        if (case["name"], case["dtype"], case["gradient"]) == (name, dtype, True):
            return case if get_median(case, "fastkd") else None
    return None


def _find_headline_case() -> Results:
    case = _find_case(find_newest()[-1][1], *SHOWN_CASES[1])
    if case is None:
        raise SystemExit(f"the newest results lack the case {SHOWN_CASES[1]}")
    return case


def _describe_devices(kind: str) -> str:
    """Return a text with names, CPU kernels and newest date of the measured devices of one kind."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/results.json"))]
    about = [run["environment"] for run in runs if run["environment"]["kind"] == kind]
    if not about:
        return ""
    devices = dict.fromkeys(machine["device"].split(",")[0] for machine in about)
    isas = dict.fromkeys(machine["fastkd"]["CPU kernels"].split(" ")[0] for machine in about)
    newest = max(machine["date"] for machine in about)
    kernels = f" ({', '.join(isas)})" if kind == "cpu" else ""
    return f"{' and '.join(devices)}{kernels}, last on {newest[:10]}"


def write_headline() -> str:
    """Return the README's first sentences: what fastkd does, its speed and memory, devices."""
    case = _find_headline_case()
    speedup = format_ratio(compute_ratio(case, "eager"))
    ours, eager = (case["lanes"][name]["peak_tensors"] for name in ("fastkd", "eager"))
    gpus = _describe_devices("cuda")
    return (
        "fastkd computes the distillation loss and its gradient in one fused pass in C++ or CUDA, "
        "by one call from PyTorch.\n"
        f"On a CPU it is **{speedup} as fast** as eager PyTorch, with "
        f"**{ours:.0f} tensor** of the size of the logits in memory\ninstead of **{eager:.0f}** "
        f"(float32 logits of {case['rows']} rows and {case['classes']} classes).\n\n"
        f"Status: **alpha**. CPU: measured on {_describe_devices('cpu')}. CUDA: "
        + (f"measured on {gpus}" if gpus else f"[not yet\nvalidated on a GPU]({PENDING})")
        + ". [Documentation](docs/index.md); `make docs` builds the site.\n"
    )


def write_comparison() -> str:
    """Return the caption of the README's two code examples."""
    speedup = format_ratio(compute_ratio(_find_headline_case(), "eager"))
    return (
        "Both give the same loss up to rounding. The call is "
        f"{speedup} as fast, and loses no digits where the "
        "student is close to its\nteacher ([accuracy](docs/accuracy.md)).\n"
    )


def make_rows(results: Results) -> Rows:
    """Return the README's table: ``SHOWN_CASES`` with gradient, and ``SHOWN_BASELINES``."""
    cases = [case for key in SHOWN_CASES if (case := _find_case(results, *key))]
    names = [name for name in SHOWN_BASELINES if any(compute_ratio(case, name) for case in cases)]
    heading = [
        "loss + backward",
        "fastkd",
        "share of memory bandwidth",
        *names,
        "gradient error: fastkd",
        "gradient error: eager",
    ]
    rows = []
    for case in cases:
        share = case["lanes"]["fastkd"].get("share")
        errors = [case["lanes"].get(name, {}).get("gradient_error") for name in ("fastkd", "eager")]
        rows.append(
            [
                f"{case['name']}, {case['rows']} x {case['classes']} {case['dtype']}",
                format_duration(get_median(case, "fastkd") or 0.0),
                f"{100 * share:.0f} %" if share else "",
                *(format_ratio(compute_ratio(case, name)) for name in names),
                *(format_optional(error, ".0e") for error in errors),
            ]
        )
    return heading, rows


def write_benchmarks() -> str:
    """Return a plot and a table of the newest run on a GPU and on a CPU, as Markdown."""
    parts = []
    for folder, results in find_newest():
        where = folder.relative_to(README.parent).as_posix()
        verb = "copy" if results["environment"]["kind"] == "cuda" else "stream"
        parts += [
            f"![Time of each baseline relative to fastkd]({where}/overview.png)\n",
            format_markdown_table(make_rows(results)),
            "Baselines: the time of each, divided by fastkd's; eager fp32 converts the logits to "
            "float32 first. Share of memory bandwidth: the time\n"
            f"to {verb} the same bytes, divided by fastkd's time. Gradient errors: relative to "
            f"float64. {describe_run(results)}.\n"
            f"[All cases, with errors, memory and the bounds that are checked]"
            f"({where}/results.md).\n",
        ]
    return "\n".join(parts)


PARTS = {
    "headline": write_headline,
    "comparison": write_comparison,
    "benchmarks": write_benchmarks,
}


def rewrite() -> str:
    """Write each part between its markers in the README; return a summary."""
    if not find_newest():
        raise SystemExit(f"no results under {RESULTS}: run `python -m benchmarks` first")
    text = README.read_text()
    for name, write in PARTS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{README} needs the lines {begin.strip()} and {end}")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}{write()}{end}{rest.split(end, 1)[1]}"
    README.write_text(text)
    return f"{README.name} rewritten from {', '.join(folder.name for folder, _ in find_newest())}"
