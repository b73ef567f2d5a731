"""Print results as tables, and save results as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.baselines import BASELINES

Results = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
LEGEND = """`python -m benchmarks` writes this file. Every answer was checked against float64 before
it was timed. Baselines took turns in one process, on inputs out of the caches, except for small
cases; times are medians. "Of stream" is the time that the memory bandwidth allows, divided by the
measured time. "Peak" is the extra memory, in tensors of logits. Errors are relative to float64, and
those of gradients are 2-norms."""
DIVERGENCES = """The soft term alone, loss + backward, T = 2: fastkd's time, that time divided by
the forward KL's, and the baselines' times divided by fastkd's (PyTorch: eager, in float32)."""


# ---- numbers as text


def format_duration(seconds: float) -> str:
    """Format a time with three digits and its unit."""
    unit, scale = "us", 1e-6
    if seconds >= 1e-3:
        unit, scale = ("ms", 1e-3) if seconds < 1 else ("s", 1.0)
    value = seconds / scale
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def format_ratio(value: float | None, digits: int = 1) -> str:
    """Format a ratio with "x" after the number, or return "" for None."""
    if value is None:
        return ""
    return f"{value:.{digits if value < 99.5 else 0}f}x"


def format_optional(value: float | None, form: str) -> str:
    """Format a number, or return "" for None."""
    return "" if value is None else format(value, form)


def get_median(case: Results, name: str) -> float | None:
    """Return the median seconds of a baseline, or None if it was not timed."""
    record = case["lanes"].get(name, {}).get("times")
    return record["median"] if record else None


def compute_ratio(case: Results, name: str) -> float | None:
    """Return a baseline's time divided by fastkd's, or None if either was not timed."""
    ours, theirs = get_median(case, "fastkd"), get_median(case, name)
    return theirs / ours if ours and theirs else None


# ---- tables: headings and rows of text, for the terminal and for Markdown

Rows = tuple[list[str], list[list[str]]]


def make_case_rows(case: Results) -> Rows:
    """Return a line for each baseline of one case."""
    heading = [
        "",
        "time",
        "20 to 80 %",
        "of fastkd's",
        "GB/s",
        "of stream",
        "peak",
        "loss error",
        "grad. error",
        "",
    ]
    rows = []
    for name, record in case["lanes"].items():
        if record["status"].startswith("not available"):
            continue  # list_notes reports the missing baseline once
        seconds = record.get("times")
        notes = [] if record["status"] == "ok" else [record["status"]]
        if "compile_seconds" in record:
            notes.append(f"compiled in {record['compile_seconds']:.0f} s")
        rows.append(
            [
                name,
                format_duration(seconds["median"]) if seconds else "",
                f"{format_duration(seconds['p20'])} to {format_duration(seconds['p80'])}"
                if seconds
                else "",
                format_ratio(compute_ratio(case, name), 2),
                format_optional(record.get("bytes_per_second", 0) / 1e9 or None, ".1f"),
                format_optional(record.get("share"), ".2f"),
                format_optional(record.get("peak_tensors"), ".2f"),
                format_optional(record.get("loss_error"), ".0e"),
                format_optional(record.get("gradient_error"), ".1e"),
                ", ".join(notes),
            ]
        )
    return heading, rows


def make_summary_rows(results: Results) -> Rows:
    """Return a line for each case: fastkd's time, and the baselines' times divided by fastkd's."""
    names = [
        baseline.name
        for baseline in BASELINES
        if baseline.name != "fastkd"
        and any(compute_ratio(case, baseline.name) for case in results["cases"])
    ]
    heading = ["case", "shape", "T", "fastkd", "of stream", *names, "s.sum()"]
    rows = []
    for case in results["cases"]:
        ours = case["lanes"].get("fastkd", {})
        median = get_median(case, "fastkd")
        rows.append(
            [
                case["name"] + ("" if case["gradient"] else ", loss alone"),
                f"{case['rows']} x {case['classes']} {case['dtype']}",
                f"{case['temperature']:g}",
                format_duration(median) if median else ours.get("status", ""),
                format_optional(ours.get("share"), ".2f"),
                *(format_ratio(compute_ratio(case, name)) for name in names),
                format_ratio(compute_ratio(case, "s.sum()"), 2),
            ]
        )
    return heading, rows


def make_claim_rows(results: Results) -> Rows:
    """Return the claims and their measured values."""
    heading = ["claim", "must", "aim", "measured", "", "worst at"]
    rows = []
    for claim in results["claims"]:

        def number(value: float | None, claim: Results = claim) -> str:
            if value is None:
                return ""
            text = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
            return text + claim["unit"]

        where = claim["where"] if len(claim["values"]) > 1 else ""
        rows.append(
            [
                claim["what"],
                number(claim["must"]),
                number(claim["aim"]),
                number(claim["measured"]),
                claim["verdict"],
                where,
            ]
        )
    return heading, rows


