"""The public loss: one function, its terms, and a module with the same options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastkd import reference
from fastkd._core import checks, dispatch, native, shapes
from fastkd._core.autograd import is_transformed
from fastkd._core.fast_path import IMMUTABLE, is_eligible
from fastkd._core.module import OptionsModule
from fastkd._core.objective import TEACHER_GRADS, Objective, fit, resolve
from fastkd.reference import Terms

P = ParamSpec("P")
R = TypeVar("R")
Teacher = Tensor | Sequence[Tensor]


def _compute(
    with_terms: bool,
    student_logits: Tensor,
    teacher_logits: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | None = None,
    hard_weight: float | Tensor | None = None,
    soft_weight: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    divergence: str = "forward_kl",
    mix: float | None = None,
    teacher_form: Literal["logits", "log_probs", "probs"] = "logits",
    teacher_weights: Sequence[float] | None = None,
    ensemble: Literal["probs", "logits"] = "probs",
    standardize: bool = False,
    classes: int | None = None,
    dim: int = -1,
    inplace: bool = False,
    teacher_grad: Literal["error", "ignore"] = "error",
) -> Tensor:
    """Compute the loss, or all terms stacked.

    Other functions take the list of options and their defaults from this signature.
    """
    if (
        not native.is_dynamo_compiling()
        and class_weight is None
        and teacher_weights is None
        and classes is None
        and teacher_form == "logits"
        and ensemble == "probs"
        and standardize is False
        and type(dim) is int
        and dim == -1
        and inplace is False
        and teacher_grad in TEACHER_GRADS
    ):
        # On a RuntimeError the slow path checks the call, fails likewise, and explains why.
        try:
            if (
                is_eligible(student_logits, teacher_logits, labels)
                and student_logits.shape == teacher_logits.shape  # type: ignore[union-attr]
            ):
                call = _fast_call(
                    with_terms, labels is not None, temperature, teacher_temperature, alpha,
                    hard_weight, soft_weight, ignore_index, reduction, label_smoothing, normalizer,
                    divergence, mix,
                )  # fmt: skip
                if call is not None:
                    return call(student_logits, teacher_logits, labels)
        except RuntimeError:
            pass
    options = dict(
        temperature=temperature, teacher_temperature=teacher_temperature, alpha=alpha,
        hard_weight=hard_weight, soft_weight=soft_weight, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing, class_weight=class_weight,
        normalizer=normalizer, divergence=divergence, mix=mix, teacher_form=teacher_form,
        teacher_weights=teacher_weights, ensemble=ensemble, standardize=standardize,
        classes=classes, dim=dim, inplace=inplace, teacher_grad=teacher_grad,
    )  # fmt: skip
    return _check_and_compute(student_logits, teacher_logits, labels, options, with_terms)


def _fast_call(*options: Any) -> Callable[..., Tensor] | None:
    """Return the op with these options bound (:func:`_prepare`), or None for the slow path."""
    if not IMMUTABLE.issuperset(map(type, options)):
        return None
    try:
        return _prepare(native.EAGER, *options)
    except TypeError:  # an option of a wrong type, which the slow path reports
        return None


@functools.lru_cache(maxsize=128, typed=True)
def _prepare(
    _eager: Any, with_terms: bool, has_labels: bool, *values: Any
) -> Callable[..., Tensor] | None:
    """Check the options and bind them to the op; return None if the fast path lacks one of them.

    ``_eager`` is only part of the cache key: autograd in C++ and in Python have different calls.
    """
    names = (
        "temperature", "teacher_temperature", "alpha", "hard_weight", "soft_weight", "ignore_index",
        "reduction", "label_smoothing", "normalizer", "divergence", "mix",
    )  # fmt: skip
    options = {**DEFAULTS, **dict(zip(names, values, strict=True))}
    objective = resolve(options, has_labels=has_labels, teachers=1)
    fused = objective.divergence in dispatch.FUSED and objective.divergence != "dkd"
    if not fused or objective.reduction == "none" or objective.normalizer == 0:
        return None
    return dispatch.prepare_call(objective, with_terms)


def _options_of(
    function: Callable[Concatenate[bool, P], object],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Says, to type checkers and to help(), that the decorated one takes the same arguments."""
    parameters = list(inspect.signature(function).parameters.values())[1:]

    def decorate(decorated: Callable[..., R]) -> Callable[P, R]:
        returned = inspect.signature(decorated).return_annotation
        decorated.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            parameters, return_annotation=returned
        )
        return decorated

    return decorate


