"""Compile other libraries' code as the oracle of fastkd.compat, and compare losses.

compile_code compiles single classes and functions of an installed library. Importing the library
would also import its dependencies.
"""

import ast
import functools
import importlib.util
import math
import pathlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def find_package_folder(package: str) -> pathlib.Path:
    """Return a package's folder without an import; skip the test if the package is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed (make test installs it)")
    return pathlib.Path(spec.submodule_search_locations[0])


def compile_code(package: str, file: str, *names: str, **extra_globals: Any) -> SimpleNamespace:
    """Compile named classes and functions of a package's file, without decorators.

    ``extra_globals`` defines names that the code uses besides torch, nn and F.
    """
    path = find_package_folder(package) / file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' docstrings have invalid escapes
        tree = ast.parse(path.read_text())
    definitions = {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names
    }
    missing = set(names) - set(definitions)
    assert not missing, f"{path} has no {missing} any more: the convention may have changed"
    # The __future__ import leaves annotations unevaluated; they may use names that the file
    # imports.
    body: list[ast.stmt] = [
        ast.ImportFrom(module="__future__", names=[ast.alias(name="annotations")], level=0)
    ]
    for node in sorted(definitions.values(), key=lambda node: node.lineno):
        node.decorator_list = []
        body.append(node)
    module = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    namespace = {"__name__": f"peer_{package}", "torch": torch, "nn": nn, "F": F, **extra_globals}
    exec(compile(module, str(path), "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


@functools.cache
def timm_task() -> Any:
    """Compile timm's LogitDistillationTask; importing timm would import torchvision."""
    as_it_is = {"unwrap_model": lambda model: model, "get_state_dict": None}
    base = compile_code("timm", "task/task.py", "TrainingTask", **as_it_is).TrainingTask
    return compile_code(
        "timm",
        "task/distillation.py",
        "DistillationTeacher",
        "_resolve_teacher",
        "LogitDistillationTask",
        TrainingTask=base,
        **as_it_is,
        resolve_classification_loss=lambda criterion, device, criterion_kwargs: criterion,
    ).LogitDistillationTask


# DOUBLE and SINGLE are tolerances; SINGLE is for libraries that always compute in float32.
DOUBLE = {"rtol": 1e-9, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 2e-6}
SHAPES = [(6, 5), (2, 4, 11)]
MASKS = ["all count", "some ignored"]


def draw(shape: tuple[int, ...], mask: str = "all count", ignore_index: int = -100):
    generator = torch.Generator().manual_seed(math.prod(shape))
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    if mask == "some ignored":
        labels[..., ::3] = ignore_index
    return student, teacher, labels


def assert_equal_losses(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    student: Tensor,
    tolerance: dict[str, float] = DOUBLE,
) -> None:
    """Assert that two losses, and their gradients for the student, are equal."""
    values, grads = [], []
    for function in (ours, theirs):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape)
        (grad,) = torch.autograd.grad(value, leaf, weights)
        values.append(value.detach().double())
        grads.append(grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(values[0], values[1], **tolerance)
    torch.testing.assert_close(grads[0], grads[1], **tolerance)


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute temperature**2 * KL(teacher || student) for each row."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)
