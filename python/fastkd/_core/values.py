"""Define ``Head``, ``TopK``, ``Sampled`` and ``Routed``, which replace a tensor of logits."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import validation
from fastkd._core import checks

Tail = Literal["ghost", "renormalize", "ignore"]
TAILS: tuple[Tail, ...] = get_args(Tail)
"""The index of a name equals its value in the enum ``Tail`` of csrc/topk.h."""
Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


class Head(NamedTuple):
    """Hold a linear layer and its input in place of logits.

    ::

        logits = hidden @ weight.T + bias
        logits = scale * logits                      # if scale is given (Cohere)
        logits = softcap * tanh(logits / softcap)    # if softcap is given (Gemma 2)

    A ``Head`` is a named tuple, so pytrees, ``torch.compile`` and Accelerate handle it. If the
    student is a ``Head``, the loss computes the logits in chunks. docs/linear.md describes the
    chunks and their memory.

    Args:
        hidden: ``(..., width)`` float64, float32, bfloat16 or float16: the input of the layer.
        weight: ``(classes, width)``, of the dtype of ``hidden`` unless autocast is on.
        bias: ``(classes,)`` or None. Default None.
        softcap: a positive number or None. Default None.
        scale: a positive number or None, applied before ``softcap``. Default None.

    Raises:
        TypeError, ValueError: for invalid arguments.

    Example:
        >>> import torch, fastkd
        >>> fastkd.Head(torch.zeros(6, 8), torch.zeros(50, 8), softcap=30.0)
        Head(hidden=float32 (6, 8) on cpu, weight=float32 (50, 8) on cpu, softcap=30.0)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float | None = None

    def __repr__(self) -> str:
        """Describe the tensors by dtype, shape and device, and omit fields that are None."""
        return _describe(self)

    def logits(self) -> Tensor:
        """Compute all logits, ``(..., classes)``, by differentiable PyTorch operations."""
        logits = F.linear(self.hidden, self.weight, self.bias)
        if self.scale is not None:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TopK(NamedTuple):
    """Hold a teacher's log-probabilities of k classes of each row, in place of all logits.

    The first two fields have the order of the results of ``torch.topk``::

        teacher = fastkd.TopK(*torch.log_softmax(teacher_logits / T, -1).topk(k))

    Let K be the listed classes, p = exp(log_probs) the teacher's probabilities, and
    q = softmax(student / T) the student's probabilities. ``tail`` chooses what is compared:

    - ``"ghost"``: the classes outside K count as one extra class, the ghost. The ghost's
      probability is 1 - sum over K of p for the teacher, and the sum of q outside K for the
      student. The student learns the total probability of the classes outside K, but not the
      probability of each class. Model-Optimizer, DistillKit's "symmetric_uniform" and TRL's tail
      bucket use a ghost.
    - ``"renormalize"``: p and q are divided by their sums over K. The student's probability of
      classes outside K has no influence. TRL without a tail renormalizes.
    - ``"ignore"``: the loss is the sum over K of p log(p / q), which may be negative. If
      ``log_probs`` minus their ``logsumexp`` over K are passed, the sum is
      KL(teacher truncated to K || student). DistillKit's "zero" ignores the tail. Only the forward
      KL supports ``"ignore"``: a sum over K of the reverse KL would fall as the student moves
      probability out of K.

    Any classes may be listed, such as the most probable classes of teacher or student. A ``TopK``
    supports every divergence that compares probabilities, except ``"dkd"``.

    vLLM returns log-probabilities at T = 1 unless it runs with ``--logprobs-mode
    processed_logprobs``; SGLang scores generated tokens at the request's temperature. The loss
    cannot apply another temperature to a list of some classes. Pass log-probabilities computed at
    the loss's temperature; the default temperature with a ``TopK`` is 1.

    A ``TopK`` is a named tuple, so pytrees, ``torch.compile``, data loaders and Accelerate handle
    it.

    Args:
        log_probs: ``(..., k)`` float64, float32, bfloat16 or float16: natural logarithms of the
            teacher's probabilities at the temperature of the loss. ``tail="renormalize"`` divides
            the probabilities by their sum. ``"ghost"`` divides them by their sum only if the sum
            is above 1 or K has all unmasked classes.
        indices: ``(..., k)`` class indices of any integer dtype, in any order, different within a
            row. An entry is padding if its index is negative or its log-probability is -inf.
            Padding is ignored: the class of the entry does not belong to K.
        tail: ``"ghost"``, ``"renormalize"`` or ``"ignore"``, as above. Default ``"ghost"``.

    Raises:
        TypeError, ValueError: for invalid arguments.

    Example:
        >>> import torch, fastkd
        >>> fastkd.TopK(*torch.log_softmax(torch.zeros(2, 10), -1).topk(3))
        TopK(log_probs=float32 (2, 3) on cpu, indices=int64 (2, 3) on cpu, tail='ghost')
    """

    log_probs: Tensor
    indices: Tensor
    tail: Tail = "ghost"

    def __repr__(self) -> str:
        """Describe the tensors by dtype, shape and device."""
        return _describe(self)


