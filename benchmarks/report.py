"""Write results: tables for the terminal, JSON and Markdown files, and the README's section."""

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

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
LEGEND = """`python -m benchmarks` writes this file. Every answer was checked against float64 before
it was timed. Baselines took turns in one process, on inputs that were out of the caches; times are
medians. "Of stream" is the time that the memory needs for both logits (and the gradient), over the
time taken; "peak" the extra memory, in tensors of logits. Errors are relative to float64, the
gradient's in the 2-norm."""
DIVERGENCES = """The soft term alone, loss + backward, T = 2: fastkd's time, the same in times of
its forward KL, and how many times as long others take (PyTorch: eager, in float32)."""
README_BASELINES = ("eager", "eager fp32", "torch.compile", "torch.compile best", "Liger KL + CE")
README_CASES = (
    ("llama-3", "bf16"),
    ("llama-2", "fp32"),
    ("imagenet-1k", "fp32"),
    ("digits", "fp32"),
)
PENDING = "benchmarks/results/PENDING.md"


# ---- numbers in words


def duration(seconds: float) -> str:
    """Format a time with three digits and its unit."""
    unit, scale = "us", 1e-6
    if seconds >= 1e-3:
        unit, scale = ("ms", 1e-3) if seconds < 1 else ("s", 1.0)
    value = seconds / scale
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def times(value: float | None, digits: int = 1) -> str:
    """Format a ratio."""
    if value is None:
        return ""
    return f"{value:.{digits if value < 99.5 else 0}f}x"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _median(case: Results, name: str) -> float | None:
    record = case["lanes"].get(name, {}).get("times")
    return record["median"] if record else None


def ratio(case: Results, name: str) -> float | None:
    """Return a baseline's time divided by fastkd's."""
    ours, theirs = _median(case, "fastkd"), _median(case, name)
    return theirs / ours if ours and theirs else None


# ---- tables, as a heading and rows of text: shown by rich and written as Markdown alike

Rows = tuple[list[str], list[list[str]]]


def case_rows(case: Results) -> Rows:
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
            continue  # printed once, for the whole run
        seconds = record.get("times")
        notes = [] if record["status"] == "ok" else [record["status"]]
        if "compile_seconds" in record:
            notes.append(f"compiled in {record['compile_seconds']:.0f} s")
        rows.append(
            [
                name,
                duration(seconds["median"]) if seconds else "",
                f"{duration(seconds['p20'])} to {duration(seconds['p80'])}" if seconds else "",
                times(ratio(case, name), 2),
                _optional(record.get("bytes_per_second", 0) / 1e9 or None, ".1f"),
                _optional(record.get("share"), ".2f"),
                _optional(record.get("peak_tensors"), ".2f"),
                _optional(record.get("loss_error"), ".0e"),
                _optional(record.get("gradient_error"), ".1e"),
                ", ".join(notes),
            ]
        )
    return heading, rows


def summary_rows(results: Results) -> Rows:
    """Return a line for each case: fastkd's time, and the baselines' times divided by it."""
    names = [
        one.name
        for one in BASELINES
        if one.name != "fastkd" and any(ratio(case, one.name) for case in results["cases"])
    ]
    heading = ["case", "shape", "T", "fastkd", "of stream", *names, "s.sum()"]
    rows = []
    for case in results["cases"]:
        ours = case["lanes"].get("fastkd", {})
        median = _median(case, "fastkd")
        rows.append(
            [
                case["name"] + ("" if case["gradient"] else ", loss alone"),
                f"{case['rows']} x {case['classes']} {case['dtype']}",
                f"{case['temperature']:g}",
                duration(median) if median else ours.get("status", ""),
                _optional(ours.get("share"), ".2f"),
                *(times(ratio(case, name)) for name in names),
                times(ratio(case, "s.sum()"), 2),
            ]
        )
    return heading, rows


def claim_rows(results: Results) -> Rows:
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


def duel_rows(results: Results) -> Rows:
    """Return the comparisons of fastkd with itself."""
    rows = [
        [
            duel["name"],
            times(duel["ratio"], 2) if "ratio" in duel else duel["status"],
            f"{duration(duel['first']['median'])} / {duration(duel['second']['median'])}"
            if "ratio" in duel
            else "",
        ]
        for duel in results["duels"]
    ]
    return ["fastkd against itself", "time for each logit", "times"], rows


def sparse_rows(results: Results) -> Rows:
    """Return the times of a sparse teacher over those of all logits."""
    names = list(dict.fromkeys(name for one in results["sparse"] for name in one["lanes"]))
    rows = [
        [
            one["title"],
            *(duration(one["lanes"][name]["times"]["median"]) for name in names),
            times(one["of the dense loss"], 2),
            times(one["of PyTorch"], 2),
        ]
        for one in results["sparse"]
    ]
    return ["sparse teacher", *names, "of all classes", "of PyTorch"], rows


