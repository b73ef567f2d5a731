"""Test messages about invalid arguments of calls with a sparse teacher."""
# ruff: noqa: E501 - one mistake per line

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import TopK
from fastkd._core.objective import Options

NAN = math.nan


def valid_arguments() -> dict[str, Any]:
    student = torch.arange(15.0).view(3, 5)
    return {
        "student": student,
        "indices": torch.tensor([[0, 1], [2, -1], [4, 3]]),
        "log_probs": torch.full((3, 2), 0.25).log(),
        "labels": torch.tensor([0, 1, 4]),
    }


Z, L = torch.zeros, torch.int64
# Each value is (changes of a valid call, the error, a part of the error's message).
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "student a list": ({"student": [1.0]}, TypeError, "student must be a tensor; got list"),
    "integer student": ({"student": Z(3, 5, dtype=L)}, TypeError, "student must be float64, float32, bfloat16 or float16; got torch.int64"),
    "no class": ({"student": Z(3, 0)}, ValueError, "student must have shape (..., classes) with at least one class; got (3, 0)"),
    "indices a list": ({"indices": [[0, 1]] * 3}, TypeError, "TopK.indices must be a tensor of class indices; got list"),
    "floating indices": ({"indices": Z(3, 2)}, TypeError, "TopK.indices must be class indices of an integer dtype; got torch.float32"),
    "indices of other rows": ({"indices": Z(2, 2, dtype=L)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 2) and (2, 2)"),
    "indices of fewer dimensions": ({"indices": Z(3, dtype=L)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 2) and (3,)"),
    "k = 0": ({"indices": Z(3, 0, dtype=L), "log_probs": Z(3, 0)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 0) and (3, 0)"),
    "swapped": ({"indices": Z(3, 2), "log_probs": Z(3, 2, dtype=L)}, TypeError, "TopK.log_probs must be float64, float32, bfloat16 or float16; got torch.int64"),
    "log_probs None": ({"log_probs": None}, TypeError, "TopK.log_probs must be a tensor; got NoneType"),
    "integer log_probs": ({"log_probs": Z(3, 2, dtype=L)}, TypeError, "TopK.log_probs must be float64, float32, bfloat16 or float16; got torch.int64"),
    "log_probs of other rows": ({"log_probs": Z(1, 2)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (1, 2) and (3, 2)"),
    "log_probs of another k": ({"log_probs": Z(3, 4)}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got (3, 4) and (3, 2)"),
    "lists of other rows": ({"indices": Z(2, 2, dtype=L), "log_probs": Z(2, 2)}, ValueError, "teacher.log_probs must have k >= 1 entries for each row of logits, shape (3, k) for logits of shape (3, 5); got (2, 2)"),
    "lists of one row": ({"indices": Z(1, 2, dtype=L), "log_probs": Z(1, 2)}, ValueError, "teacher.log_probs must have k >= 1 entries for each row of logits, shape (3, k) for logits of shape (3, 5); got (1, 2)"),
    "lists of fewer dimensions": ({"indices": Z(3, dtype=L), "log_probs": Z(3)}, ValueError, "teacher.log_probs must have k >= 1 entries for each row of logits, shape (3, k) for logits of shape (3, 5); got (3,)"),
    "lists without a dimension": ({"indices": Z((), dtype=L), "log_probs": Z(())}, ValueError, "TopK.log_probs and TopK.indices must have the same shape (..., k) with k >= 1; got () and ()"),
    "a trained teacher": ({"log_probs": Z(3, 2, requires_grad=True)}, ValueError, "teacher.log_probs requires grad, but the loss gives the teacher none"),
    "indices elsewhere": ({"indices": Z(3, 2, dtype=L, device="meta")}, ValueError, "teacher.indices must be on the logits' device, cpu; got meta"),
    "log_probs elsewhere": ({"log_probs": Z(3, 2, device="meta")}, ValueError, "teacher.log_probs must be on the logits' device, cpu; got meta"),
    "index too large": ({"indices": torch.tensor([[0, 1], [2, 5], [4, 3]])}, ValueError, "teacher.indices must be in [0, 5), or negative for padding; row 1 has 5"),
    "index huge": ({"indices": torch.tensor([[0, 1], [2, 2**62], [4, 3]])}, ValueError, f"row 1 has {2**62}"),
    "index twice": ({"indices": torch.tensor([[0, 1], [2, 3], [4, 4]])}, ValueError, "teacher.indices must not list a class twice; row 2 has 4"),
    "probabilities": ({"log_probs": torch.full((3, 2), 0.25)}, ValueError, "teacher.log_probs must be logarithms of probabilities at the temperature of the loss, which add up to at most 1 (1.1 with rounding) in each row; row 0 has 2.56"),
    "logits": ({"log_probs": torch.tensor([[-1.0, -2.0], [-1.0, -2.0], [7.0, 6.0]])}, ValueError, "row 2 has 1500"),
    "NaN log_probs": ({"log_probs": torch.tensor([[-1.0, -2.0], [NAN, -2.0], [-1.0, -2.0]])}, ValueError, "row 1 has nan"),
    "one-hot labels": ({"labels": torch.eye(3, 5)}, TypeError, "labels must be class indices of an integer dtype with a TopK as teacher; got torch.float32"),
    "too few labels": ({"labels": Z(2, dtype=L)}, ValueError, "labels must have one entry for each row of logits, shape (3,)"),
    "label too large": ({"labels": torch.tensor([0, 5, 1])}, ValueError, "labels must be in [0, 5) or ignore_index=-100; row 1 has 5"),
    "unknown tail": ({"tail": "drop"}, ValueError, "TopK.tail must be one of 'ghost', 'renormalize', 'ignore'; got 'drop'"),
    "tail None": ({"tail": None}, ValueError, "TopK.tail must be one of 'ghost', 'renormalize', 'ignore'; got None"),
    "temperature 0": ({"temperature": 0}, ValueError, "temperature must be positive and finite; got 0"),
    "alpha above 1": ({"alpha": 1.5}, ValueError, "alpha must be in [0, 1]; got 1.5"),
    "alpha without labels": ({"alpha": 0.5, "labels": None}, ValueError, "alpha weighs the hard term, which needs labels"),
    "alpha and hard_weight": ({"alpha": 0.5, "hard_weight": 1.0}, ValueError, "alpha cannot be given together with hard_weight or soft_weight"),
    "unknown reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'sum', 'mean'; got 'batchmean'. \"mean\" divides by the rows"),
    "label_smoothing": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1]; got -0.1"),
    "ignore_index a float": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int; got float"),
    "ignore_index beyond 64 bits": ({"ignore_index": 2**70}, ValueError, "ignore_index must be an int of 64 bits; got"),
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer must be positive and finite; got 0"),
    "normalizer that requires grad": ({"normalizer": torch.tensor(3.0, requires_grad=True)}, ValueError, "normalizer gets no gradient; got a tensor that requires grad"),
    "a class_weight": ({"class_weight": torch.ones(5)}, ValueError, "class_weight must be None with a TopK as teacher; got a tensor of shape (5,)"),
    "a divergence of logits": ({"divergence": "mse"}, ValueError, "'soft_cross_entropy' with a TopK as teacher, which lists probabilities of some classes; got 'mse'"),
    "tail ignore with a divergence": ({"divergence": "jsd", "tail": "ignore"}, ValueError, "divergence must be 'forward_kl' with tail=\"ignore\""),
    "a mix": ({"mix": 0.5}, ValueError, "mix belongs to the divergences"),
    "teacher_temperature": ({"teacher_temperature": 2.0}, ValueError, "teacher_temperature must be None with a TopK as teacher; got 2.0"),
    "teacher_form": ({"teacher_form": "log_probs"}, ValueError, "teacher_form must be 'logits' with a TopK as teacher; got 'log_probs'"),
    "teacher_weights": ({"teacher_weights": [1.0]}, ValueError, "teacher_weights must be None with a TopK as teacher; got [1.0]"),
    "ensemble": ({"ensemble": "logits"}, ValueError, "ensemble must be 'probs' with a TopK as teacher; got 'logits'"),
    "standardize": ({"standardize": True}, ValueError, "standardize must be False with a TopK as teacher; got True"),
    "dim": ({"dim": 1}, ValueError, "dim must be -1 with a TopK as teacher; got 1"),
    "inplace": ({"inplace": True}, ValueError, "inplace must be False with a TopK as teacher; got True"),
    "chunks": ({"chunks": 8}, ValueError, "chunks must be \"auto\" unless student is a Head; got 8"),
    "normalizer with sum": ({"normalizer": 3.0, "reduction": "sum"}, ValueError, "normalizer goes with reduction=\"mean\"; got reduction='sum'"),
}  # fmt: skip


def loss_of(arguments: dict[str, Any], **options: Any) -> Tensor:
    """Compute the loss; the fields of TopK are separate entries of ``arguments``."""
    teacher_and_labels = {**arguments, **options}
    fields = {
        name: teacher_and_labels.pop(name) for name in TopK._fields if name in teacher_and_labels
    }
    return fastkd.loss(teacher_and_labels.pop("student"), TopK(**fields), **teacher_and_labels)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("grad", [False, True])
def test_the_message_names_argument_and_values(mistake, grad):
    changed, error, message = MISTAKES[mistake]
    arguments = {**valid_arguments(), **changed}
    if (
        grad
        and isinstance(arguments["student"], Tensor)
        and arguments["student"].is_floating_point()
    ):
        arguments["student"].requires_grad_()
    with pytest.raises(error, match=re.escape(message)):
        loss_of(arguments)


def test_the_table_changes_a_valid_call():
    assert loss_of(valid_arguments()).isfinite()
    for changed, _, _ in MISTAKES.values():
        assert set(changed) <= {*valid_arguments(), *TopK._fields, *Options._fields}


DATA = [name for name, (_, _, message) in MISTAKES.items() if re.search(r"row \d has", message)]


@pytest.mark.parametrize("mistake", DATA)
def test_a_call_with_a_learned_temperature_checks_data(mistake):
    changed, error, message = MISTAKES[mistake]
    temperature = torch.ones((), requires_grad=True)
    with pytest.raises(error, match=re.escape(message)):
        loss_of({**valid_arguments(), **changed}, temperature=temperature)


@pytest.mark.parametrize("mistake", DATA)
@pytest.mark.parametrize("place", ["torch.func", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_an_unchecked_mistake_makes_its_row_nan(mistake, place):
    # Neither PyTorch's function transforms nor the CUDA kernels check data.
    changed, _, message = MISTAKES[mistake]
    arguments = {**valid_arguments(), **changed}
    if place == "cuda":
        arguments = {
            name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()
        }
    student = arguments.pop("student")
    if place == "torch.func":
        value, pull_back = torch.func.vjp(
            lambda leaf: loss_of({"student": leaf, **arguments}, reduction="none"), student
        )
        (grad,) = pull_back(torch.ones_like(value))
    else:
        student.requires_grad_()
        value = loss_of({"student": student, **arguments}, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), student)
    bad = {int(re.search(r"row (\d)", message)[1])} if mistake != "probabilities" else {0, 1, 2}
    # With "probabilities", each row's mass is above 1.1, even if one class is listed.
    for row in range(3):
        assert bool(value[row].isnan()) == (row in bad)
        assert bool(grad[row].isnan().all()) == (row in bad)
