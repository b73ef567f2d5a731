"""Test that ``inplace=True`` writes the gradient into the memory of the logits."""

import pytest
import torch
from support import BF16, DTYPES, FP16, make, name_of

import fastkd


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_inplace_gives_the_same_gradient_in_the_logits_memory(device, scale, reduction, dtype):
    student, teacher, labels = make((6, 1003), dtype, device=device)
    expected, overwritten = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = fastkd.loss(expected * 1, teacher, labels, reduction=reduction)
    (value * scale).backward()
    hidden = overwritten * 1
    version = hidden._version
    again = fastkd.loss(hidden, teacher, labels, reduction=reduction, inplace=True)
    assert hidden._version > version
    assert torch.equal(again, value)
    seen = []
    hidden.register_hook(lambda grad: seen.append(grad.data_ptr()))
    (again * scale).backward()
    assert seen == [hidden.data_ptr()]  # the gradient takes no memory of its own
    if dtype in (BF16, FP16) and scale != 1.0:  # in place, backward scales the rounded gradient
        info = torch.finfo(dtype)
        smallest = info.smallest_normal * info.eps  # subnormal numbers lose digits
        torch.testing.assert_close(
            overwritten.grad, expected.grad, rtol=info.eps, atol=smallest * scale
        )
    else:
        assert torch.equal(overwritten.grad, expected.grad)


def test_inplace_logits_cannot_be_used_afterwards(device):
    student, teacher, labels = make((6, 20), device=device)
    hidden = student.requires_grad_() * 1
    exp_sum = hidden.exp().sum()  # exp() saves its result for backward
    square = hidden.square().sum()  # square() saves the logits
    value = fastkd.loss(hidden, teacher, labels, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (value + square).backward()
    hidden = student * 1
    exp_sum = hidden.exp().sum()
    (fastkd.loss(hidden, teacher, labels, inplace=True) + exp_sum).backward()
    student.grad = None


def test_inplace_gradient_can_be_computed_once(device):
    student, teacher, labels = make((6, 20), device=device)
    value = fastkd.loss(student.requires_grad_() * 1, teacher, labels, inplace=True)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True"):
        value.backward()
    value = fastkd.loss(student * 1, teacher, labels, inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True"):
        torch.autograd.grad(value, student, create_graph=True)


def test_inplace_refuses_unsupported_logits(device):
    student, teacher, labels = make((6, 20), device=device)
    leaf = student.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"inplace=True.*leaf"):
        fastkd.loss(leaf, teacher, labels, inplace=True)
    with pytest.raises(ValueError, match=r"inplace=True.*a view of one"):
        fastkd.loss(leaf[:, :15], teacher[:, :15], labels.clamp(max=14), inplace=True)
    with pytest.raises(ValueError, match=r"inplace=True.*resolve_neg"):
        negatives = torch.complex(leaf * 1, leaf * 1).conj().imag
        fastkd.loss(negatives, teacher, labels, inplace=True)
    with pytest.raises(ValueError, match=r'inplace=True.*"mean" or "sum".*"none"'):
        fastkd.loss(leaf * 1, teacher, labels, inplace=True, reduction="none")
    with pytest.raises(ValueError, match=r"inplace=True.*different memory"):
        hidden = leaf * 1
        fastkd.loss(hidden, hidden.detach(), labels, inplace=True)
    # Neither classes nor rows are adjacent.
    with pytest.raises(ValueError, match=r"student to be.*row by row.*got strides \(20, 2\)"):
        fastkd.loss((leaf * 1)[:, ::2], teacher[:, ::2], inplace=True)
    assert torch.equal(leaf, student)


@pytest.mark.parametrize(
    "overlapping",
    [
        lambda x: x.unfold(0, 7, 3),
        lambda x: x[:7].expand(8, 7),
        lambda x: x.as_strided((3, 7), (3, 2)),
    ],
    ids=["windows", "one row", "between one another"],
)
def test_inplace_refuses_rows_that_share_memory(device, overlapping):
    leaf = torch.randn(28, device=device, requires_grad=True)
    logits = overlapping(leaf * 1)
    teacher = torch.randn(logits.shape, device=device)
    before = logits.clone()
    with pytest.raises(ValueError, match=r"inplace=True.*student,.*share memory; got strides"):
        fastkd.loss(logits, teacher, inplace=True)
    assert torch.equal(logits, before)
    fastkd.loss(logits, teacher).backward()
    (want,) = torch.autograd.grad(fastkd.loss(overlapping(leaf * 1).contiguous(), teacher), leaf)
    torch.testing.assert_close(leaf.grad, want)


@pytest.mark.filterwarnings("ignore:.*torch.frombuffer")
def test_inplace_refuses_misaligned_logits():
    # The logits' address is no multiple of the element size.
    memory = torch.frombuffer(bytearray(4 * 60 + 1), dtype=torch.float32, offset=1).view(6, 10)
    leaf, teacher, _ = make((6, 10))
    logits = memory.copy_(leaf.requires_grad_())
    with pytest.raises(ValueError, match=r"inplace=True.*student .*multiple of its 4 bytes.*at 0x"):
        fastkd.loss(logits, teacher, inplace=True)
    assert torch.equal(memory, leaf)
    fastkd.loss(logits, teacher).backward()  # without inplace, the logits are copied
    (want,) = torch.autograd.grad(fastkd.loss(leaf * 1, teacher), leaf)
    assert torch.equal(leaf.grad, want)


def test_inplace_without_a_gradient_changes_nothing(device):
    student, teacher, labels = make((6, 20), device=device)
    before = student.clone()
    fastkd.loss(student, teacher, labels, inplace=True)
    with torch.no_grad():
        fastkd.loss(student.requires_grad_(), teacher, labels, inplace=False)
    assert torch.equal(student, before)


def test_inplace_keeps_rows_outside_the_slice(device):
    # The last row of each sequence lies outside the slice logits[:, :-1].
    student, teacher, labels = make((3, 5, 40), device=device)
    expected, overwritten = student.clone().requires_grad_(), student.clone().requires_grad_()
    fastkd.loss((expected * 1)[:, :-1], teacher[:, :-1], labels[:, :-1]).backward()
    fastkd.loss((overwritten * 1)[:, :-1], teacher[:, :-1], labels[:, :-1], inplace=True).backward()
    assert torch.equal(expected.grad, overwritten.grad)
