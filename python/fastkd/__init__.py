"""Compute the loss of knowledge distillation in one fused pass, on CPUs and GPUs.

>>> import torch, fastkd
>>> student = torch.randn(8, 10, requires_grad=True)
>>> teacher, labels = torch.randn(8, 10), torch.randint(10, (8,))
>>> fastkd.loss(student, teacher, labels, temperature=2.0, alpha=0.5).backward()

``loss``, ``terms`` and ``KDLoss`` compute the loss. Student and teacher are tensors of logits, or a
``Head``: a linear layer and its input, in place of logits. A teacher may also be several
tensors, a ``TopK``, a ``Sampled`` or a ``Routed``. ``Trainer`` trains a student, ``Hint`` matches
features of student and teacher, ``teachers`` stores a teacher's outputs, and ``report`` measures
models. ``export`` writes a student as a program for a device, and ``deployment`` loads the
program. ``explain``, ``verify``, ``check_inputs`` and
``check_logits`` describe and check a call. ``fastkd.compat`` offers the losses of other libraries
under their names, and ``fastkd.integrations`` connects fastkd to the trainers of other libraries.
"""

import importlib
from typing import TYPE_CHECKING

import torch  # noqa: F401 - loads the libraries that fastkd._C is linked to

from fastkd import deployment, teachers, validation
from fastkd._C import version as __version__
from fastkd._core.values import Head, Routed, Sampled, TopK
from fastkd.deployment import export
from fastkd.diagnostics import Verification, check_inputs, check_logits, explain, verify
from fastkd.linear import chunks
from fastkd.losses import KDLoss, divergences, loss, terms
from fastkd.reference import Terms
from fastkd.reports import Report, report
from fastkd.training import Evaluation, Hint, Step, Trainer

_LAZY_MODULES = ("compat", "integrations")
__all__ = [
    "Evaluation",
    "Head",
    "Hint",
    "KDLoss",
    "Report",
    "Routed",
    "Sampled",
    "Step",
    "Terms",
    "TopK",
    "Trainer",
    "Verification",
    "__version__",
    "check_inputs",
    "check_logits",
    "chunks",
    "compat",
    "deployment",
    "divergences",
    "explain",
    "export",
    "integrations",
    "loss",
    "report",
    "teachers",
    "terms",
    "verify",
]

if TYPE_CHECKING:
    from fastkd import compat, integrations
else:

    def __getattr__(name: str) -> object:
        """Import ``fastkd.compat`` or ``fastkd.integrations`` when it is first used."""
        if name in _LAZY_MODULES:
            return importlib.import_module(f"fastkd.{name}")
        hint = validation.suggest(name, __all__)
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
