"""Test that source files import and include lower layers only."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import fastkd
from fastkd import _C, reference
from fastkd._core import dense

ROOT = pathlib.Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "fastkd"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})
MODULES = sorted(PACKAGE.rglob("*.py"))
TORCH = re.compile(r"^(torch|ATen|c10|caffe2|TH)(/|$)")

# Each file or folder of csrc may include only these files and folders of csrc.
LAYERS = {
    "numerics.h": set(),
    "dtypes.h": set(),
    "constants.h": {"numerics.h"},
    "divergences.h": {"constants.h"},
    "kernels.h": {"divergences.h", "dtypes.h"},
    "topk.h": {"kernels.h"},
    "topk_row.h": {"divergences.h", "topk.h"},
    "mixture.h": {"kernels.h"},
    "cpu": {
        *("numerics.h", "dtypes.h", "divergences.h", "kernels.h", "topk.h", "topk_row.h"),
        *("mixture.h", "cpu"),
    },
    "cuda": {
        *("numerics.h", "dtypes.h", "divergences.h", "kernels.h", "topk.h", "topk_row.h"),
        *("mixture.h", "cuda"),
    },
    "torch": {"kernels.h", "mixture.h", "topk.h", "torch"},
}
# Each module or folder of the package may import only these lower layers of the package.
IMPORTS = {
    "_C": set(),
    "_eager": set(),
    "extras": set(),
    "batches": set(),
    "validation": set(),
    "reference": set(),
    "_core": {"_C", "_eager", "reference", "validation"},
    "linear": {"_core", "reference", "validation"},
    "losses": {"_core", "linear", "reference", "validation"},
    "diagnostics": {"_core", "losses", "reference", "validation"},
    "teachers": {"_core", "batches", "extras", "reference", "validation"},
    "training": {
        *("_core", "batches", "extras", "losses", "reference", "teachers", "validation"),
    },
    "deployment": {"batches", "extras", "validation"},
    "reports": {"_C", "batches", "deployment", "extras", "validation"},
    "compat": {"_core", "losses", "validation"},
    "integrations": {"batches", "compat", "extras", "losses"},
    "commands": {
        *("_core", "batches", "deployment", "extras", "losses", "reports", "teachers"),
        *("training", "validation"),
    },
}
# C++ autograd has no stable interface; these files belong to the optional module fastkd._eager.
UNSTABLE = {"torch/eager.cpp", "torch/grad_buffer.h"}


def folder_of(path: pathlib.Path) -> str:
    return path.relative_to(CSRC).parts[0]


def includes(path: pathlib.Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def included_folder(path: pathlib.Path, name: str) -> str | None:
    """Return the folder or file of csrc that is included, or None for a system header."""
    for base in (path.parent, CSRC):
        target = (base / name).resolve()
        if target.is_file() and target.is_relative_to(CSRC):
            return folder_of(target)
    return None


def test_the_sources_are_found():
    assert len(SOURCES) > 10 and len(MODULES) > 5
    assert {folder_of(path) for path in SOURCES} == set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_csrc_includes_downwards_only(path):
    for name in includes(path):
        target = included_folder(path, name)
        if target is not None:
            assert target in LAYERS[folder_of(path)], f"{path.name} must not include {name}"
        elif name.startswith(".") or name.endswith(".cuh"):
            pytest.fail(f"{path.name} includes {name}, which is not there")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_torch_headers_are_in_the_glue_and_stable(path):
    relative = str(path.relative_to(CSRC))
    for name in includes(path):
        if TORCH.match(name):
            assert folder_of(path) == "torch", f"{relative} must not include {name}"
            if relative not in UNSTABLE:
                assert name.startswith(("torch/csrc/stable/", "torch/headeronly/")), (
                    f"{relative} includes {name}, which is not stable"
                )
        if name.startswith("pybind11/") or name == "Python.h":
            assert relative in {"torch/module.cpp", *UNSTABLE}, (
                f"{relative} must not include {name}"
            )
        if name.startswith("cuda") and included_folder(path, name) is None:
            assert folder_of(path) == "cuda", f"{relative} must not include {name}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if folder_of(p) == "cpu"], ids=lambda p: p.name
)
def test_cpu_kernels_own_no_threads(path):
    for name in includes(path):
        assert name not in {"thread", "mutex", "future", "omp.h", "pthread.h"}
    assert "#pragma omp parallel" not in path.read_text()


def imported(path: pathlib.Path) -> set[str]:
    """Return the full names that a Python file imports, except those for type checking alone."""
    tree, names = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def top_level_names(path: pathlib.Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_the_package_imports_torch_and_itself(path):
    assert top_level_names(path) <= {"torch", "fastkd"}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if "reference" in p.parts], ids=lambda p: p.name
)
def test_the_reference_imports_torch_alone(path):
    others = {n for n in imported(path) if n.split(".")[0] not in sys.stdlib_module_names}
    assert all(name.startswith(("torch", "fastkd.reference.")) for name in others)


def module_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_is_in_the_table():
    stubs = {path.stem for path in PACKAGE.glob("_*.pyi")}
    assert {module_of(path) for path in MODULES} | stubs == {*IMPORTS, "__init__", "__main__"}


def test_modules_import_only_modules_above_them():
    known: set[str] = set()
    for name, allowed in IMPORTS.items():
        assert allowed <= known, f"{name}: {allowed - known} must stand above it"
        known.add(name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_files_import_lower_layers(path):
    layer = module_of(path)
    if layer == "__main__":
        return  # the command line may import everything
    names = {name for name in imported(path) if name.split(".")[0] == "fastkd"}
    parts = {name.split(".")[1] if "." in name else "" for name in names}
    if layer == "__init__":
        assert not parts & {"compat", "integrations", "commands"}, (
            "these are imported when they are used"
        )
        return
    assert parts <= {layer, *IMPORTS[layer]}, (
        f"{layer} imports {sorted(parts - {layer, *IMPORTS[layer]})}"
    )


def test_tests_and_benchmarks_do_not_import_each_other():
    for path in (ROOT / "tests").rglob("*.py"):
        assert "benchmarks" not in top_level_names(path), path
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not top_level_names(path) & {"tests", "support", "conftest"}, path


def test_importing_fastkd_needs_torch_alone():
    script = """
import sys
import importlib.abc

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ImportError(f"{name} is not to be imported")

import torch
known = {name.split(".")[0] for name in sys.modules}
refused = {"numpy", "scipy", "sklearn", "rich", "tqdm", "matplotlib", "pytest", "hypothesis",
           "triton", "pandas", "yaml", "jsonargparse", "onnx", "onnxruntime", "onnxscript",
           "executorch", "torchao"} - known
sys.meta_path.insert(0, Wall())
import fastkd
fastkd.loss(torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)).backward()
new = {name.split(".")[0] for name in sys.modules} - known - set(sys.stdlib_module_names)
assert not {"fastkd.compat", "fastkd.integrations", "fastkd.commands"} & set(sys.modules)
print(sorted(name for name in new if not name.startswith("_")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == ["fastkd"]


def test_cpp_and_python_have_equal_divergences():
    assert tuple(reference.DIVERGENCES) == fastkd.divergences()
    assert _C.divergences == dense.DIVERGENCES
    assert set(dense.DIVERGENCES) <= set(reference.DIVERGENCES)
