"""Time fastkd and other implementations of the distillation loss: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python -m benchmarks                     the default, a few minutes
  python -m benchmarks --device cuda       on a GPU
  python -m benchmarks --rows 4096 --classes 32000 --dtype bf16 --temperature 2
  python -m benchmarks --only llama --baselines fastkd eager
  python -m benchmarks --only "top 64"     the sparse teacher alone
  python -m benchmarks --only divergences  the other divergences alone
  python -m benchmarks --readme            the README's figures, from the newest saved results
"""


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--full", action="store_true", help="every model, dtype and temperature")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose title contains this")
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help="only these (fastkd always)")
    parser.add_argument("--seconds", type=float, help="duration of timing for each case")
    parser.add_argument(
        "--minutes",
        type=float,
        help="time after which torch.compile is left out; default: 4 on a GPU, 6 on a CPU; "
        "no limit with --full",
    )
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    parser.add_argument("--no-save", action="store_true", help="only show")
    parser.add_argument(
        "--list", action="store_true", help="list cases and baselines, and measure nothing"
    )
    parser.add_argument("--readme", action="store_true", help="only rewrite the README's figures")
    parser.add_argument(
        "--redraw", type=Path, metavar="FOLDER", help="only redo a saved run's report and plots"
    )
    custom = parser.add_argument_group("a case of your own")
    custom.add_argument("--rows", type=int)
    custom.add_argument("--classes", type=int)
    custom.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    custom.add_argument("--temperature", type=float, default=2.0)
    custom.add_argument("--alpha", type=float, default=0.5, help="weight of the hard term")
    custom.add_argument("--ignored", type=float, default=0.0, help="share of rows that are ignored")
    custom.add_argument("--forward-only", action="store_true", help="no gradient")
    chosen = parser.parse_args()
    if (chosen.rows is None) != (chosen.classes is None):
        parser.error("--rows and --classes go together")
    return chosen


def _make_custom_case(chosen: argparse.Namespace) -> Any:
    from benchmarks.cases import Case

    return Case(
        "yours",
        chosen.rows,
        chosen.classes,
        chosen.dtype,
        chosen.temperature,
        gradient=not chosen.forward_only,
        alpha=chosen.alpha,
        ignored=chosen.ignored,
        compiled="best" if chosen.dtype != "fp32" else "default",
        memory=True,
    )


def _list(cases: list[Any]) -> None:
    from benchmarks.baselines import BASELINES

    for case in cases:
        print(case.title)
    print()
    for baseline in BASELINES:
        print(f"{baseline.name:20}{baseline.what}")


def _redraw(folder: Path) -> None:
    import json

    from benchmarks import claims, report

    results = json.loads((folder / "results.json").read_text())
    results["claims"] = claims.evaluate(results) if results.get("standard") else []
    report.save(results, folder)
    _draw(results, folder)


def _draw(results: dict[str, Any], folder: Path) -> None:
    try:
        from benchmarks import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error}")
        return
    plots.draw(results, folder)


def _summarize_streams(device: str, cases: list[dict[str, Any]]) -> dict[str, tuple[str, float]]:
    """Return each memory stream's description, and its median bytes per second over the cases."""
    import statistics

    from benchmarks.stream import make_streams

    result = {}
    for stream in make_streams(device):
        speeds = [case["streams"][stream.name] for case in cases if stream.name in case["streams"]]
        if speeds:
            result[stream.name] = (stream.what, statistics.median(speeds))
    return result