def _keywords_of(
    function: Callable[Concatenate[bool, Tensor, Teacher, Tensor | None, P], object],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """The same for a method that takes the options alone."""
    all_of_them = inspect.signature(function).parameters.values()

    def decorate(method: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        options = [each for each in all_of_them if each.kind is each.KEYWORD_ONLY]
        method.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [itself, *options], return_annotation="None"
        )
        return method

    return decorate


@_options_of(_compute)
def loss(*args: Any, **options: Any) -> Tensor:
    """Distillation loss in one fused pass; ``alpha`` weighs the **hard** term, the cross entropy.

    ::

        loss = alpha * CE(student, labels)
             + (1 - alpha) * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    This is the loss of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network"
    (2015); T^2 keeps the soft gradients' size independent of T. Both logits are read once and the
    gradient is written in the same pass. Arithmetic is float32 inside whatever the inputs are
    (float64 if either is), and free of cancellation when the student is close to its teacher.
    ``divergence=`` and the options below put other objectives in the place of the KL; those that
    have no kernel yet are computed by PyTorch operations (``docs/objectives.md`` says which), and
    :func:`fastkd.explain` says in words what a set of options means.

    Args:
        student_logits: ``(..., C)`` float64, float32, bfloat16 or float16. Slices such as
            ``logits[:, :-1]`` and ``logits[..., :vocab]`` are used where they are, and so are
            ``(N, C, H, W)`` and ``(N, C, L)`` with ``dim=1``, whose gradient is laid out like
            them. A copy is what logits cost of which neither classes nor pixels are adjacent, and
            spatial crops.
        teacher_logits: ``(..., C)``, any of the same dtypes, not necessarily the student's; or a
            sequence of such tensors, several teachers. What was made under
            ``torch.inference_mode()`` is copied, since autograd cannot save it.
        labels: ``(...)`` class indices of any integer dtype, or ``(..., C)`` probabilities (mixup,
            cutmix), as :func:`torch.nn.functional.cross_entropy` has them. None: the soft term
            alone, with weight 1.
        temperature: T, from 1e-18 to 1e18, or a tensor, 0-d or of shape ``(...)`` with one T for
            each row. A tensor that requires grad gets its gradient. Default 2.
        teacher_temperature: the teacher's own temperature, likewise. Default T, or 1 if
            ``teacher_form`` says that the teacher is softened already.
        alpha: weight of the hard term in [0, 1]; the soft term weighs ``1 - alpha``. Default 0.5
            with labels.
        hard_weight: weight of the hard term, given instead of ``alpha``: a number, or a tensor
            ``(...)`` with one for each row, which changes no denominator; 1 if only ``soft_weight``
            is given.
        soft_weight: weight of the soft term, likewise; 1 if only ``hard_weight`` is given.
        ignore_index: rows with this label count nothing in **both** terms and get a zero gradient;
            their logits may hold anything, NaN too. Default -100. Probabilities have none.
        reduction: ``"mean"`` divides both terms by the number of rows that are not ignored (0 if
            there are none); ``"sum"``; ``"none"`` gives one loss for each row, ``(...)``, and its
            backward pass reads the logits again instead of keeping a gradient. Default ``"mean"``.
        label_smoothing: of the hard term, in [0, 1], as :func:`torch.nn.functional.cross_entropy`
            has it; it needs labels.
        class_weight: ``(C,)`` weights of the classes in the hard term, the ``weight`` of
            :func:`torch.nn.functional.cross_entropy`. As there, ``"mean"`` then divides the hard
            term by the sum of the labels' weights (by the rows if labels are probabilities).
        normalizer: what ``"mean"`` divides both terms by instead: a positive number, or a tensor
            with one element (never waited for on CUDA). Pass the global token count under gradient
            accumulation. 0 is accepted if every row is ignored; the loss is then 0.
        divergence: the soft term; one of :func:`fastkd.divergences`. Default ``"forward_kl"``.
        mix: the one number that some divergences have: ``"symmetric_kl"``, weight of the forward KL
            (default 0.5); ``"jsd"``, weight of the teacher (0.5); ``"skewed_forward_kl"`` and
            ``"skewed_reverse_kl"``, share of the other side (0.1); ``"dkd"``, weight of the classes
            other than the label (8).
        teacher_form: what ``teacher_logits`` holds: ``"logits"``, or ``"log_probs"`` or ``"probs"``
            of a teacher that is softened already. They need not sum to 1 exactly: rows are
            renormalised. Default ``"logits"``.
        teacher_weights: a positive number for each of several teachers, divided by their sum.
            Default equal ones.
        ensemble: whether several teachers are mixed in ``"probs"`` (after softening) or in
            ``"logits"``. Default ``"probs"``.
        standardize: take each row's mean off the logits of both and divide by its standard
            deviation (unbiased, + 1e-7) before anything of the soft term (Sun et al., "Logit
            Standardization in Knowledge Distillation", CVPR 2024). Default False.
        classes: use the first ``classes`` of both logits: padded vocabularies, or class counts that
            differ. Default None, all of them.
        dim: where the classes are: -1, or 1 for logits ``(N, C, d1, ...)`` with labels
            ``(N, d1, ...)``. Default -1.
        inplace: write the gradient over the student's logits, which saves a tensor of their size.
            They hold no logits afterwards, and using them in a later backward pass is an error.
            Without effect where no gradient is asked for, under torch.compile and under function
            transforms; refused for what has no kernel.
        teacher_grad: what to do with a teacher that requires grad, since it gets none: ``"error"``
            or ``"ignore"``.

    Returns:
        A 0-d tensor, or ``(...)`` with ``reduction="none"``, float32 (float64 if either input is
        float64). Masked classes (logits of -inf) contribute what mathematics says: for the default
        divergence nothing where the teacher masks, +inf with a finite gradient where only the
        student does. A row with NaN or +inf among its logits gives NaN.

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
        >>> fastkd.loss(student, [teacher, -teacher], labels, divergence="jsd", mix=0.1).shape
        torch.Size([])
    """
    try:
        return _compute(False, *args, **options)
    except TypeError:
        _check_signature("loss", args, options)
        raise


@_options_of(_compute)
def terms(*args: Any, **options: Any) -> Terms:
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
    try:
        packed = _compute(True, *args, **options)
    except TypeError:
        _check_signature("terms", args, options)
        raise
    total, *logged = packed.unbind(0)
    return Terms(total, *(term.detach() for term in logged))


def divergences() -> tuple[str, ...]:
    """The names that ``divergence=`` accepts."""
    return tuple(reference.DIVERGENCES)


class KDLoss(OptionsModule):
    """:func:`fastkd.loss` as a module; ``alpha`` weighs the **hard** term.

    Options are those of :func:`fastkd.loss`, checked when the module is made. ``forward`` takes
    ``(student_logits, teacher_logits, labels=None)``, and :meth:`terms` the same. Without labels
    the soft term counts alone, whatever weighs the hard one. Options that are tensors are buffers
    that follow the module to another device, and a ``temperature`` or a weight that is an
    ``nn.Parameter`` is a parameter of the module and learns. Options are attributes, which may be
    assigned: ``criterion.temperature = 2.0``.

    Example:
        >>> import torch, fastkd
        >>> criterion = fastkd.KDLoss(temperature=4.0, alpha=0.1)
        >>> criterion(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(0.1099)
    """

    @_keywords_of(_compute)
    def __init__(self, **options: Any) -> None:
        """Keeps the options, having checked them."""
        super().__init__(options)

    @staticmethod
    def default_options() -> Mapping[str, Any]:
        """Those of :func:`fastkd.loss`."""
        return DEFAULTS

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises as :func:`fastkd.loss` does, as far as it can without tensors."""
        check_names("KDLoss", options)
        resolve({**DEFAULTS, **options}, has_labels=True, teachers=None)

    def options_for(self, labels: Tensor | None) -> dict[str, Any]:
        """Those that :func:`fastkd.loss` takes: without labels, none that weighs the hard term."""
        return self.options if labels is not None else {**self.options, **HARD}

    def forward(
        self, student_logits: Tensor, teacher_logits: Teacher, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of :func:`fastkd.loss`."""
        return loss(student_logits, teacher_logits, labels, **self.options_for(labels))

    def terms(
        self, student_logits: Tensor, teacher_logits: Teacher, labels: Tensor | None = None
    ) -> Terms:
        """The loss and its terms, as :func:`fastkd.terms` gives them."""
        return terms(student_logits, teacher_logits, labels, **self.options_for(labels))


DEFAULTS: dict[str, Any] = dict(_compute.__kwdefaults__ or {})
"""The options of :func:`loss`, :func:`terms` and :class:`KDLoss`, and their defaults."""
HARD = {"alpha": None, "hard_weight": None, "class_weight": None, "label_smoothing": 0.0}


def check_names(function: str, options: Mapping[str, object]) -> None:
    """Whether these are options of the loss, whose values are not looked at."""
    unknown = sorted(options.keys() - DEFAULTS.keys())
    if unknown:
        raise TypeError(f"{function} has no option {unknown[0]!r}; it has {', '.join(DEFAULTS)}")


def _check_signature(function: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Whether :func:`_compute` takes these; its own words would name it, and not ``function``."""
    tensors = ("student_logits", "teacher_logits", "labels")
    check_names(function, {k: v for k, v in options.items() if k not in tensors})
    try:
        inspect.signature(_compute).bind(False, *args, **options)
    except TypeError as error:
        raise TypeError(
            f"{function} takes {', '.join(tensors)}, and options by their names: {error}"
        ) from None


def _check_and_compute(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    options: dict[str, Any],
    with_terms: bool,
) -> Tensor:
    """Check the arguments, and compute the loss or all terms stacked."""
    call = prepare(student, teacher, labels, options)
    inplace = options["inplace"] and not is_transformed()
    if inplace:
        _check_inplace(student, call.teachers, call.objective.reduction, options["classes"])
    try:
        return dispatch.compute(*call, with_terms=with_terms, inplace=inplace)
    except RuntimeError as error:
        told = call.objective.ignore_index, call.objective.temperature
        _explain(error, call.student, call.labels, *told)
        raise


class Call(NamedTuple):
    """A call to the loss, checked; the classes are last, and those that do not count are gone."""

    student: Tensor
    teachers: tuple[Tensor, ...]
    labels: Tensor | None
    objective: Objective


def prepare(
    student: Tensor, teacher: Teacher, labels: Tensor | None, options: Mapping[str, Any]
) -> Call:
    """Checks what :func:`loss` is given, with every option present; ``inplace`` aside."""
    teachers = tuple(teacher) if isinstance(teacher, (list, tuple)) else (teacher,)
    objective = resolve(options, has_labels=labels is not None, teachers=len(teachers))
    dim, classes = options["dim"], options["classes"]
    checks.logits(student, teachers, dim, classes)
    if any(map(checks.learns, teachers)) and options["teacher_grad"] == "error":
        raise ValueError(
            "teacher_logits requires grad, but the loss gives the teacher none: compute it under "
            'torch.no_grad(), .detach() it, or pass teacher_grad="ignore"'
        )
    teachers = tuple(
        rows_last(checks.savable(teacher.detach()), dim, classes) for teacher in teachers
    )
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.dim() == student.dim():
        labels = rows_last(labels, dim, None)
    student = rows_last(student, dim, classes)
    soft_labels = labels is not None and checks.targets(labels, student)
    labels = None if labels is None else checks.savable(checks.int64(labels))
    checks.enough_classes(objective.divergence, objective.standardize, soft_labels, student)
    objective = fit(objective, student, labels, shapes.accumulator(student, *teachers))
    return Call(student, teachers, labels, objective)


def rows_last(value: Tensor, dim: int, classes: int | None) -> Tensor:
    """A view with the classes last, and those that count alone."""
    if dim != -1:
        value = value.movedim(dim, -1)
    return value if classes is None else value[..., :classes]


def _explain(
    error: RuntimeError,
    student: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    temperature: float | Tensor,
) -> None:
    """Raise the Python exception for a kernel's error: a bad label or temperature, an unsupported
    layout, or no memory."""
    if torch.compiler.is_compiling() or not checks.has_data(student, labels, temperature):
        return
    if "inplace needs" in str(error):
        raise ValueError(
            "inplace=True needs student_logits that are laid out row by row, or class by class, "
            f"and lie at a multiple of their {student.element_size()} bytes; got strides "
            f"{student.stride()} of shape {tuple(student.shape)}, the classes last, at "
            f"{student.data_ptr():#x}"
        )
    checks.ignored_label(ignore_index)
    if "API call failed" in str(error):
        # On its way through torch's stable ABI an error loses its type and its words: what asks for
        # as much memory once more raises torch's own, which others catch (and halve their batches).
        torch.empty((3, *student.shape), dtype=student.dtype, device=student.device)
    if student.device.type == "cpu":
        checks.check_rows(student, labels, ignore_index, temperature)


def _check_inplace(
    student: Tensor, teachers: Sequence[Tensor], reduction: str, classes: int | None
) -> None:
    if reduction == "none":
        raise ValueError(
            'inplace=True needs reduction="mean" or "sum"; got "none", which keeps no gradient'
        )
    if classes is not None:
        raise ValueError(
            "inplace=True cannot go with classes, whose gradient is as large as student_logits "
            f"all the same; got classes={classes}"
        )
    compiling = torch.compiler.is_compiling()
    owner = student._base if not compiling and student._is_view() else student
    if owner is not None and owner.requires_grad and owner.is_leaf:
        raise ValueError(
            "inplace=True writes the gradient over student_logits, which cannot be a leaf that "
            "requires grad, or a view of one"
        )
    if compiling:
        return  # it has no effect
    if student.is_neg():
        raise ValueError(
            "inplace=True writes the gradient over student_logits, whose memory must hold them; "
            "got a view of their negatives (.resolve_neg() it)"
        )
    if _overlaps(student):
        raise ValueError(
            "inplace=True writes the gradient over student_logits, whose rows must not share "
            f"memory; got strides {student.stride()} of shape {tuple(student.shape)} "
            "(.contiguous() them)"
        )
    memory = student.untyped_storage().data_ptr()
    if memory and any(teacher.untyped_storage().data_ptr() == memory for teacher in teachers):
        raise ValueError("inplace=True needs student_logits and teacher_logits in different memory")


def _overlaps(tensor: Tensor) -> bool:
    """Whether entries may share memory: a stride steps into what the smaller ones reach."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False
