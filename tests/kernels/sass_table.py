"""Count the instructions per class of the kernels' sweeps, on the shortest path.

A sweep is a loop. The shortest path loads student and teacher, computes two exponentials per class
and, in the second sweep, stores the gradient. On this path, rows are aligned, the temperature is 1,
and maxima do not change. The table has the number of instructions, in all and of three pipes, and
the time that each number takes, in percent of the time of the memory accesses.

Usage: cuobjdump -sass -arch sm_90 build/cuda/libfastkd_cuda.a | python tests/kernels/sass_table.py
"""

from __future__ import annotations

import heapq
import itertools
import re
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from ptxas_table import has_terms

# Limits of an SM of compute capability 9.0 per cycle: thread instructions issued, and results of
# each pipe (CUDA C++ Programming Guide, "Arithmetic Instructions").
ISSUED, RATES = 128, {"mufu": 16, "alu": 64, "fma": 128}
# An H100 SXM: number of SMs, clock, and 3,000 GB/s for copies (docs/performance-log.md).
PROCESSORS, GIGAHERTZ, BYTES_PER_NS = 132, 1.755, 3000
PIPES = {
    "mufu": r"MUFU",
    "fma": r"FFMA|FMUL|FADD|HFMA2|IMAD",
    "alu": r"FMNMX|HMNMX2|FSETP|FSEL|ISETP|SEL|LOP3|PLOP3|SHF|PRMT|IADD3|LEA|F2FP|VIADD|IABS|MOV",
}
ELEMENT = {"float": 4, "__nv_bfloat16": 2}
EXPONENTIALS = 2  # per class


class Need(NamedTuple):
    """Hold numbers of exponentials, vector loads and vector stores."""

    exponentials: int
    loads: int
    stores: int


class Instruction(NamedTuple):
    address: int
    opcode: str
    predicated: bool
    target: int | None


def kernels(text: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each kernel, by the kernel's name."""
    functions = re.split(r"\n\s*Function : ", text)[1:]
    mangled = "\n".join(function.partition("\n")[0].strip() for function in functions)
    names = subprocess.run(
        ["c++filt", "-p"], input=mangled, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    codes = {}
    for name, function in zip(names, functions, strict=True):
        code = []
        for address, guard, opcode, rest in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", function
        ):
            target = re.search(r"(0x[0-9a-f]+)\s*$", rest) if opcode.startswith("BRA") else None
            conditional = bool(guard) or "P" in rest.partition("0x")[0] or ".DIV" in opcode
            code.append(
                Instruction(
                    int(address, 16), opcode, conditional, int(target[1], 16) if target else None
                )
            )
        codes[re.sub(r"fastkd::(cuda::)?|\(anonymous namespace\)::|void ", "", name)] = code
    return codes


class Block(NamedTuple):
    """Hold a basic block: its instructions, always issued together, and its successors."""

    opcodes: list[str]
    counts: Need
    after: list[int]


def blocks_of(code: list[Instruction]) -> list[Block]:
    """Split the code into basic blocks; branches out of the code add no successor."""
    starts = {code[0].address, *(i.target for i in code if i.target is not None)}
    starts |= {
        after.address
        for i, after in itertools.pairwise(code)
        if i.target is not None or i.opcode in ("EXIT", "RET")
    }
    firsts = [i for i, instruction in enumerate(code) if instruction.address in starts]
    number = {code[i].address: n for n, i in enumerate(firsts)}
    blocks = []
    for n, first in enumerate(firsts):
        part = code[first : firsts[n + 1] if n + 1 < len(firsts) else len(code)]
        last = part[-1]
        after = [n + 1] if last.target is None or last.predicated else []
        if last.target in number:
            after.append(number[last.target])
        opcodes = [instruction.opcode for instruction in part]
        counts = Need(
            opcodes.count("MUFU.EX2"),
            sum(opcode.startswith("LDG") and "128" in opcode for opcode in opcodes),
            sum(opcode.startswith("STG") and "128" in opcode for opcode in opcodes),
        )
        blocks.append(Block(opcodes, counts, [] if last.opcode in ("EXIT", "RET") else after))
    return blocks


def shortest(code: list[Instruction], need: Need) -> Counter[str] | None:
    """Return the opcodes of the shortest path from first to last block that meets ``need``."""
    blocks = blocks_of(code)
    available = zip(*(block.counts for block in blocks), strict=True)
    if any(sum(count) < minimum for count, minimum in zip(available, need, strict=True)):
        return None
    start = (0, Need(0, 0, 0))
    lengths = {start: 0}
    before: dict[tuple[int, Need], tuple[int, Need]] = {}
    queue = [(0, start)]
    while queue:
        length, state = heapq.heappop(queue)
        if length > lengths[state]:
            continue
        at, so_far = state
        block = blocks[at]
        totals = zip(so_far, block.counts, need, strict=True)
        now = Need(*(min(sum(n), limit) for *n, limit in totals))
        if at == len(blocks) - 1:
            if now != need:
                continue
            path = Counter(block.opcodes)
            while state in before:
                state = before[state]
                path.update(blocks[state[0]].opcodes)
            return path
        length += len(block.opcodes)
        for following in block.after:
            target_state = (following, now)
            if following < len(blocks) and length < lengths.get(target_state, length + 1):
                lengths[target_state], before[target_state] = length, state
                heapq.heappush(queue, (length, target_state))
    return None


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the code between each backward branch and its target."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    return [
        code[index[end.target] : i + 1]
        for i, end in enumerate(code)
        if end.target is not None and end.target <= end.address
    ]


