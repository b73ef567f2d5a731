from collections.abc import Sequence

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
def exp2(values: npt.ArrayLike | Sequence[float]) -> npt.NDArray[np.float32]: ...