def make_duel_rows(results: Results) -> Rows:
    """Return a line for each pair of cases on which the times of fastkd are compared."""
    rows = []
    for duel in results["duels"]:
        if "ratio" not in duel:
            rows.append([duel["name"], duel["status"], ""])
            continue
        seconds = [format_duration(duel[side]["median"]) for side in ("first", "second")]
        rows.append([duel["name"], format_ratio(duel["ratio"], 2), " / ".join(seconds)])
    return ["fastkd against itself", "time for each logit", "times"], rows


def _make_ratio_rows(cases: list[Results], heading: str, ratios: dict[str, str]) -> Rows:
    """Return a line for each case: times, then ``ratios``, which maps fields to column titles."""
    names = list(dict.fromkeys(name for case in cases for name in case["lanes"]))
    rows = [
        [
            case["title"],
            *(format_duration(case["lanes"][name]["times"]["median"]) for name in names),
            *(format_ratio(case[field], 2) for field in ratios),
        ]
        for case in cases
    ]
    return [heading, *names, *ratios.values()], rows


def make_sparse_rows(results: Results) -> Rows:
    """Return a line for each sparse case: times, and ratios to the dense loss and to PyTorch."""
    ratios = {"of the dense loss": "of all classes", "of PyTorch": "of PyTorch"}
    return _make_ratio_rows(results["sparse"], "sparse teacher", ratios)


def make_sampled_rows(results: Results) -> Rows:
    """Return a line for each case of a sampled token: times, and ratios to cross entropies."""
    ratios = {
        "of the cross entropy": "of labels alone",
        "of PyTorch's cross entropy": "of PyTorch",
    }
    return _make_ratio_rows(results["sampled"], "", ratios)


def make_divergence_rows(results: Results) -> Rows:
    """Return a line for each divergence; ``DIVERGENCES`` describes times and ratios."""
    cases = results["divergences"]
    names = list(dict.fromkeys(name for case in cases for name in case["baselines"]))
    heading = ["", "fastkd", "of forward_kl", *names, "loss error", "grad. error", ""]
    rows = []
    for case in cases:
        ours = case["lanes"]["fastkd"]
        remarks = [] if case["fused"] else ["the reference formula: no kernel"]
        remarks += [
            f"{name} {record['status']}"
            for name, record in case["lanes"].items()
            if record["status"] != "ok"
        ]
        rows.append(
            [
                case["title"].removeprefix("divergences: "),
                format_duration(ours["times"]["median"]),
                format_ratio(case["of the forward KL"], 2),
                *(format_ratio(case["baselines"].get(name)) for name in names),
                f"{ours['loss_error']:.0e}",
                f"{ours['gradient_error']:.1e}",
                ", ".join(remarks),
            ]
        )
    return heading, rows


def make_scaling_rows(points: Iterable[Results]) -> Rows:
    """Return the times of fastkd and eager PyTorch in one scaling series."""
    rows = []
    for case in points:
        ours, eager = get_median(case, "fastkd"), get_median(case, "eager")
        rows.append(
            [
                f"{case['rows']} x {case['classes']} {case['dtype']}",
                str(case.get("threads", "")),
                format_duration(ours) if ours else "",
                format_duration(eager) if eager else "",
                format_ratio(compute_ratio(case, "eager")),
            ]
        )
    return ["shape", "threads", "fastkd", "eager", "ratio"], rows


def describe_run(results: Results) -> str:
    """Return the device, versions, commit and date as one line."""
    about = results["environment"]
    versions = about["versions"]
    named = [
        f"{name} {versions[name]}"
        for name in (("torch", "triton", "liger-kernel") if about["kind"] == "cuda" else ("torch",))
        if versions[name][0].isdigit()
    ]
    isa = about["fastkd"]["CPU kernels"].split(" ")[0]
    used = f"CUDA {about['cuda']}" if about["kind"] == "cuda" else f"{isa} kernels"
    fastkd = f"fastkd {versions['fastkd']} at {about['commit']}"
    return f"{about['device']} ({used}), {fastkd}, {', '.join(named)}, {about['date']}"


# ---- the terminal


def _make_table(rows: Rows, title: str = "") -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(rows[0]):
        is_left = index == 0 or name in ("", "worst at")
        table.add_column(name, justify="left" if is_left else "right", overflow="fold")
    for row in rows[1]:
        style = "bold green" if row[0] == "fastkd" else ""
        if "missed" in row or "wrong answer" in row[-1]:
            style = "red"
        table.add_row(*row, style=style)
    return table