def _measure(
    chosen: argparse.Namespace,
    device: str,
    selected: list[Any],
    sections: dict[str, list[Any]],
    standard: bool,
) -> dict[str, Any]:
    """Measure all cases, print a report, and return the results."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import cases, claims, divergences, environment, report, sparse, suite

    console = Console(width=None if sys.stdout.isatty() else 150)
    minutes = chosen.minutes or (4.0 if device == "cuda" else 6.0)
    if chosen.full and chosen.minutes is None:
        minutes = float("inf")
    start, ticks = time.monotonic(), environment.read_cpu_ticks()
    settings = suite.Settings(
        device,
        chosen.seconds or (0.4 if device == "cuda" else 1.5),
        start + 60 * minutes,
        ("fastkd", *chosen.baselines) if chosen.baselines else (),
    )
    results: dict[str, Any] = {
        "environment": environment.describe(device),
        "standard": standard,
        "cases": [],
        **{name: [] for name in sections},
        "duels": [],
        "scaling": {},
    }
    console.print(
        f"[bold]{results['environment']['device']}[/bold]: answers first checked against float64"
    )
    if results["environment"]["load at the start"] > 0.5 and device == "cpu":
        load = results["environment"]["load at the start"]
        console.print(f"[yellow]Other work is running (load {load}): times will suffer.[/yellow]")
    duels = cases.list_duels(device) if standard else []
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        total = len(selected) + sum(map(len, sections.values())) + len(duels) + 2 * standard
        task = progress.add_task("", total=total)

        def show_status(text: str) -> None:
            progress.update(task, description=text)

        def attempt(title: str, run: Callable[[], Any]) -> Any:
            measured = None
            try:
                measured = run()
            except Exception as error:  # a failed case does not stop the run
                console.print(f"{title}: not measured, {type(error).__name__}: {str(error)[:200]}")
            progress.advance(task)
            return measured

        for case in selected:
            measured = attempt(case.title, partial(suite.run_case, case, settings, show_status))
            if measured is not None:
                results["cases"].append(measured)
                report.show_case(console, measured)
        runs: dict[str, Callable[..., Any]] = {
            "sparse": sparse.run,
            "sampled": sparse.run_sampled,
            "divergences": divergences.run,
        }
        for name, run in runs.items():
            for case in sections[name]:
                show_status(case.title)
                measured = attempt(case.title, partial(run, case, device, settings.seconds))
                results[name] += [measured] * (measured is not None)
        for duel in duels:
            show_status(duel.name)
            results["duels"].append(suite.run_duel(duel, settings))
            progress.advance(task)
        if standard:
            try:
                series = cases.list_scaling(device)
                results["parsing"] = sparse.time_parsing()
                results["close_to_the_teacher"] = suite.measure_close_to_teacher(device)
                progress.advance(task)
                results["scaling"] = suite.run_scaling(series, settings, show_status)
            except Exception as error:
                console.print(f"not measured: {type(error).__name__}: {str(error)[:200]}")
            progress.advance(task)
    after = environment.read_cpu_ticks()
    results["stolen"] = (after[0] - ticks[0]) / max(1, after[1] - ticks[1])
    results["environment"]["clocks at the end"] = environment.read_clocks(device)
    results["missing"] = {
        name: why.removeprefix("not available: ") for name, why in settings.missing.items()
    }
    results["streams"] = _summarize_streams(device, results["cases"])
    results["claims"] = claims.evaluate(results) if standard else []
    results["seconds"] = time.monotonic() - start
    report.show(console, results)
    console.print(f"measured in {results['seconds'] / 60:.1f} minutes")
    return results


def main() -> None:
    """Parse the command line, and measure cases, list cases, or rewrite reports or the README."""
    chosen = _parse_arguments()
    # Inductor starts with an empty cache, so that the reported compile times are of a first run.
    folder = tempfile.mkdtemp(prefix="fastkd-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    try:
        _run(chosen)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(chosen: argparse.Namespace) -> None:
    import warnings

    import torch

    from benchmarks import cases, divergences, environment, readme, report, sparse

    if chosen.readme:
        print(readme.rewrite())
        return
    if chosen.redraw:
        _redraw(chosen.redraw)
        return
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} finds no GPU here")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore", module=r"torch\._inductor|torch\._dynamo")
    standard = chosen.rows is None and chosen.only is None and not chosen.baselines
    if chosen.rows is not None:
        selected = [_make_custom_case(chosen)]
    else:
        selected = cases.list_full(device) if chosen.full else cases.list_default(device)
    wanted = chosen.rows is None and not chosen.baselines
    sections: dict[str, list[Any]] = {
        "sparse": sparse.list_cases(device) if wanted else [],
        "sampled": sparse.list_sampled_cases(device) if wanted else [],
        "divergences": divergences.list_cases(device) if wanted else [],
    }
    if chosen.only:
        selected = [case for case in selected if chosen.only in case.title]
        sections = {
            name: [case for case in section if chosen.only in case.title]
            for name, section in sections.items()
        }
    if chosen.list:
        _list([*selected, *itertools.chain.from_iterable(sections.values())])
        return
    results = _measure(chosen, device, selected, sections, standard)
    if chosen.no_save or (not standard and chosen.output is None):
        return
    output = chosen.output or report.RESULTS / environment.make_slug(device)
    report.save(results, output)
    _draw(results, output)
    print(f"saved under {output}")


if __name__ == "__main__":
    main()
