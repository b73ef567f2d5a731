"""Define fixtures that several test files use, and set hypothesis' profile."""

import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# OpenMP reads OMP_WAIT_POLICY when torch loads OpenMP. Spinning threads slow down small operations
# on shared processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import fastkd
from fastkd import _C
from fastkd._core import autograd, dispatch, fast_path, native

FOLDER = pathlib.Path(__file__).parent
# Tests import support.py, but --import-mode=importlib does not put this folder on sys.path.
sys.path.insert(0, str(FOLDER))

collect_ignore: list[str] = []
try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # a GPU machine without network may lack hypothesis
    collect_ignore += sorted(
        path.name for path in FOLDER.glob("test_*.py") if "from hypothesis" in path.read_text()
    )
else:
    # ``derandomize`` draws the same cases in each run, so the outcome depends on the code alone.
    settings.register_profile(
        "fastkd",
        derandomize=True,
        deadline=None,
        max_examples=60,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("fastkd")


def _why_no_cuda() -> str:
    if not _C.cuda_architectures:
        return "this build has no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return ""


WHY_NO_CUDA = _why_no_cuda()
DEVICES = ["cpu"] if WHY_NO_CUDA else ["cpu", "cuda"]


def pytest_report_header() -> list[str]:
    header = [f"skipped, since hypothesis is not installed: {', '.join(collect_ignore)}"] * bool(
        collect_ignore
    )
    return header + [f"tests on the CPU alone: {WHY_NO_CUDA}"] * bool(WHY_NO_CUDA)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device and a build with CUDA kernels")
    config.addinivalue_line("markers", "slow: skipped by `make test`, run by `make test-all`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not WHY_NO_CUDA:
        return
    cuda = [item for item in items if item.get_closest_marker("cuda")]
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=cuda)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with each instruction set that this processor has."""
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpp", "python"])
def each_autograd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with autograd in C++, and with autograd in Python."""
    if request.param == "python":
        with autograd.without_cpp():
            yield "python"
        return
    if native.EAGER is None:
        pytest.skip("fastkd._eager was not built, or with another torch")
    yield "cpp"


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute losses of sparse teachers by PyTorch's operations instead of the kernel."""
    monkeypatch.setattr(fast_path, "run", lambda *_: None)
    monkeypatch.setattr(dispatch, "is_fused", lambda *_: False)


@pytest.fixture
def accelerate_state() -> Iterator[None]:
    """Reset Accelerate's process-wide state after the test."""
    import accelerate

    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    from stacks import digits_model

    return digits_model(128, epochs=12), {
        "alone": digits_model(8),
        "distilled": digits_model(8, 1, 6),
    }


@pytest.fixture(scope="module")
def report(models) -> fastkd.Report:
    from stacks import digit_loader

    return fastkd.report(*models, digit_loader(), seconds=0.02, show=False, title="Digits")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write a cache of CountingTeacher's 4 most probable classes per sample, in several files."""
    from stacks import CountingTeacher, write_cache

    path = tmp_path_factory.mktemp("cache")
    return write_cache(CountingTeacher(), path, top_k=4, shard_bytes=2000)


@pytest.fixture
def restored_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore sys.path after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def config_path(tmp_path, request) -> pathlib.Path:
    """Write a configuration, and a module of user code under a name unique to the test."""
    from stacks import COMMAND_CONFIG, USER_MODULE

    module = "parts_" + re.sub(r"\W", "_", request.node.name)[:80]
    (tmp_path / f"{module}.py").write_text(USER_MODULE)
    file = tmp_path / "config.yaml"
    file.write_text(COMMAND_CONFIG.format(module=module, output=json.dumps(str(tmp_path / "out"))))
    return file
