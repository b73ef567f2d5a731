"""Test routed teachers: each row has one of several teachers."""
# ruff: noqa: E501 - one mistake per line

import pytest
import torch

import fastkd

CLASSES, SHAPE = 20, (3, 5)


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def labels(device):
    labels = torch.arange(15).reshape(SHAPE) % CLASSES
    labels[0, 1] = -100
    return labels.to(device)


@pytest.fixture
def indices(device):
    return (torch.arange(15).reshape(SHAPE) * 7 % 3).to(device)


OPTIONS = [
    {},
    {"shift": 1},
    {"reduction": "none"},
    {"reduction": "sum", "divergence": "jsd"},
    {"normalizer": 4.0},
    {"soft_weight": draw(*SHAPE, seed=9).abs(), "hard_weight": 0.5, "shift": 1},
]


def move_options(options, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def select_rows(logits, indices):
    """Select, for each row, the logits of the teacher that ``indices`` names."""
    stacked = torch.stack([x.float() for x in logits])
    return stacked.gather(0, indices[None, ..., None].expand(1, *SHAPE, CLASSES))[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_row_has_the_logits_of_its_teacher(device, labels, indices, options):
    student = draw(*SHAPE, CLASSES, seed=0).to(device).requires_grad_()
    teachers = [draw(*SHAPE, CLASSES, seed=i).to(device) for i in (1, 2, 3)]
    teachers[1] = teachers[1].bfloat16()
    options = move_options(options, device)
    teacher = fastkd.Routed(tuple(teachers), indices)
    ours = fastkd.loss(student, teacher, labels, **options)
    expected = fastkd.loss(student, select_rows(teachers, indices), labels, **options)
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (ours, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_heads_may_be_routed(device, labels, indices, options, with_labels):
    hidden = draw(*SHAPE, 6, seed=0).to(device).requires_grad_()
    weight = draw(CLASSES, 6, seed=1).to(device).requires_grad_()
    heads = tuple(
        fastkd.Head(draw(*SHAPE, n, seed=n).to(device), draw(CLASSES, n, seed=n + 1).to(device))
        for n in (4, 8, 6)
    )
    options = move_options(options, device)
    if not with_labels:
        labels = None
        options.pop("hard_weight", None)
    exact = select_rows([head.logits() for head in heads], indices)
    expected = fastkd.loss(hidden @ weight.T, exact, labels, **options)
    want = torch.autograd.grad(expected.sum(), (hidden, weight))
    # Rows that belong to other teachers are not read, so NaN has no effect in these rows.
    for i, head in enumerate(heads):
        head.hidden[indices != i] = float("nan")
    teacher = fastkd.Routed(heads, indices)
    for student in (fastkd.Head(hidden, weight), hidden @ weight.T):
        ours = fastkd.loss(student, teacher, labels, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(ours.sum(), (hidden, weight))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_terms_of_heads_add_up(device, labels, indices):
    hidden, weight = draw(*SHAPE, 6, seed=0).to(device), draw(CLASSES, 6, seed=1).to(device)
    heads = tuple(fastkd.Head(hidden.roll(i, -1), weight) for i in (1, 2, 3))
    teacher = fastkd.Routed(heads, indices)
    ours = fastkd.terms(fastkd.Head(hidden, weight), teacher, labels)
    exact = select_rows([head.logits() for head in heads], indices)
    expected = fastkd.terms(hidden @ weight.T, exact, labels)
    for name, ours_field, expected_field in zip(ours._fields, ours, expected, strict=True):
        torch.testing.assert_close(ours_field, expected_field, rtol=1e-5, atol=1e-5, msg=name)


def test_one_teacher_may_have_no_row(device, labels, indices):
    hidden, weight = draw(*SHAPE, 6, seed=0).to(device), draw(CLASSES, 6, seed=1).to(device)
    head = fastkd.Head(hidden, weight)
    teacher = fastkd.Routed((head, head), torch.zeros_like(indices))
    assert fastkd.loss(head, teacher, labels, alpha=0.0) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["tensor", "Head"])
def test_a_compiled_loss_equals_the_eager_one(kind, labels, indices, device):
    hidden = draw(*SHAPE, 6, seed=0).to(device).requires_grad_()
    weight = draw(CLASSES, 6, seed=1).to(device)
    heads = tuple(fastkd.Head(hidden.detach().roll(i, -1), weight) for i in (1, 2, 3))

    def compute(hidden, indices):
        student = fastkd.Head(hidden, weight) if kind == "Head" else hidden @ weight.T
        return fastkd.loss(student, fastkd.Routed(heads, indices), labels)

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    values = [function(hidden, indices) for function in (compute, compiled)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(value, hidden)[0] for value in values])
    if device == "cpu":  # on CUDA, a failed assertion leaves the device unusable
        with pytest.raises(RuntimeError, match=r"teacher.indices must be in \[0, 3\)"):
            compiled(hidden, indices + 1)


def test_repr_shows_no_numbers():
    teachers = fastkd.Head(Z(2, 3), Z(4, 3)), fastkd.Head(Z(2, 5), Z(4, 5))
    collated = torch.utils.data.default_collate([fastkd.Routed((Z(2, 4),), torch.tensor([0, 1]))])
    assert repr(collated) == (
        "Routed(teachers=(float32 (1, 2, 4) on cpu), indices=int64 (1, 2) on cpu)"
    )
    assert repr(fastkd.Routed(teachers, torch.tensor([0, 1]))) == (
        "Routed(teachers=(Head(hidden=float32 (2, 3) on cpu, weight=float32 (4, 3) on cpu), "
        "Head(hidden=float32 (2, 5) on cpu, weight=float32 (4, 5) on cpu)), "
        "indices=int64 (2,) on cpu)"
    )


Z = torch.zeros
BAD = {
    "out of range": ((Z(2, 4), Z(2, 4)), torch.tensor([0, 2]), ValueError, "must be in [0, 2)"),
    "negative": ((Z(2, 4), Z(2, 4)), torch.tensor([0, -1]), ValueError, "got -1 to 0"),
    "floats": ((Z(2, 4),), Z(2), TypeError, "Routed.indices must be a tensor of an integer dtype"),
    "none": ((), torch.tensor([0, 0]), TypeError, "Routed.teachers must be a tuple of at least"),
    "kinds": ((Z(2, 4), fastkd.Head(Z(2, 3), Z(4, 3))), torch.tensor([0, 0]), TypeError, "all Heads; got Tensor, Head"),
    "lists": ((fastkd.TopK(Z(2, 3) - 2, torch.arange(6).view(2, 3)),) * 2, torch.tensor([0, 0]), TypeError, "all Heads; got TopK, TopK"),
    "rows": ((Z(2, 4), Z(3, 4)), torch.tensor([0, 0]), ValueError, "teacher.teachers[1] must have the"),
    "classes": ((Z(2, 5),), torch.tensor([0, 0]), ValueError, "must have 4 classes; got 5"),
    "indices of other rows": ((Z(2, 4),), torch.tensor([0]), ValueError, "teacher.indices must have"),
    "shift": ((Z(2, 4), Z(2, 4)), torch.tensor([0, 1]), ValueError, "shift must be an int of at least 0; got -1"),
    "a gradient": ((Z(2, 4, requires_grad=True),), torch.tensor([0, 0]), ValueError, "requires grad"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused(case):
    teachers, indices, error, message = BAD[case]
    with pytest.raises(error) as raised:
        routed = fastkd.Routed(teachers, indices)
        if case == "shift":
            fastkd.loss(fastkd.Head(Z(2, 3), Z(4, 3)), routed, shift=-1)
        fastkd.loss(Z(2, 4), routed)
    assert message in str(raised.value)


def test_narrow_labels_are_accepted():
    # PyTorch converts ignore_index, -100, to 156 to compare it with uint8 labels.
    labels = torch.tensor([156, 3, 7, 156])
    head = fastkd.Head(draw(4, 6, seed=0), draw(200, 6, seed=1))
    teacher = fastkd.Routed((head, head), torch.tensor([0, 1, 1, 0]))
    narrow, wide = (
        fastkd.terms(head, teacher, y, reduction="sum") for y in (labels.byte(), labels)
    )
    assert narrow == wide
    assert fastkd.loss(head, teacher, labels.byte()) == fastkd.loss(head, teacher, labels)


ROWS, INDICES = (2, 5), torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
LABELS = torch.arange(10).view(ROWS)
BAD_ROWS = {
    "labels of other rows": {"labels": LABELS.T},
    "too few labels": {"labels": LABELS[:, 1:]},
    "too many labels": {"labels": Z(3, 5, dtype=torch.int64)},
    "a list of labels": {"labels": LABELS.tolist()},
    "a label out of range": {"labels": LABELS + 4},
    "weights of other rows": {"labels": LABELS, "soft_weight": Z(5, 2)},
    "a temperature of 0": {"labels": LABELS, "temperature": Z(ROWS)},
    "a negative shift": {"labels": LABELS, "shift": -1},
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_head_with_a_routed_teacher_is_checked_like_a_head_with_a_teacher(case):
    head = fastkd.Head(Z(*ROWS, 3), Z(10, 3))
    messages = []
    for teacher in (head, fastkd.Routed((head, head), INDICES)):
        with pytest.raises((TypeError, ValueError)) as raised:
            fastkd.loss(head, teacher, **BAD_ROWS[case])
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
