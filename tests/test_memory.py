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
if what == "copy":
    student = torch.randn(250_000, 64).t()  # the rows of a class are adjacent
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
    "operation", ["forward", *(pytest.param(w, marks=SLOW) for w in ("copy", "backward", "rows"))]
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

size, count = int(sys.argv[2]), int(sys.argv[3])
if sys.argv[1] == "python":
    from fastkd._core import autograd
    autograd.without_cpp().__enter__()
torch.set_num_threads(1)
student, teacher = torch.randn(size // 256, 64, requires_grad=True), torch.randn(size // 256, 64)
outgoing = torch.ones(())

def gradient(loss):
    return torch.autograd.grad(loss(student, teacher), student, outgoing)[0]

def topk_loss(student, teacher):
    return fastkd.loss(student, top)

def resident():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))

top = fastkd.TopK(*teacher.log_softmax(-1).topk(4))
loss = {"dense": fastkd.loss, "topk": topk_loss}[sys.argv[4]]
for _ in range(3):
    gradient(loss)
before = resident()
gradients = [gradient(loss) for _ in range(count)]
used = sum(each.untyped_storage().nbytes() for each in gradients)
assert used == count * student.numel() * student.element_size()
print((resident() - before) / used)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory as Linux reports it")
@pytest.mark.parametrize(
    ("size", "count"),
    [
        (65 * 2**10, 500),
        pytest.param(2**20, 60, marks=SLOW),
        pytest.param(2**21 + 2**16, 30, marks=SLOW),
        pytest.param(3 * 2**20, 20, marks=SLOW),
    ],
    ids=["65 KB", "1 MB", "2.1 MB", "3 MB"],
)
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
def test_gradients_hold_little_more_memory_than_their_size(language, loss, size, count):
    # A gradient of 65 KB must not occupy a huge page of 2 MB.
    command = [sys.executable, "-c", KEPT_GRADIENTS, language, str(size), str(count), loss]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout)
    assert 0.9 <= ratio <= 1.1, f"{count} gradients of {size} bytes hold {ratio:.2f} x their size"
