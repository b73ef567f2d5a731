"""Test checkpoints: contents, damage, and names of folders."""

import copy
import os
import pathlib
import random
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fastkd
from fastkd.training import checkpoints

pytest.importorskip("accelerate")


def data() -> TensorDataset:
    seeded = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(40, 8, generator=seeded), torch.randint(3, (40,), generator=seeded)
    )


def trainer_in(folder: pathlib.Path, **options) -> fastkd.Trainer:
    """Make a trainer of a student with dropout from fixed seeds."""
    torch.manual_seed(0)
    random.seed(0)
    student = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    teacher = nn.Sequential(nn.Linear(8, 3))
    return fastkd.Trainer(
        student, teacher, optimizer, checkpoints=folder, progress=False, **options
    )


def make_loader() -> DataLoader:
    return DataLoader(data(), 8, shuffle=True)


def losses(trainer: fastkd.Trainer, loader, until: int = 15) -> list[float]:
    """Train until a step, save there and after each epoch, and return the losses."""
    drawn = []
    while trainer.step < until:
        for step in trainer.steps(loader):
            drawn.append(float(step.loss))
            if step.number == until and until % 5:
                break
        trainer.save()
    return drawn


# ---- random states

LOADERS = {
    "loader": lambda generator: DataLoader(data(), 8, shuffle=True, generator=generator),
    "sampler": lambda generator: DataLoader(
        data(), 8, sampler=RandomSampler(data(), generator=generator)
    ),
    "replacing": lambda generator: DataLoader(
        data(), 8, sampler=RandomSampler(data(), replacement=True, generator=generator)
    ),
    "weighted": lambda generator: DataLoader(
        data(), 8, sampler=WeightedRandomSampler([1.0] * 40, 40, generator=generator)
    ),
    "batch sampler": lambda generator: DataLoader(
        data(),
        batch_sampler=BatchSampler(SubsetRandomSampler(range(40), generator=generator), 8, False),
    ),
}


@pytest.mark.parametrize("stop", [5, 7, 10])
@pytest.mark.parametrize("which", LOADERS)
def test_a_generator_of_the_loader_is_restored(tmp_path, which, stop):
    # An epoch has 5 steps, so step 7 is in the middle of an epoch.
    def loader():
        return LOADERS[which](torch.Generator().manual_seed(3))

    straight = losses(trainer_in(tmp_path / "a"), loader())
    before = losses(trainer_in(tmp_path / "b"), loader(), stop)
    trainer = trainer_in(tmp_path / "b")
    assert trainer.resume() and trainer.step == stop
    torch.manual_seed(99)
    assert before + losses(trainer, loader()) == straight


def test_a_loader_with_other_generators_is_refused_within_a_pass(tmp_path):
    losses(trainer_in(tmp_path), LOADERS["loader"](torch.Generator()), 7)
    trainer = trainer_in(tmp_path)
    trainer.resume()
    with pytest.raises(
        ValueError, match="loader has 0 generators, and the loader of the checkpoint had 1"
    ):
        losses(trainer, make_loader())
    losses(trainer, LOADERS["loader"](torch.Generator()), 10)
    trainer = trainer_in(tmp_path)  # between epochs, the trainer compares no generators
    trainer.resume()
    losses(trainer, make_loader())


@pytest.mark.parametrize("stop", [5, 7])
def test_random_numbers_drawn_after_resume_change_nothing(tmp_path, stop):
    straight = losses(trainer_in(tmp_path / "a"), make_loader())
    resumed = losses(trainer_in(tmp_path / "b"), make_loader(), stop)
    for until in (8, 15):
        trainer = trainer_in(tmp_path / "b")
        trainer.resume()
        torch.randn(3)
        resumed += losses(trainer, make_loader(), until)
    assert resumed == straight


