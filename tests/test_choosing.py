"""Test the sweep for docs/choosing.md: a short run, an interrupted run, and the page."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "choosing.md"
PART = re.compile(r"<!-- choosing:(\w+) -->\n(.*?)\n?<!-- choosing:end -->", re.DOTALL)


def test_every_part_of_the_page_is_written():
    parts = dict(PART.findall(PAGE.read_text()))
    names = {"run", "share", "divergence", "alpha", "teacher", "steps", "unlabeled"}
    assert set(parts) == names and all(parts.values())
    assert PAGE.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_sweep_writes_the_page(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(PAGE.read_text())
    command = [sys.executable, "-m", "benchmarks.choosing", "--quick"]
    command += ["--page", page, "--results", results]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = page.read_text()
    assert PART.sub("", written) == PART.sub("", PAGE.read_text()) and written != PAGE.read_text()
    assert all(text.count("\n") > 3 for name, text in PART.findall(written) if name != "run")
    assert "nan" not in written and page.with_suffix(".png").exists()


STOPPED = """
import pathlib, sys
from benchmarks.sweep import list_cells, run_cells

results = pathlib.Path(sys.argv[1])
cells = {cell: tried for cell, tried in list_cells(50).items() if cell.data == "cancer"}
run_cells(cells, 2, 50, results)
lines = results.read_text().splitlines(keepends=True)
# The results end within a line, as if the run was killed.
results.write_text("".join(lines[:-2]) + lines[-2][:100])
run_cells(cells, 2, 50, results)
again = results.read_text().splitlines(keepends=True)
assert len(lines) == len(cells) and len(again) == len(lines)
assert again[:-2] == lines[:-2]
for one, other in zip(again, lines):
    assert one.partition('"seconds"')[0] == other.partition('"seconds"')[0]
print("continued")
"""


@pytest.mark.slow
def test_a_stopped_sweep_continues(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-c", STOPPED, tmp_path / "results.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "continued", done.stderr
