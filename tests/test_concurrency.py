"""Test Python threads, forked processes, OpenMP settings, and the GIL."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import FP32, FP64, make
from torch import Tensor

import fastkd
from fastkd import _C

TEAM = 8


def step(student: Tensor, teacher: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = fastkd.loss(leaf, teacher, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("shape", [(40, 10), (300, 1000), (2, 3 * _C.segment + 5)], ids=str)
def test_concurrent_threads_get_the_results_of_one_thread(device, each_autograd, shape):
    problems = [make(shape, device=device, seed=seed) for seed in range(TEAM)]
    alone = [step(*problem) for problem in problems]
    with ThreadPoolExecutor(TEAM) as pool:
        together = list(pool.map(lambda i: step(*problems[i % TEAM]), range(5 * TEAM)))
    for i, (value, grad) in enumerate(together):
        assert torch.equal(value, alone[i % TEAM][0]) and torch.equal(grad, alone[i % TEAM][1])


def test_backward_passes_of_one_graph_share_no_buffer(device, each_autograd):
    for seed in range(20):
        student, teacher, labels = make((64, 300), FP32, device=device, seed=seed)
        leaf = student.requires_grad_()
        value = fastkd.loss(leaf, teacher, labels)
        expected = torch.autograd.grad(fastkd.loss(leaf, teacher, labels), leaf)[0]
        start = threading.Barrier(TEAM)

        def gradient(factor: float, value=value, leaf=leaf, start=start) -> Tensor:
            start.wait()
            outgoing = torch.full_like(value, factor)
            return torch.autograd.grad(value, leaf, outgoing, retain_graph=True)[0]

        with ThreadPoolExecutor(TEAM) as pool:
            factors = [2.0**i for i in range(TEAM)]  # powers of two scale without rounding
            for factor, grad in zip(factors, pool.map(gradient, factors), strict=True):
                torch.testing.assert_close(grad, factor * expected, rtol=1e-6, atol=0)


LOSSES = ("dense", "topk")
SHARED_LEAF = """
import sys, threading, torch, fastkd

