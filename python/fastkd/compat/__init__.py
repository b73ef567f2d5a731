"""Distillation losses of other libraries, with the same values, computed by fastkd's fused pass.

Libraries disagree on which term ``alpha`` weighs, on T squared, on what a mean divides by and on
which rows are masked. Each module here is named after a library and has that library's names,
signatures and conventions, so switching means changing an import. A module is imported when it is
first used. ``docs/compat.md`` compares the conventions and lists where an adapter differs from its
library on purpose.

>>> import torch
>>> from fastkd.compat.torchtune import ForwardKLLoss
>>> ForwardKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1, -100]))
tensor(1.3863)
"""

import importlib
from typing import TYPE_CHECKING

from fastkd.compat.convention import Convention

__all__ = [
    "Convention",
    "conventions",
    "deit",
    "distilbert",
    "keras",
    "liger",
    "mdistiller",
    "modelopt",
    "nemo",
    "textbrewer",
    "timm",
    "torchdistill",
    "torchtune",
    "trl",
]
_LIBRARIES = __all__[2:]  # all names but Convention and conventions


def conventions() -> tuple[Convention, ...]:
    """Return the conventions of all libraries: the records that ``docs/compat.md`` is made of."""
    modules = [importlib.import_module(f"fastkd.compat.{name}") for name in _LIBRARIES]
    return tuple(module.CONVENTION for module in modules)


if TYPE_CHECKING:
    from fastkd.compat import (
        deit,
        distilbert,
        keras,
        liger,
        mdistiller,
        modelopt,
        nemo,
        textbrewer,
        timm,
        torchdistill,
        torchtune,
        trl,
    )
else:

    def __getattr__(name: str) -> object:
        """Import the module of a library."""
        if name in _LIBRARIES:
            return importlib.import_module(f"fastkd.compat.{name}")
        raise AttributeError(f"module 'fastkd.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the module's names, with those of the libraries that are not imported yet."""
    return sorted({*globals(), *_LIBRARIES})
