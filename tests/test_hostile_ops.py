"""Test that invalid calls of the ops and of autograd's nodes raise errors.

The ops compute addresses from the sizes of their arguments, so an unchecked call could read or
write memory outside the tensors.
"""

import itertools

import pytest
import torch
from support import FP16, FP32, FP64, make
from torch import Tensor

import fastkd
from fastkd._core import shapes, topk
from fastkd._core.dense import Arguments

ROWS, CLASSES = 6, 50
OPS = torch.ops.fastkd


def arguments_of(*, rows: Tensor | None = None, denominator: Tensor | None = None, **changed):
    """Return the arguments of torch.ops.fastkd.loss, with changes."""
    student, teacher, labels = make((ROWS, CLASSES))
    call = Arguments(
        (changed.pop("teacher", teacher),), labels=labels, row_settings=rows,
        denominator=denominator, temperature=2.0, teacher_temperature=2.0, hard_weight=0.5,
        soft_weight=0.5, reduction=shapes.REDUCTIONS.index("mean"),
    )  # fmt: skip
    student = changed.pop("student", student)
    return student, *call._replace(**changed)


def release(tensor: Tensor) -> Tensor:
    """Return a copy with a released storage, like a parameter under FSDP."""
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def lists() -> tuple[Tensor, Tensor, Tensor]:
    log_probs, indices = make((ROWS, CLASSES), seed=1).teacher.log_softmax(-1).topk(4)
    return make((ROWS, CLASSES)).student, indices, log_probs


WRONG = {
    "labels of other rows": dict(labels=torch.zeros(ROWS - 1, dtype=torch.int64)),
    "labels of int32": dict(labels=torch.zeros(ROWS, dtype=torch.int32)),
    "a label out of range": dict(labels=torch.full((ROWS,), CLASSES)),
    "a teacher of other rows": dict(teacher=torch.zeros(ROWS - 1, CLASSES)),
    "a teacher of other classes": dict(teacher=torch.zeros(ROWS, CLASSES - 1)),
    "a teacher of int64": dict(teacher=torch.zeros(ROWS, CLASSES, dtype=torch.int64)),
    "a student without dimensions": dict(student=torch.zeros(()), teacher=torch.zeros(())),
    "settings of other rows": dict(rows=torch.ones(4 * ROWS - 1)),
    "settings in float64": dict(rows=torch.ones(4 * ROWS, dtype=FP64)),
    "a temperature of 0": dict(rows=torch.zeros(4 * ROWS)),
    "no denominator": dict(denominator=torch.ones(0)),
    "a denominator in float64": dict(denominator=torch.ones((), dtype=FP64)),
    "a divergence that there is not": dict(divergence=99),
    "a negative divergence": dict(divergence=-1),
    "a reduction that there is not": dict(reduction=3),
    "a released student": dict(student=release(make((ROWS, CLASSES)).student)),
    "a released teacher": dict(teacher=release(make((ROWS, CLASSES)).teacher)),
    "released labels": dict(labels=release(make((ROWS, CLASSES)).labels)),
    "released settings": dict(rows=release(torch.ones(4 * ROWS))),
    "a released denominator": dict(denominator=release(torch.ones(()))),
}


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("case", WRONG)
def test_the_dense_ops_refuse_invalid_arguments(case):
    wrong = arguments_of(**WRONG[case])
    stats, grad_output = torch.zeros(shapes.STATS * ROWS + 1), torch.ones(())
    with pytest.raises(RuntimeError):
        OPS.loss(*wrong)
    with pytest.raises(RuntimeError):
        OPS.loss(wrong[0].requires_grad_(), *wrong[1:])
    grad = torch.full((ROWS, CLASSES), 7.0)
    with pytest.raises(RuntimeError):
        OPS.loss_into(grad, *wrong, True)
    if "reduction" not in case and "denominator" not in case:  # the divisor is in stats
        with pytest.raises(RuntimeError):
            OPS.loss_backward_(grad, grad_output, stats, *wrong, False)
    assert (grad == 7).all(), "a call that is refused writes nothing"


BACKWARD = {
    "a gradient of other rows": dict(grad=torch.zeros(ROWS + 1, CLASSES)),
    "a gradient of fewer rows": dict(grad=torch.zeros(ROWS - 1, CLASSES)),
    "a gradient in float16": dict(grad=torch.zeros(ROWS, CLASSES, dtype=FP16)),
    "a released gradient": dict(grad=release(torch.zeros(ROWS, CLASSES))),
    "an empty grad_output": dict(grad_output=torch.ones(0)),
    "a grad_output of rows": dict(grad_output=torch.ones(ROWS)),
    "a grad_output of other rows": dict(grad_output=torch.ones(ROWS - 1), reduction=0),
    "a grad_output in float64": dict(grad_output=torch.ones((), dtype=FP64)),
    "a released grad_output": dict(grad_output=release(torch.ones(()))),
    "short statistics": dict(stats=torch.zeros(shapes.STATS * ROWS)),
    "no statistics with reduction none": dict(stats=torch.zeros(0), reduction=0),
    "statistics in float64": dict(stats=torch.zeros(shapes.STATS * ROWS + 1, dtype=FP64)),
    "released statistics": dict(stats=release(torch.zeros(shapes.STATS * ROWS + 1))),
}


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("case", BACKWARD)
def test_the_backward_ops_refuse_invalid_arguments(case, filled):
    all_arguments = {
        "grad": torch.zeros(ROWS, CLASSES),
        "grad_output": torch.ones(()),
        "stats": torch.zeros(shapes.STATS * ROWS + 1),
        **BACKWARD[case],
    }
    reduction = all_arguments.pop("reduction", shapes.REDUCTIONS.index("mean"))
    first = (all_arguments["grad"], all_arguments["grad_output"])
    with pytest.raises(RuntimeError):
        OPS.loss_backward_(
            *first, all_arguments["stats"], *arguments_of(reduction=reduction), filled
        )
    if "statistics" not in case:
        settings = (2.0, 0.5, 0.5, 0.0, -100, 0, 0.5, 0, 0, reduction, 0.0, False)
        with pytest.raises(RuntimeError, match=r"^(?!.*missing value)"):
            OPS.topk_loss_backward_(*first, *lists(), None, None, None, *settings, filled)


