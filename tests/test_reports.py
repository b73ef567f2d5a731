"""Test the figures of fastkd.report, and that unreliable timings are withheld."""

import copy
import os
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import pytest
import torch
from stacks import digit_loader, digits
from torch import nn
from torch.nn import functional as F

import fastkd
from fastkd.reports import measure

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

IMAGES, LABELS = digits(1797, torch.float32).tensors
LOADER = digit_loader()


def calibration_error(p: torch.Tensor, labels: torch.Tensor) -> float:
    """Compute the expected calibration error of Guo et al. (2017), bin by bin."""
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
    # The model is always sure, and right always or half the time.
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
    # float32 cannot distinguish these logits.
    logits = 1e9 + torch.eye(4, dtype=torch.float64)
    result = fastkd.report(
        nn.Identity(), nn.Identity(), [(logits, torch.arange(4))], seconds=0, show=False
    )
    exact = float(F.cross_entropy(logits, torch.arange(4)))
    assert result.models[1].answers.cross_entropy == pytest.approx(exact)


def test_wilson_interval_equals_its_definition():
    # At each end of the interval, a two-sided normal test at 5 % just rejects the share.
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
    # The parameters in packed weights are unknown, and not 0.
    assert result.models[1].size.parameters is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_size_counts_weights_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    made = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    weights, rows = 64 * 32 + 32 * 10, 32 + 10
    size = measure.measure_size(made)
    assert size.parameters == weights + rows
    # A row has a bias and a scale of float32, and may have a zero point.
    assert weights + 8 * rows <= size.bytes <= weights + 12 * rows
    made.append(made[2])
    assert measure.measure_size(made) == size


class Summing(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :60].view(-1, 10, 6).sum(-1)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_frozen_script_module_is_measured_as_it_is():
    # A frozen module has no attribute ``training``.
    student = torch.jit.freeze(torch.jit.trace(nn.Linear(64, 10).eval(), IMAGES[:2]))
    result = fastkd.report(nn.Linear(64, 10), student, LOADER[:1], seconds=0, show=False)
    assert result.models[1].answers.rows == len(LOADER[0][1]) and not hasattr(student, "training")


def test_models_need_no_parameters():
    result = fastkd.report(Summing(), nn.Linear(64, 10), LOADER[:1], seconds=0, show=False)
    assert "student agrees with" not in str(result) and "2.6" in result.html()
    result = fastkd.report(nn.Linear(64, 10), Summing(), LOADER[:1], seconds=0, show=False)
    assert "| parameters | 650 | 0 |" in result.markdown() and "student keeps" in result.markdown()


class Slow(nn.Module):
    """Sleep, and record each call's batch size and modes."""

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
    """Make turns from (share of processor time, teacher's times, student's times)."""
    return [measure.Turn(share, {"teacher": a, "student": b}) for share, a, b in turns]


def test_speedup_is_that_of_quiet_turns():
    # A slow call in each quiet turn, and two turns on a busy machine, do not change the ratio.
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
    # If the tests are killed, the processes end by themselves.
    code = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command) for _ in range(os.cpu_count())]
    yield
    for process in processes:
        process.kill()
        process.wait()


class Repeated(nn.Module):
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
    # The true ratio is 30, and a reported ratio must be within a factor of 2.
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
    # An exported module has no modes, but report() must set the Dropout modules to evaluation mode.
    rows = [{0: torch.export.Dim.AUTO}]
    exported = torch.export.export(nn.Linear(64, 10), (IMAGES[:2],), dynamic_shapes=rows).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    student = nn.Sequential(nn.Dropout(1.0), exported, nn.Dropout(1.0))
    result = fastkd.report(exported, student, LOADER[:1], seconds=0, show=False)
    assert result.models[1].answers.agreement == 1
    assert student.training and student[0].training and student[2].training


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
