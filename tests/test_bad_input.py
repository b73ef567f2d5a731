"""Test that errors about invalid arguments name the argument, its value, and valid values."""
# ruff: noqa: E501 - one mistake per line

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support import FP32, make, make_heads, name_of
from torch import nn

import fastkd
from fastkd._core import shapes
from fastkd._core.objective import Options

NAN, INF = math.nan, math.inf


def valid_arguments() -> dict[str, Any]:
    student, teacher, labels = make((3, 5), ignored=0.0)
    return {"student": student, "teacher": teacher, "labels": labels}


Z = torch.zeros
# Each mistake is (changes of a valid call's arguments, error type, part of the message).
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # shapes and ranks
    "shapes differ": ({"teacher": Z(3, 6)}, ValueError, "student and teacher must have the same shape; got (3, 5) and (3, 6)"),
    "rows differ": ({"teacher": Z(4, 5)}, ValueError, "same shape; got (3, 5) and (4, 5)"),
    "broadcastable teacher": ({"teacher": Z(1, 5)}, ValueError, "same shape; got (3, 5) and (1, 5)"),
    "ranks differ": ({"teacher": Z(1, 3, 5)}, ValueError, "same shape; got (3, 5) and (1, 3, 5)"),
    "no dimension": ({"student": torch.tensor(1.0), "teacher": torch.tensor(1.0)}, ValueError, "student must have shape (..., classes) with at least one class; got ()"),
    "no class": ({"student": Z(3, 0), "teacher": Z(3, 0)}, ValueError, "student must have shape (..., classes) with at least one class; got (3, 0)"),
    "labels of logits' rank": ({"labels": Z(3, 5, dtype=torch.int64)}, ValueError, "labels must have one entry for each row of logits, shape (3,) for logits of shape (3, 5); got (3, 5)"),
    "column of labels": ({"labels": Z(3, 1, dtype=torch.int64)}, ValueError, "labels must have one entry for each row of logits, shape (3,)"),
    "too few labels": ({"labels": Z(2, dtype=torch.int64)}, ValueError, "got (2,)"),
    "one label for all": ({"labels": torch.tensor(1)}, ValueError, "got ()"),
    "temperatures' shape": ({"temperature": torch.ones(2)}, ValueError, "temperature must have one entry for each row of logits, shape (3,) for logits of shape (3, 5); got (2,)"),
    # dtypes and types
    "integer student": ({"student": Z(3, 5, dtype=torch.int64)}, TypeError, "student must be float64, float32, bfloat16 or float16; got torch.int64"),
    "integer teacher": ({"teacher": Z(3, 5, dtype=torch.int32)}, TypeError, "teacher must be float64, float32, bfloat16 or float16; got torch.int32"),
    "complex student": ({"student": Z(3, 5, dtype=torch.complex64)}, TypeError, "student must be float64, float32, bfloat16 or float16; got torch.complex64"),
    "boolean teacher": ({"teacher": Z(3, 5, dtype=torch.bool)}, TypeError, "teacher must be float64, float32, bfloat16 or float16; got torch.bool"),
    "fp8 teacher": ({"teacher": Z(3, 5).to(torch.float8_e4m3fn)}, TypeError, "teacher must be float64, float32, bfloat16 or float16; got torch.float8_e4m3fn"),
    "sparse student": ({"student": Z(3, 5).to_sparse()}, TypeError, "student must be a dense tensor; got layout torch.sparse_coo"),
    "student a list": ({"student": [[1.0]]}, TypeError, "student must be a tensor; got list"),
    "teacher None": ({"teacher": None}, TypeError, "teacher must be a tensor; got NoneType"),
    "labels a list": ({"labels": [0, 1, 2]}, TypeError, "labels must be a tensor of class indices or probabilities, or None; got list"),
    "floating labels": ({"labels": Z(3)}, TypeError, "labels must be class indices of an integer dtype; got torch.float32"),
    "boolean labels": ({"labels": Z(3, dtype=torch.bool)}, TypeError, "labels must be class indices of an integer dtype; got torch.bool"),
    # devices
    "student and teacher apart": ({"teacher": Z(3, 5, device="meta")}, ValueError, "student and teacher must be on the same device; got cpu and meta"),
    "labels apart": ({"labels": Z(3, dtype=torch.int64, device="meta")}, ValueError, "labels must be on the logits' device, cpu; got meta"),
    "temperatures apart": ({"temperature": torch.ones(3, device="meta")}, ValueError, "temperature must be on the logits' device, cpu; got meta"),
    # labels out of range
    "label too large": ({"labels": torch.tensor([0, 5, 1])}, ValueError, "labels must be in [0, 5) or ignore_index=-100; row 1 has 5"),
    "label negative": ({"labels": torch.tensor([0, 1, -1])}, ValueError, "labels must be in [0, 5) or ignore_index=-100; row 2 has -1"),
    "another ignore_index": ({"labels": torch.tensor([-100, 1, 2]), "ignore_index": -1}, ValueError, "labels must be in [0, 5) or ignore_index=-1; row 0 has -100"),
    "label huge": ({"labels": torch.tensor([0, 1, 2**40])}, ValueError, f"row 2 has {2**40}"),
    # temperature
    "temperature 0": ({"temperature": 0}, ValueError, "temperature must be positive and finite; got 0"),
    "temperature negative": ({"temperature": -1.0}, ValueError, "temperature must be positive and finite; got -1.0"),
    "temperature NaN": ({"temperature": NAN}, ValueError, "temperature must be positive and finite; got nan"),
    "temperature infinite": ({"temperature": INF}, ValueError, "temperature must be positive and finite; got inf"),
    "temperature no float": ({"temperature": 10**400}, ValueError, "temperature must be positive and finite; got inf"),
    "one temperature below float32": ({"temperature": torch.tensor([1.0, 1e-46, 2.0], dtype=torch.float64)}, ValueError, "temperature must be from 1e-18 to 1e+18; row 1 has 1e-46"),
    "one temperature beyond float32": ({"temperature": torch.tensor([1.0, 2.0, 1e39], dtype=torch.float64)}, ValueError, "temperature must be from 1e-18 to 1e+18; row 2 has 1e+39"),
    "the temperature's tensor beyond float32": ({"temperature": torch.tensor(1e39, dtype=torch.float64)}, ValueError, "temperature must be from 1e-18 to 1e+18; row 0 has 1e+39"),
    "temperature a word": ({"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
    "temperature a bool": ({"temperature": True}, TypeError, "temperature must be a number; got bool"),
    "temperatures integers": ({"temperature": torch.ones(3, dtype=torch.int64)}, TypeError, "temperature must be a number or a floating-point tensor; got torch.int64"),
    "one temperature 0": ({"temperature": torch.tensor([1.0, 0.0, 2.0])}, ValueError, "temperature must be positive and finite; row 1 has 0.0"),
    "one temperature NaN": ({"temperature": torch.tensor([1.0, 1.0, NAN])}, ValueError, "temperature must be positive and finite; row 2 has nan"),
    "the temperature's tensor negative": ({"temperature": torch.tensor(-3.0)}, ValueError, "temperature must be positive and finite; row 0 has -3.0"),
    # weights, label smoothing
    "alpha negative": ({"alpha": -0.1}, ValueError, "alpha must be in [0, 1]; got -0.1"),
    "alpha above 1": ({"alpha": 1.5}, ValueError, "alpha must be in [0, 1]; got 1.5"),
    "alpha NaN": ({"alpha": NAN}, ValueError, "alpha must be in [0, 1]; got nan"),
    "alpha a tensor": ({"alpha": torch.tensor(0.5)}, TypeError, "alpha must be a number; got Tensor"),
    "alpha without labels": ({"alpha": 0.3, "labels": None}, ValueError, "alpha weighs the hard term, which needs labels; got alpha=0.3 and labels=None. Pass labels, or alpha=0.0 for the soft term alone"),
    "label_smoothing without labels": ({"label_smoothing": 0.1, "labels": None}, ValueError, "label_smoothing needs labels; got label_smoothing=0.1 and labels=None"),
    "hard_weight without labels": ({"hard_weight": 0.3, "labels": None}, ValueError, "hard_weight weighs the hard term, which needs labels; got hard_weight=0.3 and labels=None. Pass labels, or hard_weight=0.0 for the soft term alone"),
    "alpha and hard_weight": ({"alpha": 0.3, "hard_weight": 0.2}, ValueError, "alpha cannot be given together with hard_weight or soft_weight; got alpha=0.3, hard_weight=0.2, soft_weight=None"),
    "alpha and soft_weight": ({"alpha": 0.3, "soft_weight": 0.2}, ValueError, "alpha cannot be given together with hard_weight or soft_weight"),
    "hard_weight negative": ({"hard_weight": -1.0}, ValueError, "hard_weight must be finite and at least 0; got -1.0"),
    "soft_weight infinite": ({"soft_weight": INF}, ValueError, "soft_weight must be finite and at least 0; got inf"),
    "label_smoothing negative": ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1]; got -0.1"),
    "label_smoothing above 1": ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be in [0, 1]; got 1.1"),
    # names, ignore_index, NumPy scalars
    "unknown reduction": ({"reduction": "batchmean"}, ValueError, "reduction must be one of 'none', 'sum', 'mean'; got 'batchmean'. \"mean\" divides by the rows"),
    "reduction None": ({"reduction": None}, ValueError, "reduction must be one of 'none', 'sum', 'mean'; got None"),
    "unknown divergence": ({"divergence": "hellinger"}, ValueError, "divergence must be one of 'forward_kl'"),
    "divergence a number": ({"divergence": 0}, ValueError, "divergence must be one of 'forward_kl'"),
    "ignore_index a float": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int; got float"),
    "ignore_index a bool": ({"ignore_index": True}, TypeError, "ignore_index must be an int; got bool"),
    "ignore_index None": ({"ignore_index": None}, TypeError, "ignore_index must be an int; got NoneType"),
    "reduction is no text": ({"reduction": "\ud800"}, ValueError, "reduction must be one of"),
    "ignore_index beyond 64 bits": ({"ignore_index": 2**70}, ValueError, f"ignore_index must be an int of 64 bits; got {2**70}"),
    "ignore_index beyond 64 bits, not fused": ({"ignore_index": -(2**63) - 1, "standardize": True}, ValueError, "ignore_index must be an int of 64 bits"),
    "alpha NumPy's, above 1": ({"alpha": np.float32(2)}, ValueError, "alpha must be in [0, 1]; got 2.0"),
    "temperature NumPy's bool": ({"temperature": np.bool_(True)}, TypeError, "temperature must be a number; got bool"),
    "temperature an array": ({"temperature": np.ones(3)}, TypeError, "temperature must be a number; got ndarray"),
    # normalizer
    "normalizer 0": ({"normalizer": 0}, ValueError, "normalizer must be positive and finite; got 0"),
    "normalizer negative": ({"normalizer": -2.0}, ValueError, "normalizer must be positive and finite; got -2.0"),
    "normalizer infinite": ({"normalizer": INF}, ValueError, "normalizer must be positive and finite; got inf"),
    "normalizer with sum": ({"normalizer": 3.0, "reduction": "sum"}, ValueError, "normalizer goes with reduction=\"mean\"; got reduction='sum'"),
    "normalizer with none": ({"normalizer": 3.0, "reduction": "none"}, ValueError, "normalizer goes with reduction=\"mean\"; got reduction='none'"),
    "normalizer of two": ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be a positive number or a real tensor with one element; got torch.float32 of shape (2,)"),
    "normalizer's tensor 0": ({"normalizer": torch.tensor(0)}, ValueError, "normalizer must be positive and finite; got 0"),
    "normalizer's tensor infinite": ({"normalizer": torch.tensor(INF)}, ValueError, "normalizer must be positive and finite; got inf"),
    "normalizer's tensor NaN": ({"normalizer": torch.tensor(NAN)}, ValueError, "normalizer must be positive and finite; got nan"),
    # divergences, standardize
    "mix without use": ({"mix": 0.5}, ValueError, "mix belongs to the divergences 'symmetric_kl', 'jsd', 'skewed_forward_kl', 'skewed_reverse_kl', 'dkd'; got mix=0.5 with divergence='forward_kl'. Omit mix."),
    "jsd's mix 0": ({"divergence": "jsd", "mix": 0}, ValueError, "mix must be in (0, 1); got 0.0"),
    "jsd's mix 1": ({"divergence": "jsd", "mix": 1.0}, ValueError, "mix must be in (0, 1); got 1.0"),
    "skew 0": ({"divergence": "skewed_forward_kl", "mix": 0.0}, ValueError, "mix must be in (0, 1); got 0.0"),
    "symmetric mix above 1": ({"divergence": "symmetric_kl", "mix": 1.1}, ValueError, "mix must be in [0, 1]; got 1.1"),
    "dkd's mix negative": ({"divergence": "dkd", "mix": -1.0}, ValueError, "mix must be finite and at least 0; got -1.0"),
    "mix a tensor": ({"divergence": "jsd", "mix": torch.tensor(0.5)}, TypeError, "mix must be a number; got Tensor"),
    "dkd without labels": ({"divergence": "dkd", "labels": None}, ValueError, "divergence='dkd' needs labels (class indices); got labels=None"),
    "dkd with probabilities": ({"divergence": "dkd", "labels": torch.eye(3, 5)}, ValueError, 'divergence="dkd" needs class indices as labels; got probabilities'),
    "dkd of one class": ({"divergence": "dkd", "student": Z(3, 1), "teacher": Z(3, 1)}, ValueError, "divergence='dkd' needs at least two classes; got 1"),
    "standardize one class": ({"standardize": True, "student": Z(3, 1), "teacher": Z(3, 1)}, ValueError, "standardize=True needs at least two classes; got 1"),
    "standardize a number": ({"standardize": 1}, TypeError, "standardize must be True or False; got 1"),
    # labels that are probabilities, class weights, tensors that require grad
    "probabilities of fewer classes": ({"labels": torch.eye(3, 4)}, TypeError, "labels must be class indices of an integer dtype; got torch.float32, which would be probabilities if the shape were (3, 5), not (3, 4)"),
    "probabilities that require grad": ({"labels": torch.eye(3, 5).requires_grad_()}, ValueError, "labels get no gradient; got probabilities that require grad"),
    "class_weight a list": ({"class_weight": [1.0] * 5}, TypeError, "class_weight must be a tensor or None; got list"),
    "class_weight of rows": ({"class_weight": torch.ones(3)}, ValueError, "class_weight must have one entry for each class, shape (5,); got (3,)"),
    "class_weight integers": ({"class_weight": torch.ones(5, dtype=torch.int64)}, TypeError, "class_weight must be a floating-point tensor; got torch.int64"),
    "class_weight apart": ({"class_weight": torch.ones(5, device="meta")}, ValueError, "class_weight must be on the logits' device, cpu; got meta"),
    "class_weight that requires grad": ({"class_weight": torch.ones(5, requires_grad=True)}, ValueError, "class_weight gets no gradient; got a tensor that requires grad (.detach() it)"),
    "normalizer that requires grad": ({"normalizer": torch.tensor(3.0, requires_grad=True)}, ValueError, "normalizer gets no gradient; got a tensor that requires grad (.detach() it)"),
    "class_weight without labels": ({"class_weight": torch.ones(5), "labels": None}, ValueError, "class_weight weighs the hard term, which needs labels; got labels=None"),
    # weights of rows, temperatures
    "hard_weight of classes": ({"hard_weight": torch.ones(5)}, ValueError, "hard_weight must have one entry for each row of logits, shape (3,) for logits of shape (3, 5); got (5,)"),
    "hard_weight integers": ({"hard_weight": torch.ones(3, dtype=torch.int64)}, TypeError, "hard_weight must be a number or a floating-point tensor; got torch.int64"),
    "one soft_weight negative": ({"soft_weight": torch.tensor([1.0, -1.0, 0.0])}, ValueError, "soft_weight must be finite and at least 0; row 1 has -1.0"),
    "one soft_weight NaN": ({"soft_weight": torch.tensor([1.0, 0.0, NAN])}, ValueError, "soft_weight must be finite and at least 0; row 2 has nan"),
    "teacher_temperature 0": ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be positive and finite; got 0.0"),
    "one teacher_temperature 0": ({"teacher_temperature": torch.tensor([1.0, 1.0, 0.0])}, ValueError, "teacher_temperature must be positive and finite; row 2 has 0.0"),
    "teacher_temperature beyond float32, weights of rows": ({"teacher_temperature": 1e39, "hard_weight": torch.ones(3)}, ValueError, "teacher_temperature must be from 1e-18 to 1e+18; got 1e+39"),
    "one teacher_temperature below float32": ({"teacher_temperature": torch.tensor([1.0, 1.0, 1e-46], dtype=torch.float64)}, ValueError, "teacher_temperature must be from 1e-18 to 1e+18; row 2 has 1e-46"),
    "one temperature 0, not fused": ({"temperature": torch.tensor([1.0, 0.0, 1.0]), "divergence": "jsd"}, ValueError, "temperature must be positive and finite; row 1 has 0.0"),
    "label too large, not fused": ({"labels": torch.tensor([0, 5, 1]), "divergence": "jsd"}, ValueError, "labels must be in [0, 5) or ignore_index=-100; row 1 has 5"),
    "mix next to 0": ({"divergence": "jsd", "mix": 1e-300}, ValueError, "mix is too small for float64: 1 - mix must be less than 1; got 1e-300"),
    # teachers
    "unknown teacher_form": ({"teacher_form": "softmax"}, ValueError, "teacher_form must be one of 'logits', 'log_probs', 'probs'; got 'softmax'"),
    "unknown ensemble": ({"ensemble": "mean"}, ValueError, "ensemble must be one of 'probs', 'logits'; got 'mean'"),
    "mse of probabilities": ({"divergence": "mse", "teacher_form": "probs"}, ValueError, "divergence='mse' compares logits and needs teacher_form=\"logits\"; got teacher_form='probs'"),
    "standardized probabilities": ({"standardize": True, "teacher_form": "probs"}, ValueError, "standardize=True compares logits and needs teacher_form=\"logits\"; got teacher_form='probs'"),
    "mse of a mixture of probabilities": ({"divergence": "mse", "teacher": [Z(3, 5), Z(3, 5)]}, ValueError, "divergence='mse' compares logits: with several teachers it needs ensemble=\"logits\"; got ensemble='probs'"),
    "no teacher": ({"teacher": []}, ValueError, "teacher must have at least one tensor; got an empty sequence"),
    "a teacher None": ({"teacher": [Z(3, 5), None]}, TypeError, "teacher[1] must be a tensor; got NoneType"),
    "a teacher of other shape": ({"teacher": [Z(3, 5), Z(4, 5)]}, ValueError, "student and teacher[1] must have the same shape; got (3, 5) and (4, 5)"),
    "a teacher requires grad": ({"teacher": [Z(3, 5), Z(3, 5, requires_grad=True)]}, ValueError, "teacher[1] requires grad, but the loss gives the teacher none: compute it under torch.no_grad(), or .detach() it"),
    "the teacher requires grad": ({"teacher": Z(3, 5, requires_grad=True)}, ValueError, "teacher requires grad, but the loss gives the teacher none"),
    "weights of one teacher": ({"teacher_weights": [1.0, 2.0]}, ValueError, "teacher_weights must have one number for each teacher, 1; got 2"),
    "a teacher's weight 0": ({"teacher": [Z(3, 5), Z(3, 5)], "teacher_weights": [1, 0]}, ValueError, "teacher_weights[1] must be positive and finite; got 0.0"),
    "teachers' weights huge": ({"teacher": [Z(3, 5), Z(3, 5)], "teacher_weights": [1e308, 1e308]}, ValueError, "teacher_weights must have a finite sum; got [1e+308, 1e+308]"),
    "teachers' weights a tensor": ({"teacher_weights": torch.ones(1)}, TypeError, "teacher_weights must be a sequence of numbers or None; got Tensor"),
    # classes and dim
    "classes differ": ({"teacher": Z(3, 8)}, ValueError, "got (3, 5) and (3, 8). If the first classes are the same and the others are padding, student[..., :5] and teacher[..., :5] are the first 5 of both, without a copy"),
    "classes of dimension 1 differ": ({"student": Z(3, 5, 2), "teacher": Z(3, 4, 2), "dim": 1}, ValueError, "got (3, 5, 2) and (3, 4, 2). If the first classes are the same and the others are padding, student[:, :4] and teacher[:, :4] are the first 4 of both, without a copy"),
    "classes of a second teacher differ": ({"teacher": [Z(3, 5), Z(3, 8)]}, ValueError, "student and teacher[1] must have the same shape; got (3, 5) and (3, 8). If the first classes are the same and the others are padding, student[..., :5] and teacher[1][..., :5] are the first 5 of both"),
    "dim 0": ({"dim": 0}, ValueError, "dim must be -1, for logits (..., C), or 1, for logits (N, C, d1, ...); got 0"),
    "dim a float": ({"dim": -1.0}, ValueError, "dim must be -1, for logits (..., C), or 1, for logits (N, C, d1, ...); got -1.0"),
    "dim an array": ({"dim": torch.tensor([1, 2])}, ValueError, "dim must be -1, for logits (..., C), or 1, for logits (N, C, d1, ...); got tensor([1, 2])"),
    "dim 1 of rows": ({"student": Z(5), "teacher": Z(5), "dim": 1}, ValueError, "student must have shape (N, classes, ...) with at least one class; got (5,)"),
    # inplace, chunks, normalizer
    "inplace not fused": ({"inplace": True, "standardize": True}, ValueError, "inplace must be False with standardize=True: no single-pass kernel computes this call on cpu"),
    "inplace a number": ({"inplace": 1}, TypeError, "inplace must be True or False; got 1"),
    "chunks without a Head": ({"chunks": fastkd.chunks.plan(*make_heads())}, ValueError, 'chunks must be "auto" unless student is a Head; got Plan('),
    "chunks a number": ({"chunks": 4}, ValueError, 'chunks must be "auto" unless student is a Head; got 4'),
    "normalizer a word": ({"normalizer": "tokens"}, TypeError, "normalizer must be a number; got str"),
}  # fmt: skip


