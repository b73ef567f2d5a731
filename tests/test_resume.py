"""Test exact resuming after SIGKILL in a save, and training in two processes."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("accelerate")
import training_run

SCRIPT = pathlib.Path(__file__).with_name("training_run.py")


def run(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """Run training_run.py in new processes."""
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    before = [*distributed, str(processes)] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *before, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True
    )


def run_here(*arguments: object) -> None:
    training_run.main(list(map(str, arguments)))


def losses(path: pathlib.Path) -> dict[str, str]:
    """Return the loss and the hint of each step, in hexadecimal, by the step's number."""
    return dict(line.split(" ", 1) for line in path.with_suffix(".losses").read_text().splitlines())


def evaluations(path: pathlib.Path) -> list[list[float]]:
    """Return the fields of each Evaluation that the run wrote; the last field counts rows."""
    return json.loads(path.with_suffix(".evaluations").read_text())


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_in_a_save_resumes_exactly(workers, tmp_path):
    straight, out, checkpoints = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "checkpoints"
    run_here(straight, "--workers", workers)
    arguments = (out, "--workers", workers, "--checkpoints", checkpoints)
    done = run(*arguments, "--die-in-save", 3 + workers)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (checkpoints / ".incomplete").is_dir()
    assert 0 < len(losses(out)) < len(losses(straight))
    run_here(*arguments)
    assert losses(out) == losses(straight)
    for ours, theirs in zip(torch.load(out), torch.load(straight), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    names = [path.name for path in sorted(checkpoints.iterdir())]
    assert names == ["step-00000011", "step-00000012"]


@pytest.mark.slow
def test_two_processes_give_the_parameters_of_one(tmp_path):
    # The numbers of valid rows differ between processes and between batches.
    deterministic = ("--no-shuffle", "--noise", 0, "--dropout", 0)
    one_process, two_processes = tmp_path / "one.pt", tmp_path / "two.pt"
    run_here(one_process, "--batch", 16, *deterministic)
    done = run(two_processes, "--batch", 8, *deterministic, processes=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(torch.load(two_processes), torch.load(one_process), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(
        losses(two_processes).values(), losses(one_process).values(), strict=True
    ):
        for a, b in zip(ours.split(), theirs.split(), strict=True):
            assert float.fromhex(a) == pytest.approx(float.fromhex(b), rel=1e-6)
    pairs = zip(evaluations(two_processes), evaluations(one_process), strict=True)
    for resumed, expected in pairs:
        assert resumed == pytest.approx(expected, rel=1e-9)
    labels = training_run.Digits(96, 0.0).labels
    assert [int(fields[-1]) for fields in evaluations(two_processes)] == [
        int((labels[:count] != -100).sum()) for count in (37, 5)
    ]


@pytest.mark.slow
def test_two_processes_train_a_sharded_student(tmp_path):
    # The first run saves a checkpoint after one epoch, and the second run resumes from this
    # checkpoint.
    deterministic = ("--no-shuffle", "--noise", 0, "--dropout", 0)
    one_process, two_processes = tmp_path / "one.pt", tmp_path / "two.pt"
    run_here(one_process, "--batch", 16, *deterministic)
    for epochs in (1, 2):
        arguments = ("--fsdp", "--epochs", epochs, "--checkpoints", tmp_path / "checkpoints")
        done = run(two_processes, "--batch", 8, *deterministic, *arguments, processes=2)
        assert done.returncode == 0, done.stderr
    (ours,), (theirs, _) = torch.load(two_processes), torch.load(one_process)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)
    assert losses(two_processes).keys() == losses(one_process).keys()
