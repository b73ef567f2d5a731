"""Check numbers, names and folders that are passed to fastkd, and convert labels to int64.

Every message names the argument, what was given, and what is accepted.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


def suggest(value: object, accepted: Iterable[str], hints: Mapping[str, str] | None = None) -> str:
    """Return ". Did you mean 'name'?" for a misspelled name, or "" if no name is similar.

    ``hints``: maps a frequent mistake to the sentence that is returned for this mistake.
    """
    if not isinstance(value, str):
        return ""
    key = value.lower().replace("-", "_")
    if hints and key in hints:
        return f". {hints[key]}"
    names = {name.lower(): name for name in accepted}
    close = difflib.get_close_matches(key, names, n=1)
    return f". Did you mean {names[close[0]]!r}?" if close else ""


def check_one_of(
    name: str, value: object, accepted: Sequence[str], hints: Mapping[str, str] | None = None
) -> int:
    """Return the index of ``value`` in ``accepted``; raise if ``value`` is not in ``accepted``.

    ``hints``: as in :func:`suggest`.
    """
    if isinstance(value, str) and value in accepted:
        return accepted.index(value)
    listed = ", ".join(repr(option) for option in accepted)
    hint = suggest(value, accepted, hints)
    raise ValueError(f"{name} must be one of {listed}; got {value!r}{hint}")


def check_number(
    name: str,
    value: object,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a finite float in [low, high]; an open end is excluded."""
    if type(value) is not float:
        # NumPy's integers and floats are Real; NumPy's booleans and torch's tensors are not.
        if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        try:
            value = float(value)
        except OverflowError:  # an int above the largest float
            value = -math.inf if isinstance(value, int) and value < 0 else math.inf
    is_above = low < value if open_low else low <= value
    if is_above and (value < high if open_high else value <= high) and value != math.inf:
        return value
    if high == math.inf:
        accepted = "positive and finite" if open_low else f"finite and at least {low:g}"
    else:
        opening, closing = "(" if open_low else "[", ")" if open_high else "]"
        accepted = f"in {opening}{low:g}, {high:g}{closing}"
    raise ValueError(f"{name} must be {accepted}; got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < least:  # type: ignore[operator]
        error = ValueError if is_int else TypeError
        hint = f". Did you mean {name}=1?" if value is True else ""
        raise error(f"{name} must be an int of at least {least}; got {value!r}{hint}")


def check_folder(name: str, value: object, otherwise: str = "") -> pathlib.Path:
    """Return ``value`` as the path of a folder that exists or can be made; raise for a file.

    ``otherwise``: a phrase for the message, about accepted values that are no folder.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a folder's path{otherwise}; got {type(value).__name__}")
    path = pathlib.Path(value)
    existing = next((each for each in (path, *path.parents) if each.exists()), None)
    if existing is not None and not existing.is_dir():
        raise ValueError(f"{name} must be a folder; got {path}, and {existing} is a file")
    return path


def check_ignore_index(value: object) -> None:
    """Raise unless ``value`` is an int of 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"ignore_index must be an int; got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must be an int of 64 bits; got {value}")


def to_int64(labels: Tensor) -> Tensor:
    """Convert class indices to int64, and return probabilities unchanged.

    Comparisons need int64: PyTorch converts an ``ignore_index`` of -100 to 156 to compare it with
    uint8 labels.
    """
    return labels.long() if labels.dtype in INTEGERS else labels
