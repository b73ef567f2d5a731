"""Define the public functions ``loss``, ``terms`` and ``divergences``, and ``KDLoss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from fastkd import linear, reference, validation
from fastkd._core import checks, dispatch, fast_path, native
from fastkd._core.arguments import (
    Student,
    Teacher,
    gather_routed_logits,
    prepare,
    raise_for_kernel_error,
    shift_rows,
)
from fastkd._core.heads import compute_teacher_logits
from fastkd._core.mistakes import hide_catch_all, raise_for_call
from fastkd._core.objective import Options, resolve
from fastkd._core.values import Head, Routed, Sampled, TopK
from fastkd.linear.chunks import Plan
from fastkd.reference import DivergenceName, Ensemble, Reduction, TeacherForm, Terms

__all__ = [
    "DivergenceName",
    "Head",
    "KDLoss",
    "Routed",
    "Sampled",
    "Student",
    "Teacher",
    "Terms",
    "TopK",
    "divergences",
    "loss",
    "terms",
]


@hide_catch_all
def loss(
    student: Student,
    teacher: Teacher,
    labels: Tensor | None = None,
    *extra: NoReturn,
    temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | None = None,
    hard_weight: float | Tensor | None = None,
    soft_weight: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: DivergenceName = "forward_kl",
    mix: float | None = None,
    teacher_form: TeacherForm = "logits",
    teacher_weights: Sequence[float] | None = None,
    ensemble: Ensemble = "probs",
    standardize: bool = False,
    dim: int = -1,
    shift: int = 0,
    inplace: bool = False,
    chunks: Plan | Literal["auto"] = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Compute the distillation loss; ``alpha`` weighs the **hard** term, the cross entropy.

    ::

        loss = alpha * CE(student, labels)
             + (1 - alpha) * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    This is the loss of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"
    (2015). T^2 keeps the size of the soft gradients roughly independent of T. One pass reads the
    logits and writes the gradient. Arithmetic is float64 if student or teacher is float64, else
    float32. The loss stays accurate when the student is close to its teacher. Options such as
    ``divergence`` change the formula. docs/objectives.md lists the options without a kernel, for
    which PyTorch operations compute the loss. :func:`fastkd.explain` describes in words what
    options compute.

    Args:
        student: ``(..., C)`` logits, float64, float32, bfloat16 or float16, or a
            :class:`fastkd.Head`, whose logits are computed in chunks. Slices such as
            ``logits[:, :-1]`` and ``logits[..., :vocab]`` are not copied. ``(N, C, H, W)`` and
            ``(N, C, L)`` with ``dim=1`` are not copied either; their gradient is laid out like the
            logits. Spatial crops and other logits whose classes are not adjacent are copied.
        teacher: one of

            - ``(..., C)`` logits of a dtype that ``student`` may have;
            - a sequence of several teachers' logits, unless ``student`` is a Head;
            - a :class:`fastkd.Head`, whose logits are all computed if ``student`` is a tensor;
            - a :class:`fastkd.TopK`, the log-probabilities of a few classes;
            - a :class:`fastkd.Sampled`, the log-probability of one sampled class;
            - a :class:`fastkd.Routed`, one of several teachers for each row.

            The teacher gets no gradient: logits, log-probabilities or hidden states that require
            grad raise an error.
            Tensors made under ``torch.inference_mode()`` are copied, since autograd cannot save
            them.
        labels: ``(...)`` class indices of any integer dtype, or ``(..., C)`` probabilities (mixup,
            cutmix), as in :func:`torch.nn.functional.cross_entropy`. None: the soft term alone,
            with weight 1 unless ``soft_weight`` is given.
        temperature: T, from 1e-18 to 1e18, or a tensor, 0-d or of shape ``(...)`` with one T for
            each row. A tensor that requires grad gets its gradient. Default 2; with a TopK or
            Sampled, 1.
        teacher_temperature: the teacher's temperature: a number from 1e-18 to 1e18, or a tensor,
            0-d or ``(...)``, which gets its gradient if it requires grad. Default T, or 1 if
            ``teacher_form`` is not ``"logits"``.
        alpha: weight of the hard term, in [0, 1]; the soft term weighs ``1 - alpha``. Default 0.5
            with labels. Without labels, only 0.0 is accepted: the soft term alone.
        hard_weight: weight of the hard term, instead of ``alpha``: a number, or a tensor, 0-d or
            ``(...)`` with one weight for each row, which changes no denominator. Default 1 if
            ``soft_weight`` is given.
        soft_weight: weight of the soft term: a number, or a tensor, 0-d or ``(...)`` with one
            weight for each row, which changes no denominator. Default 1 if ``hard_weight`` is
            given.
        ignore_index: rows with this label add nothing to **either** term and get a zero gradient;
            their logits may hold anything, NaN too. Labels that are probabilities ignore no row.
            Default -100.
        reduction: ``"mean"`` divides both terms by the number of rows that are not ignored, and is
            0 if every row is ignored. ``"sum"`` adds the rows. ``"none"`` returns one loss for each
            row, ``(...)``; the backward pass of ``"none"`` reads the logits again, because the
            forward pass keeps no gradient. Default ``"mean"``.
        label_smoothing: smoothing of the labels in the hard term, in [0, 1], as in
            :func:`torch.nn.functional.cross_entropy`. Default 0.
        class_weight: ``(C,)`` weights of the classes in the hard term, the ``weight`` of
            :func:`torch.nn.functional.cross_entropy`. ``"mean"`` then divides the hard term by
            the sum of the labels' weights, as ``cross_entropy`` does. If labels are probabilities,
            ``"mean"`` still divides by the number of rows.
        normalizer: the divisor of ``"mean"`` for both terms, instead of the number of rows. A
            positive number, or a tensor with one element, which is never synchronized on CUDA. Pass
            the global token count under gradient accumulation. 0 is accepted if every row is
            ignored; the loss is then 0.
        divergence: the soft term; one of :func:`fastkd.divergences`. Default ``"forward_kl"``.
        mix: the parameter of some divergences, with its default in parentheses here.
            ``"symmetric_kl"``: weight of the forward KL (0.5). ``"jsd"``: weight of the teacher
            (0.5). ``"skewed_forward_kl"``: the teacher's share of the mixture (0.1).
            ``"skewed_reverse_kl"``: the student's share of the mixture (0.1). ``"dkd"``: weight of
            the KL of the classes other than the label (8).
        teacher_form: ``"logits"``, or ``"log_probs"`` or ``"probs"`` of a teacher that is softened
            already. Probabilities need not sum to 1 exactly: rows are renormalized. Default
            ``"logits"``.
        teacher_weights: a positive number for each of several teachers, divided by their sum.
            Default: equal weights.
        ensemble: whether several teachers are mixed in ``"probs"`` (after softening) or in
            ``"logits"``. Default ``"probs"``.
        standardize: subtract each row's mean from the logits of student and teacher, and divide by
            the row's standard deviation (unbiased, + 1e-7), before the soft term. From Sun et al.,
            "Logit Standardization in Knowledge Distillation" (CVPR 2024). Default False.
        dim: the dimension of the classes: -1, or 1 for logits ``(N, C, d1, ...)`` with labels
            ``(N, d1, ...)``. Default -1.
        shift: how many positions after a row its label lies. Causal language models need 1: their
            logits at position i predict the token at position i + 1. With ``shift=1``, pass all
            positions of student, teacher and labels, as the models and the data loader return
            them. Row i is then compared with

            - label i + 1;
            - row i of a teacher's logits, Head or Routed;
            - entry i + 1 of a TopK or Sampled. Inference servers return entry i + 1 for token
              i + 1; ``torch.topk`` of logits and a cached teacher do **not**.

            The last row of each sequence has no label and is ignored. Options with one number for
            each row are indexed like the labels. Logits are not copied. Default 0: labels are
            aligned with the rows already.
        inplace: write the gradient over the student's logits, which saves a tensor of their size.
            ``student`` holds no logits afterwards, and using it in a later backward pass is an
            error. The option is ignored without gradients, under torch.compile, under function
            transforms and on devices without kernels. Other calls that no single-pass kernel
            computes raise an error. Default False.
        chunks: how many of a Head's logits are in memory at a time: ``"auto"``, or a result of
            :func:`fastkd.chunks.plan`, which bounds the memory. Default ``"auto"``.

    A TopK supports labels that are class indices, and the divergences of probabilities except
    ``"dkd"``. A TopK supports none of ``teacher_temperature``, ``teacher_form``,
    ``teacher_weights``, ``ensemble``, ``standardize``, ``class_weight``, ``dim`` and ``inplace``. A
    Sampled supports the options that a TopK supports, except ``divergence`` and ``mix``.

    With a Head as student, temperature and weights get no gradient. A Head as student supports none
    of ``teacher_form``, ``teacher_weights``, ``ensemble``, ``dim`` and ``inplace``; with a Routed
    teacher it does not support ``class_weight`` either. If labels are class indices, a call with
    a Head as student synchronizes CUDA, to find the rows that are not ignored. During CUDA
    graph capture, all rows are computed; the hidden states of ignored rows must then be finite.

    Returns:
        A 0-d tensor, or ``(...)`` with ``reduction="none"``. The dtype is float64 if student or
        teacher is float64, else float32. A logit of -inf masks its class. For the forward KL, a
        class masked by the teacher contributes 0. A class masked only by the student makes the loss
        +inf with a finite gradient. A row with NaN or +inf among its logits, or of -inf alone,
        gives NaN.

        With a TopK, the rules for masked classes hold for listed classes. With ``tail="ghost"``,
        the teacher's extra class has probability 0 if no unmasked class remains, or if the
        listed probabilities sum to 1 or more. The listed probabilities are then divided by their
        sum. The reverse and the symmetric KL would be infinite for a sum of 1 or more. For these
        two divergences, the extra class therefore has a probability of at least 2^-24 (2^-53 in
        float64) if an unmasked class remains.

    Raises:
        TypeError, ValueError: for invalid arguments, before anything is computed. The
            message names the argument, what was given, and what is accepted. A label or an index
            out of range, and an invalid list, raise on the CPU. CUDA is not synchronized for this
            check: a row with an invalid label, index or list gets a NaN loss and gradient, and
            :func:`fastkd.check_inputs` reports the first invalid label. A list is invalid if a
            class is out of range or listed twice, or if its probabilities sum to more than 1.1.

    Example:
        >>> import torch, fastkd
        >>> student = torch.randn(8, 10, requires_grad=True)
        >>> teacher, labels = torch.randn(8, 10), torch.randint(10, (8,))
        >>> loss = fastkd.loss(student, teacher, labels, temperature=4.0, alpha=0.1)
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([8, 10])
        >>> top = fastkd.TopK(*torch.log_softmax(teacher, -1).topk(3))
        >>> fastkd.loss(student, top, labels).shape
        torch.Size([])
        >>> hidden, layer = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 10)
        >>> head = fastkd.Head(hidden, layer.weight, layer.bias)
        >>> fastkd.loss(head, teacher, labels).backward()
        >>> layer.weight.grad.shape
        torch.Size([10, 16])
    """
    if extra or unknown:
        takes = "from 2 to 3 positional arguments"
        raise_for_call("loss", takes, 3 + len(extra), unknown, Options._fields)
    return _compute(
        False, student, teacher, labels, temperature, teacher_temperature, alpha, hard_weight,
        soft_weight, ignore_index, reduction, label_smoothing, class_weight, normalizer, divergence,
        mix, teacher_form, teacher_weights, ensemble, standardize, dim, shift, inplace, chunks,
    )  # fmt: skip