if sys.argv[1] == "python":
    from fastkd._core import autograd
    autograd.without_cpp().__enter__()
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
generator = torch.Generator().manual_seed(0)
student, teacher = (torch.randn(8, 10, generator=generator) for _ in range(2))
top = fastkd.TopK(*teacher.log_softmax(-1).topk(3))
calls = {
    "dense": lambda leaf: fastkd.loss(leaf, teacher),
    "topk": lambda leaf: fastkd.loss(leaf, top),
}
names = sys.argv[2].split("+")
for _ in range(5):
    leaf, start, values = student.clone().requires_grad_(), threading.Barrier(2), []

    def call(name):
        start.wait()
        values.extend((name, calls[name](leaf).detach()) for _ in range(1000))

    threads = [threading.Thread(target=call, args=[name]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {name: calls[name](student) for name in names}
    assert len(values) == 2000
    assert all(torch.equal(value, expected[name]) for name, value in values)
print("equal")
"""


@pytest.mark.parametrize("language", ["cpp", pytest.param("python", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "calls",
    ["dense+topk", *(pytest.param(f"{n}+{n}", marks=pytest.mark.slow) for n in LOSSES)],
)
def test_forward_passes_of_one_leaf_do_not_deadlock(language, calls):
    command = [sys.executable, "-c", SHARED_LEAF, language, calls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr


ONE_GRAPH = """
import sys, threading, torch, fastkd

language, name, batches = sys.argv[1], sys.argv[2], int(sys.argv[4])
retain = sys.argv[3] == "retain"
if language == "python":
    from fastkd._core import autograd
    autograd.without_cpp().__enter__()
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
THREADS, GRAPHS = 4, 1000
generator = torch.Generator().manual_seed(0)
student, teacher = (torch.randn(32, 100, generator=generator) for _ in range(2))
log_probs, indices = teacher.log_softmax(-1).topk(3)
leaf = student.requires_grad_()

def make_value():
    hidden = leaf * 1  # only the graph holds the saved tensors
    if name == "dense":
        return fastkd.loss(hidden, teacher.clone())
    return fastkd.loss(hidden, fastkd.TopK(log_probs.clone(), indices.clone()))

outgoing = torch.full((), 2.0)  # scales without rounding
expected = torch.autograd.grad(make_value(), leaf, outgoing)[0]
again = "Trying to backward through the graph a second time"

def run_backward(values, start, results):
    # A late thread fails soon, so the threads meet again at a later graph.
    start.wait()
    for value, of_graph in zip(values, results, strict=True):
        try:
            of_graph.append(torch.autograd.grad(value, leaf, outgoing, retain_graph=retain)[0])
        except Exception as error:
            of_graph.append(error)

for _ in range(batches):
    values, results = [make_value() for _ in range(GRAPHS)], [[] for _ in range(GRAPHS)]
    start = threading.Barrier(THREADS)
    arguments = (values, start, results)
    threads = [threading.Thread(target=run_backward, args=arguments) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for of_graph in results:
        errors = [each for each in of_graph if not isinstance(each, torch.Tensor)]
        gradients = [each for each in of_graph if isinstance(each, torch.Tensor)]
        assert len(of_graph) == THREADS
        assert len(gradients) == THREADS if retain else gradients, errors
        for error in errors:
            assert isinstance(error, RuntimeError) and again in str(error), error
        for gradient in gradients:
            assert torch.allclose(gradient, expected, rtol=1e-6, atol=0)
        assert len({gradient.data_ptr() for gradient in gradients}) == len(gradients)
print("finished")
"""


@pytest.mark.parametrize(  # covers every pair of values
    ("language", "retain", "loss"),
    [
        ("cpp", "free", "dense"),
        pytest.param("cpp", "retain", "topk", marks=pytest.mark.slow),
        pytest.param("python", "free", "topk", marks=pytest.mark.slow),
        pytest.param("python", "retain", "dense", marks=pytest.mark.slow),
    ],
)
def test_threads_run_backward_through_one_graph(language, retain, loss):
    # Without retain_graph, a thread gets the gradient or torch's error. Two threads may both get
    # the gradient, since the engine releases saved tensors some time after computing the gradient.
    batches = "1" if retain == "retain" else "8"
    command = [sys.executable, "-c", ONE_GRAPH, language, loss, retain, batches]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "finished", (done.returncode, done.stderr)


def is_gil_released_during(work: Callable[[], object]) -> bool:
    """Return True if another Python thread runs during ``work``.

    Python does not hand over the GIL within the long switch interval, so ``work`` must release the
    GIL.
    """
    phase, seen, done = "before", set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(phase)
            time.sleep(0)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    watcher = threading.Thread(target=watch)
    try:
        watcher.start()
        time.sleep(0.01)
        phase = "during"
        work()
        phase = "after"
    finally:
        done.set()
        watcher.join()
        sys.setswitchinterval(before)
    return "during" in seen


def test_the_gil_is_released(each_autograd):
    student, teacher, labels = make((512, 20000))
    leaf = student.requires_grad_()
    value = fastkd.loss(leaf, teacher, labels, reduction="none")
    assert not is_gil_released_during(lambda: sum(range(3_000_000))), "the watch would see anything"
    # One call may end before the watching thread gets a processor, so the calls are repeated.
    assert any(
        is_gil_released_during(lambda: fastkd.loss(leaf, teacher, labels)) for _ in range(20)
    )
    assert any(
        is_gil_released_during(lambda: value.sum().backward(retain_graph=True)) for _ in range(20)
    )


DATASET = """
import sys, torch, fastkd
from torch.utils.data import DataLoader, Dataset

def problem(seed, rows, classes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, classes, generator=g) for _ in range(2)]

class Losses(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return fastkd.loss(*problem(i, 64, 3000))

if __name__ == "__main__":
    torch.set_num_threads(2)
    fastkd.loss(*problem(0, 64, 40000))  # starts both threads
    alone = [fastkd.loss(*problem(i, 64, 3000)) for i in range(8)]
    how = {"num_workers": 2, "multiprocessing_context": sys.argv[1]}
    loader = DataLoader(Losses(), batch_size=None, **how)
    assert all(map(torch.equal, loader, alone))
    print("equal")
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers_compute_the_loss(tmp_path, method):
    # The parent has used OpenMP's threads, which a forked worker lacks.
    script = tmp_path / "dataset.py"
    script.write_text(DATASET)
    command = [sys.executable, str(script), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


BITS = """
import json, torch, fastkd
from concurrent.futures import ThreadPoolExecutor
def bits(seed):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(5, 40000, generator=g) for _ in range(2))
    return fastkd.loss(student, teacher, reduction="none").view(torch.int32).tolist()
with ThreadPoolExecutor(3) as pool:
    print(json.dumps([bits(0), *pool.map(bits, range(3))]))
"""
OPENMP = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "more threads than processors": {"OMP_NUM_THREADS": "7"},
    "nested": {"OMP_NUM_THREADS": "2", "OMP_MAX_ACTIVE_LEVELS": "3", "OMP_DYNAMIC": "true"},
    "limited": {"OMP_THREAD_LIMIT": "2", "OMP_NUM_THREADS": "4"},
}


@pytest.mark.slow
def test_openmp_settings_change_no_bit():
    answers = []
    for settings in OPENMP.values():
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **settings}
        command = [sys.executable, "-c", BITS]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == answers[0][1]


def test_the_instruction_set_may_change_while_other_threads_compute():
    problem = make((50, 2000), FP64)
    expected = {}
    before = _C.isa()
    try:
        for name in _C.available_isas():
            _C.use_isa(name)
            expected[name] = float(fastkd.loss(*problem))

        def choose(i: int) -> float:
            _C.use_isa(_C.available_isas()[i % len(expected)])
            return float(fastkd.loss(*problem))

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(choose, range(60))) <= set(expected.values())
    finally:
        _C.use_isa(before)