def test_a_loop_that_draws_random_numbers_resumes_exactly(tmp_path):
    def drawing(trainer, until=15):
        resumed, loader = [], make_loader()
        while trainer.step < until:
            for step in trainer.steps(loader):
                resumed.append(float(step.loss))
                if step.number % 4 == 0:
                    trainer.evaluate(loader)
                    trainer.save()
                if step.number == until:
                    break
        return resumed

    straight = drawing(trainer_in(tmp_path / "a", save_every=4))
    resumed = drawing(trainer_in(tmp_path / "b", save_every=4), 8)
    trainer = trainer_in(tmp_path / "b", save_every=4)
    assert trainer.resume()
    assert resumed + drawing(trainer) == straight


# ---- folders


def test_saving_again_at_the_same_step_overwrites(tmp_path):
    trainer = trainer_in(tmp_path, save_every=2)
    for step in trainer.steps(make_loader()):
        if step.number == 2:
            break
    with torch.no_grad():
        trainer.student[0].bias.fill_(5.0)
    assert trainer.save() == tmp_path / "step-00000002"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    trainer = trainer_in(tmp_path)
    assert trainer.resume()
    assert (trainer.student[0].bias == 5.0).all()


@pytest.mark.parametrize("renamings", [1, 2])
def test_an_interrupted_overwrite_leaves_a_complete_checkpoint(tmp_path, monkeypatch, renamings):
    trainer = trainer_in(tmp_path)
    next(trainer.steps(make_loader()))
    trainer.save()
    replace, done = pathlib.Path.replace, []

    def interrupted(path, target):
        if len(done) == renamings:
            raise KeyboardInterrupt
        done.append(replace(path, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pathlib.Path, "replace", interrupted)
        trainer.save()
    trainer = trainer_in(tmp_path)
    assert trainer.resume() and trainer.step == 1
    trainer.save()
    trainer.save()
    losses(trainer, make_loader(), 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000005", "step-00000006"]


def test_saving_into_the_folder_of_another_run_is_refused(tmp_path):
    losses(trainer_in(tmp_path), make_loader(), 5)
    with pytest.raises(FileExistsError, match=r"resume\(\)"):
        trainer_in(tmp_path).save()


def test_paths_with_other_names_are_neither_loaded_nor_deleted(tmp_path):
    losses(trainer_in(tmp_path), make_loader(), 5)
    for name in ("step-00000005-best", "step-best", "step-5"):
        shutil.copytree(tmp_path / "step-00000005", tmp_path / name)
    (tmp_path / "step-notes.txt").write_text("5 was best")
    (tmp_path / "step-99999999").write_text("a file")
    others = set(tmp_path.iterdir()) - {tmp_path / "step-00000005"}
    trainer = trainer_in(tmp_path)
    assert trainer.resume() and trainer.step == 5
    losses(trainer, make_loader())
    assert set(tmp_path.iterdir()) - others == set(checkpoints.list_complete(tmp_path))
    assert others < set(tmp_path.iterdir())


def test_checkpoints_are_listed_in_the_order_of_their_numbers(tmp_path):
    names = [f"step-{number:08d}" for number in (7, 99_999_999, 100_000_000)]
    for name in (*names, f"{names[1]}.replaced"):
        (tmp_path / name).mkdir()
    listed = [path.name for path in checkpoints.list_complete(tmp_path)]
    assert listed == [names[0], f"{names[1]}.replaced", *names[1:]]


@pytest.mark.parametrize("part", ["ema", "scheduler", "hints"])
def test_a_part_missing_from_the_checkpoint_is_refused(tmp_path, part):
    losses(trainer_in(tmp_path), make_loader(), 5)
    if part == "hints":
        trainer = trainer_in(tmp_path, hints=[fastkd.Hint(student="0", teacher="0")])
    elif part == "ema":
        trainer = trainer_in(tmp_path, ema=0.9)
    else:
        trainer = trainer_in(tmp_path)
        trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer._optimizer, 0.9)
    with pytest.raises(ValueError, match=f"has {part} 0, and this run 1"):
        trainer.resume()
    assert trainer.step == 0
    with pytest.raises(FileExistsError):
        trainer.fit(make_loader())


def test_a_part_missing_from_the_trainer_is_refused(tmp_path):
    losses(trainer_in(tmp_path, ema=0.9), make_loader(), 5)
    trainer = trainer_in(tmp_path)
    with pytest.raises(ValueError, match="has ema 1, and this run 0"):
        trainer.resume()
    assert trainer.step == 0


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> pathlib.Path:
    """Make a folder with two checkpoints that have every kind of file."""
    folder = tmp_path_factory.mktemp("complete")
    losses(complete_trainer_in(folder), make_loader(), 10)
    return folder


def complete_trainer_in(folder: pathlib.Path) -> fastkd.Trainer:
    trainer = trainer_in(folder, ema=0.9)
    trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer._optimizer, 0.9)
    return trainer


