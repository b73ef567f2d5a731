from typing import Any

from torch import Tensor

torch_version: str

def loss(
    student: Any, teacher: Any, labels: Any, with_terms: bool, cuda: bool, *options: Any
) -> Tensor | None: ...
def topk_loss(
    student: Any, indices: Any, log_probs: Any, labels: Any, cuda: bool, *options: Any
) -> Tensor | None: ...
def gradient(student: Any) -> Tensor | None: ...
