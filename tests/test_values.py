"""Test ``Head`` and ``TopK``: checks, copies, pytrees, data loaders, and every pair of student and
teacher.
"""
# ruff: noqa: E501 - one mistake per line

import copy
import inspect
import itertools
import json
import math
import pathlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import BF16, FP16, FP32, FP64, name_of
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

import fastkd
from fastkd import Head, TopK, reference
from fastkd._core.objective import Options
from fastkd._core.values import TAILS

ROOT = pathlib.Path(__file__).parents[1]
ROWS, WIDTH, CLASSES, K = 6, 8, 20, 4
Z, L = torch.zeros, torch.int64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64).to(dtype)


def head(seed: int = 0, dtype: torch.dtype = FP32, **options: Any) -> Head:
    hidden, weight = (draw(n, WIDTH, seed=seed + n, dtype=dtype) for n in (ROWS, CLASSES))
    return Head(hidden, weight, draw(CLASSES, seed=seed, dtype=dtype), **options)


def topk(tail: str = "ghost", dtype: torch.dtype = FP32, seed: int = 3) -> TopK:
    logits = 3 * draw(ROWS, CLASSES, seed=seed, dtype=FP64)
    log_probs, indices = logits.log_softmax(-1).topk(K)
    return TopK(log_probs.to(dtype), indices, tail)


def make_labels() -> Tensor:
    return torch.tensor([0, 3, -100, 19, 7, 5])


VALUES: dict[str, Callable[[], Head | TopK]] = {
    "Head": head,
    "Head without bias": lambda: Head(*head()[:2]),
    "Head with softcap and scale": lambda: head(softcap=30.0, scale=0.5),
    "TopK": topk,
    "TopK, ignore": lambda: topk("ignore"),
}
each_value = pytest.mark.parametrize("value", [make() for make in VALUES.values()], ids=VALUES)


def assert_same_value(value: Head | TopK, expected: Head | TopK) -> None:
    assert type(value) is type(expected)
    for ours, theirs in zip(value, expected, strict=True):
        if isinstance(theirs, Tensor):
            assert isinstance(ours, Tensor) and ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


# ---- checks at construction

