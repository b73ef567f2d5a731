"""Check the entries of a server's reply, and convert them to a :class:`fastkd.TopK`.

An entry is a token id with its log-probability. A position of the reply has any number of entries.
:mod:`fastkd.teachers.served` extracts the entries of each position.
"""

from __future__ import annotations

import bisect
import itertools
import math
import reprlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkd import validation
from fastkd._core.values import Tail, TopK
from fastkd.reference import topk as definitions

Read = Callable[[Any], tuple[Iterable[Any], Iterable[Any]]]
"""A function from one position of a reply to its token ids and their log-probabilities."""
_TOKEN_ID = "token_id:"
"""The prefix of a token in a reply of vLLM with ``return_tokens_as_token_ids``."""
_LARGEST_ID = 2**31 - 1
_LEAST = -9999.0
"""Log-probabilities of at most this value count as -inf. For -inf, vLLM writes -9999, and SGLang
writes the least float32 number."""
_LARGEST_LOG_PROB = 1e-3
"""The largest accepted log-probability; above 0, because a server may round numbers up."""
_RAGGED = 64
"""The largest accepted ratio of the longest list's length to the mean length. The bound limits the
memory of a result to this multiple of the memory of the reply."""


class Entries:
    """Hold the entries of all positions of a reply, one after the other.

    All entries are checked and converted together, since a check of each position would take most
    of the time for a long reply.

    Attributes:
        field: name of the reply's field, for messages.
        counts: number of entries of each position.
        ids: token ids, not yet checked or converted.
        log_probs: log-probabilities, not yet checked or converted.
    """

    def __init__(self, field: str, positions: object, read: Read, form: str) -> None:
        """Concatenate the entries of all positions; ``form`` says what ``read`` accepts."""
        self.field = field
        self.counts: list[int] = []
        self.ids: list[Any] = []
        self.log_probs: list[Any] = []
        all_ids, all_log_probs, total = self.ids, self.log_probs, 0
        for position, entry in enumerate(check_list(field, positions)):
            if entry is not None:
                try:
                    ids, log_probs = read(entry)
                    all_ids += ids
                    all_log_probs += log_probs
                except Exception as error:  # an unexpected object may raise any exception
                    raise ValueError(
                        f"{field}[{position}] must be {form}; got {show(entry)}"
                    ) from error
            count = len(all_ids) - total
            if count == 0 and total:
                raise ValueError(
                    f"{field}[{position}] must be {form}; got {show(entry)}, which is accepted "
                    "before the first scored token only"
                )
            self.counts.append(count)
            total += count
        if not self.counts:
            raise ValueError(f"{field} must have an entry for each token; got an empty list")
        if len(self.counts) * max(self.counts) > _RAGGED * max(total, len(self.counts)):
            raise ValueError(
                f"{field} must have lists of similar lengths; got {total} entries in "
                f"{len(self.counts)} positions, of which {field}["
                f"{self.counts.index(max(self.counts))}] has {max(self.counts)}"
            )

    def fail(self, entry: int, message: str) -> NoReturn:
        """Raise ValueError for the position of ``entry``, an index among all entries."""
        position = bisect.bisect_right(list(itertools.accumulate(self.counts)), entry)
        raise ValueError(f"{self.field}[{position}]: {message}")

    def strip_prefixes(self) -> None:
        """Remove the prefix "token_id:" of all tokens; raise for text without the prefix."""
        kinds = _get_types(self.ids)
        if kinds <= {int}:
            return
        size = len(_TOKEN_ID)
        ids = (
            [token[size:] for token in self.ids if token[:size] == _TOKEN_ID]
            if kinds == {str}
            else []
        )
        if len(ids) < len(self.ids):
            entry, token = next(
                (entry, token)
                for entry, token in enumerate(self.ids)
                if type(token) is not str or not token.startswith(_TOKEN_ID)
            )
            self.fail(
                entry,
                f"tokens must be ids, such as '{_TOKEN_ID}5'; got {show(token)}. Request "
                "return_tokens_as_token_ids=True",
            )
        self.ids = ids

    def topk(
        self,
        tokens: Sequence[int] | Tensor | None,
        lists_tokens: bool,
        k: int | None,
        tail: Tail,
    ) -> TopK:
        """Check all entries, and return a TopK with the most probable entry of each row first.

        ``lists_tokens``: True if each position that has entries must list the sequence's own token.
        """
        if k is not None:
            validation.check_count("k", k)
        rows, width = len(self.counts), max(max(self.counts), k or 1)
        counts = torch.tensor(self.counts)
        row = torch.repeat_interleave(torch.arange(rows), counts)
        place = (
            torch.arange(len(row)) + (torch.arange(rows) * width - counts.cumsum(0) + counts)[row]
        )
        log_probs = torch.full((rows * width,), -math.inf, dtype=torch.float64)
        indices = torch.full((rows * width,), -1)
        log_probs[place] = self.to_log_probs()
        indices[place] = self.to_indices()
        log_probs, order = log_probs.view(rows, width).sort(stable=True, dim=-1, descending=True)
        indices = indices.view(rows, width).gather(-1, order)
        self.check_rows(log_probs, indices)
        if tokens is not None:
            self.check_tokens(indices, tokens, lists_tokens)
        return TopK(log_probs[:, :k].float(), indices[:, :k], tail)

    def to_log_probs(self) -> Tensor:
        """Return the log-probabilities of all entries in float64; raise for an invalid number."""
        try:
            if not _get_types(self.log_probs) <= {float, int}:
                raise TypeError
            numbers = _to_tensor("d", self.log_probs, torch.float64)
        except (TypeError, OverflowError):
            entry, value = next(
                (entry, value)
                for entry, value in enumerate(self.log_probs)
                if type(value) is not float and (type(value) is not int or abs(value) > 2**1000)
            )
            self.fail(entry, f"a log-probability must be a number; got {show(value)}")
        wrong = ~(numbers <= _LARGEST_LOG_PROB)
        if wrong.any():
            entry = int(wrong.nonzero()[0])
            self.fail(
                entry,
                f"a log-probability must be at most 0; got {float(numbers[entry])}. vLLM returns "
                "logits if its logprobs_mode is raw_logits or processed_logits",
            )
        return numbers.masked_fill(numbers <= _LEAST, -math.inf)

    def to_indices(self) -> Tensor:
        """Return the token ids of all entries in int64; raise for an invalid id."""
        is_text = bool(self.ids) and type(self.ids[0]) is str
        try:
            # int() also accepts signs, spaces, underscores and digits of other scripts.
            if "".join(self.ids).encode().isdigit() if is_text else _get_types(self.ids) <= {int}:
                numbers = list(map(int, self.ids)) if is_text else self.ids
                indices = _to_tensor("q", numbers, torch.int64)
                if not ((indices < 0) | (indices > _LARGEST_ID)).any():
                    return indices
        except (TypeError, ValueError, OverflowError):
            pass
        entry, value = next(
            (entry, value)
            for entry, value in enumerate(self.ids)
            if not _is_id(value) or type(value) is not type(self.ids[0])
        )
        self.fail(
            entry,
            f"a token id must be an integer from 0 to {_LARGEST_ID}, and all ids numbers, or all "
            f"strings; got {show(value)}",
        )

    def check_rows(self, log_probs: Tensor, indices: Tensor) -> None:
        """Raise if a position lists a token twice, or if its probabilities sum to over 1.1."""
        duplicate = definitions.find_duplicate(indices)
        if (duplicate >= 0).any():
            position = int((duplicate >= 0).nonzero()[0])
            raise ValueError(
                f"{self.field}[{position}] must list a token once; it lists "
                f"{int(duplicate[position])} twice"
            )
        mass = definitions.mass(indices, log_probs)
        if (mass > definitions.MOST_MASS).any():
            position = int(mass.argmax())
            raise ValueError(
                f"{self.field}[{position}] must have logarithms of probabilities, which add up to "
                f"at most 1; they add up to {float(mass[position]):.4g}"
            )

    def check_tokens(
        self, indices: Tensor, tokens: Sequence[int] | Tensor, lists_tokens: bool
    ) -> None:
        """Raise unless the reply has a position for each token.

        ``lists_tokens``: True if each position that has entries must also list its token.
        """
        try:
            ids = tokens if isinstance(tokens, Tensor) else _to_tensor("q", tokens, torch.int64)
        except (TypeError, OverflowError):
            raise TypeError(f"tokens must be integers of 64 bits; got {show(tokens)}") from None
        if ids.dtype not in validation.INTEGERS or ids.dim() != 1:
            raise TypeError(
                f"tokens must be integers of shape (n,); got {ids.dtype} of shape "
                f"{tuple(ids.shape)}"
            )
        ids = ids.to(indices)
        if len(ids) != len(indices):
            raise ValueError(
                f"{self.field} must have an entry for each of the {len(ids)} tokens; it has "
                f"{len(indices)}"
            )
        lacks = (indices != ids[:, None]).all(-1) & (indices >= 0).any(-1)
        if lists_tokens and lacks.any():
            position = int(lacks.nonzero()[0])
            raise ValueError(
                f"{self.field}[{position}] must list token {position} of the sequence, "
                f"{int(ids[position])}, and does not: the reply is about other tokens"
            )


