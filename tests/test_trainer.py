"""The training loop equals loops written by hand, on real digits."""

import copy
import dataclasses
import math
import pathlib
import pickle
import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fastkd
from fastkd.training import checkpoints, progress
from fastkd.training.trainer import FORMAT

accelerate = pytest.importorskip("accelerate")
load_digits = pytest.importorskip("sklearn.datasets").load_digits

LOSS = {"temperature": 3.0, "alpha": 0.3}


@pytest.fixture(autouse=True)
def accelerate_state():
    """Reset Accelerate's state, which keeps the precision of the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def digits(count: int = 64, dtype: torch.dtype = torch.float64) -> TensorDataset:
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images[:count] / 16, dtype=dtype), torch.tensor(labels[:count])
    )


def network(width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).to(dtype)


def trainer_of(student: nn.Module, teacher, **options) -> fastkd.Trainer:
    options = {"loss": fastkd.KDLoss(**LOSS), "progress": False, **options}
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    return fastkd.Trainer(student, teacher, optimizer, **options)


def by_hand(student: nn.Module, teacher, steps, **options) -> nn.Module:
    """Train a copy by hand on batches; return the trained copy."""
    student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    for inputs, labels in steps:
        with torch.no_grad():
            answer = teacher(inputs)
        loss = fastkd.loss(student(inputs), answer, labels, **{**LOSS, **options})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=name)


def batches(data: TensorDataset, size: int = 16):
    return list(DataLoader(data, size))


class Wrapped(nn.Module):
    """Model with keyword arguments and an output with logits, as in transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, pixels):
        return {"logits": self.model(pixels)}


def test_a_loop_by_hand_gives_the_same_student():
    student, teacher, data = network(), network(24, 1), digits()
    expected = by_hand(student, teacher, 3 * batches(data))
    trainer = trainer_of(student, teacher)
    trainer.fit(DataLoader(data, 16), epochs=3)
    assert (trainer.step, trainer.epoch) == (12, 3)
    assert_same(student, expected)


def test_batches_may_be_mappings():
    student, teacher, data = Wrapped(network()), Wrapped(network(24, 1)), digits()
    expected = by_hand(student.model, teacher.model, batches(data))
    trainer_of(student, teacher).fit([{"pixels": x, "labels": y} for x, y in batches(data)])
    assert_same(student.model, expected)


def test_forward_and_labels_read_other_batches():
    student, teacher, data = network(), network(24, 1), digits()
    expected = by_hand(student, teacher, batches(data))
    trainer_of(
        student,
        teacher,
        forward=lambda model, batch: model(batch["of"]["pixels"]),
        labels=lambda batch: batch["of"]["digit"],
    ).fit([{"of": {"pixels": x, "digit": y}} for x, y in batches(data)])
    assert_same(student, expected)


@dataclasses.dataclass
class Pictures:
    """Batch that is neither a tuple nor a mapping."""

    names: list[str]
    pixels: torch.Tensor
    digit: torch.Tensor


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: Pictures(["a"] * len(x), x, y),
        lambda x, y: {"names": ["a"] * len(x), "mask": None, "cached": False, "of": {"x": x}},
        lambda x, y: types.SimpleNamespace(pixels=x, digit=y),
    ],
)
def test_samples_are_counted_in_batches_of_any_form(form):
    student, teacher, (data, *_) = network(), network(24, 1), batches(digits())
    expected = by_hand(student, teacher, [data])
    forward, labels = (lambda model, batch: model(data[0])), (lambda batch: data[1])
    trainer_of(student, teacher, forward=forward, labels=labels).fit([form(*data)])
    assert_same(student, expected)


def test_a_batch_without_labels_and_tensors_is_refused():
    functions = {"forward": lambda model, batch: None, "labels": lambda batch: None}
    loss = fastkd.KDLoss(alpha=0.0)
    trainer = trainer_of(network(), network(24, 1), loss=loss, **functions)
    with pytest.raises(TypeError, match=r"tensor in its tuples, .* counted; got SimpleNamespace"):
        trainer.fit([types.SimpleNamespace(pixels=torch.zeros(2, 64))])


@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"alpha": None, "hard_weight": 0.0}])
def test_without_labels_alpha_0_trains_the_soft_term(weights):
    student, teacher, data = network(), network(24, 1), digits()
    steps = [(x, None) for x, _ in batches(data)]
    expected = by_hand(student, teacher, steps, alpha=None)
    loss = fastkd.KDLoss(**{**LOSS, **weights})
    evaluations = trainer_of(student, teacher, loss=loss).fit(
        [(x,) for x, _ in steps], validation=[(x,) for x, _ in steps]
    )
    assert_same(student, expected)
    assert math.isnan(evaluations[0].accuracy) and evaluations[0].rows == len(data)


