"""fastkd.report: its figures equal plain computation, and its page renders in a browser."""

import copy
import errno
import html.parser
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd
from fastkd import reports
from fastkd.reports import measure, plots, tables

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)

IMAGES = torch.tensor(digits[0] / 16, dtype=torch.float32)
LABELS = torch.tensor(digits[1])
LOADER = [(IMAGES[i : i + 100], LABELS[i : i + 100]) for i in range(0, len(IMAGES), 100)]
HOSTILE = "<script>alert(1)</script> | **a** $x_2$ {title} & [link](https://example.org)"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


def model(width: int, seed: int = 0, epochs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in LOADER:
            optimizer.zero_grad()
            F.cross_entropy(made(images), labels).backward()
            optimizer.step()
    return made


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, dict[str, nn.Module]]:
    return model(128, epochs=12), {"alone": model(8), "distilled": model(8, 1, 6)}


@pytest.fixture(scope="module")
def report(models) -> fastkd.Report:
    return fastkd.report(*models, LOADER, seconds=0.02, show=False, title="Digits")


def calibration_error(p: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the expected calibration error as Guo et al. define it, bin by bin."""
    confidence, chosen = p.max(-1)
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            gap = (chosen == labels)[inside].double().mean() - confidence[inside].mean()
            error += float(gap.abs()) * float(inside.double().mean())
    return error


# ---- figures


def test_answers_equal_plain_computation(models, report):
    teacher, students = models
    with torch.no_grad():
        logits_by_name = {
            name: m(IMAGES).double() for name, m in {"teacher": teacher, **students}.items()
        }
    for result in report.models:
        logits, answers = logits_by_name[result.name], result.answers
        right = (logits.argmax(-1) == LABELS).double().mean()
        assert answers.rows == len(LABELS)
        assert answers.accuracy == pytest.approx(float(right), abs=1e-9)
        assert answers.accuracy_low < answers.accuracy < answers.accuracy_high
        agreement = (logits.argmax(-1) == logits_by_name["teacher"].argmax(-1)).double().mean()
        assert answers.agreement == pytest.approx(float(agreement), abs=1e-9)
        entropy = float(F.cross_entropy(logits, LABELS))
        assert answers.cross_entropy == pytest.approx(entropy, rel=1e-5)
        error = calibration_error(logits.softmax(-1), LABELS)
        assert answers.calibration_error == pytest.approx(error, abs=1e-5)
        assert sum(b.rows for b in answers.bins) == len(LABELS)


def test_calibration_error_of_a_sure_model_is_known():
    """A sure model has the error 0 if it is always right, and 0.5 if it is right half the time."""
    logits = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    for labels, error in (([0, 0], 0.0), ([0, 1], 0.5)):
        result = fastkd.report(
            nn.Identity(), nn.Identity(), [(logits, torch.tensor(labels))], seconds=0, show=False
        )
        assert result.models[1].answers.calibration_error == pytest.approx(error)
        assert [b.rows for b in result.models[0].answers.bins] == [0] * 14 + [2]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-7), (torch.float64, 1e-12)])
def test_a_copy_agrees_where_logits_hardly_differ(dtype, scale):
    torch.manual_seed(0)
    teacher = nn.Linear(64, 10).to(dtype)
    for parameter in teacher.parameters():
        parameter.data *= scale
    loader = [(IMAGES, LABELS)]
    result = fastkd.report(teacher, copy.deepcopy(teacher), loader, seconds=0, show=False)
    with torch.no_grad():
        right = (teacher(IMAGES.to(dtype)).argmax(-1) == LABELS).double().mean()
    for model in result.models:
        assert model.answers.agreement == 1 and model.answers.accuracy == pytest.approx(
            float(right)
        )


def test_float64_is_kept():
    """Logits that float32 cannot distinguish give the right figures in float64."""
    logits = 1e9 + torch.eye(4, dtype=torch.float64)
    result = fastkd.report(
        nn.Identity(), nn.Identity(), [(logits, torch.arange(4))], seconds=0, show=False
    )
    exact = float(F.cross_entropy(logits, torch.arange(4)))
    assert result.models[1].answers.cross_entropy == pytest.approx(exact)


def test_wilson_interval_equals_its_definition():
    """At each end of the interval, the normal test just rejects the share."""
    for share, rows in ((0.9, 50), (0.5, 7), (0.0, 20), (1.0, 3)):
        for end in measure.compute_wilson_interval(share, rows):
            gap = abs(share - end)
            assert gap == pytest.approx(1.959964 * (end * (1 - end) / rows) ** 0.5, abs=1e-9)


def test_sequences_ignored_rows_and_dim_1_are_supported():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 5), torch.randint(5, (4, 6))
    labels[labels == 0] = -1
    expected = fastkd.report(
        nn.Identity(), nn.Identity(), [(logits, labels)], ignore_index=-1, seconds=0, show=False
    )
    answers = expected.models[1].answers
    valid = labels != -1
    assert answers.rows == int(valid.sum())
    assert answers.accuracy == pytest.approx(
        float((logits.argmax(-1) == labels)[valid].double().mean())
    )
    turned = [(logits.movedim(-1, 1), labels)]
    moved = fastkd.report(
        nn.Identity(), nn.Identity(), turned, ignore_index=-1, dim=1, seconds=0, show=False
    )
    assert moved.models[1].answers == answers


def test_without_labels_only_agreement_is_reported(models, tmp_path):
    teacher, students = models
    result = fastkd.report(
        teacher, students, [images for images, _ in LOADER], seconds=0, show=False
    )
    answers = result.models[1].answers
    assert answers.accuracy is answers.calibration_error is answers.cross_entropy is None
    assert 0 < answers.agreement < 1
    assert "accuracy" not in str(result) and "agree" in result.markdown()
    assert {path.name for path in result.save(tmp_path).iterdir()} == {
        *("report.html", "report.md", "report.json", "tradeoff.png")
    }


def test_size_counts_shared_weights_once():
    made = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    made[2].weight = made[0].weight
    result = measure.measure_size(made)
    assert result.parameters == 64 + 8 + 16 + 8
    assert result.bytes == 4 * (result.parameters + 16) + 8
    made[2].weight = nn.Parameter(made[0].weight.detach().t())  # a view of made[0].weight
    assert measure.measure_size(made).bytes == result.bytes


def test_size_counts_views_of_one_buffer():
    made, flat = nn.Bilinear(4, 4, 2, bias=False), torch.zeros(100)
    made.weight = nn.Parameter(flat[:32].view(2, 4, 4))
    made.other = nn.Parameter(flat[32:40])
    assert measure.measure_size(made) == (40, 160)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_size_counts_quantized_weights():
    full_precision = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    quantised = torch.ao.quantization.quantize_dynamic(
        full_precision, {nn.Linear}, dtype=torch.qint8
    )
    weights = 64 * 32 + 32 * 10
    assert (
        weights < measure.measure_size(quantised).bytes < measure.measure_size(full_precision).bytes
    )
    result = fastkd.report(full_precision, quantised, LOADER[:1], seconds=0, show=False)
    assert result.models[1].answers.agreement > 0.5


class Summing(nn.Module):
    """Module without parameters, which sums its inputs."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :60].view(-1, 10, 6).sum(-1)


def test_models_need_no_parameters():
    result = fastkd.report(Summing(), nn.Linear(64, 10), LOADER[:1], seconds=0, show=False)
    assert "student agrees with" not in str(result) and "2.6" in result.html()
    result = fastkd.report(nn.Linear(64, 10), Summing(), LOADER[:1], seconds=0, show=False)
    assert "| parameters | 650 | 0 |" in result.markdown() and "student keeps" in result.markdown()


class Slow(nn.Module):
    """Module that sleeps, and records the batches of its calls."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.seen = seconds, set()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        self.seen.add((len(x), self.training, torch.is_grad_enabled()))
        return x * self.scale


def test_latency_has_percentiles_and_throughput(device):
    quick, slow = Slow(0.001).to(device), Slow(0.004).to(device)
    rows = torch.randn(20, 3)
    result = fastkd.report(
        slow, quick, [(rows, rows.argmax(-1))], seconds=0.01, devices=[device], show=False
    )
    times = {m.name: next(iter(m.latency.values())) for m in result.models}
    assert quick.seen == {(20, False, False), (1, False, False), (32, False, False)}
    assert quick.training and slow.training
    for batch in (1, 32):
        assert times["teacher"][batch].p50 > 0.004 > 0.001
        assert times["teacher"][batch].p50 > times["student"][batch].p50 > 0.001
        for name in times:
            figures = times[name][batch]
            assert figures.p95 >= figures.p50 and figures.throughput == pytest.approx(
                batch / figures.p50
            )
            assert figures.calls >= 15


def test_models_may_have_other_dtypes():
    rows = torch.randn(8, 4)
    result = fastkd.report(
        nn.Linear(4, 3), nn.Linear(4, 3).bfloat16(), [(rows, torch.zeros(8).long())], seconds=0,
        show=False,
    )  # fmt: skip
    assert result.models[1].size.bytes < result.models[0].size.bytes


def test_inputs_may_be_mappings():
    class Named(nn.Module):
        def forward(self, a, b):
            assert len(a) == len(b)
            return a + b[:, :1]

    batch = {"a": torch.randn(3, 4), "b": torch.randn(3, 2), "labels": torch.tensor([0, 1, 2])}
    result = fastkd.report(Named(), Named(), [batch, batch], seconds=0, show=False)
    assert result.models[0].answers.rows == 6


def test_inputs_shared_by_samples_and_named_tuples_are_supported():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: torch.Tensor

    class Optional(nn.Module):
        def forward(self, pair, scale, mask=None, flag=False):
            assert mask is None and flag and len(pair.a) == len(pair.b)
            return (pair.a + pair.b) * scale

    pair, labels = Pair(torch.randn(3, 4), torch.randn(3, 4)), torch.tensor([0, 1, 2])
    named = {"pair": pair, "scale": torch.tensor(2.0), "mask": None, "flag": True}
    tuples = [((pair, torch.tensor(2.0), None, True), labels)] * 2
    for loader in ([{**named, "labels": labels}] * 2, tuples):
        result = fastkd.report(Optional(), Optional(), loader, seconds=0, show=False)
        assert result.models[0].answers.rows == 6


# ---- reliability of timings


def make_turns(*turns: tuple[float, list[float], list[float]]) -> list[measure.Turn]:
    """Make turns of a teacher and a student from (share of processor time, times, times)."""
    return [measure.Turn(share, {"teacher": a, "student": b}) for share, a, b in turns]


def test_speedup_is_that_of_quiet_turns():
    """A slow call in each turn, and two turns on a busy machine, do not change the ratio."""
    quiet = (1.0, [0.4] * 20 + [9.0], [0.1] * 20 + [3.0])
    busy = (0.4, [4.0] * 9, [0.1] * 9)
    result, warnings = measure.summarize_turns(make_turns(quiet, busy, quiet, busy, quiet), 8)
    assert result["student"].speedup == pytest.approx(4) and result["teacher"].speedup == 1
    assert result["student"][:4] == (0.1, 0.1, pytest.approx(80), 63)
    assert warnings == []


def test_no_speedup_on_a_busy_machine():
    turns = make_turns(*[(0.5, [0.4] * 9, [0.1] * 9)] * 6, *[(1.0, [0.4] * 9, [0.1] * 9)] * 4)
    result, (warning,) = measure.summarize_turns(turns, 8)
    assert result["student"].speedup is result["teacher"].speedup is None
    assert "withheld; the process got 50 % of the processor time it asked for" in warning


def test_no_speedup_if_its_estimates_disagree():
    turns = make_turns(*[(1.0, [0.4, 9.0, 9.0], [0.1, 0.1, 0.1])] * 9)
    result, (warning,) = measure.summarize_turns(turns, 8)
    assert result["student"].speedup is None and result["teacher"].speedup == 1
    assert warning == (
        "student's speed ratio is withheld; it is 90 by the medians, 4 by the fastest calls"
    )


def test_wide_and_superlinear_timings_are_named():
    turns = make_turns(*[(1.0, [0.4] * 8 + [0.9] * 2, [0.1] * 8 + [0.3] * 2)] * 9)
    result, warnings = measure.summarize_turns(turns, 1)
    assert result["student"].speedup == pytest.approx(4)
    assert warnings == ["95th percentile over 2x the median: teacher, student"]
    latency = result["student"]
    by_batch = {1: latency, 32: latency._replace(p50=40 * latency.p50)}
    (warning,) = measure._compare_batches("CPU: student's", by_batch)
    assert warning == "CPU: student's batch 32 takes 40x as long as its batch 1."
    assert not measure._compare_batches(
        "", {1: latency, 32: latency._replace(p50=33 * latency.p50)}
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/self/task")
def test_processor_time_counts_every_thread():
    def work() -> None:
        start = time.thread_time()
        while time.thread_time() < start + 0.1:
            pass

    before = measure._read_processor_time()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    work()
    after = measure._read_processor_time()
    # The operating system updates the times with a delay, and drops threads that have ended.
    assert 0.08e9 < after[0] - before[0] < 0.4e9 and after[1] >= before[1]
    for thread in threads:
        thread.join()


@pytest.fixture
def busy_cores():
    """Keep every core busy with a process per core."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(os.cpu_count())]
    yield
    for process in processes:
        process.kill()
        process.wait()


class Repeated(nn.Module):
    """Module that applies a layer several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.layer = times, nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_speed_ratios_on_a_busy_machine_are_right_or_withheld(busy_cores, threads):
    """Each ratio is within 2x of the true ratio, 30, or withheld with the reason."""
    loader = [(torch.randn(32, 256), torch.randint(256, (32,)))]
    result = fastkd.report(Repeated(60), Repeated(2), loader, threads=threads, show=False)
    for batch, latency in result.models[1].latency["cpu"].items():
        if latency.speedup is None:
            reasons = [text for text in result.warnings if text.startswith(f"CPU, batch {batch}:")]
            assert "withheld" in reasons[0]
            assert "withheld" in str(result)
        else:
            assert 15 < latency.speedup < 60


def test_threads_are_set_and_restored():
    class Counting(nn.Linear):
        def forward(self, x):
            counts.add(torch.get_num_threads())
            return super().forward(x)

    counts, before = set(), torch.get_num_threads()
    result = fastkd.report(
        Counting(64, 10), nn.Linear(64, 10), LOADER[:1], threads=3, seconds=0, show=False
    )
    assert counts == {3} and torch.get_num_threads() == before
    environment = result.environment
    assert environment["threads"] == "3" and environment["cores"] == str(os.cpu_count())
    assert float(environment["load average at the start"]) >= 0
    with pytest.raises(ValueError, match=r"^threads must be an int of at least 1; got 0"):
        fastkd.report(nn.Linear(64, 10), nn.Linear(64, 10), LOADER, threads=0)


def test_modules_need_no_evaluation_mode():
    """Modules without modes are measured unchanged; other submodules are in evaluation mode."""
    rows = [{0: torch.export.Dim.AUTO}]
    exported = torch.export.export(nn.Linear(64, 10), (IMAGES[:2],), dynamic_shapes=rows).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    student = nn.Sequential(nn.Dropout(1.0), exported, nn.Dropout(1.0))
    result = fastkd.report(exported, student, LOADER[:1], seconds=0, show=False)
    assert result.models[1].answers.agreement == 1
    assert student.training and student[0].training and student[2].training


# ---- reports of up to ten models


def make_report(count: int, speedup: float | None = 3650.0) -> fastkd.Report:
    """Make a report of models that differ little, like exports of one student."""
    models = []
    for index in range(count):
        name = ["teacher", "alone", "distilled"][index] if index < 3 else f"exported as {index}"
        accuracy = [0.98, 0.9, 0.95][index] if index < 3 else 0.949
        interval = measure.compute_wilson_interval(accuracy, 1000)
        bins = (measure.Bin(0, 0.0, 0.0),) * 14 + (measure.Bin(1000, 0.97, accuracy),)
        answers = measure.Answers(1000, accuracy, *interval, 0.1, accuracy, 0.01, bins)
        size = measure.Size(None if index > 2 else 100, 59_000 if index == 0 else 1000)
        latency = measure.Latency(1e-3 if index == 0 else 1e-5, 1e-3, 1e3, 100, speedup)
        models.append(reports.Model(name, size, answers, {"cpu": {1: latency}}))
    warnings = () if speedup else ("CPU, batch 1: speed ratios are withheld; it was busy.",)
    return fastkd.Report("Ten", tuple(models), {"threads": "1"}, warnings)


def test_the_verdict_compares_student_and_teacher():
    result = make_report(4)
    expected = (
        "distilled keeps 96.9 % of the teacher's accuracy at 1/59 of its size, 3,650x faster on "
        "CPU; 5.0 points above training alone."
    )
    assert tables.summarize(result) == expected
    assert expected in Page(result.html()).text and f"**{expected}**" in result.markdown()
    withheld = tables.summarize(make_report(4, None))
    assert withheld == expected.replace(", 3,650x faster on CPU", "")
    teacher, alone, distilled, *_ = result.models
    small = alone.answers._replace(accuracy=0.949, accuracy_high=0.96)
    close = result._replace(models=(teacher, alone._replace(answers=small), distilled))
    assert tables.summarize(close).endswith(
        "; 0.1 points above training alone, a difference within the intervals."
    )
    better = alone.answers._replace(accuracy=0.97, accuracy_low=0.96)
    worse = result._replace(models=(teacher, alone._replace(answers=better), distilled))
    assert worse.models[1].name == "alone" and "; 2.0 points below" in tables.summarize(worse)
    only = tables.summarize(result._replace(models=(teacher, alone)))
    assert only.startswith("alone keeps 91.8 %") and "training alone" not in only


@pytest.mark.parametrize("count", [2, 4, 10])
@pytest.mark.parametrize("speedup", [3650.0, None])
def test_text_fits_eighty_columns(count, speedup):
    result = make_report(count, speedup)
    text, words = str(result), " ".join(str(result).split())
    assert max(map(len, text.splitlines())) <= 80
    for model in result.models:
        assert model.name in words
    assert words.count("3,650x faster") == (count if speedup else 0)
    assert words.count("withheld") == (0 if speedup else count)
    assert ("speed ratios are withheld" in words) == (speedup is None)


def test_unknown_parameters_are_a_dash():
    result = make_report(4)
    row = next(line for line in result.markdown().splitlines() if "parameters" in line)
    assert row == "| parameters | 100 | 100 (the same) | 100 (the same) | \u2013 |"
    assert (
        ">\u2013<" in result.html() and json.loads(result.json())["models"][3]["parameters"] is None
    )


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("count", [2, 10])
@pytest.mark.parametrize("speedup", [3650.0, None])
def test_labels_of_a_plot_never_overlap(count, width, speedup):
    figure = plots.draw_figures(make_report(count, speedup), width)["tradeoff"]
    canvas = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    names = [text for text in axes.texts if text.get_text()]
    assert len(names) == count
    ticks = [
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
    ]
    assert len(ticks) >= 4
    # Excludes the line to the point.
    extent = importlib.import_module("matplotlib.text").Text.get_window_extent
    boxes = [extent(text) for text in (*names, *ticks, axes.xaxis.label)]
    for box, other_box in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box)


def test_pictures_suit_light_and_dark_pages(tmp_path):
    image = pytest.importorskip("PIL.Image")
    make_report(3).save(tmp_path)
    for path in tmp_path.glob("*.png"):
        with image.open(path) as picture:
            assert picture.mode == "RGBA" and picture.getpixel((0, 0))[3] == 0

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for paper in ("#ffffff", "#0d1117"):  # GitHub's page colors
        low, high = sorted([luminance(paper), luminance(plots.INK)])
        assert (high + 0.05) / (low + 0.05) > 4.1


# ---- invalid arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": []}, "^loader: it has no rows"),
        ({"loader": [(IMAGES[:2], torch.tensor([-100, -100]))]}, "^loader: it has no rows"),
        ({"loader": [(IMAGES[:2], torch.tensor([0, 10]))]}, "^labels must be in 0 to 9"),
        (
            {"loader": [(IMAGES[:2], torch.tensor([0, 1, 2]))]},
            r"^labels must be class ids of shape",
        ),
        ({"loader": [(IMAGES[:2], torch.rand(2))]}, r"^labels must be class ids .* torch.float32"),
        ({"loader": [(IMAGES[:2] * torch.nan, LABELS[:2])]}, "^teacher: its logits.* not finite"),
        ({"students": {"teacher": nn.Linear(64, 10)}}, "^students: no student may be named"),
        ({"students": {}}, "^students must be a module, or at least one by its name; got none"),
        ({"batch_sizes": (0,)}, "^batch_sizes must be positive"),
        ({"batch_sizes": ()}, "^batch_sizes must be positive"),
        ({"seconds": -1}, "^seconds must be finite and at least 0; got -1"),
        ({"ignore_index": 2**70}, "^ignore_index must be an int of 64 bits"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    arguments = {
        "students": nn.Linear(64, 10),
        "loader": LOADER,
        "seconds": 0,
        "show": False,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        fastkd.report(
            nn.Linear(64, 10), arguments.pop("students"), arguments.pop("loader"), **arguments
        )


def test_a_student_must_be_a_module():
    with pytest.raises(TypeError, match=r"^small must be a module, .* \.pt2 file; got int"):
        fastkd.report(nn.Linear(64, 10), {"small": 3}, LOADER)
    with pytest.raises(TypeError, match=r"students must be a module, or a mapping .*; got list"):
        fastkd.report(nn.Linear(64, 10), [nn.Linear(64, 10)], LOADER)
    with pytest.raises(TypeError, match=r"^students must have names that are text; got 1"):
        fastkd.report(nn.Linear(64, 10), {1: nn.Linear(64, 10)}, LOADER)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_sizes", 8), ("devices", "cpu"), ("devices", torch.device("cpu"))]
)
def test_arguments_must_be_lists(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a list or tuple; got "):
        fastkd.report(nn.Linear(64, 10), nn.Linear(64, 10), LOADER, **{name: value})


# ---- output


def test_a_report_is_printed(models, capsys):
    result = fastkd.report(*models, LOADER[:2], seconds=0)
    shown = capsys.readouterr().out
    for text in ("teacher", "alone", "distilled", "accuracy", "calibration error", "p95"):
        assert text in shown and text in str(result)
    assert f"{100 * result.models[1].answers.agreement:.1f} %" in shown


def test_json_has_every_figure(report):
    result = json.loads(report.json())
    assert [m["name"] for m in result["models"]] == ["teacher", "alone", "distilled"]
    first = result["models"][0]
    assert first["parameters"] == 64 * 128 + 128 + 1280 + 10
    assert first["latency"]["cpu"]["32"]["p95"] == report.models[0].latency["cpu"][32].p95
    assert len(first["bins"]) == 15 and first["accuracy"] == report.models[0].answers.accuracy


def test_markdown_is_one_table(report, tmp_path):
    lines = [line for line in report.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(tables.make_rows(report))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    report.save(tmp_path)
    for name in re.findall(r"\]\((.*?)\)", report.markdown()):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_numbers_are_formatted_with_units():
    counts = [tables.format_count(n) for n in (0, 7, 999, 1000, 99_960, 999_600, 10**9, 10**13)]
    assert counts == ["0", "7", "999", "1.00k", "100k", "1.00M", "1.00G", "10.0T"]
    assert tables.format_size(999) == "999 B" and tables.format_size(1_000_000) == "1.00 MB"
    assert tables.format_duration(1.5) == "1.50 s" and tables.format_duration(0.012) == "12.0 ms"


@pytest.mark.parametrize("name", ["teachers", "report"])
def test_the_documentation_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (pathlib.Path(__file__).parents[1] / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})


class Page(html.parser.HTMLParser):
    """Parser that collects a page's references and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "content"):
                self.links.append((tag, value))
            self.links += [(tag, link) for link in re.findall(r"url\((.*?)\)", value or "")]

    def handle_data(self, data):
        self.text += data


def test_the_page_has_no_external_references(report):
    text = report.html()
    page = Page(text)
    assert "://" not in text and "@import" not in text and "//" not in text.replace("</", "")
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    assert all(link.startswith("#") for tag, link in page.links if tag != "meta")
    assert "default-src 'none'" in text
    assert page.tags.count("svg") == 2 * len(plots.draw_figures(report)) == 4
    ids = re.findall(r'\bid="(.*?)"', text)
    assert len(ids) > 20 and {link[1:] for tag, link in page.links if tag != "meta"} <= set(ids)


def test_hostile_names_are_shown_as_text(models, tmp_path):
    teacher, students = models
    named = {HOSTILE: students["alone"]}
    result = fastkd.report(teacher, named, LOADER[:1], seconds=0, title=HOSTILE, show=False)
    page = Page(result.html())
    assert "script" not in page.tags and "a" not in page.tags
    assert page.text.count(HOSTILE) >= 4  # title, heading, sentence, table
    assert "<script" not in re.sub(r"\\<", "", result.markdown())
    assert HOSTILE.split()[0] in str(result)
    result.save(tmp_path)


@pytest.mark.parametrize("title", ["eval of [/data/run1]", "[bold]a[/bold] :smile: \\[b]"])
def test_titles_and_names_are_printed_as_text(models, capsys, title):
    teacher, students = models
    named = {title: students["alone"]}
    result = fastkd.report(teacher, named, LOADER[:1], seconds=0, title=title)
    shown = capsys.readouterr().out
    assert shown.count(title) == str(result).count(title) == 3  # title, column and headline


def test_a_title_must_be_text():
    with pytest.raises(TypeError, match=r"^title must be text; got int"):
        fastkd.report(nn.Linear(64, 10), nn.Linear(64, 10), [], title=3)


@pytest.mark.parametrize(
    "written", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(4)), 4]
)
def test_a_full_disk_leaves_no_partial_report(report, tmp_path, monkeypatch, written):
    """A first report leaves no file, and an earlier report stays unchanged."""
    write, done = pathlib.Path.write_bytes, []

    def fill_disk(path, data):
        if len(done) == written:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(write(path, data))

    earlier = report.save(tmp_path / "whole")
    before = {file.name: file.read_bytes() for file in earlier.iterdir()}
    assert len(before) == 5
    changed = report._replace(title="another")
    for folder, expected in ((tmp_path / "new", {}), (earlier, before)):
        done.clear()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(pathlib.Path, "write_bytes", fill_disk)
            changed.save(folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no limits of file sizes")
def test_a_limited_file_size_leaves_no_partial_report(report, tmp_path):
    """A limit of the file size, unlike a patched write, raises the system's own error."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            report.save(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "new").iterdir())


def browse(page, *options: str) -> subprocess.CompletedProcess:
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--user-data-dir={page.parent / 'profile'}"]
    return subprocess.run(
        [*command, *options, page.as_uri()], capture_output=True, timeout=120, check=True
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_page(report, tmp_path, dark):
    """A browser draws the page and its pictures in the color scheme that the reader prefers."""
    image = pytest.importorskip("PIL.Image")
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(report.html(), encoding="utf-8")
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    browse(page, *scheme, "--window-size=1000,1700", f"--screenshot={picture}")
    with image.open(io.BytesIO(picture.read_bytes())) as shot:
        drawn = shot.convert("RGB")
    assert (sum(drawn.getpixel((2, 2))) < 150) == dark
    counts = {colour: n for n, colour in drawn.getcolors(2**24)}
    for colour in plots.choose_colors(report):
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        near = [
            n
            for result, n in counts.items()
            if max(abs(a - b) for a, b in zip(result, rgb, strict=True)) < 30
        ]
        assert sum(near) > 500, colour
    # Text in the pictures is light on dark, or dark on light.
    plot = drawn.crop((60, 650, 940, 1000)).convert("L")
    darkest, lightest = plot.getextrema()
    assert lightest > 200 and darkest < 80


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_parses_the_page(report, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report.html(), encoding="utf-8")
    shown = Page(browse(page, "--dump-dom").stdout.decode())
    assert shown.tags.count("svg") == 4 and shown.tags.count("tr") == 1 + len(
        tables.make_rows(report)
    )
    assert "distilled" in shown.text and "calibration error" in shown.text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_fits_a_phone(tmp_path):
    """The page is as wide as the phone, and shows its narrow figures."""
    (tmp_path / "report.html").write_text(make_report(10).html(), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        """<iframe src="report.html" style="width: 390px; height: 800px"></iframe><script>
        onload = () => {
          const page = document.querySelector("iframe").contentDocument;
          const shown = [...page.querySelectorAll("svg")].filter(svg => svg.clientWidth > 0);
          document.title = [page.documentElement.scrollWidth, ...shown.map(svg => svg.classList)];
        };</script>"""
    )
    done = browse(frame, "--allow-file-access-from-files", "--dump-dom").stdout.decode()
    assert "<title>390,narrow,narrow</title>" in done
