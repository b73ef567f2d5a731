from collections.abc import Sequence
from typing import Any

from torch import Tensor

torch_version: str

def register_kernels() -> None: ...

class PreparedCall:
    def __init__(self, name: str, arguments: tuple[Any, ...], places: Sequence[int]) -> None: ...
    def __call__(self, *tensors: Tensor | None) -> Tensor: ...
