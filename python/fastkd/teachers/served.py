"""Read the replies of inference servers: vLLM, SGLang and the OpenAI API.

:func:`from_vllm`, :func:`from_sglang` and :func:`from_openai` convert the decoded JSON of a reply
for one sequence to a :class:`fastkd.TopK`. :func:`collate` pads the results of several sequences
and stacks them into a batch. :func:`gather` selects the sequence's tokens from the lists, for a
:class:`fastkd.Sampled`. These functions open no connection, and run or import nothing from a reply.

**Alignment.** Row i of a result has log-probabilities of the distribution that predicted token i of
the reply. For a complete prompt, row i of a result corresponds to row i - 1 of the student's
logits. No distribution predicted the first token of a prompt, so row 0 is padding: indices -1,
log-probabilities -inf. For generated tokens, row 0 belongs to the first generated token.
:func:`collate` with left padding, to the ``length`` of prompt and generated tokens, adds a row of
padding for each token of the prompt. ``shift=1`` then compares row i with row i - 1 of the logits::

    loss = fastkd.loss(logits, teacher, labels, shift=1)  # label -100: prompt and padding

**Temperature.** A reply does not contain its temperature. A wrong temperature cannot be detected,
since probabilities add up to at most 1 at any temperature. vLLM 0.32 computes log-probabilities at
temperature 1, whatever temperature the request has. With ``--logprobs-mode processed_logprobs``,
vLLM uses the request's temperature for generated tokens. According to its source, SGLang 0.5.23
uses temperature 1 for prompts, and the request's temperature for generated tokens. The functions
raise an error for numbers that cannot be log-probabilities, such as most logits of vLLM's
``raw_logits`` mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import validation
from fastkd._core.values import Estimator, Sampled, Tail, TopK
from fastkd.teachers.entries import Entries, check_list, check_mapping, get_field, show

SGLangField = Literal[
    "input_top_logprobs",
    "input_token_logprobs",
    "input_token_ids_logprobs",
    "output_top_logprobs",
    "output_token_logprobs",
    "output_token_ids_logprobs",
]
PaddingSide = Literal["right", "left"]
__all__ = ["collate", "from_openai", "from_sglang", "from_vllm", "gather"]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__


def from_vllm(
    reply: object,
    *,
    tokens: Sequence[int] | Tensor | None = None,
    k: int | None = None,
    tail: Tail = "ghost",
) -> TopK:
    """Read vLLM's log-probabilities of a prompt's tokens, which ``prompt_logprobs=k`` requests.

    vLLM lists the k most probable tokens of each position and the prompt's token, so a position has
    k or k + 1 entries. ``prompt_logprobs=0`` requests the prompt's tokens alone.

    Args:
        reply: one of

            - a choice of ``/v1/completions``, or a reply of ``/v1/chat/completions``: a mapping
              with ``"prompt_logprobs"``;
            - a ``vllm.RequestOutput``, an object with ``.prompt_logprobs``;
            - ``outputs[0].logprobs`` of a ``vllm.RequestOutput``, for generated tokens, or a part
              of this list or of ``prompt_logprobs``: a sequence of dictionaries from token id to
              ``{"logprob": ...}`` or ``vllm.Logprob``. The first entry of the sequence may be None.
        tokens: the ids of the sequence's tokens, ``(n,)``. If given, the reply must have n
            positions and list each of these tokens, or the function raises an error.
        k: number of entries in a row of the result: the most probable entries, then padding.
            Default: the length of the longest list.
        tail: see :class:`fastkd.TopK`.

    Returns:
        A :class:`fastkd.TopK` on the CPU with ``log_probs`` float32 ``(n, k)`` and ``indices``
        int64 ``(n, k)``, most probable first, padded with -inf and -1. Row i belongs to token i. A
        listed token of probability 0 keeps its index, with -inf. vLLM's ranks are ignored, because
        with ``logprob_token_ids`` a rank is a position in the request.

    Raises:
        TypeError: if ``tokens`` or ``k`` has the wrong type.
        ValueError: if the reply has none of these forms, or lacks the field; or if a position is
            not a dictionary, lists a token twice, or has numbers that are not log-probabilities,
            and the message names the position; or if the reply does not fit ``tokens``.

    Example:
        >>> from fastkd.teachers import served
        >>> choice = {"prompt_logprobs": [
        ...     None,
        ...     {"5": {"logprob": -2.5, "rank": 3}, "7": {"logprob": -0.5, "rank": 1}},
        ... ]}
        >>> teacher = served.from_vllm(choice, tokens=[2, 5], k=1)
        >>> teacher.indices.tolist(), teacher.log_probs.tolist()
        ([[-1], [7]], [[-inf], [-0.5]])
    """
    field = "prompt_logprobs"
    form = "a dictionary from token ids to log-probabilities, {id: {'logprob': number}}"
    positions = get_field(reply, field) if isinstance(reply, Mapping) else reply
    if not isinstance(positions, Sequence):
        positions = getattr(positions, field, positions)
    first = next(
        (entry for entry in check_list(field, positions) if isinstance(entry, dict) and entry), {}
    )
    is_json = all(isinstance(value, dict) for value in first.values())
    read = _read_vllm_json if is_json else _read_vllm_objects
    entries = Entries(field, positions, read, form)
    return entries.topk(tokens, True, k, tail)


def from_sglang(
    reply: Mapping[str, Any],
    field: SGLangField = "input_top_logprobs",
    *,
    tokens: Sequence[int] | Tensor | None = None,
    k: int | None = None,
    tail: Tail = "ghost",
) -> TopK:
    """Read SGLang's log-probabilities, which ``return_logprob=True`` requests.

    Args:
        reply: a reply of ``/generate``, or its ``"meta_info"``.
        field: the list to read. ``input_...`` is about the prompt after ``logprob_start_len``
            tokens, and ``output_...`` about the generated text.

            - ``..._top_logprobs``: the most probable tokens (``top_logprobs_num=k``);
            - ``..._token_logprobs``: the sequence's tokens, one entry per row, for :func:`gather`;
            - ``..._token_ids_logprobs``: the tokens of ``token_ids_logprob=[...]``.
        tokens: the ids of the sequence's tokens, ``(n,)``. If given, the reply must have n
            positions. The entries of ``..._token_logprobs`` must be about these tokens.
        k, tail: see :func:`from_vllm`.

    Returns:
        See :func:`from_vllm`.

    Raises:
        TypeError: if ``reply``, ``tokens`` or ``k`` has the wrong type.
        ValueError: as :func:`from_vllm`; or if the reply lacks ``field``.

    Example:
        >>> from fastkd.teachers import served
        >>> meta = {"input_top_logprobs": [None, [[-0.5, 7, None], [-2.5, 5, None]]]}
        >>> served.from_sglang({"meta_info": meta}).indices.tolist()
        [[-1, -1], [7, 5]]
    """
    validation.check_one_of("field", field, get_args(SGLangField))
    check_mapping(reply)
    if "meta_info" in reply:
        reply = reply["meta_info"]
        check_mapping(reply, "meta_info")
    is_single = field.endswith("_token_logprobs")
    read = _read_sglang_token if is_single else _read_sglang
    form = f"{'' if is_single else 'a list of '}[log-probability, token id, text]"
    entries = Entries(field, get_field(reply, field), read, form)
    return entries.topk(tokens, is_single, k, tail)


def from_openai(
    reply: Mapping[str, Any],
    *,
    tokens: Sequence[int] | Tensor | None = None,
    k: int | None = None,
    tail: Tail = "ghost",
) -> TopK:
    """Read the log-probabilities of generated tokens in the form of the OpenAI API.

    The API writes tokens as text, without ids. If the request has
    ``return_tokens_as_token_ids=True``, vLLM writes ids, such as ``"token_id:5"``. A row lists the
    tokens of ``top_logprobs`` and the generated token.

    Args:
        reply: a choice of ``/v1/completions`` (``logprobs=k``) or of ``/v1/chat/completions``
            (``logprobs=True, top_logprobs=k``), or the choice's ``"logprobs"``. With ``echo=True``,
            the prompt's tokens come first. Replies of vLLM's ``/inference/v1/generate``, which have
            ``"token_id"`` in place of ``"token"``, are accepted as well.
        tokens, k, tail: see :func:`from_vllm`.

    Returns:
        See :func:`from_vllm`.

    Raises:
        TypeError: if ``reply``, ``tokens`` or ``k`` has the wrong type.
        ValueError: as :func:`from_vllm`; or if tokens are text.

    Example:
        >>> from fastkd.teachers import served
        >>> logprobs = {"content": [{"token": "token_id:5", "logprob": -2.5, "top_logprobs": [
        ...     {"token": "token_id:7", "logprob": -0.5}
        ... ]}]}
        >>> served.from_openai({"logprobs": logprobs}, tokens=[5]).indices.tolist()
        [[7, 5]]
    """
    check_mapping(reply)
    if "content" not in reply and "tokens" not in reply:
        reply = get_field(reply, "logprobs")
        check_mapping(reply, "logprobs")
    if "tokens" in reply:
        columns = [get_field(reply, name) for name in ("tokens", "token_logprobs", "top_logprobs")]
        columns[2] = columns[2] or [None] * len(columns[0] or ())
        for name, column in zip(("tokens", "token_logprobs", "top_logprobs"), columns, strict=True):
            if not isinstance(column, (list, tuple)) or len(column) != len(columns[0]):
                raise ValueError(
                    "logprobs must have lists 'tokens', 'token_logprobs' and 'top_logprobs' of one "
                    f"length; got {name!r}: {show(column)}"
                )
        field, positions = "logprobs", list(zip(*columns, strict=True))
        form = "a token, its log-probability, and a dictionary from tokens to log-probabilities"
        entries = Entries(field, positions, _read_completion, form)
    else:
        form = (
            "{'token': token, 'logprob': number, 'top_logprobs': [{'token': token, 'logprob': "
            "number}]} with the same number wherever it has the same token"
        )
        entries = Entries("content", get_field(reply, "content"), _read_chat, form)
    entries.strip_prefixes()
    return entries.topk(tokens, True, k, tail)


def gather(topk: TopK, tokens: Tensor, estimator: Estimator = "k1") -> Sampled:
    """Select one token from each row's list, for a loss on the sampled tokens alone.

    Args:
        topk: the result of a function of this module, ``(..., k)``. Read the reply with ``k=None``,
            since vLLM lists the sequence's token last if the token is not among the k most probable
            tokens.
        tokens: ``(...)`` token ids of any integer dtype, one for each row. A negative id, such as
            the label -100, makes the row padding.
        estimator: see :class:`fastkd.Sampled`.

    Returns:
        A :class:`fastkd.Sampled` of shape ``(...)``. A row is padding, with
        log-probability -inf and class -1, if its token is negative or its list is empty.

    Raises:
        TypeError: if ``topk`` is not a :class:`fastkd.TopK`, or ``tokens`` has no integer dtype.
        ValueError: if the shapes differ; or if a row's list lacks its token.

    Example:
        >>> import torch
        >>> from fastkd.teachers import served
        >>> meta = {"input_token_logprobs": [[None, 2, "a"], [-2.5, 5, "b"]]}
        >>> teacher = served.from_sglang(meta, "input_token_logprobs")
        >>> served.gather(teacher, torch.tensor([2, 5])).log_probs.tolist()
        [-inf, -2.5]
    """
    if not isinstance(topk, TopK):
        raise TypeError(f"topk must be a fastkd.TopK; got {type(topk).__name__}")
    if not isinstance(tokens, Tensor) or tokens.dtype not in validation.INTEGERS:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be a tensor of an integer dtype; got {kind}")
    if tokens.shape != topk.indices.shape[:-1]:
        raise ValueError(
            f"tokens must have shape {tuple(topk.indices.shape[:-1])}, one for each row of topk; "
            f"got {tuple(tokens.shape)}"
        )
    indices = validation.to_int64(topk.indices)
    tokens = tokens.to(indices)
    is_padding = (tokens < 0) | (indices < 0).all(-1)
    is_token = (indices == tokens.unsqueeze(-1)) & ~is_padding.unsqueeze(-1)
    lacking = ~(is_token.any(-1) | is_padding)
    if lacking.any():
        row = tuple(lacking.nonzero()[0].tolist())
        raise ValueError(
            f"topk must list the token of each row; row {row} lacks token {int(tokens[row])}. Read "
            "the reply with k=None, and see that its rows and the tokens are aligned"
        )
    log_probs = topk.log_probs.masked_fill(~is_token, -math.inf).amax(-1)
    return Sampled(log_probs, tokens.masked_fill(is_padding, -1), estimator)


@overload
def collate(
    values: Sequence[TopK], length: int | None = None, padding_side: PaddingSide = "right"
) -> TopK: ...
@overload
def collate(
    values: Sequence[Sampled], length: int | None = None, padding_side: PaddingSide = "right"
) -> Sampled: ...
def collate(
    values: Sequence[TopK] | Sequence[Sampled],
    length: int | None = None,
    padding_side: PaddingSide = "right",
) -> TopK | Sampled:
    """Pad sparse teachers of several sequences to one length, and stack the teachers into a batch.

    Args:
        values: B :class:`fastkd.TopK` of shapes ``(n, k)``, where n and k may differ, or B
            :class:`fastkd.Sampled` of shapes ``(n,)``. All values have the same ``tail`` or
            ``estimator``.
        length: number of rows to pad to. Default: the length of the longest sequence.
        padding_side: ``"right"``, or ``"left"`` as in batches of prompts. Default ``"right"``.

    Returns:
        A :class:`fastkd.TopK` of shape ``(B, length, k)`` with the largest k, or a
        :class:`fastkd.Sampled` of shape ``(B, length)``. Padding has log-probability -inf and
        class -1.

    Raises:
        TypeError: if ``values`` is empty, or its items are not all TopK or all Sampled.
        ValueError: if a value is longer than ``length``, has batch dimensions, or differs from
            another value in ``tail`` or ``estimator``.

    Example:
        >>> import torch, fastkd
        >>> from fastkd.teachers import served
        >>> values = [
        ...     fastkd.Sampled(torch.tensor([-1.0, -2.0]), torch.tensor([3, 4])),
        ...     fastkd.Sampled(torch.tensor([-0.5]), torch.tensor([9])),
        ... ]
        >>> served.collate(values, padding_side="left").tokens.tolist()
        [[3, 4], [-1, 9]]
    """
    validation.check_one_of("padding_side", padding_side, get_args(PaddingSide))
    if {type(value) for value in values} not in ({TopK}, {Sampled}):
        names = sorted({type(value).__name__ for value in values})
        raise TypeError(f"values must all be fastkd.TopK, or all fastkd.Sampled; got {names}")
    shapes = [tuple(value.log_probs.shape) for value in values]
    is_listed = isinstance(values[0], TopK)
    if any(len(shape) != 1 + is_listed for shape in shapes):
        accepted = "(n, k)" if is_listed else "(n,)"
        raise ValueError(f"values must have shape {accepted}; got {shapes}")
    options = {value[-1] for value in values}
    if len(options) != 1:
        raise ValueError(f"values must have one {values[0]._fields[-1]}; got {sorted(options)}")
    longest, *most = (max(sizes) for sizes in zip(*shapes, strict=True))
    if length is not None:
        validation.check_count("length", length)
        if length < longest:
            raise ValueError(
                f"length must be at least {longest}, as the longest value; got {length}"
            )

    def stack(fields: Sequence[Tensor], fill: float) -> Tensor:
        padded = []
        for field in fields:
            rows = [0, (length or longest) - len(field)]
            columns = [0, most[0] - field.shape[1]] if is_listed else []
            padding = columns + (rows if padding_side == "right" else rows[::-1])
            padded.append(F.pad(field, padding, value=fill))
        return torch.stack(padded)

    log_probs = stack([value[0] for value in values], -math.inf)
    indices = stack([value[1] for value in values], -1)
    return type(values[0])(log_probs, indices, values[0][-1])  # type: ignore[arg-type]


# ---- functions from one position of a reply to its token ids and log-probabilities


def _read_vllm_json(entry: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    return entry.keys(), map(_FROM_JSON, entry.values())


def _read_vllm_objects(entry: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    return entry.keys(), map(_FROM_OBJECT, entry.values())


_FROM_JSON, _FROM_OBJECT = itemgetter("logprob"), attrgetter("logprob")


def _read_sglang(entry: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    return [token for _, token, _ in entry], [log_prob for log_prob, _, _ in entry]


def _read_sglang_token(entry: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    log_prob, token, _ = entry
    return ((), ()) if log_prob is None else ((token,), (log_prob,))


def _read_completion(entry: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    token, log_prob, top = entry
    return _merge({**(top or {})}, token, log_prob)


def _read_chat(entry: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    name = "token_id" if "token_id" in entry else "token"
    top = entry.get("top_logprobs") or ()
    listed = {each[name]: each["logprob"] for each in top}
    if len(listed) < len(top):
        raise ValueError("a token is listed twice")
    return _merge(listed, entry[name], entry["logprob"])


def _merge(
    listed: dict[Any, Any], token: Any, log_prob: Any
) -> tuple[Iterable[Any], Iterable[Any]]:
    """Add the generated token to the listed tokens, unless the list has the token."""
    if log_prob is not None and listed.setdefault(token, log_prob) != log_prob:
        raise ValueError("a token has two log-probabilities")
    return listed.keys(), listed.values()