def _to_tensor(code: str, values: Iterable[Any], dtype: torch.dtype) -> Tensor:
    """Convert numbers by an ``array``, which is faster than ``torch.tensor``."""
    numbers = array(code, values)
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _get_types(values: list[Any]) -> set[type]:
    return set(map(type, values))


def _is_id(value: object) -> bool:
    if type(value) is str:
        return (
            value.isascii() and value.isdecimal() and len(value) < 20 and int(value) <= _LARGEST_ID
        )
    return type(value) is int and 0 <= value <= _LARGEST_ID


def get_field(reply: Mapping[str, Any], field: str) -> Any:
    """Return a field of a reply; raise ValueError if it is absent or None."""
    value = reply.get(field)
    if value is not None:
        return value
    if field not in reply and "choices" in reply:
        raise ValueError(
            f"reply has 'choices', each of which is the reply for one sequence: pass "
            f"reply['choices'][0] for {field}"
        )
    problem = "None" if field in reply else f"the fields {show(list(reply))}"
    raise ValueError(f"reply must have {field!r}, which the request has to ask for; got {problem}")


def check_list(field: str, positions: object) -> Sequence[Any]:
    """Return the positions of a reply; raise ValueError if they are not a list."""
    if not isinstance(positions, Sequence) or isinstance(positions, (str, bytes)):
        raise ValueError(
            f"{field} must be a list with an entry for each token; got {show(positions)}"
        )
    return positions


def check_mapping(value: object, name: str = "reply") -> None:
    """Raise TypeError if a value is not a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary, decoded from JSON; got {show(value)}")


def show(value: object) -> str:
    """Return the repr of a value, shortened to 200 characters for a message."""
    try:
        text = reprlib.repr(value)
    except Exception:  # an object's __repr__ may raise, as does an int of too many digits
        return type(value).__name__
    return text if len(text) <= 200 else text[:197] + "..."