@pytest.mark.parametrize("options", [{}, LOSS, {"soft_weight": 1.0}])
def test_batches_that_lost_their_labels_are_refused(options):
    student, data = network(), [(x,) for x, _ in batches(digits())]
    before = copy.deepcopy(student)
    trainer = trainer_of(student, network(24, 1), loss=fastkd.KDLoss(**options))
    for run in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match=r"labels must not be None.* Use KDLoss\(alpha=0.0\)"):
            run(data)
    assert_same(student, before)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulated_batches_equal_one_batch(accumulate):
    """Accumulated batches have different sizes and different shares of valid rows."""
    student, teacher, (inputs, labels) = network(), network(24, 1), digits().tensors
    labels = labels.masked_fill(torch.arange(64) % 7 < torch.arange(64) // 16, -100)
    sizes = [5, 20, 3, 12, 24]
    pieces = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    joined = [
        tuple(torch.cat(part) for part in zip(*pieces[i : i + accumulate], strict=True))
        for i in range(0, 5, accumulate)
    ]
    expected = by_hand(student, teacher, joined)
    trainer = trainer_of(student, teacher, accumulate=accumulate)
    steps = list(trainer.steps(pieces))
    assert_same(student, expected)
    assert [step.number for step in steps] == list(range(1, len(joined) + 1))


def test_a_step_without_a_valid_row_changes_nothing():
    student = network()
    expected = copy.deepcopy(student)
    inputs, labels = digits().tensors
    (step,) = trainer_of(student, network(24, 1)).steps([(inputs, torch.full_like(labels, -100))])
    assert_same(student, expected)
    assert float(step.loss) == 0


@pytest.mark.parametrize("labelled", [True, False])
def test_an_empty_batch_changes_nothing(labelled):
    student = network()
    expected = copy.deepcopy(student)
    inputs, labels = (tensor[:0] for tensor in digits().tensors)
    loss = fastkd.KDLoss(**{**LOSS, **({} if labelled else {"alpha": 0.0})})
    trainer = trainer_of(student, network(24, 1), loss=loss)
    (step,) = trainer.steps([(inputs, labels) if labelled else inputs])
    assert_same(student, expected)
    assert float(step.loss) == 0


def test_values_of_a_step_are_those_of_terms():
    student, teacher, (inputs, labels) = network(), network(24, 1), digits().tensors
    with torch.no_grad():
        terms = fastkd.terms(student(inputs), teacher(inputs), labels, **LOSS)
    (step,) = trainer_of(student, teacher).steps([(inputs, labels)])
    for name in ("loss", "hard", "soft", "agreement"):
        assert float(getattr(step, name)) == pytest.approx(float(getattr(terms, name)), rel=1e-12)
    assert float(step.hint) == 0


def test_clipping_schedule_and_average_equal_a_loop_by_hand():
    student, teacher, data = network(), network(24, 1), digits()
    exact_student = copy.deepcopy(student)
    average = torch.optim.swa_utils.AveragedModel(
        exact_student,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8),
        use_buffers=True,
    )
    optimizer = torch.optim.SGD(exact_student.parameters(), 0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for inputs, labels in batches(data):
        optimizer.zero_grad()
        fastkd.loss(exact_student(inputs), teacher(inputs).detach(), labels, **LOSS).backward()
        norm = nn.utils.clip_grad_norm_(exact_student.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
        schedule.step()
        average.update_parameters(exact_student)
    ours = torch.optim.SGD(student.parameters(), 0.5)
    trainer = fastkd.Trainer(
        student,
        teacher,
        ours,
        loss=fastkd.KDLoss(**LOSS),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(ours, 0.7),
        clip=0.1,
        ema=0.8,
        progress=False,
    )
    trainer.fit(DataLoader(data, 16))
    assert_same(student, exact_student)
    assert_same(trainer.ema.module, average.module)
    inputs, labels = data.tensors
    expected = (average.module(inputs).argmax(-1) == labels).double().mean()
    assert trainer.evaluate([(inputs, labels)]).accuracy == pytest.approx(float(expected))


def test_clipping_excludes_parameters_without_updates():
    """Clipping excludes gradients of parameters that the optimizer does not update."""
    student, teacher, data = network(), network(24, 1), digits()
    exact_student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(exact_student[2].parameters(), 0.5)
    for inputs, labels in batches(data):
        optimizer.zero_grad()
        fastkd.loss(exact_student(inputs), teacher(inputs).detach(), labels, **LOSS).backward()
        nn.utils.clip_grad_norm_(exact_student[2].parameters(), 0.1)
        optimizer.step()
    ours = torch.optim.SGD(student[2].parameters(), 0.5)
    loss = fastkd.KDLoss(**LOSS)
    fastkd.Trainer(student, teacher, ours, loss=loss, clip=0.1, progress=False).fit(batches(data))
    assert_same(student, exact_student)


def test_several_teachers_are_mixed_as_probabilities():
    student, teachers, data = network(), [network(24, 1), network(24, 2)], digits()

    def mixture(inputs):
        return [teacher(inputs) for teacher in teachers]

    weights = {"teacher_weights": (0.25, 0.75)}
    expected = by_hand(student, mixture, batches(data), **weights)
    inputs, labels = data.tensors
    with torch.no_grad():
        p = sum(
            w * (t(inputs) / 3).softmax(-1) for w, t in zip((0.25, 0.75), teachers, strict=True)
        )
        z = student(inputs)
        soft = (p * (p.log() - (z / 3).log_softmax(-1))).sum(-1).mean()
        truth = 0.3 * F.cross_entropy(z, labels) + 0.7 * 9 * soft
    trainer = trainer_of(student, teachers, loss=fastkd.KDLoss(**LOSS, **weights))
    assert trainer.evaluate([(inputs, labels)]).loss == pytest.approx(float(truth), rel=1e-12)
    trainer.fit(DataLoader(data, 16))
    assert_same(student, expected)


def test_a_cached_teacher_trains_like_the_teacher(tmp_path):
    student, teacher, data = network(), network(24, 1), digits()
    expected = by_hand(student, teacher, batches(data))
    numbered = fastkd.teachers.WithIds(data)
    cache = fastkd.teachers.precompute(
        teacher, DataLoader(numbered, 32), tmp_path, dtype=torch.float32, progress=False
    )
    trainer_of(student, cache).fit(DataLoader(numbered, 16))
    for ours, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="sample ids"):
        trainer_of(network(), cache).fit(DataLoader(data, 16))
    with pytest.raises(ValueError, match="hints need features"):
        trainer_of(network(), cache, hints=[fastkd.Hint(student="0", teacher="0")])


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("dim", [-1, 1])
def test_cached_sequences_serve_longer_padding(tmp_path, top_k, dim):
    """Cached sequences of at most 7 rows serve batches that are padded to 8 rows."""
    images, digit = load_digits(return_X_y=True)
    inputs = torch.tensor(images[:16] / 16).view(16, 8, 8)
    lengths = 4 + torch.arange(16) % 4
    labels = torch.tensor(digit[:16]).unsqueeze(1).expand(-1, 8)
    labels = labels.masked_fill(torch.arange(8) >= lengths.unsqueeze(1), -100)
    data = fastkd.teachers.WithIds(TensorDataset(inputs, labels))
    loader = DataLoader(data, 8)
    torch.manual_seed(1)
    teacher, student = nn.Linear(8, 10).double(), nn.Linear(8, 10).double()
    options = {} if top_k else {"dim": dim}
    cache = fastkd.teachers.precompute(
        teacher, loader, tmp_path, top_k=top_k, temperature=3.0, dtype=torch.float32, progress=False
    )

    def forward(model, batch):
        return model(batch[0]).movedim(-1, options.get("dim", -1))

    def trainer(learner, source):
        return trainer_of(
            learner, source, forward=forward, accumulate=2, loss=fastkd.KDLoss(**LOSS, **options)
        )

    exact_student = copy.deepcopy(student)
    if top_k:
        lists = fastkd.TopK(*(teacher(inputs).detach() / 3.0).log_softmax(-1).topk(top_k))
        fastkd.loss(exact_student(inputs), lists, labels, **LOSS).backward()
        torch.optim.SGD(exact_student.parameters(), 0.5).step()
    else:
        list(trainer(exact_student, teacher).steps(loader))
    learner = trainer(student, cache)
    list(learner.steps(loader))
    assert learner.evaluate(loader).rows == int(lengths.sum())
    for ours, theirs in zip(student.parameters(), exact_student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_cache_of_other_classes_is_refused(tmp_path, top_k):
    data = DataLoader(fastkd.teachers.WithIds(digits()), 32)
    cache = fastkd.teachers.precompute(
        network(24, 1), data, tmp_path, top_k=top_k, temperature=3.0, progress=False
    )
    student = nn.Linear(64, 12).double()
    before = copy.deepcopy(student)
    with pytest.raises(ValueError, match="a teacher of 10 classes; got 12"):
        trainer_of(student, cache).fit(data)
    assert_same(student, before)
    if top_k is None:  # a padded vocabulary
        trainer = trainer_of(student, cache, forward=lambda model, batch: model(batch[0])[..., :10])
        assert trainer.evaluate(data).rows == 64


@pytest.mark.parametrize("masked", [False, True])
def test_a_top_k_cache_trains_like_its_lists(tmp_path, masked):
    student, teacher, (inputs, labels) = network(), network(24, 1), digits().tensors
    labels = labels.masked_fill(torch.arange(64) % 5 == 0, -100) if masked else labels
    data = fastkd.teachers.WithIds(TensorDataset(inputs, labels))
    loader = DataLoader(data, 32)
    cache = fastkd.teachers.precompute(
        teacher, loader, tmp_path, top_k=4, temperature=3.0, dtype=torch.float32, progress=False
    )
    exact_student = copy.deepcopy(student)
    log_probs, indices = (teacher(inputs).detach() / 3.0).log_softmax(-1).topk(4)
    loss = fastkd.loss(
        exact_student(inputs), fastkd.TopK(log_probs.float(), indices), labels, **LOSS
    )
    loss.backward()
    torch.optim.SGD(exact_student.parameters(), 0.5).step()
    (step,) = trainer_of(student, cache, accumulate=2).steps(loader)
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(0.3 * step.hard + 0.7 * 9 * step.soft) == pytest.approx(float(step.loss), rel=1e-6)
    for ours, theirs in zip(student.parameters(), exact_student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    cached, live = (trainer_of(student, t).evaluate(loader) for t in (cache, teacher))
    assert (cached.hard, cached.agreement) == (
        pytest.approx(live.hard),
        pytest.approx(live.agreement),
    )
    for options, words in (
        ({"temperature": 2.0}, "at temperature 3, which cannot be turned into those at 2"),
        (
            {"temperature": 3.0, "divergence": "mse"},
            "with a TopK as teacher, which lists probabilities of some classes; got 'mse'",
        ),
        (
            {"temperature": 3.0, "standardize": True},
            "standardize must be False with a TopK as teacher; got True",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            trainer_of(student, cache, loss=fastkd.KDLoss(**options))


@pytest.mark.parametrize("labelled", [True, False])
def test_defaults_may_be_explicit_with_a_top_k_cache(tmp_path, labelled):
    student, teacher, data = network(), network(24, 1), digits()
    data = fastkd.teachers.WithIds(data if labelled else TensorDataset(data.tensors[0]))
    loader = DataLoader(data, 32)
    cache = fastkd.teachers.precompute(
        teacher, loader, tmp_path, top_k=4, temperature=3.0, progress=False
    )
    defaults = {"divergence": "forward_kl", "standardize": False, "class_weight": None, "dim": -1}
    options = {**LOSS, **({} if labelled else {"alpha": 0.0})}
    losses = [fastkd.KDLoss(**options), fastkd.KDLoss(**options, **defaults)]
    histories = [
        trainer_of(copy.deepcopy(student), cache, loss=loss).fit(loader, 2, validation=loader)
        for loss in losses
    ]
    assert math.isfinite(histories[0][-1].loss)
    assert histories[0][-1][:4] == histories[1][-1][:4]


def test_the_teacher_is_frozen_and_keeps_its_dtype():
    student, teacher = network(dtype=torch.float32), network(24, 1, torch.bfloat16)
    seen = []
    teacher.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype, module.training))
    )
    trainer_of(student, teacher).fit(DataLoader(digits(dtype=torch.float32), 32))
    assert seen == [(torch.bfloat16, torch.bfloat16, False)] * 2
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_mixed_precision_keeps_logits_in_16_bits(monkeypatch):
    student, teacher = network(dtype=torch.float32), network(24, 1, torch.float32)
    seen = []
    terms = fastkd.losses.terms
    monkeypatch.setattr(
        fastkd.losses, "terms", lambda s, *a, **k: (seen.append(s.dtype), terms(s, *a, **k))[1]
    )
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    trainer = trainer_of(student, teacher, accelerator=accelerator)
    first, *_, last = trainer.fit(
        DataLoader(digits(dtype=torch.float32), 16),
        8,
        validation=batches(digits(dtype=torch.float32)),
    )
    assert set(seen) == {torch.bfloat16}
    assert last.loss < first.loss
    assert all(parameter.dtype is torch.float32 for parameter in student.parameters())


def test_evaluation_averages_rows_and_restores_modes():
    student = nn.Sequential(network(), nn.Dropout(0.5))
    teacher, (inputs, labels) = network(24, 1), digits().tensors
    labels = labels.masked_fill(torch.arange(64) < 20, -100)
    trainer = trainer_of(student, teacher)
    student.train()
    evaluated = trainer.evaluate(list(zip(inputs.split(30), labels.split(30), strict=True)))
    assert student[1].training
    student.eval().requires_grad_(False)
    terms = fastkd.terms(student(inputs), teacher(inputs), labels, **LOSS)
    assert evaluated.loss == pytest.approx(float(terms.loss))
    assert evaluated.hard == pytest.approx(float(terms.hard))
    assert evaluated.soft == pytest.approx(float(terms.soft))
    assert evaluated.agreement == pytest.approx(float(terms.agreement))
    hits = (student(inputs).argmax(-1) == labels)[20:]
    assert (evaluated.accuracy, evaluated.rows) == (pytest.approx(float(hits.double().mean())), 44)


def test_an_evaluation_without_labels_is_refused():
    trainer, (inputs, labels) = trainer_of(network(), network(24, 1)), digits().tensors
    with pytest.raises(ValueError, match="no label counts, or loader gave no batch: it is empty"):
        trainer.evaluate([])
    with pytest.raises(ValueError, match="no label counts"):
        trainer.evaluate([(inputs, torch.full_like(labels, -100))])
    with pytest.raises(ValueError, match="or an iterator that has been iterated before"):
        trainer.fit(batches(digits()), 2, validation=iter(batches(digits())))
    assert trainer.epoch == 2


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("soft", [False, True])
def test_accuracy_ignores_padding_classes(dim, soft):
    """Predictions on padding classes do not count."""
    labels = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2]])
    right = F.one_hot(labels, 3).double()
    logits = torch.cat((right, torch.full((4, 2, 2), 9.0)), -1).movedim(-1, dim)
    if soft:
        labels = right.movedim(-1, dim)
    trainer = trainer_of(
        nn.Linear(1, 1),
        nn.Linear(1, 1),
        forward=lambda model, batch: batch[0].narrow(dim, 0, 3),
        loss=fastkd.KDLoss(**LOSS, dim=dim),
    )
    evaluated = trainer.evaluate([(logits, labels)])
    assert (evaluated.accuracy, evaluated.agreement) == (1.0, 1.0)


