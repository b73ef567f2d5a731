"""Test that the training loop gives the results of hand-written loops, on real digits."""

import copy
import dataclasses
import math
import pathlib
import re
import types

import pytest
import torch
from stacks import (
    TRAINER_LOSS,
    WithPixels,
    assert_same_parameters,
    batches_of,
    digits,
    network,
    train_by_hand,
    trainer_of,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd

accelerate = pytest.importorskip("accelerate")
load_digits = pytest.importorskip("sklearn.datasets").load_digits

pytestmark = pytest.mark.usefixtures("accelerate_state")


def test_a_loop_by_hand_gives_the_same_student():
    student, teacher, data = network(), network(24, 1), digits()
    expected = train_by_hand(student, teacher, 3 * batches_of(data))
    trainer = trainer_of(student, teacher)
    trainer.fit(DataLoader(data, 16), epochs=3)
    assert (trainer.step, trainer.epoch) == (12, 3)
    assert_same_parameters(student, expected)


def test_batches_may_be_mappings():
    student, teacher, data = WithPixels(network()), WithPixels(network(24, 1)), digits()
    expected = train_by_hand(student.model, teacher.model, batches_of(data))
    trainer_of(student, teacher).fit([{"pixels": x, "labels": y} for x, y in batches_of(data)])
    assert_same_parameters(student.model, expected)


def test_forward_and_labels_read_other_batches():
    student, teacher, data = network(), network(24, 1), digits()
    expected = train_by_hand(student, teacher, batches_of(data))
    trainer_of(
        student,
        teacher,
        forward=lambda model, batch: model(batch["of"]["pixels"]),
        labels=lambda batch: batch["of"]["digit"],
    ).fit([{"of": {"pixels": x, "digit": y}} for x, y in batches_of(data)])
    assert_same_parameters(student, expected)


@dataclasses.dataclass
class Pictures:
    """Hold a batch that is neither a tuple nor a mapping."""

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
    student, teacher, (data, *_) = network(), network(24, 1), batches_of(digits())
    expected = train_by_hand(student, teacher, [data])
    forward, labels = (lambda model, batch: model(data[0])), (lambda batch: data[1])
    trainer_of(student, teacher, forward=forward, labels=labels).fit([form(*data)])
    assert_same_parameters(student, expected)


def test_a_batch_without_labels_and_tensors_is_refused():
    functions = {"forward": lambda model, batch: None, "labels": lambda batch: None}
    loss = fastkd.KDLoss(alpha=0.0)
    trainer = trainer_of(network(), network(24, 1), loss=loss, **functions)
    with pytest.raises(TypeError, match=r"tensor in its tuples, .* counted; got SimpleNamespace"):
        trainer.fit([types.SimpleNamespace(pixels=torch.zeros(2, 64))])


@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"alpha": None, "hard_weight": 0.0}])
def test_without_labels_alpha_0_trains_the_soft_term(weights):
    student, teacher, data = network(), network(24, 1), digits()
    steps = [(x, None) for x, _ in batches_of(data)]
    expected = train_by_hand(student, teacher, steps, alpha=None)
    loss = fastkd.KDLoss(**{**TRAINER_LOSS, **weights})
    evaluations = trainer_of(student, teacher, loss=loss).fit(
        [(x,) for x, _ in steps], validation=[(x,) for x, _ in steps]
    )
    assert_same_parameters(student, expected)
    assert math.isnan(evaluations[0].accuracy) and evaluations[0].rows == len(data)