class Sampled(NamedTuple):
    """Hold the teacher's log-probability of one sampled token per row, in place of all logits.

    The tokens must be sampled from q = softmax(student / T), the student at the temperature of the
    loss (on-policy distillation). Let p be the teacher's probabilities. The soft term, before its
    weight and T^2, estimates the reverse KL, KL(q || p), from the token y of the row::

        d = log p(y) - log q(y)
        k1:  value -d                gradient -d * grad log q(y)
        k2:  value d^2 / 2           gradient -d * grad log q(y)
        k3:  value exp(d) - 1 - d    gradient (1 - exp(d)) * grad log q(y)

    (J. Schulman, "Approximating KL Divergence", 2020.) The expected value of k1 and of k3 is
    KL(q || p); k2 is biased. k1 may be negative, and usually has a higher variance than k3. The
    expected gradient of k1 and of k2 is the gradient of KL(q || p); that of k3 is the gradient of
    KL(p || q). The gradient of k1 is the policy gradient with the advantage d, detached. If the
    student's logit of the token is -inf, the value is infinite and the gradient is 0.

    A ``Sampled`` is a named tuple, so pytrees, ``torch.compile``, data loaders and Accelerate
    handle it.

    Args:
        log_probs: ``(...)`` float64, float32, bfloat16 or float16: the natural logarithm of the
            teacher's probability of each row's token, at the temperature of the loss.
        tokens: ``(...)`` class indices of any integer dtype. A row is padding, with a soft term of
            0, if its token is negative or its log-probability is -inf.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``, as above. Default ``"k1"``.

    Raises:
        TypeError, ValueError: for invalid arguments.

    Example:
        >>> import torch, fastkd
        >>> fastkd.Sampled(torch.tensor([-1.5, -0.2]), torch.tensor([7, 3]))
        Sampled(log_probs=float32 (2,) on cpu, tokens=int64 (2,) on cpu, estimator='k1')
    """

    log_probs: Tensor
    tokens: Tensor
    estimator: Estimator = "k1"

    def __repr__(self) -> str:
        """Describe the tensors by dtype, shape and device."""
        return _describe(self)


class Routed(NamedTuple):
    """Assign one of several teachers to each row, such as a specialist for each task.

    The loss reads each teacher only in the rows that are assigned to that teacher. If a teacher is
    a Head, the loss computes the logits of these rows only.

    A ``Routed`` is a named tuple, so pytrees, ``torch.compile``, data loaders and Accelerate handle
    it.

    Args:
        teachers: a tuple of logits ``(..., C)`` or of :class:`fastkd.Head`, at least one.
        indices: ``(...)`` integers: the position in ``teachers`` of each row's teacher. Checking
            the indices synchronizes CUDA. Under ``torch.compile``, an index out of range raises a
            RuntimeError.

    Raises:
        TypeError, ValueError: for invalid arguments.

    Example:
        >>> import torch, fastkd
        >>> math, code = torch.randn(4, 10), torch.randn(4, 10)
        >>> fastkd.Routed((math, code), torch.tensor([0, 1, 1, 0]))
        Routed(teachers=(float32 (4, 10) on cpu, float32 (4, 10) on cpu), indices=int64 (4,) on cpu)
    """

    teachers: tuple[Tensor | Head, ...]
    indices: Tensor

    def __repr__(self) -> str:
        """Describe the tensors by dtype, shape and device."""
        return _describe(self)


def check_head(head: Head, name: str = "Head") -> None:
    """Raise unless the fields of a head are valid; messages call the head ``name``."""
    for field in ("hidden", "weight", "bias"):
        value = getattr(head, field)
        if value is not None or field != "bias":
            checks.check_floats(f"{name}.{field}", value)
    hidden, weight, bias = head[:3]
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}.hidden must have shape (..., width) and {name}.weight (classes, width); got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{name}.weight must have at least one class; got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}.bias must have shape {tuple(weight.shape[:1])}, one number for each class; "
            f"got {tuple(bias.shape)}"
        )
    for field in ("softcap", "scale"):
        value = getattr(head, field)
        if value is not None:
            validation.check_number(f"{name}.{field}", value, 0.0, math.inf, open_low=True)