def divergence_rows(results: Results) -> Rows:
    """Return each divergence's time over the forward KL's, and the baselines' times over it."""
    cases = results["divergences"]
    names = list(dict.fromkeys(name for one in cases for name in one["rivals"]))
    heading = ["", "fastkd", "of forward_kl", *names, "loss error", "grad. error", ""]
    rows = []
    for one in cases:
        ours = one["lanes"]["fastkd"]
        remarks = [] if one["fused"] else ["the reference formula: no kernel"]
        remarks += [
            f"{name} {lane['status']}"
            for name, lane in one["lanes"].items()
            if lane["status"] != "ok"
        ]
        rows.append(
            [
                one["title"].removeprefix("divergences: "),
                duration(ours["times"]["median"]),
                times(one["of the forward KL"], 2),
                *(times(one["rivals"].get(name)) for name in names),
                f"{ours['loss_error']:.0e}",
                f"{ours['gradient_error']:.1e}",
                ", ".join(remarks),
            ]
        )
    return heading, rows


def scaling_rows(points: Iterable[Results]) -> Rows:
    """Return the rows of one series."""
    rows = []
    for case in points:
        ours, eager = _median(case, "fastkd"), _median(case, "eager")
        rows.append(
            [
                f"{case['rows']} x {case['classes']} {case['dtype']}",
                str(case.get("threads", "")),
                duration(ours) if ours else "",
                duration(eager) if eager else "",
                times(ratio(case, "eager")),
            ]
        )
    return ["shape", "threads", "fastkd", "eager", "ratio"], rows


def headline(results: Results) -> str:
    """Return the device, versions and date as one line."""
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


def _table(rows: Rows, title: str = "") -> Table:
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
    """Print one case."""
    console.print(_table(case_rows(case), case["title"]))


def show(console: Console, results: Results) -> None:
    """Print all tables."""
    console.rule("Times of fastkd, and times of the baselines divided by it")
    console.print(_table(summary_rows(results)))
    for line in notes(results):
        console.print(line)
    if results.get("sparse"):
        console.print(_table(sparse_rows(results)))
    if results.get("divergences"):
        console.print(_table(divergence_rows(results), DIVERGENCES))
    if results["duels"]:
        console.print(_table(duel_rows(results)))
    for name, points in results["scaling"].items():
        console.print(_table(scaling_rows(points), f"Cost against {name}"))
    if results["claims"]:
        console.rule("Claims")
        console.print(_table(claim_rows(results)))
    console.print(headline(results))