@pytest.mark.parametrize("options", [{}, TRAINER_LOSS, {"soft_weight": 1.0}])
def test_batches_that_lost_their_labels_are_refused(options):
    student, data = network(), [(x,) for x, _ in batches_of(digits())]
    before = copy.deepcopy(student)
    trainer = trainer_of(student, network(24, 1), loss=fastkd.KDLoss(**options))
    for run in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match=r"labels must not be None.* Use KDLoss\(alpha=0.0\)"):
            run(data)
    assert_same_parameters(student, before)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulated_batches_equal_one_batch(accumulate):
    # The batches differ in size and in their share of valid rows.
    student, teacher, (inputs, labels) = network(), network(24, 1), digits().tensors
    labels = labels.masked_fill(torch.arange(64) % 7 < torch.arange(64) // 16, -100)
    sizes = [5, 20, 3, 12, 24]
    pieces = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    joined = [
        tuple(torch.cat(part) for part in zip(*pieces[i : i + accumulate], strict=True))
        for i in range(0, 5, accumulate)
    ]
    expected = train_by_hand(student, teacher, joined)
    trainer = trainer_of(student, teacher, accumulate=accumulate)
    steps = list(trainer.steps(pieces))
    assert_same_parameters(student, expected)
    assert [step.number for step in steps] == list(range(1, len(joined) + 1))


def test_a_step_without_a_valid_row_changes_nothing():
    student = network()
    expected = copy.deepcopy(student)
    inputs, labels = digits().tensors
    (step,) = trainer_of(student, network(24, 1)).steps([(inputs, torch.full_like(labels, -100))])
    assert_same_parameters(student, expected)
    assert float(step.loss) == 0


@pytest.mark.parametrize("labelled", [True, False])
def test_an_empty_batch_changes_nothing(labelled):
    student = network()
    expected = copy.deepcopy(student)
    inputs, labels = (tensor[:0] for tensor in digits().tensors)
    loss = fastkd.KDLoss(**{**TRAINER_LOSS, **({} if labelled else {"alpha": 0.0})})
    trainer = trainer_of(student, network(24, 1), loss=loss)
    (step,) = trainer.steps([(inputs, labels) if labelled else inputs])
    assert_same_parameters(student, expected)
    assert float(step.loss) == 0


def test_values_of_a_step_are_those_of_terms():
    student, teacher, (inputs, labels) = network(), network(24, 1), digits().tensors
    with torch.no_grad():
        terms = fastkd.terms(student(inputs), teacher(inputs), labels, **TRAINER_LOSS)
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
    for inputs, labels in batches_of(data):
        optimizer.zero_grad()
        fastkd.loss(
            exact_student(inputs), teacher(inputs).detach(), labels, **TRAINER_LOSS
        ).backward()
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
        loss=fastkd.KDLoss(**TRAINER_LOSS),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(ours, 0.7),
        clip=0.1,
        ema=0.8,
        progress=False,
    )
    trainer.fit(DataLoader(data, 16))
    assert_same_parameters(student, exact_student)
    assert_same_parameters(trainer.ema.module, average.module)
    inputs, labels = data.tensors
    expected = (average.module(inputs).argmax(-1) == labels).double().mean()
    assert trainer.evaluate([(inputs, labels)]).accuracy == pytest.approx(float(expected))


def test_clipping_excludes_parameters_without_updates():
    student, teacher, data = network(), network(24, 1), digits()
    exact_student = copy.deepcopy(student)
    optimizer = torch.optim.SGD(exact_student[2].parameters(), 0.5)
    for inputs, labels in batches_of(data):
        optimizer.zero_grad()
        fastkd.loss(
            exact_student(inputs), teacher(inputs).detach(), labels, **TRAINER_LOSS
        ).backward()
        nn.utils.clip_grad_norm_(exact_student[2].parameters(), 0.1)
        optimizer.step()
    ours = torch.optim.SGD(student[2].parameters(), 0.5)
    loss = fastkd.KDLoss(**TRAINER_LOSS)
    fastkd.Trainer(student, teacher, ours, loss=loss, clip=0.1, progress=False).fit(
        batches_of(data)
    )
    assert_same_parameters(student, exact_student)


def test_several_teachers_are_mixed_as_probabilities():
    student, teachers, data = network(), [network(24, 1), network(24, 2)], digits()

    def mixture(inputs):
        return [teacher(inputs) for teacher in teachers]

    weights = {"teacher_weights": (0.25, 0.75)}
    expected = train_by_hand(student, mixture, batches_of(data), **weights)
    inputs, labels = data.tensors
    with torch.no_grad():
        p = sum(
            w * (t(inputs) / 3).softmax(-1) for w, t in zip((0.25, 0.75), teachers, strict=True)
        )
        z = student(inputs)
        soft = (p * (p.log() - (z / 3).log_softmax(-1))).sum(-1).mean()
        truth = 0.3 * F.cross_entropy(z, labels) + 0.7 * 9 * soft
    trainer = trainer_of(student, teachers, loss=fastkd.KDLoss(**TRAINER_LOSS, **weights))
    assert trainer.evaluate([(inputs, labels)]).loss == pytest.approx(float(truth), rel=1e-12)
    trainer.fit(DataLoader(data, 16))
    assert_same_parameters(student, expected)


