"""Test fastkd.export and reports of exported students: agreement, errors, files, timings."""

import importlib
import json
import pathlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd
from fastkd import deployment, extras
from fastkd.deployment import loading, writing
from fastkd.reports import memory, tables

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("executorch")
digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)

IMAGES = torch.tensor(digits[0] / 16, dtype=torch.float32)
LABELS = torch.tensor(digits[1])
TRAIN, HELD_OUT = IMAGES[:1200], IMAGES[1200:]
LOADER = [(IMAGES[i : i + 100], LABELS[i : i + 100]) for i in range(1200, len(IMAGES), 100)]
FILES = {
    "exported": ("student.pt2", "torch", None),
    "ONNX": ("student.onnx", "onnx", None),
    "ONNX int8": ("student-int8.onnx", "onnx", "int8"),
    "ExecuTorch": ("student.pte", "executorch", None),
}


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    made.append(nn.Linear(128, 10))
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    for _ in range(8):
        for index in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            F.cross_entropy(made(TRAIN[index]), LABELS[index]).backward()
            optimizer.step()
    return made


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory) -> dict[str, deployment.Exported]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        name: fastkd.export(student, TRAIN[:256], folder / file, kind, quantize, rows=HELD_OUT)
        for name, (file, kind, quantize) in FILES.items()
    }


def logits_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(rows)


# ---- exported files


@pytest.mark.parametrize("name", FILES)
def test_figures_of_an_export_are_those_of_its_file(student, exported, name):
    result = exported[name]
    expected, logits = logits_of(student, HELD_OUT), logits_of(loading.load(result.path), HELD_OUT)
    assert result.rows == len(HELD_OUT) and result.bytes == result.path.stat().st_size
    assert result.difference == pytest.approx(float((logits - expected).abs().max()), rel=1e-3)
    agreement = (logits.argmax(-1) == expected.argmax(-1)).double().mean()
    assert result.agreement == pytest.approx(float(agreement), abs=1e-9)
    if "int8" not in name:
        assert result.difference < 1e-4 and result.agreement == 1
    assert f"{result.bytes:,} bytes" in str(result)


def test_int8_costs_little_accuracy_and_few_bytes(student, exported):
    result = {n: loading.load(exported[n].path) for n in ("ONNX", "ONNX int8")}
    right = {
        n: float((logits_of(m, HELD_OUT).argmax(-1) == LABELS[1200:]).double().mean())
        for n, m in result.items()
    }
    assert right["ONNX"] - right["ONNX int8"] <= 0.005
    assert exported["ONNX int8"].bytes <= 0.35 * exported["ONNX"].bytes


def test_the_runtime_alone_runs_the_file(student, exported):
    # ONNX runtime runs the file without fastkd; no exported file contains the repository's path.
    path = exported["ONNX"].path
    session = onnxruntime.InferenceSession(str(path))
    for count in (1, 7, 100):
        (logits,) = session.run(["logits"], {"input": HELD_OUT[:count].numpy()})
        assert torch.allclose(torch.from_numpy(logits), logits_of(student, HELD_OUT[:count]), 1e-4)
    for each in exported.values():
        assert str(pathlib.Path(__file__).parents[1]).encode() not in each.path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "kind"), [("a.pte", "executorch"), ("a.pt2", "torch")])
def test_pt2e_exports_int8(student, tmp_path, file, kind):
    # PT2E quantizes linear layers and convolutions, and the batch size stays dynamic.
    torch.manual_seed(0)
    first = nn.Conv2d(1, 1, 1)
    nn.init.dirac_(first.weight)
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), first, nn.Flatten(), student)
    result = fastkd.export(model, TRAIN[:256], tmp_path / file, kind, "int8", rows=HELD_OUT)
    assert result.agreement > 0.98 and result.difference > 0
    assert result.bytes < 0.9 * 4 * sum(p.numel() for p in student.parameters())
    assert logits_of(loading.load(result.path), HELD_OUT[:50]).shape == (50, 10)


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_models_with_several_inputs_are_exported(form, tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 4), nn.Linear(3, 4)

        def forward(self, words, features):
            return {"logits": self.table(words).sum(1) + self.layer(features)}

    model, words, features = Sum(), torch.randint(9, (50, 5)), torch.randn(50, 3)
    inputs = (words, features) if form == "tuple" else {"features": features, "words": words}
    for file, kind in (("a.onnx", "onnx"), ("a.pt2", "torch")):
        result = fastkd.export(model, inputs, tmp_path / file, kind)
        assert result.rows == 50 and result.agreement == 1
        report = fastkd.report(
            model, result.path, [(inputs, torch.zeros(50).long())] if form == "tuple" else [inputs],
            seconds=0, show=False,
        )  # fmt: skip
        assert report.models[1].answers.agreement == 1
    if form == "mapping":
        with pytest.raises(TypeError, match=r"has the inputs \['features', 'words'\]; got"):
            loading.load(tmp_path / "a.onnx")(word=words, features=features)


