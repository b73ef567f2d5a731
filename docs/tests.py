"""Write docs/tests.md from the results of `make coverage`: ``python docs/tests.py``."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple
from xml.etree import ElementTree

PATH = pathlib.Path(__file__).with_suffix(".md")
BUILD = PATH.parents[1] / "build"
SLOWEST = 20

_INTRO = """\
# Tests in two tiers

<!-- Written by `make coverage`, which runs the quick tests, then the slow tests. -->

`make test` leaves out the tests that `@pytest.mark.slow` marks. `make test-all` runs every test
and the kernels' own tests. Seconds include a test's fixtures.

"""


class Tier(NamedTuple):
    """Hold the tests with their seconds, and the covered lines, of a Makefile target."""

    command: str
    tests: list[tuple[float, str]]
    covered: dict[str, set[int]]

    @property
    def lines(self) -> set[tuple[str, int]]:
        """Return the covered lines of all files, as pairs of file and line number."""
        return {(name, line) for name, lines in self.covered.items() for line in lines}


def read(name: str, *runs: str) -> Tier:
    """Read the tests of ``runs`` from JUnit files, and the coverage of ``make NAME``."""
    tests = [
        (float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}")
        for run in runs
        for case in ElementTree.parse(BUILD / f"{run}.xml").iter("testcase")
        if case.find("skipped") is None
    ]
    report = json.loads((BUILD / f"{name}.json").read_text())
    covered = {name: set(file["executed_lines"]) for name, file in report["files"].items()}
    return Tier(f"make {name}", sorted(tests, reverse=True), covered)


def write_document() -> str:
    """Return the text of docs/tests.md."""
    quick, full = read("test", "test"), read("test-all", "test", "slow")
    share = len(quick.lines & full.lines) / len(full.lines)
    text = (
        _INTRO
        + "| | tests | sum of seconds | covered lines of python/fastkd |\n|---|---|---|---|\n"
    )
    for tier in (quick, full):
        seconds = sum(time for time, _ in tier.tests)
        text += f"| `{tier.command}` | {len(tier.tests)} | {seconds:.0f} | {len(tier.lines)} |\n"
    text += f"\nThe quick tests cover {share:.1%} of the lines that all tests cover.\n"
    for tier in (quick, full):
        text += f"\n## The {SLOWEST} slowest of `{tier.command}`\n\n| seconds | test |\n|---|---|\n"
        text += "".join(f"| {time:.1f} | `{name}` |\n" for time, name in tier.tests[:SLOWEST])
    return text


if __name__ == "__main__":
    PATH.write_text(write_document())