def test_the_sparse_op_refuses_invalid_arguments():
    student, indices, log_probs = lists()
    settings = (2.0, 0.5, 0.5, 0.0, -100, 0, 0.5, 0, 0, 2, 0.0, False)
    OPS.topk_loss(student, indices, log_probs, None, None, None, *settings)
    wrong = [
        (student, indices[:-1], log_probs[:-1]),
        (student, indices[:, :-1], log_probs),
        (student, indices[..., :0], log_probs),
        (student, indices.int(), log_probs),
        (student, indices[0], log_probs[0]),
        (student, indices + CLASSES, log_probs),
        (release(student), indices, log_probs),
        (student, release(indices), log_probs),
        (student, indices, release(log_probs)),
    ]
    for tensors in wrong:
        with pytest.raises(RuntimeError):
            OPS.topk_loss(*tensors, None, None, None, *settings)
    divergence, tail, estimator, reduction = 5, 7, 8, 9
    wrong_numbers = [(divergence, 8), (divergence, 12), (divergence, -1), (tail, 3), (tail, -1)]
    wrong_numbers += [
        (estimator, 1),
        (estimator, 4),
        (estimator, -1),
        (reduction, 3),
        (reduction, -1),
    ]
    for place, number in wrong_numbers:
        changed = [*settings[:place], number, *settings[place + 1 :]]
        with pytest.raises(RuntimeError):
            OPS.topk_loss(student, indices, log_probs, None, None, None, *changed)
    cut_off = [*settings[:5], 2, 0.5, topk.TAILS.index("ignore"), *settings[8:]]
    with pytest.raises(RuntimeError):
        OPS.topk_loss(student, indices, log_probs, None, None, None, *cut_off)


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("name", ["student", "teacher", "labels", "temperature"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"divergence": "jsd"}], ids=str)
def test_released_tensors_raise(name, options):
    all_arguments = dict(make((ROWS, CLASSES))._asdict(), temperature=torch.ones(ROWS))
    all_arguments[name] = release(all_arguments[name])
    student, teacher, labels, temperature = all_arguments.values()
    for leaf in (student, student.detach().requires_grad_()):
        with pytest.raises(RuntimeError):
            fastkd.loss(leaf, teacher, labels, temperature=temperature, **options)


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("index", range(4))
def test_released_lists_raise(index):
    all_arguments = [*lists(), make((ROWS, CLASSES)).labels]
    all_arguments[index] = release(all_arguments[index])
    student, indices, log_probs, labels = all_arguments
    for requires_grad in (False, True):
        leaf = student.detach().requires_grad_(requires_grad)
        with pytest.raises(RuntimeError):
            fastkd.loss(leaf, fastkd.TopK(log_probs, indices), labels)


@pytest.mark.usefixtures("each_autograd")
def test_a_student_released_after_the_forward_pass_raises():
    student, teacher, labels = make((ROWS, CLASSES))
    hidden = student.requires_grad_() * 1
    value = fastkd.loss(hidden, teacher, labels)
    value.backward(retain_graph=True)
    hidden.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        value.backward()


@pytest.mark.parametrize("reduction", shapes.REDUCTIONS)
def test_grad_fn_called_directly_refuses_invalid_grad_outputs(reduction):
    # Nodes of autograd in C++ call an op, which raises an error. Nodes in Python are not callable.
    student, teacher, labels = make((ROWS, CLASSES), FP32)
    leaf = student.requires_grad_()
    _, indices, log_probs = lists()
    values = [
        fastkd.loss(leaf, teacher, labels, reduction=reduction),
        fastkd.loss(leaf, fastkd.TopK(log_probs, indices), labels, reduction=reduction),
    ]
    wrong = [torch.empty(0), torch.ones(ROWS + 1), torch.ones((), dtype=FP64), torch.ones(2, 2)]
    if reduction != "none":
        wrong.append(torch.ones(ROWS))
    for value, grad_output in itertools.product(values, wrong):
        with torch.no_grad(), pytest.raises((RuntimeError, TypeError)):
            value.grad_fn(grad_output)
