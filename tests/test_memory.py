"""Memory: calls do not gather it, and where there is none left torch's own error says so."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_no_call_keeps_memory():
    """A short run of ``make soak``, which makes 100,000 calls of each kind."""
    command = [sys.executable, "-m", "reliability.soak", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1].removeprefix("figures: "))
    assert figures["calls"] == 1000 and figures["ways in"] > 5


SHORT_OF_MEMORY = """
import resource, sys, torch, fastkd
from fastkd import autograd

language, what = sys.argv[1:]
if language == "python":
    autograd.without_cpp().__enter__()
torch.set_num_threads(1)
options = {"reduction": "none"} if what == "backward" else {}
shape = (8_000_000, 2) if what == "rows" else (64, 250_000)
student, teacher = torch.randn(shape), torch.randn(shape)  # 64 MB each
if what == "copy":
    student = torch.randn(250_000, 64).t()  # the kernels need a copy of it
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
@pytest.mark.parametrize("what", ["forward", "copy", "backward", "rows"])
@pytest.mark.parametrize("language", ["cpp", "python"])
def test_no_memory_left_is_torchs_error(language, what):
    command = [sys.executable, "-c", SHORT_OF_MEMORY, language, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert re.search(r"DefaultCPUAllocator: can't allocate memory", done.stdout), (
        done.stdout + done.stderr
    )
    assert done.stdout.splitlines()[-1] == "works again True", done.stdout + done.stderr
