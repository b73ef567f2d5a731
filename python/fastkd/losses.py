"""The public loss: one function, its terms, and a module with the same options."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastkd import checks, ops
from fastkd.reference import Terms


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    alpha: float | None = None,
    hard_weight: float | None = None,
    soft_weight: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
    inplace: bool = False,
    teacher_grad: Literal["error", "ignore"] = "error",
) -> Tensor:
    """Distillation loss in one fused pass; ``alpha`` weighs the **hard** term, the cross entropy.

    ::

        loss = alpha * CE(student, labels)
             + (1 - alpha) * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    This is the loss of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"
    (2015); T^2 keeps the soft gradients' size independent of T. Both logits are read once and the
    gradient is written in the same pass. Arithmetic is float32 inside whatever the inputs are
    (float64 if either is), and free of cancellation when the student is close to its teacher.

    Args:
        student_logits: ``(..., C)`` float64, float32, bfloat16 or float16. Slices such as
            ``logits[:, :-1]`` and ``logits[..., :vocab]`` are used where they are; only
            non-adjacent classes cost a copy.
        teacher_logits: ``(..., C)``, any of the same dtypes, not necessarily the student's.
        labels: ``(...)`` class indices of any integer dtype. None: the soft term alone, with weight
            1.
        temperature: T > 0, or a tensor of shape ``(...)`` with one T for each row. Default 2.
        alpha: weight of the hard term in [0, 1]; the soft term weighs ``1 - alpha``. Default 0.5
            with labels.
        hard_weight: weight of the hard term, given instead of ``alpha``; 1 if only ``soft_weight``
            is given.
        soft_weight: weight of the soft term, given instead of ``alpha``; 1 if only ``hard_weight``
            is given.
        ignore_index: rows with this label count nothing in **both** terms and get a zero gradient;
            their logits may hold anything, NaN too. Default -100.
        reduction: ``"mean"`` divides both terms by the number of rows that are not ignored (0 if
            there are none); ``"sum"``; ``"none"`` gives one loss for each row, ``(...)``, and its
            backward pass reads the logits again instead of keeping a gradient. Default ``"mean"``.
        label_smoothing: of the hard term, in [0, 1], as :func:`torch.nn.functional.cross_entropy`
            has it.
        normalizer: what ``"mean"`` divides by instead of the number of rows: a positive number, or
            a tensor with one element (never waited for on CUDA). Pass the global token count under
            gradient accumulation.
        divergence: the soft term; one of :func:`fastkd.divergences`. Default ``"forward_kl"``.
        inplace: write the gradient over the student's logits, which saves a tensor of their size.
            They hold no logits afterwards, and using them in a later backward pass is an error.
            Without effect where no gradient is asked for, under torch.compile and under function
            transforms.
        teacher_grad: what to do with a teacher that requires grad, since it gets none: ``"error"``
            or ``"ignore"``.

    Returns:
        A 0-d tensor, or ``(...)`` with ``reduction="none"``, float32 (float64 if either input is
        float64). Masked classes (logits of -inf) contribute what mathematics says: nothing where
        the teacher masks, +inf with a finite gradient where only the student does. A row with NaN
        or +inf among its logits gives NaN.

    Raises:
        TypeError, ValueError: for arguments that are not as above; the message names the argument,
            what was given, and what is accepted. A label out of range raises on the CPU; on CUDA,
            which is never waited for, it makes that row's loss and gradient NaN
            (:func:`fastkd.check_inputs` finds it).

    Example:
        >>> import torch, fastkd
        >>> student = torch.randn(8, 10, requires_grad=True)
        >>> teacher, labels = torch.randn(8, 10), torch.randint(10, (8,))
        >>> loss = fastkd.loss(student, teacher, labels, temperature=4.0, alpha=0.1)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([8, 10])
    """
    return _call(
        student_logits, teacher_logits, labels, temperature, alpha, hard_weight, soft_weight,
        ignore_index, reduction, label_smoothing, normalizer, divergence, inplace, teacher_grad,
        False,
    )  # fmt: skip


def terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    alpha: float | None = None,
    hard_weight: float | None = None,
    soft_weight: float | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
    inplace: bool = False,
    teacher_grad: Literal["error", "ignore"] = "error",
) -> Terms:
    """The loss and what is worth logging about it, from one pass; arguments as in :func:`loss`.

    Returns:
        A named tuple of tensors, each reduced like the loss: ``loss``, ``hard`` (cross entropy),
        ``soft`` (the divergence without weight and T^2), ``student_entropy`` and
        ``teacher_entropy`` (nats, at temperature T) and ``agreement`` (share of rows on whose most
        probable class both agree). Only ``loss`` carries a gradient. Nothing waits for the device.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
        >>> fastkd.terms(student, teacher, torch.randint(10, (8,)))._fields
        ('loss', 'hard', 'soft', 'student_entropy', 'teacher_entropy', 'agreement')
    """
    packed = _call(
        student_logits, teacher_logits, labels, temperature, alpha, hard_weight, soft_weight,
        ignore_index, reduction, label_smoothing, normalizer, divergence, inplace, teacher_grad,
        True,
    )  # fmt: skip
    total, *logged = packed.unbind(0)
    return Terms(total, *(term.detach() for term in logged))


def divergences() -> tuple[str, ...]:
    """The names that ``divergence=`` accepts."""
    return ops.DIVERGENCES


class KDLoss(nn.Module):
    """:func:`fastkd.loss` as a module; ``alpha`` weighs the **hard** term.

    Options are those of :func:`fastkd.loss`, checked when the module is made. ``forward`` takes
    ``(student_logits, teacher_logits, labels=None)``, and :meth:`terms` the same. Without labels
    the soft term counts alone, whatever ``alpha`` is.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.KDLoss(temperature=4.0, alpha=0.1)
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(0.1099)
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 2.0,
        alpha: float | None = None,
        hard_weight: float | None = None,
        soft_weight: float | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
        normalizer: float | Tensor | None = None,
        divergence: str = "forward_kl",
        inplace: bool = False,
        teacher_grad: Literal["error", "ignore"] = "error",
    ) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        _weights(alpha, hard_weight, soft_weight, True)
        if not isinstance(temperature, Tensor):
            checks.number("temperature", temperature, 0.0, math.inf, open_low=True)
        checks.one_of("reduction", reduction, ops.REDUCTIONS)
        checks.one_of("divergence", divergence, ops.DIVERGENCES)
        checks.one_of("teacher_grad", teacher_grad, ("error", "ignore"))
        checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "alpha": alpha,
            "hard_weight": hard_weight,
            "soft_weight": soft_weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "normalizer": normalizer,
            "divergence": divergence,
            "inplace": inplace,
            "teacher_grad": teacher_grad,
        }

    def _options(self, labels: Tensor | None) -> dict[str, Any]:
        if labels is not None:
            return self.options
        return {**self.options, "alpha": None, "hard_weight": None}

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of :func:`fastkd.loss`."""
        return loss(student_logits, teacher_logits, labels, **self._options(labels))

    def terms(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Terms:
        """The loss and its terms, as :func:`fastkd.terms` gives them."""
        return terms(student_logits, teacher_logits, labels, **self._options(labels))

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(
            f"{name}={value!r}" for name, value in self.options.items() if value is not None
        )


def _weights(
    alpha: float | None, hard: float | None, soft: float | None, has_labels: bool
) -> tuple[float, float]:
    """(hard_weight, soft_weight) from the two ways to give them."""
    if hard is None and soft is None:
        if not has_labels:
            if alpha is None:
                return 0.0, 1.0
            raise ValueError(
                f"alpha weighs the hard term, which needs labels; got alpha={alpha!r} and "
                "labels=None. Leave alpha out (the soft term alone), or pass labels"
            )
        weight = 0.5 if alpha is None else checks.number("alpha", alpha, 0.0, 1.0)
        return weight, 1.0 - weight
    if alpha is not None:
        raise ValueError(
            f"alpha cannot be given together with hard_weight or soft_weight; got alpha={alpha!r}, "
            f"hard_weight={hard!r}, soft_weight={soft!r}"
        )
    if not has_labels and hard is not None:
        raise ValueError(f"hard_weight needs labels; got hard_weight={hard!r} and labels=None")
    return (
        1.0 if hard is None else checks.number("hard_weight", hard, 0.0, math.inf),
        1.0 if soft is None else checks.number("soft_weight", soft, 0.0, math.inf),
    )


def _temperatures(value: Tensor, student: Tensor, acc: torch.dtype) -> Tensor:
    """One temperature for each row, as the ops take them."""
    if not value.is_floating_point():
        raise TypeError(
            f"temperature must be a number or a floating-point tensor; got {value.dtype}"
        )
    if value.requires_grad:
        raise ValueError(
            "temperature gets no gradient; got a tensor that requires grad (.detach() it)"
        )
    if value.dim() == 0:
        value = value.to(student.device).expand(student.shape[:-1])
    checks.rows(value, "temperature", student)
    return value.to(acc).reshape(-1)


def _denominator(value: Tensor, student: Tensor, acc: torch.dtype) -> Tensor:
    """The tensor that the mean divides by, as the ops take it."""
    if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
        raise ValueError(
            "normalizer must be a positive number or a real tensor with one element; got "
            f"{value.dtype} of shape {tuple(value.shape)}"
        )
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not value.item() > 0:
        raise ValueError(f"normalizer must be positive; got {value.item()}")
    return value.detach().to(device=student.device, dtype=acc).reshape(())


def _call(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    alpha: float | None,
    hard_weight: float | None,
    soft_weight: float | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    normalizer: float | Tensor | None,
    divergence: str,
    inplace: bool,
    teacher_grad: str,
    with_terms: bool,
) -> Tensor:
    """Runs the op; what only the data could tell (on the CPU) becomes an error that explains."""
    try:
        return _run(
            student, teacher, labels, temperature, alpha, hard_weight, soft_weight, ignore_index,
            reduction, label_smoothing, normalizer, divergence, inplace, teacher_grad, with_terms,
        )  # fmt: skip
    except RuntimeError:
        if not torch.compiler.is_compiling() and student.device.type == "cpu":
            checks.check_rows(student, labels, ignore_index, temperature)
        raise


def _run(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    alpha: float | None,
    hard_weight: float | None,
    soft_weight: float | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    normalizer: float | Tensor | None,
    divergence: str,
    inplace: bool,
    teacher_grad: str,
    with_terms: bool,
) -> Tensor:
    """Checks the arguments, as far as that needs no data, and runs the op."""
    if (
        ops.EAGER is not None
        and hard_weight is None
        and soft_weight is None
        and normalizer is None
        and not inplace
        and divergence in ops.DIVERGENCES
        and not torch.compiler.is_compiling()
    ):
        out = ops.EAGER.loss(
            student, teacher, labels, with_terms, ops.CUDA_KERNELS, temperature, alpha,
            ignore_index, reduction, label_smoothing, ops.DIVERGENCES.index(divergence),
        )  # fmt: skip
        if out is not None:
            return out  # type: ignore[no-any-return]
    checks.logits(student, teacher)
    if (
        teacher.requires_grad
        and checks.one_of("teacher_grad", teacher_grad, ("error", "ignore")) == 0
    ):
        raise ValueError(
            "teacher_logits requires grad, but the loss gives the teacher none: compute it under "
            'torch.no_grad(), .detach() it, or pass teacher_grad="ignore"'
        )
    if labels is not None:
        checks.indices(labels, student)
        if labels.dtype is not torch.int64:
            labels = labels.long()
    hard, soft = _weights(alpha, hard_weight, soft_weight, labels is not None)
    acc = torch.float32
    if student.dtype is torch.float64 or teacher.dtype is torch.float64:
        acc = torch.float64
    temperatures = denominator = None
    if isinstance(temperature, Tensor):
        temperatures = _temperatures(temperature, student, acc)
        temperature = 1.0
    else:
        temperature = checks.number("temperature", temperature, 0.0, math.inf, open_low=True)
    reduction_index = checks.one_of("reduction", reduction, ops.REDUCTIONS)
    if normalizer is None:
        normalizer = 0.0
    elif reduction != "mean":
        raise ValueError(f'normalizer goes with reduction="mean"; got reduction={reduction!r}')
    elif isinstance(normalizer, Tensor):
        denominator = _denominator(normalizer, student, acc)
        normalizer = 0.0
    else:
        normalizer = checks.number("normalizer", normalizer, 0.0, math.inf, open_low=True)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
    settings = ops.Settings(
        temperature,
        hard,
        soft,
        checks.number("label_smoothing", label_smoothing, 0.0, 1.0),
        ignore_index,
        checks.one_of("divergence", divergence, ops.DIVERGENCES),
        reduction_index,
        normalizer,
        with_terms,
    )
    if inplace:
        _check_inplace(student, teacher, reduction)
    out = ops.apply(student, teacher.detach(), labels, temperatures, denominator, settings, inplace)
    if reduction == "none" and student.dim() != 2:
        out = out.reshape((*out.shape[:-1], *student.shape[:-1]))
    return out


def _check_inplace(student: Tensor, teacher: Tensor, reduction: str) -> None:
    if reduction == "none":
        raise ValueError(
            'inplace=True needs reduction="mean" or "sum"; got "none", which keeps no gradient'
        )
    if student.requires_grad and student.is_leaf:
        raise ValueError(
            "inplace=True writes the gradient over student_logits, which cannot be a leaf that "
            "requires grad"
        )
    if torch.compiler.is_compiling():
        return  # it has no effect
    if student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        raise ValueError("inplace=True needs student_logits and teacher_logits in different memory")