# ---- failures, interruptions, checkpoints, invalid arguments


@pytest.mark.parametrize("term", ["hard and soft", "soft", "hint"])
def test_a_loss_that_is_not_finite_stops_before_the_step(term):
    student, teacher, data = network(), network(24, 1), batches(digits())

    def poison(module, inputs, output):
        if trainer.step < 2:
            return output
        if term != "soft":
            return output * math.nan
        wrong = (data[2][1] + 1).unsqueeze(1) % 10  # a class that the student masks
        return output.scatter(1, wrong, -math.inf)

    {"hard and soft": teacher[2], "soft": student[2], "hint": teacher[0]}[
        term
    ].register_forward_hook(poison)
    if term == "hint":  # NaN does not reach later layers
        teacher[1].register_forward_hook(lambda module, inputs, output: output.nan_to_num())
    before_hooks = hooks(student)
    trainer = trainer_of(
        student, teacher, hints=[fastkd.Hint(student="0", teacher="0", project=nn.Linear(12, 24))]
    )
    seen = []
    with pytest.raises(FloatingPointError, match=f"loss of step 3 .* its {term} term"):
        for step in trainer.steps(data):
            seen.append(step.number)
            before = copy.deepcopy(student)
    assert seen == [1, 2]
    assert_same(student, before)
    assert hooks(student) == before_hooks


