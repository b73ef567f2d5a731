from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

version: str
compiler: str
cuda_architectures: str
segment: int
divergences: tuple[str, ...]

def isa() -> str: ...
def available_isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def exp2(
    values: npt.ArrayLike | Sequence[float], by_registers: bool
) -> npt.NDArray[np.float32]: ...
def plan_cuda(
    rows: int,
    classes: int,
    student_dtype: int,
    teacher_dtype: int,
    processors: int,
    largest_cluster: int,
    strided: bool = False,
) -> dict[str, Any]: ...