FLOATS = "must be float64, float32, bfloat16 or float16; got torch.int64"
SHAPES = "Head.hidden must have shape (..., width) and Head.weight (classes, width); got "
LISTS = "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got "
# Each value is (the constructor, its arguments, the error, the start of the error's message).
MISTAKES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "hidden a list": (Head, {"hidden": [1.0], "weight": Z(5, 4)}, TypeError, "Head.hidden must be a tensor; got list"),
    "hidden None": (Head, {"hidden": None, "weight": Z(5, 4)}, TypeError, "Head.hidden must be a tensor; got NoneType"),
    "a layer as weight": (Head, {"hidden": Z(3, 4), "weight": nn.Linear(4, 5)}, TypeError, "Head.weight must be a tensor; got Linear"),
    "bias a number": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "bias": 0.0}, TypeError, "Head.bias must be a tensor; got float"),
    "integer hidden": (Head, {"hidden": Z(3, 4, dtype=L), "weight": Z(5, 4)}, TypeError, f"Head.hidden {FLOATS}"),
    "integer weight": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4, dtype=L)}, TypeError, f"Head.weight {FLOATS}"),
    "integer bias": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "bias": Z(5, dtype=L)}, TypeError, f"Head.bias {FLOATS}"),
    "sparse weight": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4).to_sparse()}, TypeError, "Head.weight must be a dense tensor; got layout torch.sparse_coo"),
    "hidden without a dimension": (Head, {"hidden": Z(()), "weight": Z(5, 4)}, ValueError, f"{SHAPES}() and (5, 4)"),
    "widths differ": (Head, {"hidden": Z(3, 4), "weight": Z(5, 3)}, ValueError, f"{SHAPES}(3, 4) and (5, 3)"),
    "a transposed weight": (Head, {"hidden": Z(3, 4), "weight": Z(4, 5)}, ValueError, f"{SHAPES}(3, 4) and (4, 5)"),
    "a weight of one dimension": (Head, {"hidden": Z(3, 4), "weight": Z(4)}, ValueError, f"{SHAPES}(3, 4) and (4,)"),
    "no class": (Head, {"hidden": Z(3, 4), "weight": Z(0, 4)}, ValueError, "Head.weight must have at least one class; got (0, 4)"),
    "a bias of the width": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "bias": Z(4)}, ValueError, "Head.bias must have shape (5,), one number for each class; got (4,)"),
    "softcap 0": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "softcap": 0.0}, ValueError, "Head.softcap must be positive and finite; got 0.0"),
    "softcap a pair": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "softcap": (30.0, None)}, TypeError, "Head.softcap must be a number; got tuple"),
    "scale negative": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "scale": -1.0}, ValueError, "Head.scale must be positive and finite; got -1.0"),
    "scale infinite": (Head, {"hidden": Z(3, 4), "weight": Z(5, 4), "scale": math.inf}, ValueError, "Head.scale must be positive and finite; got inf"),
    "log_probs a list": (TopK, {"log_probs": [0.0], "indices": Z(3, 2, dtype=L)}, TypeError, "TopK.log_probs must be a tensor; got list"),
    "integer log_probs": (TopK, {"log_probs": Z(3, 2, dtype=L), "indices": Z(3, 2, dtype=L)}, TypeError, f"TopK.log_probs {FLOATS}"),
    "sparse log_probs": (TopK, {"log_probs": Z(3, 2).to_sparse(), "indices": Z(3, 2, dtype=L)}, TypeError, "TopK.log_probs must be a dense tensor; got layout torch.sparse_coo"),
    "indices None": (TopK, {"log_probs": Z(3, 2), "indices": None}, TypeError, "TopK.indices must be a tensor of class indices; got NoneType"),
    "floating indices": (TopK, {"log_probs": Z(3, 2), "indices": Z(3, 2)}, TypeError, "TopK.indices must be class indices of an integer dtype; got torch.float32"),
    "sparse indices": (TopK, {"log_probs": Z(3, 2), "indices": Z(3, 2, dtype=L).to_sparse()}, TypeError, "TopK.indices must be a dense tensor; got layout torch.sparse_coo"),
    "lists of another k": (TopK, {"log_probs": Z(3, 2), "indices": Z(3, 4, dtype=L)}, ValueError, f"{LISTS}(3, 2) and (3, 4)"),
    "lists of other rows": (TopK, {"log_probs": Z(3, 2), "indices": Z(1, 2, dtype=L)}, ValueError, f"{LISTS}(3, 2) and (1, 2)"),
    "k = 0": (TopK, {"log_probs": Z(3, 0), "indices": Z(3, 0, dtype=L)}, ValueError, f"{LISTS}(3, 0) and (3, 0)"),
    "lists without a dimension": (TopK, {"log_probs": Z(()), "indices": Z((), dtype=L)}, ValueError, f"{LISTS}() and ()"),
    "unknown tail": (TopK, {"log_probs": Z(3, 2), "indices": Z(3, 2, dtype=L), "tail": "drop"}, ValueError, "TopK.tail must be one of 'ghost', 'renormalize', 'ignore'; got 'drop'"),
    "tails that differ": (TopK, {"log_probs": Z(2, 2), "indices": Z(2, 2, dtype=L), "tail": ("ghost", "ignore")}, ValueError, "TopK.tail must be one of 'ghost', 'renormalize', 'ignore'; got ('ghost', 'ignore')"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_argument_and_values(mistake):
    kind, arguments, error, message = MISTAKES[mistake]
    with pytest.raises(error, match="^" + re.escape(message)):
        kind(**arguments)


@pytest.mark.parametrize("kind", [Head, TopK])
def test_missing_and_unknown_arguments_are_refused(kind):
    with pytest.raises(TypeError, match="missing"):
        kind()
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        kind(Z(3, 4), Z(3, 4), labels=None)


def test_the_order_of_topk_is_that_of_torch():
    top_two = torch.log_softmax(draw(3, 5), -1).topk(2)
    top = TopK(*top_two)
    assert (
        top.log_probs is top_two.values and top.indices is top_two.indices and top.tail == "ghost"
    )


def test_replaced_fields_are_checked_by_the_call():
    student, labels = draw(ROWS, CLASSES), make_labels()
    with pytest.raises(ValueError, match=r"^teacher\.tail must be one of"):
        fastkd.loss(student, topk()._replace(tail="drop"), labels)
    with pytest.raises(ValueError, match=r"^student\.softcap must be positive"):
        fastkd.loss(head()._replace(softcap=-1.0), student, labels)
    with pytest.raises(ValueError, match=r"^teacher\.hidden must have shape"):
        fastkd.loss(head(), head()._replace(hidden=Z(ROWS, 3)), labels)
    with pytest.raises(TypeError, match=r"^student\.hidden must be a tensor; got NoneType"):
        fastkd.loss(Head(None, None), student, labels)


@pytest.mark.parametrize("student", ["tensor", "Head"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", Z(CLASSES, WIDTH, device="meta"), "must be on the student's device, cpu; got m"),
        ("weight", Z(CLASSES, WIDTH, dtype=FP64), "must have the dtype of .*hidden, torch.float32"),
        ("softcap", 0.0, "must be positive and finite; got 0.0"),
        ("hidden", None, "must be a tensor; got NoneType"),
    ],
)
def test_the_head_of_a_teacher_is_checked_for_every_student(student, field, value, message):
    logits = draw(ROWS, CLASSES) if student == "tensor" else head()
    teacher = head()._replace(**{field: value})
    with pytest.raises((TypeError, ValueError), match=rf"^teacher\.{field} {message}"):
        fastkd.loss(logits, teacher, make_labels())
    if student == "tensor" and field != "hidden":
        routed = fastkd.Routed((teacher,), torch.zeros(ROWS, dtype=L))
        with pytest.raises(ValueError, match=rf"^teacher\.teachers\[0\]\.{field} {message}"):
            fastkd.loss(logits, routed, make_labels())


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (Z(3, 5), "a path", TypeError, "teacher must be a tensor; got str"),
        (Head(Z(3, 4), Z(5, 4)), [Z(3, 5), Z(3, 5)], TypeError, "teacher must be a Head, TopK, Sampled or a tensor of logits if student is a Head, or a Routed in fastkd.loss and fastkd.terms; got list"),
        (TopK(Z(3, 2), Z(3, 2, dtype=L)), Z(3, 5), TypeError, "student must be a tensor; got TopK$"),
        (Z(3, 5), [Z(3, 5), TopK(Z(3, 2), Z(3, 2, dtype=L))], TypeError, "teacher[1] must be a tensor; got TopK$"),
        (Z(3, 5), [Head(Z(3, 4), Z(5, 4))] * 2, TypeError, "teacher[0] must be a tensor; got Head. Pass teacher[0].logits()"),
        (Z(3, 5), Head(Z(3, 4), Z(6, 4)), ValueError, "student and teacher must have the same shape; got (3, 5) and (3, 6)"),
        (Head(Z(3, 4), Z(5, 4)), Head(Z(3, 4), Z(6, 4)), ValueError, "teacher.weight and student.weight must have the same classes; got (6,) and (5,)"),
        (Head(Z(3, 4), Z(5, 4)), Head(Z(2, 4), Z(5, 4)), ValueError, "teacher.hidden and student.hidden must have the same rows; got (2,) and (3,)"),
        (Head(Z(3, 4), Z(5, 4)), Head(Z(3, 4, requires_grad=True), Z(5, 4)), ValueError, "teacher.hidden requires grad, but the loss gives the teacher none"),
        (Z(3, 5), Head(Z(3, 4, requires_grad=True), Z(5, 4)), ValueError, "teacher.hidden requires grad, but the loss gives the teacher none"),
        (Head(Z(3, 4), Z(5, 4)), TopK(Z(3, 2, requires_grad=True), Z(3, 2, dtype=L)), ValueError, "teacher.log_probs requires grad, but the loss gives the teacher none"),
        (Head(Z(3, 4), Z(5, 4, dtype=FP64)), Z(3, 5), ValueError, "student.weight must have the dtype of student.hidden, torch.float32"),
        (Head(Z(3, 4), Z(5, 4)), Z(3, 8), ValueError, "student and teacher must have the same shape; got (3, 5) and (3, 8)"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("function", [fastkd.loss, fastkd.terms, fastkd.KDLoss()])
def test_unsupported_pairs_are_refused(function, student, teacher, error, message):
    with pytest.raises(error) as caught:
        function(student, teacher)
    assert f"{caught.value}$".startswith(message)  # a message that ends in $ must match to the end


def test_classes_that_differ_name_the_slices():
    # The message suggests slices, which the loss reads without a copy.
    student, teacher = draw(3, 8), draw(3, 5, seed=1)
    with pytest.raises(ValueError, match="first classes are the same") as caught:
        fastkd.loss(student, teacher)
    assert "student[..., :5] and teacher[..., :5]" in str(caught.value)
    sliced = fastkd.loss(student[..., :5], teacher[..., :5])
    assert torch.equal(sliced, fastkd.loss(student[..., :5].contiguous(), teacher))


# ---- repr, copies, pytrees, data loaders


def test_repr_shows_no_numbers():
    student = head(softcap=30.0)
    assert repr(student) == (
        "Head(hidden=float32 (6, 8) on cpu, weight=float32 (20, 8) on cpu, "
        "bias=float32 (20,) on cpu, softcap=30.0)"
    )
    assert repr(Head(*student[:2], scale=0.5)) == (
        "Head(hidden=float32 (6, 8) on cpu, weight=float32 (20, 8) on cpu, scale=0.5)"
    )
    assert repr(topk("ignore", BF16)) == (
        "TopK(log_probs=bfloat16 (6, 4) on cpu, indices=int64 (6, 4) on cpu, tail='ignore')"
    )


@each_value
def test_values_are_copied_and_pickled(value):
    for again in (
        pickle.loads(pickle.dumps(value)),
        copy.copy(value),
        copy.deepcopy(value),
        value._replace(),
        type(value)(*value),
        type(value)(**value._asdict()),
    ):
        assert_same_value(again, value)


@each_value
def test_values_are_pytrees(value):
    leaves, tree = pytree.tree_flatten({"value": value})
    assert [leaf for leaf in leaves if isinstance(leaf, Tensor)] == [
        field for field in value if isinstance(field, Tensor)
    ]
    assert_same_value(pytree.tree_unflatten(leaves, tree)["value"], value)
    doubled = pytree.tree_map_only(Tensor, lambda x: x * 2, value)
    assert torch.equal(doubled[0], value[0] * 2)
    # Shapes are not tensors, so the constructors do not check them.
    shapes = pytree.tree_map_only(Tensor, lambda x: x.shape, value)
    assert type(shapes) is type(value) and shapes[0] == value[0].shape


@each_value
def test_accelerate_moves_values(value):
    operations = pytest.importorskip("accelerate.utils")
    assert_same_value(operations.send_to_device(value, "cpu"), value)
    moved = operations.send_to_device(value, "meta")
    assert type(moved) is type(value)
    assert {field.device.type for field in moved if isinstance(field, Tensor)} == {"meta"}


class Samples(Dataset):
    """Hold a sparse teacher's samples, one row each."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        log_probs, indices, tail = topk("renormalize")
        teacher = TopK(log_probs[index], indices[index], tail)
        return {"teacher": teacher, "labels": make_labels()[index]}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_collate_makes_one_topk(workers):
    (batch,) = DataLoader(Samples(), batch_size=ROWS, num_workers=workers)
    assert_same_value(batch["teacher"], topk("renormalize"))
    student = draw(ROWS, CLASSES)
    value = fastkd.loss(student, batch["teacher"], batch["labels"])
    assert torch.equal(value, fastkd.loss(student, topk("renormalize"), make_labels()))


# ---- torch.compile and function transforms


def student_of(hidden: Tensor, weight: Tensor) -> dict[str, Head | Tensor]:
    return {"tensor": hidden @ weight.t(), "Head": Head(hidden, weight)}


PAIRS = list(itertools.product(("tensor", "Head"), ("tensor", "Head", "TopK")))
each_pair = pytest.mark.parametrize(
    ("student", "teacher"), PAIRS, ids=[f"{student}-{teacher}" for student, teacher in PAIRS]
)


def teacher_of(kind: str, dtype: torch.dtype = FP32) -> Tensor | Head | TopK:
    makers = {"tensor": lambda: draw(ROWS, CLASSES, seed=9, dtype=dtype)}
    return {**makers, "Head": lambda: head(40, dtype), "TopK": lambda: topk(dtype=dtype)}[kind]()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "values", [pytest.param("made inside", marks=pytest.mark.slow), "as arguments"]
)
@each_pair
def test_compiled_pairs_equal_eager_ones(student, teacher, values):
    inputs = (draw(ROWS, CLASSES),) if student == "tensor" else head()
    teacher_value = teacher_of(teacher)
    made = {"tensor": lambda x: x, "Head": Head, "TopK": TopK}

    def made_inside(leaves: list[Tensor], fields: Any) -> Tensor:
        return as_arguments(made[student](*leaves), made[teacher](*fields))

    def as_arguments(student_input: Any, teacher_input: Any) -> Tensor:
        return fastkd.loss(student_input, teacher_input, make_labels()) * 2

    results = []
    for compiles in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs if isinstance(x, Tensor)]
        function, arguments = as_arguments, (made[student](*leaves), teacher_value)
        if values == "made inside":
            fields = (teacher_value,) if teacher == "tensor" else tuple(teacher_value)
            function, arguments = made_inside, (leaves, fields)
        if compiles:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        value = function(*arguments)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_pair
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_function_transforms_give_the_gradients(student, teacher):
    inputs, teacher_value = head(dtype=FP64)[:2], teacher_of(teacher, FP64)

    def function(hidden: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        return fastkd.loss(
            student_of(hidden, weight)[student], teacher_value, labels, reduction="sum"
        )

    leaves = [x.clone().requires_grad_() for x in inputs]
    labels = make_labels()
    expected = torch.autograd.grad(function(*leaves, labels), leaves)
    got = torch.func.grad(function, (0, 1))(*inputs, labels)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    def row(hidden: Tensor, of_row: Any) -> Tensor:
        return fastkd.loss(student_of(hidden, inputs[1])[student], of_row, reduction="sum")

    def rows_of(*fields: int | None) -> Any:
        return {"tensor": lambda x: x, "Head": Head, "TopK": TopK}[teacher](*fields)

    # In vmap's in_dims, fields with a dimension of rows are 0, and fields without it are None.
    dims = rows_of(*{"tensor": (0,), "Head": (0, None, None), "TopK": (0, 0, None)}[teacher])
    rows = torch.func.vmap(torch.func.grad(row), (0, dims))(inputs[0], teacher_value)
    (expected,) = torch.autograd.grad(function(*leaves), leaves[0])
    torch.testing.assert_close(rows, expected)


# ---- options of every pair of student and teacher


@pytest.mark.parametrize("function", [fastkd.loss, fastkd.terms, fastkd.KDLoss.__init__])
def test_options_are_those_of_one_list(function):
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert list(options.items()) == list(Options._field_defaults.items())
    others = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert others == (
        ["self"] if function is fastkd.KDLoss.__init__ else ["student", "teacher", "labels"]
    )


def test_annotations_are_those_of_the_loss():
    of_loss = inspect.get_annotations(fastkd.loss)
    for function in (fastkd.terms, fastkd.KDLoss.__init__):
        annotations = inspect.get_annotations(function)
        assert all(annotations[name] == of_loss[name] for name in Options._fields)


@each_pair
def test_a_hard_term_without_labels_is_refused_everywhere(student, teacher):
    first, second = student_of(*head()[:2])[student], teacher_of(teacher)

    def make_calls(**options: Any) -> list[Callable[[], Any]]:
        module = fastkd.KDLoss(**options)
        functions = (fastkd.loss, fastkd.terms)
        return [
            *(lambda f=f: f(first, second, **options) for f in functions),
            *(lambda f=f: f(first, second) for f in (module, module.terms)),
        ]

    for option, number in (("alpha", 0.1), ("alpha", 1), ("hard_weight", 0.5)):
        for call in make_calls(**{option: number}):
            message = rf"^{option} weighs the hard term, which needs labels; got {option}={number}"
            with pytest.raises(ValueError, match=message):
                call()
    expected = fastkd.loss(first, second)
    for options in ({}, {"alpha": 0.0}, {"alpha": 0}, {"hard_weight": 0.0}):
        for call in make_calls(**options):
            value = call()
            torch.testing.assert_close(getattr(value, "loss", value), expected)


@each_pair
@pytest.mark.parametrize("function", [fastkd.loss, fastkd.terms])
def test_batchmean_is_refused_and_mean_named(function, student, teacher):
    first, second = student_of(*head()[:2])[student], teacher_of(teacher)
    message = (
        "reduction must be one of 'none', 'sum', 'mean'; got 'batchmean'. \"mean\" divides by the "
        "rows"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(first, second, reduction="batchmean")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fastkd.KDLoss(reduction="batchmean")


# ---- terms of every pair of student and teacher


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("with_labels", [True, False])
def test_terms_of_a_sparse_teacher_equal_the_definition(
    monkeypatch, tail, reduction, with_labels, fused
):
    labels, student = (make_labels() if with_labels else None), 2 * draw(ROWS, CLASSES, dtype=FP64)
    top = topk(tail, FP64)
    top = top._replace(indices=top.indices.clone())
    top.indices[0, 1] = -1
    top.log_probs[1, 2] = -math.inf
    options: dict[str, Any] = {"temperature": 1.5, "reduction": reduction}
    weights = {"hard_weight": 0.3, "soft_weight": 0.7}
    if with_labels:
        options |= {**weights, "label_smoothing": 0.1}
    expected = reference.topk.terms(student, *top[:2], labels, tail=tail, **options)
    if not fused:
        monkeypatch.setattr("fastkd._core.dispatch.is_fused", lambda *_: False)
    leaf = student.clone().requires_grad_()
    for teacher, logits, bound in (
        (top, leaf, 1e-12),
        (top._replace(log_probs=top.log_probs.float()), student.float(), 2e-5),
    ):
        got = fastkd.terms(logits, teacher, labels, **options)
        for name, ours, theirs in zip(got._fields, got, expected, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours.double(), theirs, rtol=bound, atol=bound, msg=name)
    got = fastkd.terms(leaf, top, labels, **options)
    assert [term.requires_grad for term in got] == [True, *[False] * 7]
    (gradient,) = torch.autograd.grad(got.loss.sum(), leaf)
    (alone,) = torch.autograd.grad(fastkd.loss(leaf, top, labels, **options).sum(), leaf)
    if fused:
        assert torch.equal(gradient, alone)
    else:
        torch.testing.assert_close(gradient, alone)


def test_terms_of_a_sparse_teacher_use_the_normalizer():
    student, top, labels = draw(2, 3, CLASSES, dtype=FP64), topk(dtype=FP64), make_labels()
    shaped = TopK(top.log_probs.view(2, 3, K), top.indices.view(2, 3, K))
    for normalizer in (4.0, torch.tensor(4.0)):
        got = fastkd.terms(student, shaped, labels.view(2, 3), normalizer=normalizer)
        sums = fastkd.terms(student, shaped, labels.view(2, 3), reduction="sum")
        for mean, total in zip(got, sums, strict=True):
            torch.testing.assert_close(mean, total / 4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["tensor", "Head", "TopK"])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "scale": 0.5}], ids=["plain", "softcap and scale"]
)
@pytest.mark.parametrize("chunk_by", ["auto", "rows", "classes"])
def test_terms_of_a_head_are_those_of_its_logits(chunk_by, options, with_labels, kind, reduction):
    student, teacher = head(dtype=FP64, **options), teacher_of(kind, FP64)
    labels = make_labels() if with_labels else None
    chunks: Any = "auto"
    if chunk_by != "auto":
        size = {"rows": 4, "classes": 8}[chunk_by]
        chunks = fastkd.chunks.plan(
            student, teacher_of("tensor", FP64), chunk_by=chunk_by, chunk_size=size
        )
    common: dict[str, Any] = {"reduction": reduction, "temperature": 1.5}
    if with_labels:
        common["alpha"] = 0.3
    try:
        got = fastkd.terms(student, teacher, labels, chunks=chunks, **common)
    except ValueError as error:
        assert chunk_by == "classes" and "chunks must be a plan of rows" in str(error)
        return
    expected = fastkd.terms(student.logits(), teacher, labels, **common)
    for name, ours, theirs in zip(got._fields, got, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)
    assert torch.equal(got.loss, fastkd.loss(student, teacher, labels, chunks=chunks, **common))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=name_of)
@each_pair
def test_the_gradient_of_terms_is_that_of_the_loss(student, teacher, dtype):
    gradients = []
    for function in (fastkd.loss, lambda *a: fastkd.terms(*a).loss):
        leaves = [x.clone().requires_grad_() for x in head(dtype=dtype)[:2]]
        value = function(student_of(*leaves)[student], teacher_of(teacher, dtype), make_labels())
        gradients.append(torch.autograd.grad(value, leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_logits_of_a_head_equal_the_formula():
    student = head(dtype=FP64, softcap=2.0, scale=0.25)
    logits = 0.25 * (student.hidden @ student.weight.t() + student.bias)
    torch.testing.assert_close(student.logits(), 2.0 * torch.tanh(logits / 2.0))
    leaf = student.hidden.clone().requires_grad_()
    assert student._replace(hidden=leaf).logits().requires_grad
    shaped = student._replace(hidden=student.hidden.view(2, 3, WIDTH))
    assert torch.equal(shaped.logits().view(ROWS, CLASSES), student.logits())


# ---- types

TYPED_USE = """
from typing import assert_type

import torch
from torch import Tensor

import fastkd
from fastkd import Head, KDLoss, Terms, TopK


def every_pair(logits: Tensor, labels: Tensor, layer: torch.nn.Linear) -> Tensor:
    student = Head(logits, layer.weight, layer.bias, softcap=30.0, scale=0.5)
    top = TopK(logits, labels, tail="renormalize")
    total = fastkd.loss(logits, logits) + fastkd.loss(logits, [logits, logits], labels)
    total += fastkd.loss(logits, (logits, logits)) + fastkd.loss(logits, student, labels)
    total += fastkd.loss(logits, top, labels) + fastkd.loss(student, logits)
    total += fastkd.loss(student, student, labels) + fastkd.loss(student, top, labels, alpha=0.1)
    plan = fastkd.chunks.plan(student, top, max_workspace=1 << 20)
    total += fastkd.loss(student, top, temperature=torch.ones(3), chunks=plan)
    assert_type(fastkd.terms(student, top, labels), Terms)
    criterion = KDLoss(temperature=2, reduction="none", divergence="jsd", hard_weight=labels)
    assert_type(criterion.terms(logits, student), Terms)
    assert_type(student.logits(), Tensor)
    assert_type(student.bias, Tensor | None)
    assert_type(fastkd.loss(logits, student), Tensor)
    hidden, weight, *rest = student
    log_probs, indices, tail = top
    assert_type(indices, Tensor)
    return total


def mistakes(logits: Tensor, top: TopK) -> None:
    fastkd.loss(logits, "teacher")  # type: ignore[arg-type]
    fastkd.loss(top, logits)  # type: ignore[arg-type]
    fastkd.loss(logits, logits, reduction="batchmean")  # type: ignore[arg-type]
    fastkd.loss(logits, logits, tau=2.0)  # type: ignore[arg-type]
    fastkd.loss(logits, logits, divergence="kl")  # type: ignore[arg-type]
    KDLoss(4.0, 0.1)  # type: ignore[arg-type]
    fastkd.teachers.served.gather(top, logits, "k4")  # type: ignore[arg-type]
    fastkd.loss(logits)  # type: ignore[call-arg]
    fastkd.loss(logits, logits, logits, 2.0)  # type: ignore[arg-type]
    TopK(logits, logits, "drop")  # type: ignore[arg-type]
    Head(logits)  # type: ignore[call-arg]
    KDLoss(teacher_form="softmax")  # type: ignore[arg-type]
"""


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_types_of_every_pair_are_checked(checker, tmp_path):
    pytest.importorskip(checker)
    path = tmp_path / "typed_use.py"
    path.write_text(TYPED_USE)
    options = ["--strict", path]
    if checker == "pyright":
        config = {"include": [path.name], "extraPaths": [str(ROOT / "python")]}
        (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
        options = ["--project", tmp_path, "--pythonpath", sys.executable]
    command = [sys.executable, "-m", checker, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
