"""The definitions of the losses, in plain PyTorch, from the papers."""

from fastkd.reference import topk
from fastkd.reference.dense import (
    ENSEMBLES,
    REDUCTIONS,
    TEACHER_FORMS,
    Terms,
    column,
    cross_entropy,
    loss,
    reduce,
    softened_teacher,
    terms,
)
from fastkd.reference.divergences import (
    DIVERGENCES,
    LEAST_DEVIATION,
    Divergence,
    deviation,
    standardized,
    weighted,
)

__all__ = [
    "DIVERGENCES",
    "ENSEMBLES",
    "LEAST_DEVIATION",
    "REDUCTIONS",
    "TEACHER_FORMS",
    "Divergence",
    "Terms",
    "column",
    "cross_entropy",
    "deviation",
    "loss",
    "reduce",
    "softened_teacher",
    "standardized",
    "terms",
    "topk",
    "weighted",
]
