"""Print a table of the kernels from the output of ``nvcc -Xptxas -v``; fail on spills.

Kernels that also sum the terms may spill SPILLS_WITH_TERMS bytes. The first boolean template
argument of such a kernel, kExtra, is true.

Usage: python tests/kernels/ptxas_table.py BUILD_LOG
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

SPILLS_WITH_TERMS = 64  # bytes


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def parse(log: str) -> list[Kernel]:
    kernels = []
    name, arch, stack, spills = "", "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, arch = match.groups()
            stack = spills = 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            stack, spills = int(match[1]), int(match[2])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            kernels.append(Kernel(name, arch, int(match[1]), stack, spills))
            name = ""
    return kernels


def has_terms(label: str) -> bool:
    """Return True if a kernel also sums the terms."""
    arguments = label.partition("_kernel<")[2]
    while "<" in arguments:  # drop nested templates, whose flags are not the kernel's
        arguments = re.sub(r"<[^<>]*>", "", arguments, count=1)
    flags = re.findall(r"\b(true|false)\b", arguments)
    return flags[:1] == ["true"]


def main() -> None:
    kernels = parse(Path(sys.argv[1]).read_text())
    if not kernels:
        sys.exit("no kernel was compiled: the log holds no ptxas output")
    mangled = "\n".join(kernel.name for kernel in kernels)
    named = subprocess.run(
        ["c++filt", "-p"], input=mangled, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows: dict[str, dict[str, Kernel]] = defaultdict(dict)
    for label, kernel in zip(named, kernels, strict=True):
        short = re.sub(r"fastkd::(cuda::)?|\(anonymous namespace\)::|void ", "", label)
        rows[short][kernel.arch] = kernel
    arches = sorted({kernel.arch for kernel in kernels})
    width = min(100, max(map(len, rows)))
    title = "registers (and bytes spilled) of each kernel"
    print(f"{title:<{width}}", *(f"{arch:>10}" for arch in arches))
    for short, row in sorted(rows.items()):
        cells = []
        for arch in arches:
            kernel = row.get(arch)
            text = "-" if kernel is None else str(kernel.registers)
            cells.append(text + (f" ({kernel.spills})" if kernel and kernel.spills else ""))
        print(f"{short[:width]:<{width}}", *(f"{cell:>10}" for cell in cells))
    spilling = [
        label
        for label, kernel in zip(named, kernels, strict=True)
        if kernel.spills > (SPILLS_WITH_TERMS if has_terms(label) else 0)
    ]
    print(f"{len(kernels)} kernels, {len(spilling)} of them spill registers on a hot path")
    if spilling:
        sys.exit("\n".join(spilling))


if __name__ == "__main__":
    main()
