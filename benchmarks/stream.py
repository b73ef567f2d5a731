"""Measure the memory bandwidth of this machine, which limits a fused loss.

On a GPU, copy_ and torch.add(out=) run on tensors of 1 GiB. On a CPU, torch.add(out=) runs on
tensors of 64 MiB; its stores also read memory. If there is a C compiler, the CPU also runs a loop
in C (stream.c) on torch's number of threads. The loop reads two arrays and writes one, with
non-temporal stores on x86-64.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Stream:
    """Describe an access pattern whose bandwidth is measured."""

    name: str
    run: Callable[[], object]
    bytes: int
    what: str


@functools.cache
def _load_library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="fastkd-stream-"))
    source, library = Path(__file__).with_name("stream.c"), folder / "stream.so"
    command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(library), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        loaded = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    pointer = ctypes.c_void_p
    loaded.stream.argtypes = [pointer, pointer, pointer, ctypes.c_size_t]
    loaded.stream.restype = None
    return loaded


@functools.cache
def _make_cpu_buffers() -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(2**24) for _ in range(3))  # 64 MiB each


@functools.cache
def _make_cuda_buffers() -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(2**28, device="cuda") for _ in range(3))  # 1 GiB each


@functools.cache
def _make_pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def make_streams(device: str) -> list[Stream]:
    """Return the streams of a device; reports compare times with the first stream."""
    if device == "cuda":
        a, b, c = _make_cuda_buffers()
        size = a.numel() * a.itemsize
        return [
            Stream("copy", lambda: c.copy_(a), 2 * size, "a device-to-device copy of 1 GiB"),
            Stream(
                "add", lambda: torch.add(a, b, out=c), 3 * size, "torch.add(out=) on 1 GiB tensors"
            ),
        ]
    a, b, c = _make_cpu_buffers()
    size, threads = a.numel() * a.itemsize, torch.get_num_threads()
    add = Stream(
        "add",
        lambda: torch.add(a, b, out=c),
        3 * size,
        "torch.add(out=) on 64 MiB tensors: 2 reads, 1 write with ordinary stores",
    )
    library = _load_library()
    if library is None:
        return [add]
    run = library.stream
    share = a.numel() // threads // 16 * 16

    def run_slices() -> None:
        def run_slice(index: int) -> None:
            offset = index * share * a.itemsize
            count = share if index < threads - 1 else a.numel() - share * (threads - 1)
            run(a.data_ptr() + offset, b.data_ptr() + offset, c.data_ptr() + offset, count)

        list(_make_pool(threads).map(run_slice, range(threads)))

    kind = "non-temporal" if library.stores_bypass_caches() else "ordinary"
    what = f"2 reads, 1 write with {kind} stores on 64 MiB arrays, {threads} threads"
    return [Stream("stream", run_slices, 3 * size, what), add]
