"""Other libraries' distillation losses, number for number, over fastkd's fused pass.

Libraries disagree on which term ``alpha`` weighs, on T squared, on what a mean divides by and on
what is masked, mostly without saying so. Each module here is named after a library, and has its
names, its signatures and its conventions: switching is a changed import. ``docs/compat.md``, which
``python -m fastkd.compat`` writes, has the conventions side by side, and where an adapter differs
from its library on purpose.

>>> import torch
>>> from fastkd.compat.torchtune import ForwardKLLoss
>>> ForwardKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1, -100]))
tensor(1.3863)
"""

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
from fastkd.compat.convention import Convention

__all__ = ["CONVENTIONS", "Convention"]

CONVENTIONS = tuple(
    module.CONVENTION
    for module in (
        deit, distilbert, keras, liger, mdistiller, modelopt,
        nemo, textbrewer, timm, torchdistill, torchtune, trl,
    )
)  # fmt: skip
"""One record for each library, which the page of conventions is written from."""
