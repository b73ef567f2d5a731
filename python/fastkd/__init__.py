"""fastkd: knowledge distillation's loss in one fused pass, on CPUs and GPUs.

>>> import torch, fastkd
>>> student = torch.randn(8, 10, requires_grad=True)
>>> teacher, labels = torch.randn(8, 10), torch.randint(10, (8,))
>>> fastkd.loss(student, teacher, labels, temperature=2.0, alpha=0.5).backward()
"""

import torch  # noqa: F401 - loads the libraries that fastkd._C is linked to

from fastkd._C import version as __version__
from fastkd.checks import check_inputs, check_logits
from fastkd.explain import explain
from fastkd.losses import KDLoss, divergences, loss, terms
from fastkd.reference import Terms
from fastkd.sparse import topk_loss
from fastkd.verify import Verification, verify

__all__ = [
    "KDLoss",
    "Terms",
    "Verification",
    "__version__",
    "check_inputs",
    "check_logits",
    "divergences",
    "explain",
    "loss",
    "terms",
    "topk_loss",
    "verify",
]
