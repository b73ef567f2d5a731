"""Test invalid calls of ``torch.ops.fastkd``, whose ops address memory by tensor sizes.

Each call is nearly valid. The call must raise one of the types in ERRORS, or return tensors of the
right shapes. Each call is made twice, with different bytes around the tensors: the bytes
must stay unchanged, and the results must not depend on the bytes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import draw_rarely, execution_settings, has_equal_bits, program
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BF16, FP16, FP32, FP64
from torch import Tensor

from fastkd import _C, reference
from fastkd._core import shapes, topk
from fastkd._core.arguments import SPARSE_DIVERGENCES

OPS = torch.ops.fastkd
NAMES = (
    "loss", "loss_into", "loss_backward_", "loss_gradient", "topk_loss", "topk_loss_into",
    "topk_loss_backward_", "topk_loss_gradient", "mixture", "empty_gradient", "linear_loss",
)  # fmt: skip
RELEASED = ("released", "shortened")
# These ops consist of PyTorch operations, some of which crash on released storages. A required
# tensor that is None gives an AttributeError.
COMPOSED = ("loss_gradient", "topk_loss_gradient", "linear_loss")
ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError)
GUARDS = (0xA5, 0xFF)  # 0xFF bytes are NaN as floats, and -1 as class indices
GUARD_BYTES = 256
FLOATS = (FP32, FP32, BF16, FP16, FP64)
HIDDEN = 5
# A case changes tensor arguments of a valid call in these ways.
CHANGES = (
    "one more", "one less", "none at all", "one more in dim 0", "a dimension more", "flattened",
    "one number", "a thousand billion rows", "released", "shortened", "on meta", "absent", "sparse",
    "negated lazily", "a list", "far out of range", "negative", "the first argument",
    *(FP64, FP32, FP16, BF16, torch.int64, torch.int32, torch.bool, torch.complex64),
)  # fmt: skip
LAYOUTS = ("contiguous", "contiguous", "classes apart", "transposed", "expanded", "misaligned")
# A case replaces a number, an enum, a flag or a name by one of these values.
NUMBERS = (
    0, 1, -1, 2, 3, 99, 2**31, 2**32, 2**40, -(2**63), 2**63 - 1, 0.0, -0.0, -1.0, 1e-46, 1e-300,
    1e39, 1e300, math.inf, -math.inf, math.nan, None, True, "none", "kl", (), (1.0,), (-1.0, 2.0),
    FP64, FP16, torch.int64,
)  # fmt: skip


class Case(NamedTuple):
    """Hold the parameters of a call; the repr of a case is code, but for inf and nan."""

    op: str = "loss"
    leading: tuple[int, ...] = (3,)
    classes: int = 10
    k: int = 2
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    layouts: tuple[str, ...] = ("contiguous",)  # one layout for each tensor, in turn
    seed: int = 0
    teachers: int = 1
    mixed: bool = False
    present: int = 0  # bits select labels, row_settings, denominator, row_temperatures
    number: int = 0  # selects the divergence, the tail, the ensemble and the estimator
    reduction: int = 2
    flags: tuple[bool, bool, bool] = (False, False, False)
    inplace: bool = False
    requires_grad: bool = False
    changes: tuple[tuple[int, Any, Any], ...] = ()
    """Hold tuples (index of the argument, change of a tensor, replacement of a number)."""
    isa: str = "default"
    threads: int = 1
    in_python: bool = False


CASES = st.builds(
    Case,
    op=st.sampled_from(NAMES),
    leading=st.lists(st.integers(0, 4), max_size=2).map(tuple),
    classes=st.one_of(
        st.integers(1, 40), st.integers(1, 40), st.sampled_from([127, 1000, _C.segment + 3])
    ),
    k=st.integers(1, 9),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 2),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
    teachers=draw_rarely(1, st.integers(1, 3)),
    mixed=draw_rarely(False, st.just(True)),
    present=st.integers(0, 15),
    number=draw_rarely(0, st.integers(0, len(_C.divergences) - 1)),
    reduction=st.integers(0, 2),
    flags=st.tuples(*[st.booleans()] * 3),
    inplace=draw_rarely(False, st.just(True)),
    requires_grad=draw_rarely(False, st.just(True)),
    changes=st.lists(
        st.tuples(st.integers(0, 25), st.sampled_from(CHANGES), st.sampled_from(NUMBERS)),
        max_size=2,
    ).map(tuple),
    isa=st.sampled_from(_C.available_isas()),
    threads=st.integers(1, 3),
    in_python=draw_rarely(False, st.just(True)),
)


class Memory:
    """Make tensors with ``guard`` bytes before, behind and between their elements."""

    def __init__(self, guard: int) -> None:
        self.guard = guard
        self.blocks: list[tuple[bytearray, Tensor]] = []

    def place(self, values: Tensor, layout: str) -> Tensor:
        if values.numel() == 0:
            return values
        if layout == "expanded":
            values = values[:1] if values.dim() > 1 else values
        size, factor = values.element_size(), 2 if layout == "classes apart" else 1
        shape = list(values.shape)
        if layout == "transposed":
            strides = [math.prod(shape[:dim]) for dim in range(len(shape))]
        else:
            strides = [factor * math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        start = GUARD_BYTES + (1 if layout == "misaligned" else 0)
        block = bytearray([self.guard]) * (start + count * size + GUARD_BYTES)
        flat = torch.frombuffer(block, dtype=values.dtype, offset=start, count=count)
        tensor = flat.as_strided(shape, strides).copy_(values)
        self.blocks.append((block, tensor))
        return tensor

    def copy(self) -> list[tuple[bytes, Tensor]]:
        return [(bytes(block), tensor.clone()) for block, tensor in self.blocks]

    def check(self, before: list[tuple[bytes, Tensor]], writable: Tensor | None) -> None:
        """Assert that only elements of ``writable`` have changed since ``before``."""
        for (block, tensor), (content, values) in zip(self.blocks, before, strict=True):
            if writable is not None and tensor.data_ptr() == writable.data_ptr():
                tensor.copy_(values)
            assert bytes(block) == content, "memory outside the results was written"


def expand(tensor: Tensor, rows: int) -> Tensor:
    return tensor.expand(rows, *tensor.shape[1:]) if tensor.dim() and len(tensor) == 1 else tensor


def apply_change(value: Any, change: Any, first: Any) -> Any:
    """Apply a change of CHANGES to an argument, if torch can make the changed tensor."""
    if change == "absent":
        return None
    if not isinstance(value, Tensor):
        return value
    try:
        return (
            value.to(change)
            if isinstance(change, torch.dtype)
            else change_tensor(value, change, first)
        )
    except (RuntimeError, IndexError, NotImplementedError):
        return value


def change_tensor(tensor: Tensor, change: str, first: Any) -> Any:
    tensor = tensor.detach()
    dim0 = tensor[:1] if tensor.dim() and len(tensor) else tensor
    last = (*tensor.shape[:-1], 1) if tensor.dim() else (1,)
    match change:
        case "one more":
            return torch.cat(
                [tensor.reshape(last[:-1] + tensor.shape[-1:]), tensor.new_ones(last)], -1
            )
        case "one less":
            return tensor[..., :-1] if tensor.dim() else tensor
        case "none at all":
            return tensor[..., :0] if tensor.dim() else tensor.new_empty(0)
        case "one more in dim 0":
            return torch.cat([tensor, dim0]) if tensor.dim() else tensor
        case "a dimension more":
            return tensor.unsqueeze(0)
        case "flattened":
            return tensor.flatten()
        case "one number":
            return tensor.flatten()[0] if tensor.numel() else tensor.new_zeros(())
        case "a thousand billion rows":
            return dim0.expand(10**15, *dim0.shape[1:]) if tensor.dim() and len(dim0) else tensor
        case "released" | "shortened":
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
            storage.resize_(0 if change == "released" else storage.nbytes() // 2)
            return tensor
        case "on meta":
            return tensor.to("meta")
        case "sparse":
            return tensor.to_sparse() if tensor.dim() else tensor
        case "negated lazily":
            return torch._neg_view(tensor) if tensor.is_floating_point() else tensor
        case "a list":
            return [tensor]
        case "far out of range" | "negative":
            value = 2**62 if change == "far out of range" else -1
            return torch.full_like(tensor, True if tensor.dtype is torch.bool else value)
    return first


def arguments_of(case: Case, memory: Memory) -> dict[str, Any]:
    """Return the changed arguments of the op, by name."""
    generator = torch.Generator().manual_seed(case.seed)
    rows, classes, k = math.prod(case.leading), case.classes, min(case.k, case.classes)
    shape = (*case.leading, classes)
    acc = shapes.accumulator(*[torch.empty(0, dtype=dtype) for dtype in case.dtypes])
    layouts = iter(case.layouts * 32)

    def floats(sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=FP64).to(dtype)

    def positive(sizes: Sequence[int]) -> Tensor:
        return floats(sizes, acc).abs() + 0.5

    labels = torch.randint(classes, case.leading, generator=generator)
    labels[torch.rand(case.leading, generator=generator) < 0.2] = -100
    teacher = floats(shape, case.dtypes[1])
    log_probs, indices = teacher.to(acc).log_softmax(-1).topk(k)
    per_row = case.reduction == 0
    grad_output = positive((rows,) if per_row else ())
    if case.op.endswith("_gradient") and per_row:
        grad_output = positive((rows,))
    shares = [1 / case.teachers] * case.teachers if case.mixed or case.teachers > 1 else []
    tensors: dict[str, Any] = {
        "student": floats(shape, case.dtypes[0]),
        "teachers": [floats(shape, case.dtypes[1]) for _ in range(case.teachers)],
        "row_temperatures": positive((2, rows)) if shares else None,
        "labels": labels,
        "row_settings": positive((4, rows)),
        "denominator": positive(()),
        "indices": indices,
        "log_probs": log_probs,
        "grad": torch.zeros(shape, dtype=case.dtypes[0]),
        "grad_output": grad_output,
        "stats": floats((shapes.STATS * rows + 1,), acc),
    }
    for bit, name in enumerate(("labels", "row_settings", "denominator", "row_temperatures")):
        if not case.present >> bit & 1:
            tensors[name] = None
    numbers: dict[str, Any] = {
        "shares": shares, "probabilities": case.flags[0], "ensemble": case.number % 2,
        "mixture_temperature": 1.0, "teachers_temperature": 1.5, "temperature": 2.0,
        "teacher_temperature": 2.0, "hard_weight": 0.5, "soft_weight": 0.5,
        "label_smoothing": 0.1, "ignore_index": -100, "divergence": case.number, "mix": 0.3,
        "reduction": case.reduction, "normalizer": 0.0, "with_terms": case.flags[1],
        "with_stats": case.flags[2], "filled": case.flags[2], "strided": case.flags[2],
        "tail": case.number % len(topk.TAILS), "in_double": acc is FP64,
        "estimator": case.number % 4 if k == 1 else 0,
    }  # fmt: skip
    if case.op.startswith("topk"):
        numbers["divergence"] = case.number % len(SPARSE_DIVERGENCES) if numbers["tail"] < 2 else 0
    if case.op == "linear_loss":
        tensors, numbers = linear_arguments(case, tensors, floats)
    schema = getattr(OPS, case.op).default._schema.arguments
    arguments = {
        argument.name: tensors.get(argument.name, numbers.get(argument.name)) for argument in schema
    }

    def place(value: Any, name: str) -> Any:
        layout = next(layouts)
        if layout == "expanded" and name in ("grad", "grad_output", "stats"):
            layout = "contiguous"
        tensor = memory.place(value, layout)
        return expand(tensor, len(value)) if layout == "expanded" and value.dim() > 1 else tensor

    flat = {
        name: [value] if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    for name, value in flat.items():
        if name in tensors and value is not None:
            placed = [None if each is None else place(each, name) for each in value]
            flat[name] = placed if isinstance(arguments[name], list) else placed[0]
    if case.inplace and "grad" in flat:
        flat["grad"] = flat["student"]
    if case.requires_grad and "student" in flat:
        flat["student"] = flat["student"].detach().requires_grad_()
    first = flat.get("student", next(iter(flat.values())))
    without_data = set()
    for place_of, change, number in case.changes:
        name = list(flat)[place_of % len(flat)]
        if name in without_data or (case.op in COMPOSED and change in RELEASED):
            continue
        if change in RELEASED:
            without_data.add(name)
        value = flat[name]
        # PyTorch 2.13 crashes if an op in Python gets a number that encodes no dtype.
        if isinstance(value, torch.dtype) and isinstance(number, int):
            continue
        if name in numbers:
            flat[name] = number
        elif isinstance(value, list) and value:
            at = case.seed % len(value)
            flat[name] = [*value[:at], apply_change(value[at], change, first), *value[at + 1 :]]
        else:
            flat[name] = apply_change(value, change, first)
    return flat


def linear_arguments(
    case: Case, tensors: dict[str, Any], floats: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return linear_loss's arguments: the list of tensors, and the numbers."""
    rows, classes = math.prod(case.leading), case.classes
    acc = tensors["log_probs"].dtype
    bias, sparse_teacher, teacher_head = case.flags
    student_dtype, teacher_dtype = case.dtypes
    lists = [None, None]
    if sparse_teacher:
        lists = [
            tensors[name].reshape(rows, tensors[name].shape[-1])
            for name in ("indices", "log_probs")
        ]
    head = teacher_head and not sparse_teacher
    logits = None if head or sparse_teacher else floats((rows, classes), teacher_dtype)
    labels = tensors["labels"]
    settings_of_rows = tensors["row_settings"]
    numbers_of_rows = [None] * 4 if settings_of_rows is None else list(settings_of_rows)
    inputs = [
        floats((rows, HIDDEN), student_dtype),
        floats((classes, HIDDEN), student_dtype),
        floats((classes,), student_dtype) if bias else None,
        floats((rows, HIDDEN), teacher_dtype) if head else None,
        floats((classes, HIDDEN), teacher_dtype) if head else None,
        floats((classes,), teacher_dtype) if head and bias else None,
        logits,
        *lists,
        None if labels is None else labels.reshape(rows),
        *numbers_of_rows,
        None,
        torch.tensor(3.0, dtype=acc) if case.reduction == 2 else None,
        None,
    ]
    numbers = {
        "temperature": 2.0, "teacher_temperature": None, "hard_weight": 0.5, "soft_weight": 0.5,
        "ignore_index": -100, "reduction": shapes.REDUCTIONS[case.reduction],
        "label_smoothing": 0.1, "divergence": _C.divergences[case.number], "mix": None,
        "standardize": False, "tail": topk.TAILS[case.number % len(topk.TAILS)], "estimator": None,
        "student_softcap": None, "teacher_softcap": None, "student_scale": 1.0,
        "teacher_scale": 1.0, "dtype": student_dtype, "teacher_dtype": teacher_dtype,
        "accumulate": FP32, "chunk": max(case.k, classes // 8), "by_classes": case.present == 15,
        "hidden_grad": case.mixed, "weight_grad": case.mixed, "bias_grad": case.mixed and bias,
    }  # fmt: skip
    return {"inputs": inputs}, numbers


def expected_shapes(case: Case, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the shapes of an accepted call's results."""
    if case.op == "mixture":
        return [tuple(arguments["teachers"][0].shape)]
    if case.op == "linear_loss":
        hidden, weight = arguments["inputs"][:2]
        rows = hidden.shape[:1] if arguments["reduction"] == "none" else ()
        return [
            tuple(rows),
            tuple(hidden.shape) if arguments["hidden_grad"] else (0,),
            tuple(weight.shape) if arguments["weight_grad"] else (0,),
            tuple(weight.shape[:1]) if arguments["bias_grad"] else (0,),
        ]
    student = arguments["student"]
    if case.op == "empty_gradient" or case.op.endswith("_gradient"):
        return [tuple(student.shape)]
    if case.op.endswith("_backward_"):
        return []
    rows = student.numel() // student.shape[-1]
    terms = shapes.TERMS if case.op.startswith("loss") else len(reference.Terms._fields)
    out: list[int] = [terms] if arguments.get("with_terms") else []
    out += [rows] if arguments["reduction"] == 0 else []
    if case.op != "loss_into":
        return [tuple(out)]
    keeps_stats = arguments["with_stats"] and arguments["grad"] is None
    return [tuple(out), (shapes.STATS * rows + 1,) if keeps_stats else (0,)]


def call(case: Case, guard: int) -> tuple[str, list[Tensor]]:
    """Return (error's name, []), or ("", results that depend on the call alone)."""
    memory = Memory(guard)
    arguments = arguments_of(case, memory)
    before, grad = memory.copy(), arguments.get("grad")
    errors = (*ERRORS, AttributeError) if case.op in COMPOSED else ERRORS
    try:
        results = getattr(OPS, case.op)(*arguments.values())
    except errors as error:
        # The op detects an invalid list when it computes the row, after it has written earlier
        # rows.
        late = "indices must be different" in str(error)
        memory.check(before, grad if late and isinstance(grad, Tensor) else None)
        return type(error).__name__, []
    results = [] if results is None else [results] if isinstance(results, Tensor) else list(results)
    assert [tuple(each.shape) for each in results] == expected_shapes(case, arguments)
    student = arguments.get("student")
    if case.op in ("loss", "topk_loss") and results[0].requires_grad:
        results.append(torch.autograd.grad(results[0].sum(), student)[0])
        results[0] = results[0].detach()
    if isinstance(grad, Tensor):
        results.append(grad.detach().clone())
    memory.check(before, grad)
    if case.op == "empty_gradient":
        return "", []
    if case.op == "loss_into":
        del results[1]  # the op writes no statistics of ignored rows
    # Outputs on "meta" have no values to compare.
    return "", [each for each in results if each.device.type == "cpu"]


def check(case: Case) -> None:
    (error, results), (other_error, others) = (call(case, guard) for guard in GUARDS)
    assert error == other_error
    for result, expected in zip(results, others, strict=True):
        assert has_equal_bits(result, expected), "memory around the tensors was read"


def run(case: Case, _: torch.device) -> None:
    with execution_settings(case.isa, case.threads, in_python=case.in_python):
        check(case)


# Each case failed once, as its comment says.
REGRESSIONS = [
    # A `filled` gradient was scaled by the first row's grad_output, which is null without rows.
    Case(op="loss_backward_", leading=(0,), reduction=0, flags=(False, False, True)),
    Case(op="topk_loss_backward_", leading=(0,), reduction=0, flags=(False, False, True)),
    Case(op="loss_backward_", reduction=0, flags=(False, False, True)),
    # The number of a reduction lost its upper 32 bits before the check.
    Case(changes=((19, "absent", 2**40),)),
    # With one tensor on "meta" the fake kernel returned uninitialized memory.
    Case(present=1, changes=((8, "on meta", 0),)),
    Case(op="topk_loss_into", changes=((3, "on meta", 0),)),
    Case(op="linear_loss", changes=((0, "on meta", 0),)),
    # The next two calls raised an AttributeError and an AssertionError.
    Case(op="loss_gradient", number=_C.divergences.index("dkd"), reduction=1),
    Case(op="linear_loss", present=15, flags=(False, True, False)),
    Case(op="linear_loss", changes=((20, "absent", 0),)),  # the op divided by a chunk size of 0
]
REFUSED = ("filled", "reduction", "device", "labels must be", "by_classes", "chunk")


@pytest.mark.parametrize("case", REGRESSIONS)
def test_regressions_are_refused(case):
    with pytest.raises(ERRORS, match="|".join(REFUSED)):
        getattr(OPS, case.op)(*arguments_of(case, Memory(GUARDS[0])).values())


def test_a_gradient_with_non_adjacent_classes_is_written_in_place(isa):
    # The classes are every second element, and the elements between them stay unchanged.
    for dtype, classes in ((FP64, 127), (FP32, 1000)):
        student, teacher = (torch.randn(1, classes, dtype=dtype) for _ in range(2))
        case = Case(dtypes=(dtype, dtype), present=0, reduction=1)
        flat = list(arguments_of(case, Memory(GUARDS[0])).values())[2:]
        memory, expected = torch.full((1, classes, 2), 7.0, dtype=dtype), torch.empty(1, classes)
        expected = expected.to(dtype)
        OPS.loss_into(expected, student, [teacher], *flat, False)
        OPS.loss_into(memory[..., 0], student, [teacher], *flat, False)
        assert (memory[..., 1] == 7).all()
        torch.testing.assert_close(memory[..., 0], expected)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400)
@given(case=CASES)
def test_hostile_calls_are_refused_or_right(case):
    run(case, torch.device("cpu"))


@pytest.mark.parametrize("case", REGRESSIONS)
def test_earlier_failures_are_refused_or_right(case):
    run(case, torch.device("cpu"))


if __name__ == "__main__":
    program(CASES, run)
