"""The Python of the documentation's pages runs, top to bottom."""

import pathlib
import re

import pytest

PAGES = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", ["language-models.md", "teachers.md", "deploying.md"])
def test_python_of_a_page(name):
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / name).read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    for value in namespace.values():
        if getattr(value, "ndim", None) == 0:
            assert value.isfinite(), value
