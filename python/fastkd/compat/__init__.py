"""Compute the distillation losses of other libraries, with equal values, by fastkd's fused pass.

Libraries disagree on the term that ``alpha`` weighs, on T squared, on the divisor of a mean, and on
the rows that are masked. Each public module of this package is named after a library, and has the
library's names, signatures and conventions. Usually only an import changes. ``docs/compat.md``
compares the conventions, and lists where a module differs from its library on purpose.

>>> import torch
>>> from fastkd.compat.torchtune import ForwardKLLoss
>>> ForwardKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1, -100]))
tensor(1.3863)
"""

from fastkd.compat import (
    axolotl,
    deit,
    distilbert,
    keras,
    liger,
    mdistiller,
    modelopt,
    ms_swift,
    nemo,
    textbrewer,
    timm,
    torchdistill,
    torchtune,
    trl,
    trl_async,
    trl_sdft,
    verl,
)

__all__ = [
    "axolotl",
    "deit",
    "distilbert",
    "keras",
    "liger",
    "mdistiller",
    "modelopt",
    "ms_swift",
    "nemo",
    "textbrewer",
    "timm",
    "torchdistill",
    "torchtune",
    "trl",
    "trl_async",
    "trl_sdft",
    "verl",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