def test_earlier_gradients_are_discarded():
    """Gradients of the user, of a non-finite loss, or of an interrupted step are discarded."""
    student, teacher, (data, *_) = network(), network(24, 1), batches(digits())
    expected = by_hand(student, teacher, 2 * [data])
    inputs, labels = data
    student(inputs).sum().backward()

    def forward(model, batch):
        if not batch[0].any():
            raise KeyboardInterrupt
        return model(batch[0])

    trainer = trainer_of(student, teacher, accumulate=2, forward=forward)
    with pytest.raises(FloatingPointError):
        list(trainer.steps([(inputs * math.nan, labels)]))
    list(trainer.steps([data]))
    with pytest.raises(KeyboardInterrupt):
        list(trainer.steps([data, (inputs * 0, labels)]))
    list(trainer.steps([data]))
    assert_same(student, expected)


def test_losses_on_other_devices_are_read_a_step_late():
    """Losses on other devices are read when the next step is queued, as on a GPU."""

    class Far:
        def __init__(self, *values):
            self.values = torch.tensor(values)
            self.device = torch.device("cuda")

        def to(self, device, non_blocking):
            assert (device, non_blocking) == ("cpu", True)
            return self.values

    class Event:
        def __init__(self, device):
            self.recorded = False

        def record(self):
            self.recorded = True

        def synchronize(self):
            assert self.recorded

    names, logged = ["loss", "hard", "soft", "hint"], []
    tracker = types.SimpleNamespace(
        is_main_process=True,
        log_with=["a tracker"],
        trackers=["a tracker"],
        log=lambda values, step: logged.append((step, values["hard"])),
    )
    report = progress.Progress(tracker, show=False, names=names, logged=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "Event", Event)
        report.add(1, Far(1.0, 2.0, 3.0, 0.0))
        assert logged == []
        report.add(2, Far(math.inf, 2.0, math.inf, 0.0))
        assert logged == [(1, 2.0)]
        with pytest.raises(FloatingPointError, match=r"step 2 .* its soft term"):
            report.add(3, Far(1.0, 2.0, 3.0, 0.0))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("ending", ["to the end", "break", "error"])