def sweep(code: list[Instruction], element: int, stores: bool) -> Counter | None:
    """Return the opcodes per class of the shortest loop that takes one or two vectors at a time."""
    best = None
    for body in loops(code):
        if len(body) > 2500:
            continue
        for vectors in (1, 2):
            classes = vectors * 16 // element
            need = Need(EXPONENTIALS * classes, 2 * vectors, vectors * stores)
            path = shortest(body, need)
            if path is None or (not stores and any(o.startswith("STG") for o in path)):
                continue  # the loop is not the wanted sweep
            per_class = Counter({opcode: n / classes for opcode, n in path.items()})
            if best is None or per_class.total() < best.total():
                best = per_class
    return best


def line(name: str, sweep_name: str, per_class: Counter, bytes_moved: float) -> str:
    """Return a table line: counts, and the time of each pipe in percent of the memory's time."""
    pipes = {
        pipe: sum(n for opcode, n in per_class.items() if re.match(opcodes, opcode))
        for pipe, opcodes in PIPES.items()
    }
    slots = per_class.total()
    memory = bytes_moved / BYTES_PER_NS * PROCESSORS * GIGAHERTZ  # cycles of an SM
    shares = {"issue": slots / ISSUED, **{pipe: n / RATES[pipe] for pipe, n in pipes.items()}}
    cells = [f"{slots:.1f}", *(f"{n:.1f}" for n in pipes.values())]
    cells += [f"{100 * cycles / memory:.0f} %" for cycles in shares.values()]
    return f"| {name} | {sweep_name} | {' | '.join(cells)} |"


def main() -> None:
    header = ["kernel", "sweep", "slots", *PIPES, *(f"{x} of DRAM" for x in ("issue", *PIPES))]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for name, code in sorted(kernels(sys.stdin.read()).items()):
        hot = re.match(r"rows_kernel<VectorRow<(float|__nv_bfloat16)>, (\w+)", name)
        if hot is None or "GeneralWriter" in name or has_terms(name):
            continue
        dtype, team = hot.groups()
        element = ELEMENT[dtype]
        lanes = "a warp" if team == "LaneTeam" else "a CTA"
        first, second = (sweep(code, element, stores) for stores in (False, True))
        both = first + second if first and second else None
        for sweep_name, counts in {"first": first, "second": second, "both": both}.items():
            if counts is None:
                sys.exit(f"{name}: not found: {sweep_name}")
            print(line(f"{lanes} {dtype.removeprefix('__nv_')}", sweep_name, counts, 3 * element))


if __name__ == "__main__":
    main()
