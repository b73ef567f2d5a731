"""Test that a missing optional package is named before any work starts."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastkd
from fastkd import __main__ as command_line
from fastkd import extras

for package in ("accelerate", "safetensors", "numpy", "tqdm", "rich", "matplotlib", "jsonargparse"):
    pytest.importorskip(package)

LOADER = [(torch.zeros(2, 2), torch.tensor([0, 1]), torch.arange(2))]
PARTS = """
import sys
import torch

def model():
    raise SystemExit("a model was made")

def data():
    raise SystemExit("data were read")
"""


class Uncalled(nn.Linear):
    def __init__(self):
        super().__init__(2, 3)

    def forward(self, x):
        pytest.fail("the model was called")


@pytest.fixture
def hide(monkeypatch):
    """Return a function that makes an installed package unimportable."""

    def hidden(package: str) -> None:
        def import_module(name):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return importlib.import_module(name)

        monkeypatch.setattr(extras, "importlib", SimpleNamespace(import_module=import_module))

    return hidden


@pytest.mark.parametrize("package", ["safetensors", "numpy", "tqdm"])
def test_precompute_names_its_package(package, hide, tmp_path):
    hide(package)
    with pytest.raises(ImportError, match=rf"needs {package}, .*fastkd\[train\]"):
        fastkd.teachers.precompute(Uncalled(), LOADER, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_report_names_its_package(package, hide):
    hide(package)
    with pytest.raises(ImportError, match=rf"needs {package}, .*fastkd\[report\]"):
        fastkd.report(Uncalled(), nn.Linear(2, 3), LOADER)


def test_the_trainer_names_its_package(hide):
    hide("tqdm")
    student = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with pytest.raises(ImportError, match=r"needs tqdm, .*fastkd\[train\]"):
        fastkd.Trainer(student, Uncalled(), optimizer)


@pytest.mark.parametrize(
    "command, package",
    [
        ("distill", "safetensors"),
        ("distill", "numpy"),
        ("sweep", "safetensors"),
        ("sweep", "matplotlib"),
        ("report", "rich"),
        ("report", "matplotlib"),
        ("report", "safetensors"),
        ("export", "onnxruntime"),
        ("export", "safetensors"),
    ],
)
def test_the_command_line_names_its_package(command, package, hide, tmp_path, monkeypatch, capsys):
    (tmp_path / "parts_of_extras.py").write_text(PARTS)
    file = tmp_path / "config.yaml"
    parts = dict.fromkeys(("teacher", "student"), "parts_of_extras:model")
    parts |= dict.fromkeys(("train", "validation"), "parts_of_extras:data")
    file.write_text(json.dumps({**parts, "output": str(tmp_path / "out")}))
    arguments = ["fastkd", command, "--config", str(file)]
    if command == "report":
        arguments += ["--save", str(tmp_path / "report")]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "path", list(sys.path))
    hide(package)
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 2
    assert f"needs {package}, which is not installed" in capsys.readouterr().err