def show_case(console: Console, case: Results) -> None:
    """Print the table of one case."""
    console.print(_make_table(make_case_rows(case), case["title"]))


def show(console: Console, results: Results) -> None:
    """Print the notes, and all tables except those of single cases."""
    console.rule("Times of fastkd, and times of the baselines divided by it")
    console.print(_make_table(make_summary_rows(results)))
    for line in list_notes(results):
        console.print(line)
    if results.get("sparse"):
        console.print(_make_table(make_sparse_rows(results)))
    if results.get("sampled"):
        console.print(_make_table(make_sampled_rows(results)))
    if results.get("divergences"):
        console.print(_make_table(make_divergence_rows(results), DIVERGENCES))
    if results["duels"]:
        console.print(_make_table(make_duel_rows(results)))
    for name, points in results["scaling"].items():
        console.print(_make_table(make_scaling_rows(points), f"Cost against {name}"))
    if results["claims"]:
        console.rule("Claims")
        console.print(_make_table(make_claim_rows(results)))
    console.print(describe_run(results))


def list_notes(results: Results) -> list[str]:
    """Return remarks on missing baselines, on memory streams, and on errors at a small KL."""
    lines = [f"Not measured: {name}, {why}." for name, why in results["missing"].items()]
    lines += [
        f"Stream {name!r}: {what}; {speed / 1e9:.1f} GB/s."
        for name, (what, speed) in results["streams"].items()
    ]
    near = results.get("close_to_the_teacher")
    if near:
        ours, torchs = near["fastkd"], near["F.kl_div"]
        lines.append(
            f"{near['what']}: fastkd {ours['median']:.1e} (worst {ours['worst']:.1e}), "
            f"F.kl_div {torchs['median']:.1e} (worst {torchs['worst']:.1e})."
        )
    return lines


# ---- files


def save(results: Results, folder: Path) -> None:
    """Write results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_round(results), indent=1)
    (folder / "results.json").write_text(text + "\n")
    (folder / "results.md").write_text(format_markdown(results))


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, (list, tuple)) else value


def format_markdown_table(rows: Rows) -> str:
    """Format a table as Markdown, without empty columns."""
    heading, body = rows
    keep = [index for index in range(len(heading)) if any(row[index] for row in body)]
    lines = [
        [heading[index] for index in keep],
        ["-" if i == 0 else "-:" for i in range(len(keep))],
    ]
    lines += [[row[index] for index in keep] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_markdown(results: Results) -> str:
    """Return the whole report as Markdown."""
    about = results["environment"]
    quiet = (
        f"Load {about['load at the start']} at the start; the host of a virtual machine took "
        f"{results['stolen']:.1%} of the processors' time."
    )
    parts = [
        f"# Measured on {about['device']}\n",
        f"{describe_run(results)}. {quiet}\n\n{LEGEND}\n",
        format_markdown_table(make_summary_rows(results)),
        "\n".join(f"- {line}" for line in list_notes(results)) + "\n",
        "Baselines:\n\n"
        + "\n".join(f"- {baseline.name}: {baseline.what}" for baseline in BASELINES)
        + "\n",
    ]
    if results["claims"]:
        parts += ["## Claims\n", format_markdown_table(make_claim_rows(results))]
    parts += ["![overview](overview.png)\n", "## Cases\n"]
    for case in results["cases"]:
        clock = "the device's time" if case["clock"] == "device" else "wall time"
        parts += [
            f"### {case['title']}\n",
            f"{clock}, {case['sets']} sets of inputs\n",
            format_markdown_table(make_case_rows(case)),
        ]
    if results.get("sparse"):
        parts += ["## The sparse teacher\n", format_markdown_table(make_sparse_rows(results))]
    if results.get("sampled"):
        parts += ["## A sampled token\n", format_markdown_table(make_sampled_rows(results))]
    if results.get("divergences"):
        parts += [
            "## Divergences\n",
            f"{DIVERGENCES}\n",
            format_markdown_table(make_divergence_rows(results)),
        ]
    if results["duels"]:
        parts += ["## fastkd against itself\n", format_markdown_table(make_duel_rows(results))]
    if results["scaling"]:
        parts += ["## Scaling\n", "![scaling](scaling.png)\n"]
    for name, points in results["scaling"].items():
        parts += [f"Against {name}:\n", format_markdown_table(make_scaling_rows(points))]
    facts = {
        **about["fastkd"],
        **about["versions"],
        "platform": about["platform"],
        "clocks": about["clocks at the start"],
    }
    parts += [
        "## Environment\n",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n",
    ]
    return "\n".join(parts)