@pytest.mark.parametrize("function", ["loss", "terms"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_argument_and_values(mistake, function):
    changed, error, message = MISTAKES[mistake]
    arguments = {**valid_arguments(), **changed}
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    before = {k: (v.clone(), v._version) for k, v in tensors.items()}
    with pytest.raises(error, match=re.escape(message)):
        getattr(fastkd, function)(**arguments)
    for name, (value, version) in before.items():
        assert tensors[name]._version == version
        if value.device.type == "cpu" and value.layout is torch.strided:
            torch.testing.assert_close(tensors[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("each_autograd")
@pytest.mark.parametrize("mistake", ["label too large", "label negative", "label huge"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_refused_call_writes_nothing(mistake, grad, inplace):
    changed, error, message = MISTAKES[mistake]
    arguments = {**valid_arguments(), **changed}
    before = arguments["student"].clone()
    if grad:
        arguments["student"] = arguments["student"].requires_grad_() * 1
    version = arguments["student"]._version
    with pytest.raises(error, match=re.escape(message)):
        fastkd.loss(**arguments, inplace=inplace)
    assert torch.equal(arguments["student"], before)
    assert arguments["student"]._version == version


def test_the_table_changes_a_valid_call():
    assert fastkd.loss(**valid_arguments()).isfinite()
    for changed, _, _ in MISTAKES.values():
        assert set(changed) <= {*valid_arguments(), *Options._fields}


def test_valid_names_are_listed():
    for name in fastkd.divergences():
        with pytest.raises(ValueError, match=f"'{name}'"):
            fastkd.loss(**valid_arguments(), divergence="no such thing")
    for name in shapes.REDUCTIONS:
        with pytest.raises(ValueError, match=f"'{name}'"):
            fastkd.loss(**valid_arguments(), reduction="no such thing")


@pytest.mark.parametrize("name", ["loss", "terms", "verify", "KDLoss", "explain"])
def test_an_unknown_option_is_refused(name):
    function = getattr(fastkd, name)
    arguments = valid_arguments() if name in ("loss", "terms", "verify") else {}
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'tau'"):
        function(**arguments, tau=2.0)


@pytest.mark.parametrize("name", ["loss", "terms"])
def test_wrong_numbers_of_arguments_are_refused(name):
    function, (student, teacher, labels) = getattr(fastkd, name), valid_arguments().values()
    with pytest.raises(TypeError, match=rf"{name}\(\) takes from 2 to 3 positional arguments"):
        function(student, teacher, labels, 2.0)
    with pytest.raises(TypeError, match=rf"{name}\(\) missing 1 required .* 'teacher'"):
        function(student)
    with pytest.raises(TypeError, match=rf"{name}\(\) got multiple values for argument 'labels'"):
        function(student, teacher, labels, labels=labels)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 2.0},
        {"temperature": 0.0},
        {"reduction": "avg"},
        {"divergence": "x"},
        {"teacher_form": "x"},
        {"label_smoothing": 3.0},
        {"alpha": 0.5, "soft_weight": 1.0},
        {"hard_weight": -1.0},
        {"class_weight": nn.Parameter(torch.ones(5))},
        {"normalizer": nn.Parameter(torch.tensor(3.0))},
    ],
    ids=str,
)
def test_module_refuses_options_when_it_is_made(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fastkd.KDLoss(**options)


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=name_of)
@pytest.mark.parametrize("value", [1e-46, 1e-39, 1e25, 1e39])
@pytest.mark.usefixtures("each_autograd")
def test_temperatures_that_float32_cannot_square_or_invert_are_refused(value, dtype):
    arguments = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in valid_arguments().items()
    }
    for name in ("temperature", "teacher_temperature"):
        message = re.escape(f"{name} must be from 1e-18 to 1e+18; got {value!r}")
        with pytest.raises(ValueError, match=message):
            fastkd.loss(**arguments, **{name: value})
        with pytest.raises(ValueError, match=message):
            fastkd.KDLoss(**{name: value})
    message = re.escape(f"temperature must be from 1e-18 to 1e+18; got {value!r}")
    with pytest.raises(ValueError, match=message):
        top = fastkd.TopK(Z(3, 1) - 1, Z(3, 1).long())
        fastkd.loss(arguments["student"], top, temperature=value)
    with pytest.raises(ValueError, match=message):
        fastkd.check_inputs(**arguments, temperature=value)


@pytest.mark.parametrize("value", [1e-18, 1e18])
def test_the_least_and_the_greatest_temperature_are_finite(value):
    for option in (value, torch.full((3,), value), torch.tensor(value, dtype=torch.float64)):
        student, teacher, labels = valid_arguments().values()
        leaf = student.requires_grad_()
        got = fastkd.loss(leaf, teacher, labels, temperature=option)
        got.backward()
        assert got.isfinite() and leaf.grad.isfinite().all()
        with pytest.raises(ValueError, match="temperature must be from"):
            fastkd.loss(
                leaf,
                teacher,
                labels,
                temperature=torch.tensor([value, 1e39, 1.0], dtype=torch.float64),
            )


def test_errors_name_no_path_of_the_machine_that_built_the_extension():
    # The first line of a native check's message has a path relative to the repository.
    student, teacher = Z(3, 5), Z(3, 6)
    settings = (None, None, None, 1.0, 1.0, 0.5, 0.5, 0.0, -100, 0, 0.5, 2, 0.0, False)
    with pytest.raises(RuntimeError, match="must have the shape of the student") as caught:
        torch.ops.fastkd.loss(student, [teacher], None, [], False, 0, 1.0, 1.0, *settings)
    assert re.search(r"(^|\s)csrc/torch/\w+\.cpp", str(caught.value).split("\n")[0])


# ---- unusual arguments that are accepted


def test_non_adjacent_classes_work(device):
    student, teacher, labels = make((6, 40), device=device)
    odd = student.t().contiguous().t()
    assert odd.stride(-1) != 1
    leaf = odd.detach().requires_grad_()
    value = fastkd.loss(leaf, teacher.t().contiguous().t(), labels)
    assert torch.equal(value, fastkd.loss(student, teacher, labels))
    value.backward()
    contiguous = student.clone().requires_grad_()
    fastkd.loss(contiguous, teacher, labels).backward()
    assert torch.equal(leaf.grad, contiguous.grad)


def test_integers_are_accepted_as_numbers():
    arguments = valid_arguments()
    assert torch.equal(
        fastkd.loss(**arguments, temperature=3, alpha=1, normalizer=2, label_smoothing=0),
        fastkd.loss(**arguments, temperature=3.0, alpha=1.0, normalizer=2.0, label_smoothing=0.0),
    )


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numpy_scalars_are_accepted_as_numbers(kind):
    arguments = valid_arguments()
    expected = fastkd.loss(**arguments, temperature=3.0, hard_weight=1.0, normalizer=2.0)
    three, one, two = kind(3), kind(1), kind(2)
    loss = fastkd.loss(**arguments, temperature=three, hard_weight=one, normalizer=two)
    assert torch.equal(loss, expected)
    assert fastkd.KDLoss(alpha=one)(**arguments) == fastkd.loss(**arguments, alpha=1.0)
    fastkd.check_inputs(**arguments, temperature=three)


# ---- checks that look at data


def test_checks_of_data_need_tensors():
    with pytest.raises(TypeError, match="teacher must be a tensor; got list"):
        fastkd.check_logits([1.0], "teacher")
    with pytest.raises(ValueError, match="ignore_index must be an int of 64 bits"):
        fastkd.check_inputs(**valid_arguments(), ignore_index=2**63)


# Each entry is (conversion to an unsupported layout, call that the error message suggests).
LAYOUTS = {
    "coo": (lambda value: value.to_sparse(), "to_dense()"),
    "csr": (lambda value: value.to_sparse_csr(), "to_dense()"),
    "mkldnn": (lambda value: value.to_mkldnn(), "to_dense()"),
    "nested": (lambda value: torch.nested.nested_tensor([value]), "torch.nested.to_padded_tensor("),
    "jagged": (
        lambda value: torch.nested.nested_tensor([value], layout=torch.jagged),
        "torch.nested.to_padded_tensor(",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("function", "name"),
    [
        *(("loss", name) for name in ("student", "teacher", "labels")),
        *(("verify", name) for name in ("student", "teacher", "labels")),
        *(("check_inputs", name) for name in ("student", "teacher", "labels")),
        *(("TopK", name) for name in ("student", "indices", "log_probs", "labels")),
        *(("Head", name) for name in ("hidden", "weight", "bias", "teacher")),
        ("check_logits", "logits"),
    ],
)
def test_tensors_of_other_layouts_are_refused(function, name, layout):
    make_other, advice = LAYOUTS[layout]
    arguments: dict[str, Any] = dict(valid_arguments(), labels=torch.rand(4, 7))
    if function == "TopK":
        log_probs, indices = arguments["teacher"].log_softmax(-1).topk(2)
        arguments.update(indices=indices, log_probs=log_probs, labels=valid_arguments()["labels"])
    elif function == "Head":
        arguments.update(hidden=torch.rand(3, 4), weight=torch.rand(5, 4), bias=torch.rand(5))
        arguments["labels"] = valid_arguments()["labels"]
    elif function == "check_logits":
        arguments = {"logits": torch.rand(4, 7)}
    value = arguments[name]
    if (layout == "csr" and value.dim() < 2) or (
        layout == "mkldnn" and not value.is_floating_point()
    ):
        value = torch.rand(4, 7)  # csr needs two dimensions, and mkldnn a floating-point dtype
    arguments[name] = make_other(value)
    kind = getattr(fastkd, function)
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor") as caught:
        if function in ("TopK", "Head"):
            side = {"TopK": "teacher", "Head": "student"}[function]
            fields = {key: arguments.pop(key) for key in kind._fields if key in arguments}
            fastkd.loss(**{**arguments, side: kind(**fields)})
        else:
            kind(**arguments)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        *(("verify", {name: None}) for name in ("student", "teacher", "repeats")),
        *(("verify", {name: "x"}) for name in ("student", "teacher", "labels")),
        ("verify", {"student": torch.ones(4, 7, dtype=torch.int64)}),
        *(("check_inputs", {name: None}) for name in ("student", "teacher")),
        *(("check_inputs", {name: "x"}) for name in ("labels", "ignore_index", "temperature")),
        ("check_logits", {"logits": None}),
        ("check_logits", {"logits": torch.zeros(4, 7), "name": None}),
    ],
)
def test_arguments_of_another_type_are_named(function, arguments):
    name = list(arguments)[-1]
    with_tensors = arguments if function == "check_logits" else {**valid_arguments(), **arguments}
    with pytest.raises(TypeError, match=f"^{name} must be "):
        getattr(fastkd, function)(**with_tensors)


def test_check_inputs_accepts_valid_arguments(device):
    student, teacher, labels = make((6, 40), device=device)
    student[0], labels[0] = NAN, -100  # check_inputs does not check values of ignored rows
    teacher[1, :39] = -INF
    assert fastkd.check_inputs(student, teacher, labels) is None
    fastkd.check_inputs(student[1:], teacher[1:], temperature=torch.ones(5, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, y: y.__setitem__(2, 40), "labels must be in [0, 40) or ignore_index=-100; row 2 has 40"),
        (lambda s, t, y: y.__setitem__(2, -7), "labels must be in [0, 40) or ignore_index=-100; row 2 has -7"),
        (lambda s, t, y: s.__setitem__((3, 1), NAN), "student must not hold NaN or +inf; row 3 has nan"),
        (lambda s, t, y: s.__setitem__((3, 1), INF), "student must not hold NaN or +inf; row 3 has inf"),
        (lambda s, t, y: t.__setitem__((4, 39), NAN), "teacher must not hold NaN or +inf; row 4 has nan"),
        (lambda s, t, y: t.__setitem__(5, -INF), "teacher must have at least one class above -inf in each row; row 5"),
    ],
)  # fmt: skip
def test_check_inputs_names_the_row(device, change, message):
    student, teacher, labels = make((6, 40), device=device, ignored=0.0)
    change(student, teacher, labels)
    with pytest.raises(ValueError, match=re.escape(message)):
        fastkd.check_inputs(student, teacher, labels)