def check_topk(topk: TopK, name: str = "TopK") -> None:
    """Raise unless the fields of a TopK are valid; messages call the TopK ``name``."""
    _check_listed(name, topk.log_probs, "indices", topk.indices, "(..., k) with k >= 1")
    if topk.indices.dim() == 0 or topk.indices.shape[-1] == 0:
        raise ValueError(
            f"{name}.log_probs and {name}.indices must have the same shape (..., k) with k >= 1; "
            f"got {tuple(topk.log_probs.shape)} and {tuple(topk.indices.shape)}"
        )
    validation.check_one_of(f"{name}.tail", topk.tail, TAILS)


def check_sampled(sampled: Sampled, name: str = "Sampled") -> None:
    """Raise unless the fields of a Sampled are valid; messages call the Sampled ``name``."""
    _check_listed(name, sampled.log_probs, "tokens", sampled.tokens, "(...)")
    validation.check_one_of(f"{name}.estimator", sampled.estimator, ESTIMATORS)


def check_routed(routed: Routed, name: str = "Routed") -> None:
    """Raise unless all teachers have one type, and the indices have an integer dtype."""
    teachers, indices = routed
    if not isinstance(teachers, (tuple, list)) or not teachers:
        raise TypeError(
            f"{name}.teachers must be a tuple of at least one teacher; got {teachers!r}"
        )
    is_mixed = any(type(teacher) is not type(teachers[0]) for teacher in teachers)
    if is_mixed or not isinstance(teachers[0], (Tensor, Head)):
        types = ", ".join(type(teacher).__name__ for teacher in teachers)
        raise TypeError(f"{name}.teachers must all be logits, or all Heads; got {types}")
    if not isinstance(indices, Tensor) or indices.dtype not in validation.INTEGERS:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name}.indices must be a tensor of an integer dtype; got {got}")


def _check_listed(name: str, log_probs: object, field: str, indices: object, shape: str) -> None:
    """Raise unless log-probabilities and class indices have one shape and accepted dtypes."""
    checks.check_floats(f"{name}.log_probs", log_probs)
    assert isinstance(log_probs, Tensor)
    if not isinstance(indices, Tensor):
        raise TypeError(
            f"{name}.{field} must be a tensor of class indices; got {type(indices).__name__}"
        )
    checks.check_dense(f"{name}.{field}", indices)
    if indices.dtype not in validation.INTEGERS:
        raise TypeError(
            f"{name}.{field} must be class indices of an integer dtype; got {indices.dtype}"
        )
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"{name}.log_probs and {name}.{field} must have the same shape {shape}; got "
            f"{tuple(log_probs.shape)} and {tuple(indices.shape)}"
        )


def _describe(value: Head | TopK | Sampled | Routed) -> str:
    """Return the ``repr`` of a named tuple, with dtype, shape and device in place of a tensor."""

    def describe_field(field: object) -> str:
        if isinstance(field, (tuple, list)) and not isinstance(field, Head):  # a Routed's teachers
            return f"({', '.join(map(describe_field, field))})"
        if not isinstance(field, Tensor):
            return repr(field)
        dtype = str(field.dtype).removeprefix("torch.")
        return f"{dtype} {tuple(field.shape)} on {field.device}"

    fields = ", ".join(
        f"{name}={describe_field(field)}"
        for name, field in zip(value._fields, value, strict=True)
        if field is not None
    )
    return f"{type(value).__name__}({fields})"


_Value = TypeVar("_Value", Head, TopK, Sampled, Routed)


def _from_collated(value: _Value) -> _Value:
    """Replace the last field by a string if default_collate made it a tuple of equal strings."""
    last: Any = value[-1]
    is_collated = isinstance(last, (list, tuple)) and len(set(last)) == 1
    return value._replace(**{value._fields[-1]: last[0]}) if is_collated else value


def _check_when_made(cls: type[_Value], check: Any) -> None:
    """Make the constructor of a named tuple check its fields; typing.NamedTuple has no hook."""
    make = cls.__new__

    def __new__(cls: type[_Value], *args: Any, **kwargs: Any) -> _Value:  # noqa: N807
        value: _Value = make(cls, *args, **kwargs)
        # Skip the check for pytrees without tensors, such as torch.vmap's in_dims.
        if any(isinstance(field, Tensor) for field in value):
            value = _from_collated(value)
            check(value)
        return value

    __new__.__defaults__ = make.__defaults__
    __new__.__wrapped__ = make  # type: ignore[attr-defined] # for inspect.signature
    cls.__new__ = __new__  # type: ignore[assignment]


_check_when_made(Head, check_head)
_check_when_made(TopK, check_topk)
_check_when_made(Sampled, check_sampled)
_check_when_made(Routed, check_routed)
