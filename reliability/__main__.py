"""Run the programs that docs/reliability.md lists, and write that page.

``python -m reliability [NAME ...]`` runs the named programs, or all programs. Each program has a
time limit, and a failure does not stop later programs. After each program, its results are written
to ``results/NAME.json`` and to the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "reliability.md"
FINDINGS = ROOT / "reliability" / "findings.md"


class Promise(NamedTuple):
    """Hold a promise, and the command that tests the promise."""

    promise: str
    command: str
    minutes: int = 10
    needs: str | None = None
    """Required program; if it is missing, the promise is not tested."""


TESTS = ".venv/bin/python -m pytest -q "
PROMISES = {
    "sanitize": Promise(
        "The kernels have no memory error, no undefined behavior and no data race: under their own "
        "tests, with several threads, and under hostile calls.",
        "make sanitize",
        minutes=40,
    ),
    "valgrind": Promise(
        "The kernels read no uninitialized memory and leak none (AVX2 and baseline alone: valgrind "
        "has no AVX-512).",
        "make valgrind",
        minutes=40,
        needs="valgrind",
    ),
    "sanitize-python": Promise(
        "The extension, called from Python, passes the tests under the sanitizers.",
        "make sanitize-python",
        minutes=30,
    ),
    "fuzz-kernels": Promise(
        "Kernel calls with random sizes, strides, options, labels, lists of classes and logits "
        "touch no memory but their own. Rows that threads share, rows of one thread, and the "
        "backward pass agree.",
        "make fuzz-kernels CASES=200000 SEED=1",
        minutes=20,
    ),
    "libfuzzer": Promise(
        "The promise above, tested by a coverage-guided fuzzer (libFuzzer).",
        "make libfuzzer",
        minutes=20,
        needs="clang++",
    ),
    "fuzz": Promise(
        "Random calls from Python agree with float64: shapes, strides, alignments, dtypes, masks, "
        "infinities, NaN, subnormals, every divergence, every entry point, classes in dim 1.",
        "make fuzz CASES=20000 FUZZERS=tests/test_fuzz.py",
        minutes=30,
    ),
    "fuzz-lists": Promise(
        "Random calls with a list of classes, or a sampled class, for each row agree with float64, "
        "for every divergence and estimator; invalid lists are refused.",
        "make fuzz CASES=20000 FUZZERS=tests/test_fuzz_topk.py",
        minutes=30,
    ),
    "fuzz-heads": Promise(
        "Random calls with linear heads agree with float64.",
        "make fuzz CASES=5000 FUZZERS=tests/test_fuzz_linear.py",
        minutes=30,
    ),
    "fuzz-ops": Promise(
        "Hostile calls of the ops under torch.ops.fastkd raise, or touch no memory but their own: "
        "sizes, dtypes, strides, devices, released storages, values of enums.",
        "make fuzz CASES=5000 FUZZERS=tests/test_fuzz_ops.py",
        minutes=30,
    ),
    "fuzz-caches": Promise(
        "A malformed, truncated or hostile file of a teacher's cache can be read, or raises a "
        "ValueError. The fuzzer is coverage-guided; half of its mutations change header entries.",
        "make fuzz-caches SECONDS=120",
    ),
    "concurrency": Promise(
        "Results are bitwise the same with Python threads, forked and spawned workers, OpenMP "
        "settings, and graphs shared by threads. The GIL is released while kernels run.",
        TESTS + "tests/test_concurrency.py",
    ),
    "determinism": Promise(
        "Results are bitwise the same on every run and for every number of threads. Instruction "
        "sets differ by at most a stated bound.",
        TESTS + "tests/test_determinism.py",
    ),
    "memory": Promise(
        "If memory runs out, torch's own error is raised, inputs are unchanged, and later calls "
        "work.",
        TESTS + "tests/test_memory.py",
    ),
    "peak": Promise(
        "Peak memory, as counted by the allocator, is a gradient and a few numbers for each row.",
        TESTS + "tests/test_autograd.py -k memory",
    ),
    "soak": Promise("100,000 calls of each kind leak no memory.", "make soak", minutes=40),
    "security": Promise(
        "The statements of SECURITY.md: no loaded data is executed, no connection is opened.",
        TESTS + "tests/test_security.py",
    ),
    "versions": Promise(
        "The core tests pass on the oldest and the newest torch and on Python 3.10 to 3.13, each "
        "installed from the sdist. A wheel built with one torch works with another.",
        "make versions",
        minutes=90,
    ),
    "package": Promise(
        "The sdist installs from its tarball without git; auditwheel accepts the wheel; "
        "cibuildwheel reads its settings.",
        "make package",
    ),
    "accuracy": Promise(
        "Errors against float64, beside those of eager PyTorch: [accuracy.md](accuracy.md).",
        "make accuracy",
    ),
}


def run(name: str) -> dict[str, Any]:
    """Run a promise's command, print its output, and store its figures."""
    promise = PROMISES[name]
    print(f"\n==== {name}: {promise.command} (at most {promise.minutes} minutes)", flush=True)
    start = time.monotonic()
    if promise.needs is None or shutil.which(promise.needs):
        status, lines = run_command(promise)
        figures = read_figures(lines)
        if status == -signal.SIGKILL:
            figures.append(f"stopped after {promise.minutes} minutes")
    else:
        status, figures = None, [f"not tried: {promise.needs} is not installed"]
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {
        "passed": None if status is None else status == 0,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "unknown",
        "seconds": round(time.monotonic() - start),
        "found": figures,
    }
    print(f"==== {name}: {result['passed']} after {result['seconds']} s", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def run_command(promise: Promise) -> tuple[int, list[str]]:
    """Return a command's exit status and output; kill its process group at the time limit."""
    lines = []
    with subprocess.Popen(
        promise.command, shell=True, cwd=ROOT, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        limit = threading.Timer(60 * promise.minutes, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        limit.cancel()
    return process.returncode, lines


def read_figures(lines: list[str]) -> list[Any]:
    """Return the figures that a command printed, and summaries of test runners and libFuzzer."""
    figures: list[Any] = []
    for line in lines:
        if line.startswith("figures: "):
            figures.append(json.loads(line.removeprefix("figures: ")))
        elif match := re.search(r"\d+ passed.*|\d+% tests passed.*", line):
            figures.append(re.sub(r" in [\d.]+s.*", "", match[0]))
        elif match := re.match(r"(stat::number_of_executed_units): *(\d+)", line):
            figures.append({"cases": int(match[2])})
    return figures


def format_figures(value: Any) -> str:
    """Return figures as text, without the lists in a dictionary."""
    if isinstance(value, dict):
        pairs = {key: part for key, part in value.items() if not isinstance(part, list)}
        return ", ".join(f"{key}: {part}" for key, part in pairs.items())
    return str(value)


def write_document() -> str:
    """Return the text of docs/reliability.md."""
    lines = [
        "# Reliability",
        "",
        "`python -m reliability` runs the commands below and writes this page. Each row is a",
        "promise, the command that tests it, and the result of the command's last run. The text",
        "below the tables is `reliability/findings.md`.",
        "",
        "| Promise | Command | Last run | Found |",
        "| --- | --- | --- | --- |",
    ]
    versions: list[dict[str, str]] = []
    for name, (promise, command, *_) in PROMISES.items():
        path = RESULTS / f"{name}.json"
        command = command.replace(".venv/bin/python -m ", "")
        if not path.exists():
            lines.append(f"| {promise} | `{command}` | not run yet | |")
            continue
        result = json.loads(path.read_text())
        when = f"{result['date']}, {result['commit']}, {result['seconds']} s"
        verdict = "**failed**; " if result["passed"] is False else ""
        text = verdict + "; ".join(map(format_figures, result["found"]))
        lines.append(f"| {promise} | `{command}` | {when} | {text} |")
        for figures in result["found"]:
            if isinstance(figures, dict) and "pairs" in figures:
                versions = figures["pairs"]
    if versions:
        lines += ["", "## Pythons and torches", ""]
        lines += ["| Python | torch | tried | core tests | a wheel built with another torch |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for row in versions:
            cells = (row["python"], row["torch"], row["date"], row["result"])
            lines.append(f"| {' | '.join(cells)} | {row.get('foreign', '')} |")
    return "\n".join(lines) + "\n\n" + FINDINGS.read_text()


def main() -> int:
    """Run the named programs, or all programs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROMISES)}")
    parser.add_argument("--write", action="store_true", help="run nothing, only write")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.names if name not in PROMISES]
    if unknown:
        parser.error(f"NAME must be one of {', '.join(PROMISES)}; got {unknown[0]}")
    failed = []
    for name in [] if chosen.write else chosen.names or list(PROMISES):
        if run(name)["passed"] is False:
            failed.append(name)
        DOCUMENT.write_text(write_document())
    DOCUMENT.write_text(write_document())
    print(f"wrote {DOCUMENT.relative_to(ROOT)}" + (f"; failed: {failed}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