@hide_catch_all
def terms(
    student: Student,
    teacher: Teacher,
    labels: Tensor | None = None,
    *extra: NoReturn,
    temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | None = None,
    hard_weight: float | Tensor | None = None,
    soft_weight: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: DivergenceName = "forward_kl",
    mix: float | None = None,
    teacher_form: TeacherForm = "logits",
    teacher_weights: Sequence[float] | None = None,
    ensemble: Ensemble = "probs",
    standardize: bool = False,
    dim: int = -1,
    shift: int = 0,
    inplace: bool = False,
    chunks: Plan | Literal["auto"] = "auto",
    **unknown: NoReturn,
) -> Terms:
    """Compute the loss and its terms for logging; the arguments are those of :func:`loss`.

    Options with a kernel take one pass over the logits. ``class_weight`` and probabilities as
    labels need extra passes, and a TopK or Sampled needs one more pass over the student's logits.

    Returns:
        A :class:`fastkd.Terms`, whose fields are reduced like the loss. ``loss`` alone has a
        gradient. With a TopK, ``teacher_entropy`` is the entropy of the distribution that the
        divergence compares. With a Sampled, ``teacher_entropy`` and ``agreement`` are NaN, because
        one class does not determine them.

    Example:
        >>> import torch, fastkd
        >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
        >>> fastkd.terms(student, teacher, torch.randint(10, (8,)))._fields[:5]
        ('loss', 'hard', 'soft', 'student_entropy', 'teacher_entropy')
    """
    if extra or unknown:
        takes = "from 2 to 3 positional arguments"
        raise_for_call("terms", takes, 3 + len(extra), unknown, Options._fields)
    packed = _compute(
        True, student, teacher, labels, temperature, teacher_temperature, alpha, hard_weight,
        soft_weight, ignore_index, reduction, label_smoothing, class_weight, normalizer, divergence,
        mix, teacher_form, teacher_weights, ensemble, standardize, dim, shift, inplace, chunks,
    )  # fmt: skip
    total, *logged = packed.unbind(0)
    if shift and labels is None:  # shift_labels() added labels that the caller did not pass
        logged[0] = torch.zeros_like(logged[0])
    if not isinstance(teacher, (TopK, Sampled)):  # the masses of a dense teacher are 1
        rows = student.hidden[..., 0] if isinstance(student, Head) else student.select(dim, 0)
        one, valid = torch.ones_like(rows, dtype=total.dtype), None
        if labels is not None and not labels.is_floating_point():
            valid = validation.to_int64(labels).ne(ignore_index)
        if shift:
            valid = shift_rows(one.bool() if valid is None else valid, shift, False)
        logged += [reference.reduce(one, valid, reduction, normalizer)] * 2
    return Terms(total, *(term.detach() for term in logged))


