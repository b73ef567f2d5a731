"""Suggest the call that works, in error messages about frequent mistakes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastkd.validation import suggest

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SPARSE = "{} is a field of the teacher, fastkd.{}"
OPTION_HINTS = {
    **dict.fromkeys(
        ("t", "tau", "temp", "kd_temperature", "student_temperature"),
        "Did you mean 'temperature'?",
    ),
    **dict.fromkeys(
        ("lambda_", "lam", "lmbda", "kd_weight", "kd_ratio", "gamma", "kd_alpha", "alpha_kd"),
        "alpha weighs the hard term, and 1 - alpha the soft term",
    ),
    "weight_hard_loss": "Did you mean 'hard_weight'?",
    "weight_soft_loss": "Did you mean 'soft_weight'?",
    "beta": 'TRL\'s beta is mix with divergence="jsd"; beta=0 is divergence="forward_kl", and '
    'beta=1 is divergence="reverse_kl"',
    "weight": "Did you mean 'class_weight'?",
    "axis": "Did you mean 'dim'?",
    "log_target": 'Did you mean teacher_form="log_probs"?',
    "num_items_in_batch": "Did you mean 'normalizer'?",
    **dict.fromkeys(
        ("target", "targets", "label", "y", "true_labels", "shift_labels"),
        "Did you mean 'labels'?",
    ),
    **dict.fromkeys(
        ("attention_mask", "mask", "loss_mask", "pad_token_id"),
        "Rows with the label -100 count in neither term: labels.masked_fill(mask == 0, -100)",
    ),
    **dict.fromkeys(("loss", "loss_type", "kind", "objective"), "Did you mean 'divergence'?"),
    **dict.fromkeys(("k", "topk", "top_k"), "Pass a fastkd.TopK as teacher"),
    "tail": _SPARSE.format("tail", "TopK"),
    "estimator": _SPARSE.format("estimator", "Sampled"),
}
DIVERGENCE_HINTS = {
    alias: f"Did you mean {name!r}?"
    for name, aliases in {
        "forward_kl": ("kl", "kld", "kl_div", "kldiv", "kl_divergence", "fkl", "forward"),
        "reverse_kl": ("rkl", "reverse"),
        "symmetric_kl": ("jeffreys", "skl"),
        "jsd": ("js", "jensen_shannon", "gjsd", "generalized_jsd", "js_divergence"),
        "skewed_forward_kl": ("sfkl",),
        "skewed_reverse_kl": ("srkl",),
        "total_variation": ("tv", "tvd", "l1"),
        "soft_cross_entropy": ("ce", "cross_entropy", "soft_ce"),
        "mse": ("l2",),
    }.items()
    for alias in aliases
}
FORM_HINTS = {
    **dict.fromkeys(("softmax", "probabilities", "prob"), "Did you mean 'probs'?"),
    **dict.fromkeys(("log_softmax", "logprobs", "log_prob"), "Did you mean 'log_probs'?"),
}
REDUCTION_HINTS = {
    "batchmean": '"mean" divides by the rows',
    **dict.fromkeys(("avg", "average"), "Did you mean 'mean'?"),
}


def raise_for_call(
    function: str,
    takes: str,
    count: int,
    unknown: Mapping[str, object],
    accepted: Sequence[str],
) -> NoReturn:
    """Raise TypeError for an unknown keyword, or for too many positional arguments (``count``).

    ``takes``: a phrase for the message that says which positional arguments the function takes.
    """
    if unknown:
        name = next(iter(unknown))
        raise TypeError(
            f"{function}() got an unexpected keyword argument {name!r}"
            + suggest(name, accepted, OPTION_HINTS)
        )
    tensors = ". Call the module with tensors: KDLoss()(student, teacher, labels)"
    raise TypeError(
        f"{function}() takes {takes} but {count} were given. Options are keywords, such as "
        "temperature=4.0, alpha=0.1" + (tensors if function == "KDLoss" else "")
    )


def hide_catch_all(function: _Function) -> _Function:
    """Hide ``*extra`` and ``**unknown``, which only catch mistakes, from a function's signature."""
    signature = inspect.signature(function)
    hidden = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in signature.parameters.values() if p.kind not in hidden]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def hint_for_type(name: str, value: object) -> str:
    """Return the end of an error message, which says what to pass instead of ``value``."""
    hint = ""
    if isinstance(value, Tensor):
        integer = not value.is_floating_point() and not value.is_complex()
        if name.endswith(".log_probs"):
            hint = "The first field is log_probs, the second the class indices"
        elif integer and name.startswith("teacher["):
            hint = "A teacher that lists a few classes is a fastkd.TopK(log_probs, indices)"
        elif integer and name.startswith("teacher"):
            hint = "The arguments are student, teacher, labels, in this order"
        elif integer:
            hint = f"{name}.float() converts it"
    elif isinstance(getattr(value, "logits", None), Tensor):
        hint = f"Pass {name}.logits"
    elif isinstance(value, Mapping) and "logits" in value:
        hint = f'Pass {name}["logits"]'
    elif isinstance(value, torch.nn.Module) and name.endswith(".weight"):
        hint = "Pass the weight of the module, such as linear.weight"
    elif isinstance(value, torch.nn.Module):
        hint = f"Pass the module's output: {name}(inputs)"
    elif callable(getattr(value, "logits", None)):  # a Head
        hint = f"Pass {name}.logits()"
    elif type(value).__module__ == "numpy":
        hint = f"torch.from_numpy({name}) converts it"
    elif type(value).__module__ == "fastkd._core.values":
        pass  # a TopK or Sampled has no logits
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        hint = f"If a model returned it, pass its logits, such as {name}[0]"
    return hint and f". {hint}"


def hint_for_labels(shape: Sequence[int], logits: Sequence[int]) -> str:
    """Return the end of an error message, which says how to make labels fit the logits."""
    shape, logits, hint = tuple(shape), tuple(logits), ""
    rows = logits[:-1]
    if shape == (*rows, 1):
        hint = "labels.squeeze(-1) has this shape"
    elif shape == (*rows[:1], 1, *rows[1:]):
        hint = "labels.squeeze(1) has this shape"
    elif len(shape) == 1 and shape[0] == math.prod(rows):
        hint = f"labels.view{rows} has this shape"
    elif len(rows) == 1 and rows[0] == math.prod(shape):
        hint = "labels.flatten() has this shape"
    elif shape == logits:
        hint = "labels.argmax(-1) are the class indices of one-hot labels"
    elif len(logits) > 2 and shape in (
        (logits[0], *logits[2:]),
        (logits[0], 1, *logits[2:]),
    ):
        hint = f"With dim=1, logits of shape {logits} have {logits[1]} classes"
    elif rows and shape and shape[:-1] == rows[:-1] and abs(shape[-1] - rows[-1]) == 1:
        lead = ":, " * (len(shape) - 1)
        by_one = f"[{lead}1:]" if shape[-1] > rows[-1] else f"[{lead}:-1]"
        shifted = (
            f"labels{by_one}" if shape[-1] > rows[-1] else f"student{by_one} and teacher{by_one}"
        )
        hint = f"Pass {shifted}, or the logits and labels of all positions and shift=1"
    return hint and f". {hint}"


def hint_for_label(label: float) -> str:
    """Return the end of an error message about a label out of range."""
    if label < 0:
        return f". ignore_index={label} ignores such rows"
    return ". Classes are numbered from 0"