def test_hooks_are_always_removed(ending):
    student, teacher, data = network(), network(24, 1), batches(digits())
    trainer = trainer_of(
        student, teacher, hints=[fastkd.Hint(student="1", teacher="1", project=nn.Linear(12, 24))]
    )
    if ending == "error":
        data[1] = "no batch"
        with pytest.raises(TypeError, match="a batch must be"):
            trainer.fit(data)
    else:
        for _ in trainer.steps(data):
            assert hooks(student) == hooks(teacher) == 1
            if ending == "break":
                break
    assert hooks(student) == hooks(teacher) == 0


def test_after_a_break_the_next_pass_starts_at_the_beginning():
    student, data = network(), digits()
    trainer = trainer_of(student, network(24, 1))
    loader = DataLoader(data, 16)
    next(trainer.steps(loader))
    assert [step.number for step in trainer.steps(loader)] == [2, 3, 4, 5]


def test_a_folder_of_another_run_is_refused(tmp_path):
    loader = DataLoader(digits(), 32)
    trainer_of(network(), network(24, 1), checkpoints=tmp_path).fit(loader)
    trainer = trainer_of(network(), network(24, 1), checkpoints=tmp_path)
    with pytest.raises(FileExistsError, match=r"resume\(\)"):
        trainer.fit(loader)
    assert trainer.step == 0
    assert trainer.resume() and trainer.step == 2
    trainer.fit(loader, epochs=2)
    assert trainer.step == 4
    assert not trainer_of(network(), network(24, 1), checkpoints=tmp_path / "none").resume()


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    trainer_of(network(), network(24, 1), checkpoints=tmp_path).fit(DataLoader(digits(), 32))
    about = tmp_path / "step-00000002" / "trainer.json"
    about.write_text(about.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    checkpoints.write_checksums(about.parent)
    trainer = trainer_of(network(), network(24, 1), checkpoints=tmp_path)
    with pytest.raises(ValueError, match=f"has format 1, and this run {FORMAT}"):
        trainer.resume()
    assert trainer.step == 0


class Malicious:
    """Object that writes a file when it is unpickled."""

    def __init__(self, proof: pathlib.Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return pathlib.Path.write_text, (self.proof, "executed")


def scheduled_trainer(folder: pathlib.Path, **options) -> fastkd.Trainer:
    student = network()
    optimizer = torch.optim.Adam(student.parameters())
    options = {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), **options}
    return fastkd.Trainer(
        student, network(24, 1), optimizer, ema=0.9, checkpoints=folder, progress=False, **options
    )


def test_no_code_in_a_checkpoint_is_executed(tmp_path):
    """A malicious object in place of any pickled file, also Accelerate's, is not executed."""
    folder, proof = tmp_path / "run", tmp_path / "proof"
    scheduled_trainer(folder).fit(DataLoader(digits(), 32))
    checkpoint = folder / "step-00000002"
    files = {file.name for file in checkpoint.iterdir()}
    pickled = files - {"model.safetensors", "trainer.json", "files.json"}
    assert pickled == {
        "ema.pt",
        "optimizer.bin",
        "position-0.pt",
        "random_states_0.pkl",
        "scheduler.pt",
    }
    for name in sorted(pickled | {"custom_checkpoint_0.pkl", "shards/.metadata"}):
        file = checkpoint / name
        file.parent.mkdir(exist_ok=True)
        before = file.read_bytes() if file.exists() else None
        torch.save(Malicious(proof), tmp_path / "malicious")
        file.write_bytes((tmp_path / "malicious").read_bytes())
        checkpoints.write_checksums(checkpoint)  # an attacker recomputes checksums
        # The file is not read, since fastkd's states are in position-0.pt.
        if name == "random_states_0.pkl":
            assert scheduled_trainer(folder).resume()
        else:
            with pytest.raises((pickle.UnpicklingError, ValueError), match=r"weights|execute"):
                scheduled_trainer(folder).resume()
        assert not proof.exists(), name
        file.unlink() if before is None else file.write_bytes(before)
        checkpoints.write_checksums(checkpoint)
    assert scheduled_trainer(folder).resume()
    torch.load(tmp_path / "malicious", weights_only=False)
    assert proof.exists()  # without the check, the file is written


def test_unresumable_states_are_not_saved(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(torch.optim.SGD([torch.zeros(1)], 0.1))
    trainer = scheduled_trainer(tmp_path / "a", accelerator=accelerator)
    with pytest.raises(ValueError, match="Register no objects with the accelerator"):
        trainer.fit(DataLoader(digits(), 32))
    assert not list((tmp_path / "a").glob("step-*"))

    trainer = scheduled_trainer(tmp_path / "b")
    trainer.scheduler.what = Malicious(tmp_path / "proof")
    with pytest.raises(TypeError, match=r"scheduler.pt would hold .*pathlib.Path"):
        trainer.fit(DataLoader(digits(), 32))
    assert not list((tmp_path / "b").glob("step-*"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": fastkd.KDLoss(reduction="sum")}, ValueError, "reduction='mean'.*got 'sum'"),
        ({"loss": fastkd.KDLoss(normalizer=3.0)}, ValueError, "normalizer=None"),
        ({"loss": F.cross_entropy}, TypeError, "loss must be a fastkd.KDLoss"),
        (
            {"loss": fastkd.KDLoss(class_weight=torch.ones(10))},
            ValueError,
            "class_weight=None, since the trainer divides .* call fastkd.loss in a training loop",
        ),
        ({"accumulate": 0}, ValueError, "accumulate must be an int of at least 1; got 0"),
        ({"clip": -1.0}, ValueError, "clip must be positive"),
        ({"ema": 1.5}, ValueError, "Invalid decay value 1.5"),
        ({"save_every": 5}, ValueError, "save_every needs checkpoints"),
        (
            {"hints": [fastkd.Hint(student="first", teacher="0")]},
            ValueError,
            "the student has no module 'first'",
        ),
        (
            {"hints": [fastkd.Hint(student="0", teacher="x")]},
            ValueError,
            "the teacher has no module 'x'",
        ),
        ({"hints": fastkd.Hint(student="0", teacher="0")}, TypeError, "'Hint' object is not iter"),
        ({"checkpoints": 3}, TypeError, "checkpoints must be a folder's path or None; got int"),
        ({"teacher_device": "nope"}, RuntimeError, "device"),
    ],
)
def test_bad_arguments_are_refused(options, error, words):
    teacher = network(24, 1)
    with pytest.raises(error, match=words):
        trainer_of(network(), teacher, **options)
    assert teacher.training and teacher[0].weight.requires_grad


def test_an_optimizer_of_other_parameters_is_refused():
    student, teacher = network(), network(24, 1)
    others = torch.optim.SGD(copy.deepcopy(student).parameters(), 0.5)
    with pytest.raises(ValueError, match="optimizer has none of the student's parameters"):
        fastkd.Trainer(student, teacher, others)


@pytest.mark.parametrize("below", ["", "run"])
def test_checkpoints_must_be_a_folder(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"checkpoints must be a folder; got .*file is a file"):
        trainer_of(network(), network(24, 1), checkpoints=file / below)


@pytest.mark.parametrize("epochs", [2.5, 0, True, None])
def test_invalid_epochs_are_refused(epochs):
    trainer = trainer_of(network(), network(24, 1))
    error = ValueError if epochs == 0 else TypeError
    with pytest.raises(error, match=f"epochs must be an int of at least 1; got {epochs}"):
        trainer.fit(batches(digits()), epochs)
    assert trainer.step == 0


def test_an_accelerator_that_would_divide_losses_is_refused():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    try:
        with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1; got 4.*accumulate"):
            trainer_of(network(), network(24, 1), accelerator=accelerator)
    finally:
        accelerate.state.GradientState._reset_state()


class Stream(IterableDataset):
    """Iterable dataset of unknown length."""

    def __iter__(self):
        return iter(zip(*digits(40).tensors, strict=True))


def test_loaders_without_a_length_are_trained_on(capsys):
    trainer = trainer_of(network(), network(24, 1), progress=True)
    (evaluated,) = trainer.fit(DataLoader(Stream(), 16), validation=DataLoader(Stream(), 16))
    assert trainer.step == 3 and evaluated.rows == 40 and "3it" in capsys.readouterr().err


def test_a_loader_without_batches_is_refused():
    trainer = trainer_of(network(), network(24, 1))
    once = iter(batches(digits()))
    with pytest.raises(ValueError, match="loader gave no batch: it is empty, or an iterator"):
        trainer.fit(once, 2)
    assert trainer.epoch == 1
    with pytest.raises(TypeError, match="got the dataset TensorDataset, which yields single"):
        trainer.fit(digits(), 2)
    with pytest.raises(TypeError, match="validation must yield batches; got the dataset TensorD"):
        trainer.fit(batches(digits()), 2, validation=digits())
    assert trainer.epoch == 1


def test_batches_that_do_not_fit_the_model_are_refused():
    trainer = trainer_of(Wrapped(network()), Wrapped(network(24, 1)))
    images, labels = batches(digits())[0]
    with pytest.raises(TypeError, match=r"here \['images'\], and Wrapped does not take them: "):
        trainer.fit([{"images": images, "labels": labels}])
    with pytest.raises(TypeError, match="labels must be a tensor; got ndarray"):
        trainer.fit([{"pixels": images, "labels": labels.numpy()}])


def test_a_teacher_that_shares_parameters_is_refused():
    student = network()
    with pytest.raises(ValueError, match=r"shares its parameter '0.weight'"):
        trainer_of(student, nn.Sequential(student[0], nn.Linear(12, 10)))
    assert student[0].weight.requires_grad


@pytest.mark.parametrize("teacher", [["teacher"], [network(), torch.zeros(3)], "a"])
def test_a_teacher_of_another_kind_is_refused(teacher):
    with pytest.raises(TypeError, match="is not a Module subclass"):
        trainer_of(network(), teacher)


def test_saving_needs_a_folder():
    with pytest.raises(ValueError, match="checkpoints"):
        trainer_of(network(), network(24, 1)).save()


def test_processes_unknown_to_accelerate_are_refused(monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched"):
        trainer_of(network(), network(24, 1), accelerator=accelerator)


def test_unsupported_options_of_sharding_are_refused(monkeypatch):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = types.SimpleNamespace(fsdp_version=1)
    with pytest.raises(ValueError, match="FSDP is supported in version 2"):
        trainer_of(network(), network(24, 1), accelerator=accelerator)
    accelerator.state.fsdp_plugin.fsdp_version = 2
    with pytest.raises(ValueError, match="ema cannot average"):
        trainer_of(network(), network(24, 1), ema=0.5, accelerator=accelerator)
    monkeypatch.setattr(accelerator, "prepare", lambda *parts: parts)
    trainer = trainer_of(network(), network(24, 1), accelerator=accelerator)
    data = batches(digits())
    with pytest.raises(ValueError, match="evaluation needs the full student"):
        trainer.evaluate(data)
    with pytest.raises(ValueError, match="evaluation needs the full student"):
        trainer.fit(data, validation=data)
    assert trainer.step == 0


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"fastkd\[train\]"):
        trainer_of(network(), network(24, 1))


# ---- documentation and output


def test_the_code_of_the_documentation_runs(capsys):
    text = (pathlib.Path(__file__).parents[1] / "docs" / "training.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    run = [block for block in blocks if "..." not in block]
    assert len(run) >= 2
    exec("\n".join(run), {})
    assert "Evaluation(" in capsys.readouterr().out


def test_one_bar_shows_both_terms(capsys, tmp_path):
    trainer = trainer_of(network(), network(24, 1), progress=True, checkpoints=tmp_path)
    trainer.fit(DataLoader(digits(), 16), 2)
    shown = capsys.readouterr().err
    assert "epoch 2" in shown and "8/8" in shown and "hard=" in shown and "soft=" in shown
    assert shown.count("\n") == 1

    trainer = trainer_of(network(), network(24, 1), progress=True, checkpoints=tmp_path)
    trainer.resume()
    for step in trainer.steps(DataLoader(digits(), 16)):
        if step.number == 10:
            trainer.save()
            break
    assert "0/4" in capsys.readouterr().err
    trainer = trainer_of(network(), network(24, 1), progress=True, checkpoints=tmp_path)
    trainer.resume()
    trainer.fit(DataLoader(digits(), 16), 3)
    shown = capsys.readouterr().err
    assert "10/12" in shown and "12/12" in shown and "epoch 3" in shown


def test_losses_are_logged_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = accelerate.Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
    trainer = trainer_of(network(), network(24, 1), accelerator=accelerator)
    data = DataLoader(digits(), 16)
    (evaluation,) = trainer.fit(data, validation=data)
    accelerator.end_training()
    written = EventAccumulator(str(tmp_path / "fastkd")).Reload()
    assert [event.step for event in written.Scalars("soft")] == [1, 2, 3, 4]
    assert written.Scalars("validation/loss")[0].value == pytest.approx(evaluation.loss, rel=1e-6)