def divergences() -> tuple[str, ...]:
    """Return the names that the option ``divergence`` accepts."""
    return tuple(reference.DIVERGENCES)


class KDLoss(nn.Module):
    """Compute :func:`fastkd.loss` as a module; ``alpha`` weighs the **hard** term.

    Options are those of :func:`fastkd.loss`, and are checked when the module is made. ``forward``
    and :meth:`terms` take ``(student, teacher, labels=None)``. Options that are tensors are
    buffers, which follow the module to another device. A ``temperature`` or a weight that is an
    ``nn.Parameter`` becomes a parameter of the module. Options are attributes that may be assigned:
    ``criterion.temperature = 2.0``.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.KDLoss(temperature=4.0, alpha=0.1)
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(0.1099)
    """

    @hide_catch_all
    def __init__(
        self,
        *extra: NoReturn,
        temperature: float | Tensor | None = None,
        teacher_temperature: float | Tensor | None = None,
        alpha: float | None = None,
        hard_weight: float | Tensor | None = None,
        soft_weight: float | Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        divergence: DivergenceName = "forward_kl",
        mix: float | None = None,
        teacher_form: TeacherForm = "logits",
        teacher_weights: Sequence[float] | None = None,
        ensemble: Ensemble = "probs",
        standardize: bool = False,
        dim: int = -1,
        shift: int = 0,
        inplace: bool = False,
        chunks: Plan | Literal["auto"] = "auto",
        **unknown: NoReturn,
    ) -> None:
        """Check and store the options."""
        if extra or unknown:
            takes = "no positional arguments"
            raise_for_call("KDLoss", takes, len(extra), unknown, Options._fields)
        super().__init__()
        options = Options(
            temperature, teacher_temperature, alpha, hard_weight, soft_weight, ignore_index,
            reduction, label_smoothing, class_weight, normalizer, divergence, mix, teacher_form,
            teacher_weights, ensemble, standardize, dim, shift, inplace, chunks,
        )  # fmt: skip
        _check_options(options)
        self._static_options = options  # _set_option() puts None in the place of each tensor
        for name, value in options._asdict().items():
            if isinstance(value, Tensor):
                self._set_option(name, value)

    def forward(self, student: Student, teacher: Teacher, labels: Tensor | None = None) -> Tensor:
        """Compute the loss, as :func:`fastkd.loss` does."""
        return _compute(False, student, teacher, labels, *self._current_options())

    def terms(self, student: Student, teacher: Teacher, labels: Tensor | None = None) -> Terms:
        """Compute the loss and its terms, as :func:`fastkd.terms` does."""
        return terms(student, teacher, labels, **self._current_options()._asdict())

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return self._current_options().nondefault

    def _current_options(self) -> Options:
        if not self._parameters and not self._buffers:
            return self._static_options
        tensors: Any = {**self._parameters, **self._buffers}
        return self._static_options._replace(**tensors)

    def _set_option(self, name: str, value: object) -> None:
        """Store an option as a parameter, a buffer or a field, without a check."""
        # register_parameter() and register_buffer() refuse the name of an existing attribute, and
        # every option is an attribute.
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, Tensor):
            self._buffers[name] = value
            self._non_persistent_buffers_set.add(name)
        non_tensor = None if isinstance(value, Tensor) else value
        change: Any = {name: non_tensor}
        self._static_options = self._static_options._replace(**change)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option after checking all options together, or set another attribute."""
        if name not in Options._fields:
            return super().__setattr__(name, value)
        _check_options(self._current_options()._replace(**{name: value}))
        self._set_option(name, value)

    def __getattr__(self, name: str) -> Any:
        """Return an option, or the attribute of ``nn.Module`` with this name."""
        if name not in Options._fields or name in self._parameters or name in self._buffers:
            return super().__getattr__(name)
        return getattr(self._static_options, name)

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults, as text."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def check_has_labels(criterion: KDLoss, labels: object, remedy: str = "") -> None:
    """Raise if a trainer's batch has no labels, unless the options ask for the soft term alone.

    ``remedy``: the end of the message.
    """
    weights = criterion.alpha, criterion.hard_weight
    if labels is None and not any(isinstance(x, (int, float)) and x == 0 for x in weights):
        raise ValueError(
            "labels must not be None: the loss has a hard term. Use KDLoss(alpha=0.0) for the soft "
            f"term alone{remedy}"
        )


def _check_options(options: Options) -> None:
    resolve(options, has_labels=True, teachers=None)
    linear.chunks.check_plan(options.chunks)


def _compute(
    with_terms: bool, student: Student, teacher: Teacher, labels: Tensor | None, *values: Any
) -> Tensor:
    """Compute the loss, or all terms stacked, from the fields of ``Options`` (``values``)."""
    if not native.is_dynamo_compiling():
        out = fast_path.run(with_terms, student, teacher, labels, values)
        if out is not None:
            return out
    options = Options(*values)
    if isinstance(student, Head):
        if isinstance(teacher, Routed):
            return linear.compute_routed(student, teacher, labels, options, with_terms)
        return linear.compute(student, teacher, labels, options, with_terms)
    if isinstance(teacher, Routed):
        teacher = gather_routed_logits(student, teacher, options.dim)
    if isinstance(teacher, Head):
        checks.check_student(student, options.dim)
        teacher = compute_teacher_logits(teacher, "teacher", student.device)
    call = prepare(student, teacher, labels, options)
    try:
        return dispatch.compute(call, with_terms)
    except RuntimeError as error:
        raise_for_kernel_error(error, call)
        raise
