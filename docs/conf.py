"""Configure the documentation site, which ``make docs`` builds with Sphinx.

The source folder is the repository, so that links from ``docs/`` to files such as
``CONTRIBUTING.md`` work on the site as on GitHub.
"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

project = "fastkd"
copyright = "The fastkd authors, Apache-2.0"
release = importlib.metadata.version("fastkd")
html_title = f"fastkd {release}"

root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "examples/*.ipynb",
    "benchmarks/results/**",
]
# docs/index.md takes the place of README.md on the site.
exclude_patterns = ["README.md", ".*", "build", "runs", "tests", "csrc", "python"]
html_extra_path = ["site"]  # index.html, which opens docs/index.html

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
]
html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path, html_css_files = ["site.css"], ["site.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style, pygments_dark_style = "tango", "monokai"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub renders ```math, too
myst_heading_anchors = 4  # for links such as teachers.md#ids

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings describe the types with their shapes and ranges
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False
doctest_global_setup = "import torch, fastkd"
# Docstrings link to names of these projects, whose inventories are in docs/, so that a build needs
# no network.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable", "docs/torch.inv"),
    "python": ("https://docs.python.org/3", "docs/python.inv"),
}


class NotebookParser(MystParser):
    """Parse a notebook, with its stored outputs, as Markdown."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Convert the notebook to Markdown, and parse the Markdown."""
        super().parse(to_markdown(inputstring), document)


def to_markdown(notebook: str) -> str:
    """Return the text, code and outputs of a notebook as Markdown."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                data = "".join(picture).replace("\n", "")
                parts.append(f"![output of the code above](data:image/png;base64,{data})")
            elif "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
    return "\n\n".join(parts)


def drop_alias(*event: Any) -> None:
    """Remove the docstring that Python gives to a field of a named tuple."""
    lines = event[-1]
    if lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app: Sphinx) -> None:
    """Register the parser of notebooks, and the filter of docstrings."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("autodoc-process-docstring", drop_alias)
