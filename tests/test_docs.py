"""Test that the documentation's code runs, its links work, and its reference is complete."""

import functools
import importlib.metadata
import pathlib
import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The code blocks of these pages are not tested: they import optional packages or omit arguments.
EXCERPTS = {"compat.md", "index.md", "training.md"}
# first-distillation.md trains three networks, and report.md draws pictures.
SLOW = {"first-distillation.md", "report.md"}
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if path.name not in EXCERPTS and PYTHON.search(path.read_text())
)
MARKDOWN = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "reliability/*.md")
    for path in ROOT.glob(pattern)
)


def run(blocks: list[str], name: str, namespace: dict[str, object]) -> None:
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    for value in namespace.values():
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            assert value.isfinite(), value


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PAGES]
)
def test_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(PYTHON.findall((DOCS / name).read_text()), name, {})


class LanguageModel(nn.Module):
    """Return an output with ``logits``, as transformers' language models do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))

    def forward(self, tokens):
        return types.SimpleNamespace(logits=self.layers(tokens))


def test_python_of_the_readme_runs():
    torch.manual_seed(0)
    tokens = torch.randint(50, (2, 12))
    names = {
        "F": F,
        "T": 4.0,
        "alpha": 0.1,
        "fastkd": fastkd,
        "is_prompt": torch.arange(12) < 4,
        "labels": torch.randint(10, (8,)),
        "student": LanguageModel(),
        "student_logits": torch.randn(8, 10, requires_grad=True),
        "teacher": LanguageModel(),
        "teacher_logits": torch.randn(8, 10),
        "tokens": tokens,
        "torch": torch,
    }
    before, after, language_model = PYTHON.findall((ROOT / "README.md").read_text())
    run([before], "README.md", names)
    expected = names["loss"]
    run([after], "README.md", names)
    torch.testing.assert_close(names["loss"], expected)
    run([language_model], "README.md", names)
    rows = names["student_logits"].detach()[:, 3:-1].flatten(0, 1)
    targets = names["teacher_logits"][:, 3:-1].flatten(0, 1)
    hard = F.cross_entropy(rows, tokens[:, 4:].flatten())
    soft = F.kl_div(rows.log_softmax(-1), targets.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(names["loss"].detach(), 0.1 * hard + 0.9 * soft)


def test_the_readme_shows_what_explain_prints():
    text = (ROOT / "README.md").read_text()
    (call, shown) = re.search(r"```text\n>>> fastkd.explain\((.*)\)\n(.*?)```", text, re.S).groups()
    assert shown == eval(f"fastkd.explain({call}, show=False)") + "\n"


@functools.cache
def anchors(path: pathlib.Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_of_a_page_work(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", text)):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(path.resolve()), f"{name}: {link}"


def test_the_reference_has_every_public_name():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: fastkd\.(\w+)", text, re.MULTILINE))
    assert documented >= set(fastkd.__all__) - {"__version__"}


def test_install_lists_the_extras():
    listed = {
        extra: set(packages.split(", "))
        for extra, packages in re.findall(
            r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (DOCS / "install.md").read_text(), re.MULTILINE
        )
    }
    metadata: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("fastkd"):
        if match := re.match(r"([\w-]+).*extra == [\"'](\w+)[\"']", line):
            metadata.setdefault(match[2], set()).add(match[1])
    assert listed == metadata
