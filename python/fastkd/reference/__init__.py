"""Define the losses in PyTorch operations, after the formulas of the papers."""

from fastkd.reference import topk
from fastkd.reference.dense import (
    ENSEMBLES,
    REDUCTIONS,
    TEACHER_FORMS,
    Ensemble,
    Reduction,
    TeacherForm,
    Terms,
    column,
    loss,
    reduce,
    terms,
)
from fastkd.reference.divergences import DIVERGENCES, Divergence, DivergenceName

__all__ = [
    "DIVERGENCES",
    "ENSEMBLES",
    "REDUCTIONS",
    "TEACHER_FORMS",
    "Divergence",
    "DivergenceName",
    "Ensemble",
    "Reduction",
    "TeacherForm",
    "Terms",
    "column",
    "loss",
    "reduce",
    "terms",
    "topk",
]