FILES = (
    *("trainer.json", "files.json", "model.safetensors", "optimizer.bin", "scheduler.pt"),
    *("ema.pt", "position-0.pt", "random_states_0.pkl"),
)


def damages(file: pathlib.Path) -> dict[str, Callable[[], object]]:
    """Return functions that damage a file, by name of the damage."""
    data = file.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        f"cut to {size} bytes": lambda size=size: file.write_bytes(data[:size])
        for size in (0, 1, 7, len(data) // 3, len(data) // 2, len(data) - 1)
    }
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    changes["a flipped bit"] = lambda: file.write_bytes(flipped)
    for text in ("{}", "[]", "3", "null", '"text"', '{"step": "x"}', "[" * 100_000, "no JSON"):
        changes[f"the text {text[:20]}"] = lambda text=text: file.write_text(text)
    for name, value in (("tensor", torch.zeros(3)), ("list", [1]), ("dict", {})):
        changes[f"another {name}"] = lambda value=value: torch.save(value, file)
    changes["missing"] = lambda: None
    changes["a folder"] = file.mkdir
    changes["a link to itself"] = lambda: file.symlink_to(file)
    if hasattr(os, "mkfifo"):
        changes["a named pipe"] = lambda: os.mkfifo(file)
    return changes


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_nothing_is_changed(complete, tmp_path, name):
    assert {file.name for file in (complete / "step-00000010").iterdir()} == set(FILES)
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "step-00000010" / name
    trainer = complete_trainer_in(tmp_path)
    before = state_of(trainer)
    for kind, damage in damages(file).items():
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        damage()
        with pytest.raises(ValueError, match=r"Delete step-00000010 to resume") as caught:
            trainer.resume()
        assert f"{file} cannot be read: " in str(caught.value) or name == "files.json", kind
        assert is_equal(state_of(trainer), before), kind
    shutil.rmtree(file.parent)
    assert trainer.resume() and trainer.step == 5


def state_of(trainer: fastkd.Trainer) -> list:
    """Copy the trainer's state and Python's random state, which a checkpoint restores."""
    states = [trainer.student, trainer._optimizer, trainer.ema, trainer.scheduler]
    numbers = [
        trainer.step,
        trainer.epoch,
        list(trainer._history),
        trainer._loader_state.state_dict(),
    ]
    return copy.deepcopy([*(state.state_dict() for state in states), *numbers, random.getstate()])


def is_equal(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            is_equal(first[key], second[key]) for key in first
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(is_equal, first, second))
    return first == second


@pytest.mark.parametrize("dangling", [False, True])
def test_an_old_checkpoint_may_be_a_link(tmp_path, dangling):
    # Deleting an old checkpoint that is a link keeps the link's target.
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    trainer = trainer_in(folder)
    logged = losses(trainer, make_loader(), 5)
    shutil.move(folder / "step-00000005", elsewhere)
    (folder / "step-00000005").symlink_to(elsewhere)
    if dangling:
        elsewhere.rename(tmp_path / "away")
        trainer.save()  # the new checkpoint of step 5 has the name of the dangling link
    (folder / ".discarded").symlink_to(elsewhere)  # mimics an interrupted deletion
    logged += losses(trainer, make_loader(), 15)
    assert len(logged) == 15
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000015"]
    assert list((tmp_path / "away" if dangling else elsewhere).iterdir())
