"""Test the verdicts of fastkd.verify on right and on wrong results."""

import pytest
import torch
from support import BF16, FP16, FP32, FP64, make, name_of

import fastkd
from fastkd import losses

ROWS, CLASSES = 6, 40


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=name_of)
def test_a_right_loss_agrees(device, dtype):
    verification = fastkd.verify(
        *make((ROWS, CLASSES), dtype, device=device), repeats=1, show=False, temperature=3.0
    )
    assert verification.agrees and verification.rows_checked == ROWS


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "jsd", "mix": 0.2},
        {"divergence": "dkd", "alpha": 0.1},
        {"temperature": torch.linspace(1, 3, ROWS), "teacher_temperature": 1.5},
        {"hard_weight": torch.linspace(0, 1, ROWS), "soft_weight": torch.tensor(0.5)},
        {"class_weight": torch.linspace(0.5, 2, CLASSES), "label_smoothing": 0.1},
        {"normalizer": torch.tensor(9.0)},
        {"ignore_index": -1},
        {"reduction": "none", "standardize": True},
        {"reduction": "sum", "inplace": True},
    ],
    ids=str,
)
def test_verify_agrees_for_every_option(options):
    student, teacher, labels = make((ROWS, CLASSES))
    labels = labels.clamp(min=-1) if "ignore_index" in options else labels
    verification = fastkd.verify(student, teacher, labels, repeats=1, show=False, **options)
    assert verification.agrees, str(verification)
    assert student.grad is None


def test_verify_agrees_with_classes_in_dimension_1():
    student, teacher, _ = make((2, 5, 3), labels=False)
    labels = make((2, 3, 5)).labels
    assert fastkd.verify(student, teacher, labels, dim=1, repeats=1, show=False).agrees


def test_verify_agrees_on_slices_of_padded_classes():
    student, teacher, labels = make((ROWS, CLASSES))
    student, teacher, labels = student[:, :30], teacher[:, :30], labels.clamp(max=29)
    assert fastkd.verify(student, teacher, labels, repeats=1, show=False).agrees


def test_verify_reports_wrong_results(monkeypatch):
    right = losses.loss
    monkeypatch.setattr(losses, "loss", lambda *a, **k: 1.001 * right(*a, **k))
    verification = fastkd.verify(*make((ROWS, CLASSES)), repeats=1, show=False)
    assert not verification.agrees
    assert verification.loss_error == pytest.approx(1e-3, rel=1e-2)
    assert verification.gradient_error == pytest.approx(1e-3, rel=1e-2)
    assert "DOES NOT AGREE" in str(verification)


def test_the_verdict_is_printed(capsys):
    verification = fastkd.verify(*make((ROWS, CLASSES)), repeats=1)
    printed = capsys.readouterr().out
    assert f"{ROWS} x {CLASSES}, float32, cpu" in printed and str(verification) in printed


def test_verify_refuses_what_the_loss_refuses():
    with pytest.raises(ValueError, match="temperature must be positive"):
        fastkd.verify(*make((ROWS, CLASSES)), temperature=-1.0)
    student, teacher, labels = make((ROWS, CLASSES))
    with pytest.raises(TypeError, match=r"teacher must be a tensor of logits .*; got TopK"):
        fastkd.verify(student, fastkd.TopK(*teacher.log_softmax(-1).topk(3)), labels)
    sampled = fastkd.Sampled(torch.full((len(student),), -1.0), labels)
    with pytest.raises(TypeError, match=r"teacher must be a tensor of logits .*; got Sampled"):
        fastkd.verify(student, sampled, labels)
    head = fastkd.Head(student, teacher)
    with pytest.raises(TypeError, match="student must be a tensor; got Head"):
        fastkd.verify(head, teacher, labels)
    with pytest.raises(TypeError, match=r"teacher must be a tensor of logits .*; got Head"):
        fastkd.verify(student, head, labels)
    with pytest.raises(ValueError, match="repeats must be an int of at least 1; got 0"):
        fastkd.verify(*make((ROWS, CLASSES)), repeats=0)