def test_check_inputs_checks_temperatures(device):
    student, teacher, labels = make((3, 40), device=device)
    with pytest.raises(
        ValueError, match=r"temperature must be positive and finite; row 1 has 0\.0"
    ):
        fastkd.check_inputs(
            student, teacher, labels, temperature=torch.tensor([1.0, 0.0, 1.0], device=device)
        )
    with pytest.raises(ValueError, match=r"temperature must be positive and finite; got -1\.0"):
        fastkd.check_inputs(student, teacher, labels, temperature=-1.0)
    with pytest.raises(ValueError, match=r"temperature must have one entry for each row.*\(7,\)"):
        fastkd.check_inputs(student, teacher, labels, temperature=torch.ones(7, device=device))
    with pytest.raises(TypeError, match="temperature must be a number or a floating-point tensor"):
        fastkd.check_inputs(student, teacher, labels, temperature=torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("logits", [torch.tensor(1.0), torch.ones(3, 2, dtype=torch.complex64)])
def test_check_logits_refuses_invalid_tensors(logits):
    with pytest.raises(ValueError, match=r"logits must be floating-point, of shape \(\.\.\., C\)"):
        fastkd.check_logits(logits)


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [10, 1000, 40000])
def test_labels_out_of_range_on_cuda_are_nan_rows(classes):
    student, teacher, labels = make((6, classes), device="cuda", ignored=0.0)
    expected = fastkd.loss(student, teacher, labels, reduction="none")
    labels[2], labels[4] = classes, -5
    leaf = student.requires_grad_()
    rows = fastkd.loss(leaf, teacher, labels, reduction="none")
    rows.sum().backward()
    good_rows = [0, 1, 3, 5]
    assert rows[[2, 4]].isnan().all() and leaf.grad[[2, 4]].isnan().all()
    assert torch.equal(rows[good_rows], expected[good_rows])
    assert leaf.grad[good_rows].isfinite().all()
    with pytest.raises(ValueError, match="row 2"):
        fastkd.check_inputs(student, teacher, labels)


@pytest.mark.cuda
def test_temperatures_out_of_range_on_cuda_are_nan_rows():
    student, teacher, labels = make((4, 100), device="cuda", ignored=0.0)
    t = torch.tensor([1.0, 0.0, -2.0, 3.0], device="cuda")
    rows = fastkd.loss(student, teacher, labels, temperature=t, reduction="none")
    assert rows.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_check_logits_warns_about_probabilities(device, dtype):
    logits = make((6, 40), dtype, device=device).student
    with pytest.warns(UserWarning, match="teacher look like probabilities.*expects logits"):
        assert fastkd.check_logits(logits.float().softmax(-1).to(dtype), "teacher") is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastkd.check_logits(logits)
        assert fastkd.check_logits(logits.float().log_softmax(-1))
        assert fastkd.check_logits(logits.float().sigmoid())
        assert fastkd.check_logits(logits[:0])


def test_probabilities_are_never_refused(device):
    # Probabilities are valid logits, so only check_logits warns about them.
    probabilities = make((6, 40), device=device).student.softmax(-1)
    assert fastkd.loss(probabilities, probabilities) == 0
