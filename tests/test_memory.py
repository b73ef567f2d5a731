"""Test the memory of calls: leaks, torch's error if memory runs out, the size of gradients."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SLOW = pytest.mark.slow


@pytest.mark.slow
def test_no_call_keeps_memory():
    # The full run of ``make soak`` makes 100,000 calls of each kind.
    command = [sys.executable, "-m", "reliability.soak", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1].removeprefix("figures: "))
    assert figures["calls"] == 1000 and figures["kinds of calls"] > 5


SHORT_OF_MEMORY = """
import resource, sys, torch, fastkd
from fastkd._core import autograd

language, what = sys.argv[1:]
if language == "python":
    autograd.without_cpp().__enter__()
torch.set_num_threads(1)
options = {"reduction": "none"} if what == "backward" else {}
shape = (8_000_000, 2) if what == "rows" else (64, 250_000)
student, teacher = torch.randn(shape), torch.randn(shape)  # 64 MB each
small = torch.randn(2, 10, requires_grad=True)
fastkd.loss(small, small.detach() + 1).backward()
before, (leaf, other) = student.clone(), (student.requires_grad_(), teacher.clone())
value = fastkd.loss(leaf, teacher, **options) if what == "backward" else None
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, limits[1]))
try:
    if value is not None:
        value.sum().backward()
    else:
        fastkd.loss(leaf.detach() if what == "rows" else leaf, teacher)
except RuntimeError as error:
    message = str(error)
else:
    message = "no error"
resource.setrlimit(resource.RLIMIT_AS, limits)
print(message)
assert torch.equal(leaf, before) and torch.equal(teacher, other), "inputs were changed"
fastkd.loss(leaf, teacher).backward()
print("works again", bool(leaf.grad.isfinite().all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize(
    "operation", ["forward", *(pytest.param(w, marks=SLOW) for w in ("backward", "rows"))]
)
@pytest.mark.parametrize("language", ["cpp", pytest.param("python", marks=SLOW)])
def test_out_of_memory_raises_torchs_error(language, operation):
    command = [sys.executable, "-c", SHORT_OF_MEMORY, language, operation]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert re.search(r"DefaultCPUAllocator: can't allocate memory", done.stdout), (
        done.stdout + done.stderr
    )
    assert done.stdout.splitlines()[-1] == "works again True", done.stdout + done.stderr


KEPT_GRADIENTS = """
import sys, torch, fastkd

language, kind, *sizes = sys.argv[1:]
if language == "python":
    from fastkd._core import autograd
    autograd.without_cpp().__enter__()
torch.set_num_threads(1)
outgoing, kept = torch.ones(()), []

def resident():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))

for size in map(int, sizes):
    student, teacher = torch.randn(2, size // 256, 64).unbind()
    student.requires_grad_()
    if kind == "topk":
        teacher = fastkd.TopK(*teacher.log_softmax(-1).topk(4))

    def gradient():
        return torch.autograd.grad(fastkd.loss(student, teacher), student, outgoing)[0]

    for _ in range(3):
        gradient()
    before = resident()
    gradients = [gradient() for _ in range(2**26 // size)]  # 64 MB together
    used = sum(each.untyped_storage().nbytes() for each in gradients)
    assert used == len(gradients) * student.numel() * student.element_size()
    print((resident() - before) / used)
    kept += gradients  # so that the next size gets no memory of this one
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory as Linux reports it")
@pytest.mark.parametrize(  # each language with each loss
    ("language", "loss"),
    [
        ("cpp", "dense"),
        *(
            pytest.param(*both, marks=SLOW)
            for both in (("python", "dense"), ("cpp", "topk"), ("python", "topk"))
        ),
    ],
)
def test_gradients_hold_little_more_memory_than_their_size(language, loss):
    # A gradient of 65 KB must not occupy a huge page of 2 MB.
    sizes = [65 * 2**10, 2**20, 2**21 + 2**16, 3 * 2**20]
    command = [sys.executable, "-c", KEPT_GRADIENTS, language, loss, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for size, ratio in zip(sizes, done.stdout.split(), strict=True):
        assert 0.9 <= float(ratio) <= 1.1, f"gradients of {size} bytes hold {ratio} x their size"
