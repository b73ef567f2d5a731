"""Test that with shift=1, row i of a causal model predicts label i + 1."""

import math

import pytest
import torch

import fastkd

BATCH, POSITIONS, CLASSES, K = 3, 7, 40, 5


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def student(device):
    return draw(BATCH, POSITIONS, CLASSES, seed=0).to(device).requires_grad_()


@pytest.fixture
def teacher(device):
    return draw(BATCH, POSITIONS, CLASSES, seed=1).to(device)


@pytest.fixture
def labels(device):
    labels = torch.arange(BATCH * POSITIONS).reshape(BATCH, POSITIONS) % CLASSES
    labels[0, 3] = -100
    return labels.to(device)


def check(student, ours, sliced, sliced_labels, **options):
    """Assert that a shifted call equals a call on slices: loss, gradient and terms."""
    teacher, labels = ours
    reduction = options.get("reduction", "mean")
    shifted_loss = fastkd.loss(student, teacher, labels, shift=1, **options)
    rows = {k: v[:, 1:] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    sliced_loss = fastkd.loss(student[:, :-1], sliced, sliced_labels, **rows)
    if reduction == "none":
        assert (shifted_loss[:, -1] == 0).all()
    torch.testing.assert_close(
        shifted_loss[:, :-1] if reduction == "none" else shifted_loss, sliced_loss
    )
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (shifted_loss, sliced_loss)]
    torch.testing.assert_close(*gradients)
    shifted = fastkd.terms(student, teacher, labels, shift=1, **options)
    theirs = fastkd.terms(student[:, :-1], sliced, sliced_labels, **rows)
    for name, x, y in zip(shifted._fields, shifted, theirs, strict=True):
        x = x[:, :-1] if reduction == "none" else x
        torch.testing.assert_close(x, y, msg=name, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_shifted_logits_equal_slices(student, teacher, labels, reduction, with_labels):
    labels = labels if with_labels else None
    sliced = labels[:, 1:] if with_labels else None
    check(student, (teacher, labels), teacher[:, :-1], sliced, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [0, 1])
def test_a_class_as_ignore_index_ignores_no_row_without_labels(student, teacher, ignore_index):
    check(student, (teacher, None), teacher[:, :-1], None, ignore_index=ignore_index)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_lists_belong_to_tokens(student, teacher, labels, divergence, with_labels):
    # A server's list for token i comes at position i; token 0 has no list.
    log_probs, indices = teacher.log_softmax(-1).topk(K)
    log_probs[:, 0], indices[:, 0] = -math.inf, -1
    top = fastkd.TopK(log_probs, indices)
    sliced = fastkd.TopK(log_probs[:, 1:], indices[:, 1:])
    labels = labels if with_labels else None
    sliced_labels = labels[:, 1:] if with_labels else None
    check(student, (top, labels), sliced, sliced_labels, divergence=divergence)


def test_sampled_tokens_may_have_weights(student, teacher, labels, device):
    # Row weights, such as importance ratios, belong to tokens and are shifted with the tokens.
    tokens = labels.clamp(min=0)
    log_probs = teacher.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    weights = draw(BATCH, POSITIONS, seed=2).abs().to(device)
    sampled = fastkd.Sampled(log_probs, tokens)
    sliced = fastkd.Sampled(log_probs[:, 1:], tokens[:, 1:])
    check(student, (sampled, None), sliced, None, soft_weight=weights)


def test_shifted_heads_equal_slices(device, labels):
    hidden = draw(BATCH, POSITIONS, 8, seed=3).to(device)
    weight = draw(CLASSES, 8, seed=4).to(device).requires_grad_()
    other_head = fastkd.Head(hidden, weight.detach() * 1.1)
    ours = fastkd.loss(fastkd.Head(hidden, weight), other_head, labels, shift=1)
    sliced = other_head._replace(hidden=hidden[:, :-1])
    student = fastkd.Head(hidden[:, :-1], weight)
    theirs = fastkd.loss(student, sliced, labels[:, 1:])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, weight)[0] for x in (ours, theirs)))


def test_dim_1_is_shifted_too(student, teacher, labels):
    first = [x.movedim(-1, 1) for x in (student, teacher)]
    ours = fastkd.loss(*first, labels, dim=1, shift=1)
    torch.testing.assert_close(ours, fastkd.loss(student, teacher, labels, shift=1))


def test_shift_2_and_short_sequences_are_supported(student, teacher, labels):
    # The last two calls have no token to predict.
    ours = fastkd.loss(student, teacher, labels, shift=2)
    torch.testing.assert_close(ours, fastkd.loss(student[:, :-2], teacher[:, :-2], labels[:, 2:]))
    assert fastkd.loss(student[:, :1], teacher[:, :1], labels[:, :1], shift=1) == 0
    assert fastkd.loss(student[:, :1], teacher[:, :1], shift=5) == 0


def test_the_module_shifts(student, teacher, labels):
    with pytest.raises(ValueError, match="shift must be an int of at least 0; got -1"):
        fastkd.KDLoss(shift=-1)
    criterion = fastkd.KDLoss(shift=1)
    ours = criterion(student, teacher, labels)
    torch.testing.assert_close(ours, fastkd.loss(student, teacher, labels, shift=1))


def test_narrow_labels_are_shifted(student, teacher, labels):
    # ignore_index, -100, is no uint8 number.
    labels = labels.clamp(min=0)
    ours = fastkd.loss(student, teacher, labels.to(torch.uint8), shift=1)
    torch.testing.assert_close(ours, fastkd.loss(student, teacher, labels, shift=1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shift": -1}, ValueError, "shift must be an int of at least 0; got -1"),
        ({"shift": True}, TypeError, "shift must be an int of at least 0; got True"),
        ({"shift": 1, "alpha": 0.3}, ValueError, "alpha weighs the hard term, which needs labels"),
        ({"shift": 1, "label_smoothing": 0.1}, ValueError, "label_smoothing needs labels"),
    ],
)
def test_bad_shifts_are_refused(student, teacher, options, error, message):
    with pytest.raises(error, match=message):
        fastkd.loss(student, teacher, **options)


def test_a_bad_shift_is_refused_without_logits():
    with pytest.raises(ValueError, match="shift must be an int of at least 0; got -1"):
        fastkd.KDLoss(shift=-1)
    with pytest.raises(TypeError, match=r"at least 0; got 1\.0"):
        fastkd.explain(shift=1.0)


def test_bad_shapes_are_refused(student, teacher):
    with pytest.raises(ValueError, match=r"shift=1 needs logits \(..., positions, C\)"):
        fastkd.loss(student[0, 0], teacher[0, 0], shift=1)
    with pytest.raises(TypeError, match="labels must be class indices with shift=1"):
        fastkd.loss(student, teacher, teacher.softmax(-1), shift=1)
