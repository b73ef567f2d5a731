"""Other libraries' own code, as the oracle of the adapters in fastkd.compat.

A library's classes and functions are compiled from its installed source, alone: importing the
library would bring along its dependencies, which are a hundred times its size, and their warnings.
"""

import ast
import importlib.util
import pathlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

INSTALL = "python -m pip install --no-deps --group peers"


def folder(package: str) -> pathlib.Path:
    """Where an installed package lies, without importing it; skips the test if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed ({INSTALL})")
    return pathlib.Path(spec.submodule_search_locations[0])


def code(package: str, file: str, *names: str, **given: Any) -> SimpleNamespace:
    """The named classes and functions (methods too) of a package's file, without their decorators.

    ``given`` are the globals that they use beside torch, nn and F.
    """
    path = folder(package) / file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about escapes in their docstrings
        tree = ast.parse(path.read_text())
    found = {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names
    }
    missing = set(names) - set(found)
    assert not missing, f"{path} has no {missing} any more: the convention may have changed"
    # Annotations stay text: they name what is imported in the file.
    body: list[ast.stmt] = [
        ast.ImportFrom(module="__future__", names=[ast.alias(name="annotations")], level=0)
    ]
    for node in sorted(found.values(), key=lambda node: node.lineno):
        node.decorator_list = []
        body.append(node)
    module = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    namespace = {"__name__": f"peer_{package}", "torch": torch, "nn": nn, "F": F, **given}
    exec(compile(module, str(path), "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})
