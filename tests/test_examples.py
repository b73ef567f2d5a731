"""Test that examples run briefly, and that deploy.py has the cells of its notebook."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
# Each entry is (arguments, required package, words of the output's last line).
SCRIPTS = {
    "plain_loop.py": (["--seeds", "2", "--epochs", "2"], "sklearn", "gain by distillation"),
    "lightning_module.py": (["--seeds", "2", "--epochs", "1"], "lightning", "gain by"),
    "transformers_trainer.py": (["--seeds", "2", "--steps", "1"], "transformers", "gain by"),
    "language_model.py": (["--steps", "2", "--seeds", "1"], "matplotlib", "Lowest reverse KL"),
    "feature_hints.py": (["--seeds", "2", "--epochs", "1"], "accelerate", "with a hint"),
    "ensemble.py": (["--seeds", "2", "--steps", "5"], "sklearn", "all against none"),
}
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize(
    "name",
    [n if n == "plain_loop.py" else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS],
)
def test_scripts_print_what_is_documented(name):
    arguments, needs, word = SCRIPTS[name]
    pytest.importorskip(needs)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    assert word in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_language_model_writes_between_its_markers(tmp_path):
    pytest.importorskip("matplotlib")
    document = tmp_path / "a.md"
    document.write_text(
        "before\n<!-- language_model:begin -->\nold\n<!-- language_model:end -->\nafter\n"
    )
    command = [sys.executable, str(EXAMPLES / "language_model.py"), "--steps", "1", "--seeds", "1"]
    done = subprocess.run([*command, "--write", document], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert done.stdout in text
    assert document.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    document.write_text("no markers\n")
    done = subprocess.run([*command, "--write", document], capture_output=True, text=True)
    assert done.returncode == 2 and document.read_text() == "no markers\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebooks_run_to_the_end(name):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_the_script_has_the_cells_of_the_notebook():
    # ``jupytext --to ipynb examples/deploy.py`` writes the notebook's cells.
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "deploy.ipynb", as_version=4)
    cells = []
    for part in re.split(r"^# %%", (EXAMPLES / "deploy.py").read_text(), flags=re.MULTILINE)[1:]:
        kind, _, text = part.partition("\n")
        is_text = kind.strip() == "[markdown]"
        text = re.sub(r"^# ?", "", text.strip("\n"), flags=re.MULTILINE) if is_text else text
        cells.append(("markdown" if is_text else "code", text.strip("\n")))
    assert cells == [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebooks_are_found():
    assert {"introduction.ipynb", "deploy.ipynb"} <= set(NOTEBOOKS)
