"""Test the training loop: failures, interruptions, checkpoints, invalid arguments."""

import copy
import math
import pathlib
import pickle
import types

import pytest
import torch
from stacks import (
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
from torch.utils.data import DataLoader, IterableDataset

import fastkd
from fastkd.training import checkpoints, progress
from fastkd.training.trainer import FORMAT

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("accelerate_state")


@pytest.mark.parametrize("term", ["hard and soft", "soft", "hint"])
def test_a_loss_that_is_not_finite_stops_before_the_step(term):
    student, teacher, data = network(), network(24, 1), batches_of(digits())

    def poison(module, inputs, output):
        if trainer.step < 2:
            return output
        if term != "soft":
            return output * math.nan
        wrong = (data[2][1] + 1).unsqueeze(1) % 10  # a class, not the label, that the student masks
        return output.scatter(1, wrong, -math.inf)

    {"hard and soft": teacher[2], "soft": student[2], "hint": teacher[0]}[
        term
    ].register_forward_hook(poison)
    if term == "hint":  # keeps NaN from later layers
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
    assert_same_parameters(student, before)
    assert hooks(student) == before_hooks


def test_earlier_gradients_are_discarded():
    # The user, a non-finite loss, and an interrupted step leave gradients behind.
    student, teacher, (data, *_) = network(), network(24, 1), batches_of(digits())
    expected = train_by_hand(student, teacher, 2 * [data])
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
    assert_same_parameters(student, expected)


def test_losses_on_other_devices_are_read_a_step_late():
    # Losses on devices other than the CPU are read when the next step is queued.
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
    student, teacher, data = network(), network(24, 1), batches_of(digits())
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
    """Write a file when the object is unpickled."""

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
    # A malicious object is written in turn to each file that fastkd or Accelerate may unpickle.
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
        # Accelerate ignores an unreadable random_states_0.pkl; position-0.pt has the random states.
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
    assert proof.exists()  # without weights_only, the object writes the file


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


@pytest.mark.parametrize(
    ("optimizer", "got"), [(torch.optim.SGD, "the class SGD"), ([torch.ones(1)], "list")]
)
def test_something_else_than_an_optimizer_is_refused(optimizer, got):
    with pytest.raises(TypeError, match=f"torch.optim.Optimizer, such as .*; got {got}$"):
        fastkd.Trainer(network(), network(24, 1), optimizer)


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
        trainer.fit(batches_of(digits()), epochs)
    assert trainer.step == 0


def test_an_accelerator_that_would_divide_losses_is_refused():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    try:
        with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1; got 4.*accumulate"):
            trainer_of(network(), network(24, 1), accelerator=accelerator)
    finally:
        accelerate.state.GradientState._reset_state()


class Stream(IterableDataset):
    """Iterate over samples without a known length."""

    def __iter__(self):
        return iter(zip(*digits(40).tensors, strict=True))


def test_loaders_without_a_length_are_trained_on(capsys):
    trainer = trainer_of(network(), network(24, 1), progress=True)
    (evaluated,) = trainer.fit(DataLoader(Stream(), 16), validation=DataLoader(Stream(), 16))
    assert trainer.step == 3 and evaluated.rows == 40 and "3it" in capsys.readouterr().err


def test_a_loader_without_batches_is_refused():
    trainer = trainer_of(network(), network(24, 1))
    once = iter(batches_of(digits()))
    with pytest.raises(ValueError, match="loader gave no batch: it is empty, or an iterator"):
        trainer.fit(once, 2)
    assert trainer.epoch == 1
    with pytest.raises(TypeError, match="got the dataset TensorDataset, which yields single"):
        trainer.fit(digits(), 2)
    with pytest.raises(TypeError, match="validation must yield batches; got the dataset TensorD"):
        trainer.fit(batches_of(digits()), 2, validation=digits())
    assert trainer.epoch == 1


def test_batches_that_do_not_fit_the_model_are_refused():
    trainer = trainer_of(WithPixels(network()), WithPixels(network(24, 1)))
    images, labels = batches_of(digits())[0]
    with pytest.raises(TypeError, match=r"here \['images'\], and WithPixels does not take them: "):
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
    data = batches_of(digits())
    with pytest.raises(ValueError, match="evaluation needs the full student"):
        trainer.evaluate(data)
    with pytest.raises(ValueError, match="evaluation needs the full student"):
        trainer.fit(data, validation=data)
    assert trainer.step == 0


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"fastkd\[train\]"):
        trainer_of(network(), network(24, 1))