def notes(results: Results) -> list[str]:
    """Return remarks on failures and on load during the run."""
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
    text = json.dumps(_rounded(results), indent=1)
    (folder / "results.json").write_text(text + "\n")
    (folder / "results.md").write_text(markdown(results))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _markdown_table(rows: Rows) -> str:
    heading, body = rows
    keep = [index for index in range(len(heading)) if any(row[index] for row in body)]
    lines = [
        [heading[index] for index in keep],
        ["-" if i == 0 else "-:" for i in range(len(keep))],
    ]
    lines += [[row[index] for index in keep] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(results: Results) -> str:
    """Return the whole report as Markdown."""
    about = results["environment"]
    quiet = (
        f"Load {about['load at the start']} at the start; the host of a virtual machine took "
        f"{results['stolen']:.1%} of the processors' time."
    )
    parts = [
        f"# Measured on {about['device']}\n",
        f"{headline(results)}. {quiet}\n\n{LEGEND}\n",
        _markdown_table(summary_rows(results)),
        "\n".join(f"- {line}" for line in notes(results)) + "\n",
        "Baselines:\n\n" + "\n".join(f"- {one.name}: {one.what}" for one in BASELINES) + "\n",
    ]
    if results["claims"]:
        parts += ["## Claims\n", _markdown_table(claim_rows(results))]
    parts += ["![overview](overview.png)\n", "## Cases\n"]
    for case in results["cases"]:
        clock = "the device's time" if case["clock"] == "device" else "wall time"
        parts += [
            f"### {case['title']}\n",
            f"{clock}, {case['sets']} sets of inputs\n",
            _markdown_table(case_rows(case)),
        ]
    if results.get("sparse"):
        parts += ["## The sparse teacher\n", _markdown_table(sparse_rows(results))]
    if results.get("divergences"):
        parts += [
            "## Divergences\n",
            f"{DIVERGENCES}\n",
            _markdown_table(divergence_rows(results)),
        ]
    if results["duels"]:
        parts += ["## fastkd against itself\n", _markdown_table(duel_rows(results))]
    if results["scaling"]:
        parts += ["## Scaling\n", "![scaling](scaling.png)\n"]
    for name, points in results["scaling"].items():
        parts += [f"Against {name}:\n", _markdown_table(scaling_rows(points))]
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


# ---- the README


def newest() -> list[tuple[Path, Results]]:
    """Return the newest results of a GPU, if any, then the newest of a CPU."""
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


def _case(results: Results, name: str, dtype: str) -> Results | None:
    """Return the case of a model and a dtype, with its gradient."""
    for case in results["cases"]:
        if (case["name"], case["dtype"], case["gradient"]) == (name, dtype, True):
            return case if _median(case, "fastkd") else None
    return None


def _headline_case() -> Results:
    """Return the case of the README's first sentences, from the newest results of a CPU."""
    case = _case(newest()[-1][1], *README_CASES[1])
    if case is None:
        raise SystemExit(f"the newest results lack the case {README_CASES[1]}")
    return case


def _measured(kind: str) -> str:
    """Return the devices of one kind that have results, their kernels, and the newest date."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/results.json"))]
    about = [one["environment"] for one in runs if one["environment"]["kind"] == kind]
    if not about:
        return ""
    devices = dict.fromkeys(one["device"].split(",")[0] for one in about)
    isas = dict.fromkeys(one["fastkd"]["CPU kernels"].split(" ")[0] for one in about)
    kernels = f" ({', '.join(isas)})" if kind == "cpu" else ""
    return f"{' and '.join(devices)}{kernels}, last on {max(one['date'] for one in about)[:10]}"


def readme_headline() -> str:
    """Say what fastkd is, with two measurements, and what is validated where."""
    case = _headline_case()
    ours, eager = (case["lanes"][name]["peak_tensors"] for name in ("fastkd", "eager"))
    gpus = _measured("cuda")
    return (
        "fastkd computes the distillation loss and its gradient in one fused pass in C++ or CUDA, "
        "by one call from PyTorch.\n"
        f"On a CPU it is **{times(ratio(case, 'eager'))} as fast** as eager PyTorch, with "
        f"**{ours:.0f} tensor** of the size of the logits in memory\ninstead of **{eager:.0f}** "
        f"(float32 logits of {case['rows']} x {case['classes']}).\n\n"
        f"Status: **alpha**. CPU: measured on {_measured('cpu')}. CUDA: "
        + (f"measured on {gpus}" if gpus else f"[not yet\nvalidated on a GPU]({PENDING})")
        + ". [Documentation](docs/index.md); `make docs` builds the site.\n"
    )


def readme_comparison() -> str:
    """Caption the README's code before and after."""
    return (
        "Both give the same loss up to rounding. The call is "
        f"{times(ratio(_headline_case(), 'eager'))} as fast, and loses no digits where the "
        "student is close to its\nteacher ([accuracy](docs/accuracy.md)).\n"
    )


def readme_rows(results: Results) -> Rows:
    """Select four cases with a gradient, and the best-known baselines, for the README."""
    cases = [case for key in README_CASES if (case := _case(results, *key))]
    names = [name for name in README_BASELINES if any(ratio(case, name) for case in cases)]
    heading = [
        "loss + backward",
        "fastkd",
        "share of memory bandwidth",
        *names,
        "gradient error: fastkd",
        "eager",
    ]
    rows = []
    for case in cases:
        share = case["lanes"]["fastkd"].get("share")
        errors = [case["lanes"].get(name, {}).get("gradient_error") for name in ("fastkd", "eager")]
        rows.append(
            [
                f"{case['name']}, {case['rows']} x {case['classes']} {case['dtype']}",
                duration(_median(case, "fastkd") or 0.0),
                f"{100 * share:.0f} %" if share else "",
                *(times(ratio(case, name)) for name in names),
                *(_optional(error, ".0e") for error in errors),
            ]
        )
    return heading, rows


def readme_benchmarks() -> str:
    """Show the newest results: a picture, and a table of four cases."""
    parts = []
    for folder, results in newest():
        where = folder.relative_to(README.parent).as_posix()
        verb = "copy" if results["environment"]["kind"] == "cuda" else "stream"
        parts += [
            f"![Time of each baseline relative to fastkd]({where}/overview.png)\n",
            _markdown_table(readme_rows(results)),
            "Baselines: the time of each, divided by fastkd's; eager fp32 converts the logits to "
            "float32 first. Share of memory bandwidth: the time\n"
            f"to {verb} the same bytes, divided by fastkd's time. Gradient errors: relative to "
            f"float64. {headline(results)}.\n"
            f"[All cases, errors, memory and claims]({where}/results.md).\n",
        ]
    return "\n".join(parts)


README_PARTS = {
    "headline": readme_headline,
    "comparison": readme_comparison,
    "benchmarks": readme_benchmarks,
}


def rewrite_readme() -> str:
    """Write each part between its markers in the README; return what was done."""
    if not newest():
        raise SystemExit(f"no results under {RESULTS}: run `python -m benchmarks` first")
    text = README.read_text()
    for name, write in README_PARTS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{README} needs the lines {begin.strip()} and {end}")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}{write()}{end}{rest.split(end, 1)[1]}"
    README.write_text(text)
    return f"{README.name} rewritten from {', '.join(folder.name for folder, _ in newest())}"