@pytest.mark.parametrize(
    ("file", "kind"), [("a.onnx", "onnx"), ("a.pt2", "torch"), ("a.pte", "executorch")]
)
def test_inputs_are_found_by_name(file, kind, tmp_path):
    class Difference(nn.Module):
        def forward(self, a, b):
            return a - b

    inputs = {"b": torch.randn(32, 4), "a": torch.randn(32, 4)}
    path = fastkd.export(Difference(), inputs, tmp_path / file, kind).path
    program = loading.load(path)
    for names in ("ab", "ba"):
        logits = program(**{name: inputs[name] for name in names})
        assert torch.equal(logits, inputs["a"] - inputs["b"])
    with pytest.raises(
        TypeError, match=r"^the program has the inputs \['b', 'a'\]; got \['a', 'c'\]"
    ):
        program(a=inputs["a"], c=inputs["b"])


def test_classes_in_another_dimension_and_one_sample_are_exported(tmp_path):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 1)
    result = fastkd.export(model, torch.randn(1, 3, 4, 4), tmp_path / "a.pt2", "torch", dim=1)
    assert result.rows == 16
    assert logits_of(loading.load(result.path), torch.randn(9, 3, 4, 4)).shape == (9, 5, 4, 4)


def test_executorch_programs_are_right_for_models_in_channels_last(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.rand(32, 3, 8, 8)
    turned = images.to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    result = fastkd.export(model, turned, tmp_path / "a.pte", "executorch", rows=images)
    assert result.agreement == 1
    assert torch.allclose(
        logits_of(loading.load(result.path), turned), logits_of(model, images), atol=1e-4
    )


def test_the_student_stays_unchanged(tmp_path):
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[1].eval()
    result = fastkd.export(model, TRAIN[:64], tmp_path / "new" / "a.pt2", "torch")
    assert result.agreement == 1
    assert model.training and not model[1].training and model[3].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- refused exports


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(32, 8, 8).sum(-1)


class Shifted(nn.Module):
    """Compute indices, which XNNPACKQuantizer makes floating-point numbers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, words):
        return self.table[words + 1].mean(1)


def test_a_student_that_pt2e_cannot_quantize_is_refused(tmp_path):
    words = torch.randint(8, (32, 5))
    assert fastkd.export(Shifted(), words, tmp_path / "a.pt2", "torch").agreement == 1
    with pytest.raises(ValueError, match=r"^student cannot be quantized by PT2E .*used as indices"):
        fastkd.export(Shifted(), words, tmp_path / "b.pt2", "torch", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


def test_a_student_that_executorch_cannot_run_is_refused(tmp_path):
    class Decomposed(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x.view(-1, 8, 8))

    with pytest.raises(ValueError, match=r"^student cannot be lowered to ExecuTorch .*linalg_svd"):
        fastkd.export(Decomposed(), TRAIN[:32], tmp_path / "a.pte", "executorch")
    assert not list(tmp_path.iterdir())


class Answer(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": 3}, TypeError, "^student must be a module; got int"),
        ({"student": Fixed()}, ValueError, "^student cannot be traced .* batches of any size: "),
        ({"student": nn.Linear(64, 9).bfloat16()}, ValueError, r"bfloat16.*student\.float\(\)"),
        (
            {"student": nn.Linear(64, 9).double(), "quantize": "int8"},
            ValueError,
            r"float64, and int8 is made from .* student\.float\(\)",
        ),
        ({"student": Answer(64, 9)}, ValueError, r"^student must return .*int64 of shape \(32,\)"),
        ({"dim": 2}, ValueError, r"^student must return .* dim=2; got .* of shape \(32, 10\)"),
        ({"dim": 0}, ValueError, "^student must return .* dim=0; got "),
        ({"format": "tflite"}, ValueError, "^format must be one of 'onnx', 'exec.*; got 'tflite'"),
        ({"quantize": "int4"}, ValueError, "^quantize must be one of 'int8'; got 'int4'"),
        ({"max_batch": 1}, ValueError, "^max_batch must be an int of at least 2; got 1"),
        ({"path": 3}, TypeError, "^path must be a file's path; got int"),
        ({"path": "a.pt2"}, ValueError, r"^path must be a file that ends in \.onnx for format='o"),
        ({"example": [1, 2]}, TypeError, r"^example must be a tensor \(B, \.\.\.\), or a tuple"),
        ({"example": torch.tensor(1)}, TypeError, "^example must be a tensor"),
        ({"example": TRAIN[:0]}, ValueError, "^example must have at least one sample"),
        ({"rows": (TRAIN[:2], TRAIN[:3])}, ValueError, "^rows must have .* got the shapes"),
    ],
)
def test_invalid_arguments_are_refused(change, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"student": nn.Linear(64, 10), "example": TRAIN[:32], "path": "a.onnx", **change}
    with pytest.raises(error, match=message):
        fastkd.export(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["disk", "wrong", "nan"])
def test_a_file_is_written_completely_or_not_at_all(student, tmp_path, monkeypatch, fault):
    path = tmp_path / "a.pt2"
    path.write_text("earlier")

    def fill_the_disk(part, *arguments):
        part.write_text("half")
        raise OSError("No space left on device")

    class Scaled(nn.Module):
        def forward(self, x):
            return student(x) * {"wrong": 1.001, "nan": float("nan")}[fault]

    if fault == "disk":
        monkeypatch.setattr(writing, "write", fill_the_disk)
    else:
        monkeypatch.setattr(loading, "load", lambda path: Scaled())
    message = {
        "disk": "No space",
        "wrong": "logits differ from the student's by .* Nothing was written",
        "nan": "0 of 640 finite. Nothing was written",
    }[fault]
    with pytest.raises((OSError, ValueError), match=message):
        fastkd.export(student, TRAIN[:64], path, "torch")
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("package", "kind"), [("onnxruntime", "onnx"), ("onnx", "onnx"), ("executorch", "executorch")]
)
def test_a_missing_package_is_named_first(package, kind, tmp_path, monkeypatch):
    def import_module(name):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.import_module(name)

    class Uncalled(nn.Linear):
        def forward(self, x):
            pytest.fail("the model was called")

    path = tmp_path / f"a{writing.SUFFIXES[kind]}"
    monkeypatch.setattr(extras, "importlib", SimpleNamespace(import_module=import_module))
    with pytest.raises(ImportError, match=rf"needs {package}, .*fastkd\[deploy\]"):
        fastkd.export(Uncalled(64, 10), TRAIN, path, kind)
    if package != "onnx":
        path.write_bytes(b"")
        with pytest.raises(ImportError, match=rf"needs {package}, .*fastkd\[deploy\]"):
            fastkd.report(Uncalled(64, 10), path, LOADER, show=False)


# ---- reports of exported models


def test_a_report_compares_exported_models(student, exported):
    result = fastkd.report(
        student, {n: each.path for n, each in exported.items()}, LOADER, seconds=0.01, show=False
    )
    torch_model, *programs = result.models
    assert [model.name for model in programs] == list(FILES)
    for model in programs:
        assert model.size == (torch_model.size.parameters, exported[model.name].bytes)
        assert model.answers.rows == len(HELD_OUT)
        assert model.answers.agreement >= 0.98
        assert model.answers.accuracy == pytest.approx(torch_model.answers.accuracy, abs=0.005)
        assert model.peak_memory is None or model.peak_memory < 100e6
        assert model.latency["cpu"][1].p95 >= model.latency["cpu"][1].p50 > 0
    page = result.html()
    assert all(name in page for name in FILES) and "0 parameters" not in page
    assert len(json.loads(result.json())["models"]) == 5


def test_programs_in_memory_have_a_dash_for_unknown_figures(student, exported):
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(exported["ExecuTorch"].path)
    session = onnxruntime.InferenceSession(exported["ONNX"].path.read_bytes())
    traced = torch.export.export(student, (HELD_OUT[:100],))
    models = {"method": program.load_method("forward"), "session": session, "traced": traced}
    loader = [batch for batch in LOADER if len(batch[0]) == 100]
    result = fastkd.report(student, {**models, "program": program}, loader, seconds=0, show=False)
    by_name = {model.name: model for model in result.models}
    parameters = by_name["teacher"].size.parameters
    assert by_name["method"].size == (None, None)
    assert by_name["program"].size == (parameters, None)
    assert by_name["session"].size == (parameters, exported["ONNX"].bytes)
    assert all(by_name[name].peak_memory is None for name in models)
    assert by_name["traced"].size == by_name["teacher"].size
    assert all(model.answers.agreement == 1 for model in result.models)
    row = next(row for row in tables.make_rows(result) if row.label == "parameters")
    assert row.cells[1] == (tables.UNKNOWN, "") and all(figure != "0" for figure, _ in row.cells)
    assert json.loads(result.json())["models"][1]["parameters"] is None
    assert "None" not in result.markdown()
    assert "None" not in result.html()


def test_the_size_of_an_onnx_model_includes_weights_in_another_file(student, tmp_path):
    path = tmp_path / "a.onnx"
    with loading.silence():
        traced = torch.onnx.export(student.eval(), (HELD_OUT[:4],), dynamo=True, verbose=False)
        traced.save(path, external_data=True)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert path.stat().st_size < size / 4
    assert loading.load(path).bytes == size
    assert loading.load(onnxruntime.InferenceSession(path)).bytes == size


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_programs_of_a_fixed_batch_give_all_rows(student, count):
    # A program of a fixed batch size gets the rows in batches of this size; the last is padded.
    program = torch.export.export(student.eval(), (HELD_OUT[:4],))
    model = loading.load(program)
    assert torch.allclose(logits_of(model, HELD_OUT[:count]), logits_of(student, HELD_OUT[:count]))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_an_executorch_program_has_a_largest_batch(student, exported, count):
    logits = logits_of(loading.load(exported["ExecuTorch"].path), HELD_OUT[:count])
    assert torch.allclose(logits, logits_of(student, HELD_OUT[:count]), atol=1e-4)


@pytest.mark.slow
def test_an_executorch_program_may_have_a_fixed_batch(student, tmp_path):
    from executorch.exir import to_edge_transform_and_lower

    with loading.silence():
        program = torch.export.export(student.eval(), (HELD_OUT[:4],))
        to_edge_transform_and_lower(program).to_executorch().save(str(tmp_path / "a.pte"))
    model = loading.load(tmp_path / "a.pte")
    for count in (1, 4, 6):
        expected = logits_of(student, HELD_OUT[:count])
        assert torch.allclose(logits_of(model, HELD_OUT[:count]), expected, atol=1e-4)
    assert model.parameter_count is None


def test_onnx_models_may_have_a_fixed_batch_or_dynamic_int8(student, exported, tmp_path):
    from onnxruntime import quantization

    with loading.silence():
        made = torch.onnx.export(student.eval(), (HELD_OUT[:4],), dynamo=True, verbose=False)
        made.save(tmp_path / "fixed.onnx", external_data=False)
        quantization.quantize_dynamic(exported["ONNX"].path, tmp_path / "dynamic.onnx")
    models = {"fixed": tmp_path / "fixed.onnx", "dynamic": str(tmp_path / "dynamic.onnx")}
    result = fastkd.report(student, models, LOADER, seconds=0, show=False)
    assert result.models[1].answers.agreement == 1 and result.models[2].answers.agreement > 0.98
    assert result.models[1].size.parameters is None


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, r"^model must be a module, .* \.pt2 file; got int"),
        ("missing.onnx", ValueError, "^model must be an existing .* got missing.onnx"),
        (__file__, ValueError, "^model must be an existing .onnx, .pte or .pt2 file; got "),
    ],
)
def test_unknown_models_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        loading.load(model)


@pytest.mark.parametrize("suffix", [".onnx", ".pte", ".pt2"])
def test_a_damaged_file_is_named(suffix, tmp_path):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"^model: .*damaged{suffix} cannot be loaded, .+"):
        loading.load(path)


def test_programs_run_on_the_cpu(student, exported):
    with pytest.raises(ValueError, match=r"^devices must be \['cpu'\], where the program small"):
        fastkd.report(
            student, {"small": exported["ONNX"].path}, LOADER, devices=["meta"], show=False
        )


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_peak_memory_counts_weights_and_activations(exported):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1_000_000))

        def forward(self, x):
            return torch.zeros(5_000_000)[:10] + x[:, :10] + self.weight[0]

    result = memory.measure_peak_memory(Wide(), HELD_OUT[:2])
    assert result == pytest.approx(24e6, abs=1e6)
    onnx = memory.measure_peak_memory(loading.load(exported["ONNX"].path), HELD_OUT[:32])
    assert 0.2e6 < onnx < 5e6

    class Uncopied(Wide):
        def __deepcopy__(self, memo):
            raise RuntimeError("cannot be copied")

    assert memory.measure_peak_memory(Uncopied(), HELD_OUT[:2]) is None
