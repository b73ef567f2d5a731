"""Test the installed package: metadata, public names, docstrings, and the command line."""

import doctest
import importlib
import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest
import torch

import fastkd
from fastkd import _C

NAMES = [
    "fastkd",
    *(
        module.name
        for module in pkgutil.walk_packages(fastkd.__path__, "fastkd.")
        if not module.name.rpartition(".")[2].startswith("_")
    ),
]


def test_version_is_that_of_the_metadata():
    assert fastkd.__version__ == importlib.metadata.version("fastkd") == _C.version


def test_the_metadata_names_license_and_torch():
    metadata = importlib.metadata.metadata("fastkd")
    assert metadata["License-Expression"] == "Apache-2.0"
    needs = [line for line in importlib.metadata.requires("fastkd") if "extra ==" not in line]
    assert len(needs) == 1 and re.match(r"torch\s*>=\s*2\.10", needs[0])


def test_types_are_shipped():
    files = importlib.resources.files("fastkd")
    assert (files / "py.typed").is_file()
    assert (files / "_C.pyi").is_file()


def test_stubs_have_the_names_of_the_library():
    stub = (importlib.resources.files("fastkd") / "_C.pyi").read_text()
    named = set(re.findall(r"^(?:def )?(\w+)[(:]", stub, re.MULTILINE))
    assert named == {name for name in dir(_C) if not name.startswith("_")}


def test_public_names_exist():
    assert len(fastkd.__all__) == len(set(fastkd.__all__))
    for name in fastkd.__all__:
        assert hasattr(fastkd, name)


def test_tab_completion_shows_public_names_alone():
    for module in (
        *(fastkd, fastkd.chunks, fastkd.compat, fastkd.deployment, fastkd.integrations),
        *(fastkd.teachers, fastkd.teachers.served),
    ):
        assert dir(module) == sorted(module.__all__)


def test_compat_and_integrations_are_imported_when_they_are_used():
    script = """
import sys
import fastkd
assert {"compat", "integrations"} <= set(dir(fastkd)) and "fastkd.compat" not in sys.modules
fastkd.compat.trl.generalized_jsd_loss
fastkd.integrations.transformers.DistillationMixin
fastkd.integrations.trl.chunked_divergence_loss
assert not {"transformers", "trl"} & set(sys.modules)
for module in (fastkd, fastkd.compat):
    try:
        module.nothing
    except AttributeError as error:
        assert str(error) == f"module {module.__name__!r} has no attribute 'nothing'"
    else:
        raise AssertionError(module)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loss_terms_and_module_have_the_same_options():
    def options(function) -> dict:
        return {
            p.name: (p.default, str(p.annotation))
            for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }

    assert options(fastkd.loss) == options(fastkd.terms) == options(fastkd.KDLoss.__init__)


@pytest.mark.parametrize("name", NAMES)
def test_public_objects_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for key, value in vars(module).items():
        if (
            not key.startswith("_")
            and getattr(value, "__module__", None) == name
            and callable(value)
        ):
            assert value.__doc__, f"{name}.{key}"


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_run(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, _ = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    )
    assert failed == 0


def test_docstring_examples_are_found():
    doctests = [
        test
        for name in NAMES
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    ]
    assert {test.name for test in doctests} >= {
        f"fastkd.losses.{name}" for name in ("loss", "terms", "KDLoss")
    }


def test_info_names_versions_and_kernels():
    done = subprocess.run([sys.executable, "-m", "fastkd", "info"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert facts["fastkd"] == fastkd.__version__
    assert facts["torch"].startswith(torch.__version__)
    assert all(name in facts["CPU kernels"] for name in _C.available_isas())
    assert (_C.cuda_architectures or "not built") in facts["CUDA kernels"]
    assert int(facts["threads"]) >= 1
    assert facts["divergences"].split(", ") == list(fastkd.divergences())
    assert facts["compiler"] == _C.compiler


def test_command_without_arguments_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "fastkd"], capture_output=True, text=True)
    assert done.returncode == 2 and "info" in done.stderr


@pytest.mark.slow
def test_the_environment_can_select_an_isa():
    for name in _C.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", "from fastkd import _C; print(_C.isa())"],
            env={"FASTKD_CPU_CAPABILITY": name, "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == name, done.stderr