def test_a_cached_teacher_trains_like_the_teacher(tmp_path):
    student, teacher, data = network(), network(24, 1), digits()
    expected = train_by_hand(student, teacher, batches_of(data))
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
    # Cached sequences have at most 7 rows, and batches are padded to 8 rows.
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
            learner,
            source,
            forward=forward,
            accumulate=2,
            loss=fastkd.KDLoss(**TRAINER_LOSS, **options),
        )

    exact_student = copy.deepcopy(student)
    if top_k:
        lists = fastkd.TopK(*(teacher(inputs).detach() / 3.0).log_softmax(-1).topk(top_k))
        fastkd.loss(exact_student(inputs), lists, labels, **TRAINER_LOSS).backward()
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
    assert_same_parameters(student, before)
    if top_k is None:  # the slice removes padded classes
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
        exact_student(inputs), fastkd.TopK(log_probs.float(), indices), labels, **TRAINER_LOSS
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
    options = {**TRAINER_LOSS, **({} if labelled else {"alpha": 0.0})}
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
        validation=batches_of(digits(dtype=torch.float32)),
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
    terms = fastkd.terms(student(inputs), teacher(inputs), labels, **TRAINER_LOSS)
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
        trainer.fit(batches_of(digits()), 2, validation=iter(batches_of(digits())))
    assert trainer.epoch == 2


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("soft", [False, True])
def test_accuracy_ignores_padding_classes(dim, soft):
    labels = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 2]])
    right = F.one_hot(labels, 3).double()
    logits = torch.cat((right, torch.full((4, 2, 2), 9.0)), -1).movedim(-1, dim)
    if soft:
        labels = right.movedim(-1, dim)
    trainer = trainer_of(
        nn.Linear(1, 1),
        nn.Linear(1, 1),
        forward=lambda model, batch: batch[0].narrow(dim, 0, 3),
        loss=fastkd.KDLoss(**TRAINER_LOSS, dim=dim),
    )
    evaluated = trainer.evaluate([(logits, labels)])
    assert (evaluated.accuracy, evaluated.agreement) == (1.0, 1.0)


def test_an_ignored_class_is_never_correct():
    labels = torch.tensor([0, 0, 1, 2])
    logits = F.one_hot(labels, 3).double()
    trainer = trainer_of(
        nn.Linear(1, 1),
        nn.Linear(1, 1),
        forward=lambda model, batch: batch[0],
        loss=fastkd.KDLoss(**TRAINER_LOSS, ignore_index=0),
    )
    evaluated = trainer.evaluate([(logits, labels)])
    assert (evaluated.accuracy, evaluated.rows) == (1.0, 2)


def test_shift_moves_the_labels():
    torch.manual_seed(0)
    student, teacher = nn.Embedding(5, 5), nn.Embedding(5, 5)
    tokens = torch.randint(5, (3, 4))
    labels = tokens.clone()
    labels[0, :2] = -100
    logits, answers = student(tokens)[:, :-1], teacher(tokens).detach()[:, :-1]
    expected = fastkd.terms(logits, answers, labels[:, 1:])
    trainer = trainer_of(student, teacher, loss=fastkd.KDLoss(shift=1))
    evaluated = trainer.evaluate([(tokens, labels)])
    (step,) = trainer.steps([(tokens, labels)])
    for values in (evaluated, step):
        for name in ("loss", "hard", "soft", "agreement"):
            value = torch.as_tensor(getattr(values, name), dtype=torch.float32)
            torch.testing.assert_close(value, getattr(expected, name).detach(), msg=name)
    correct = (logits.argmax(-1) == labels[:, 1:]).sum() / 8
    assert evaluated.rows == 8 and evaluated.accuracy == pytest.approx(correct.item())
    trainer = trainer_of(student, teacher, loss=fastkd.KDLoss(shift=1, alpha=0.0))
    for batch in ((tokens,), (tokens, F.one_hot(tokens, 5).float())):
        with pytest.raises(TypeError, match="labels must be class indices with shift=1; got"):
            trainer.evaluate([batch])


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
