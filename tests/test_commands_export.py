"""Test the command ``fastkd export``."""

import pytest
from stacks import run_refused_command

pytest.importorskip("accelerate")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("restored_path")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student="], "student is missing"),
        (["--output="], "output is missing"),
        (["--samples=0"], "samples must be an int of at least 1; got 0"),
        (["--path=student.pte"], "path must be a file that ends in .onnx for format='onnx'; got"),
        ([], "student_weights must be an existing .safetensors file"),
    ],
)
def test_an_export_with_missing_or_invalid_options_is_refused(
    config_path, monkeypatch, capsys, arguments, message
):
    pytest.importorskip("onnxscript")
    assert message in run_refused_command(
        monkeypatch, capsys, "export", "--config", config_path, *arguments
    )
