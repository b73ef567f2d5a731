from typing import Any

from typing_extensions import Buffer

version: str
compiler: str
cuda_architectures: str
segment: int
divergences: tuple[str, ...]

def isa() -> str: ...
def available_isas() -> tuple[str, ...]: ...
def use_isa(name: str) -> None: ...
def exp2_(numbers: Buffer, by_registers: bool) -> None: ...
def plan_cuda(
    rows: int,
    classes: int,
    student_dtype: int,
    teacher_dtype: int,
    processors: int,
    largest_cluster: int,
    strided: bool = False,
) -> dict[str, Any]: ...
