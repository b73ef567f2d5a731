"""fastkd: knowledge distillation's loss in one fused pass, on CPUs and GPUs.

>>> import torch, fastkd
>>> student = torch.randn(8, 10, requires_grad=True)
>>> teacher, labels = torch.randn(8, 10), torch.randint(10, (8,))
>>> fastkd.loss(student, teacher, labels, temperature=2.0, alpha=0.5).backward()

``loss``, ``terms`` and ``KDLoss`` take logits, ``topk_loss`` a teacher's most probable classes, and
``linear_loss`` hidden states and heads. ``Trainer``, ``Hint``, ``teachers`` and ``report`` are what
training needs around them, ``explain``, ``verify`` and the checks what a reader of results does.
``fastkd.compat`` and ``fastkd.integrations`` are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

import torch  # noqa: F401 - loads the libraries that fastkd._C is linked to

from fastkd import teachers
from fastkd._C import version as __version__
from fastkd._core.checks import check_inputs, check_logits
from fastkd._core.topk import topk_loss
from fastkd.diagnostics.explanation import explain
from fastkd.diagnostics.verification import Verification, verify
from fastkd.linear import chunks
from fastkd.linear.loss import LinearKDLoss, linear_loss
from fastkd.losses import KDLoss, divergences, loss, terms
from fastkd.reference import Terms
from fastkd.reports import Report, report
from fastkd.training.hints import Hint
from fastkd.training.trainer import Evaluation, Step, Trainer

_LAZY_MODULES = ("compat", "integrations")
__all__ = [
    "Evaluation",
    "Hint",
    "KDLoss",
    "LinearKDLoss",
    "Report",
    "Step",
    "Terms",
    "Trainer",
    "Verification",
    "__version__",
    "check_inputs",
    "check_logits",
    "chunks",
    "compat",
    "divergences",
    "explain",
    "integrations",
    "linear_loss",
    "loss",
    "report",
    "teachers",
    "terms",
    "topk_loss",
    "verify",
]

if TYPE_CHECKING:
    from fastkd import compat, integrations
else:

    def __getattr__(name: str) -> object:
        """Import a module that ``import fastkd`` does not import."""
        if name in _LAZY_MODULES:
            return importlib.import_module(f"fastkd.{name}")
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the module's names, with those of the modules that are not imported yet."""
    return sorted({*globals(), *_LAZY_MODULES})
