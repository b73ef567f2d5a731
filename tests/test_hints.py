"""Hints: what they measure, what they learn, what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd
from fastkd.training.hints import Features, HintLoss


def loss_of(kind: str, student: torch.Tensor, teacher: torch.Tensor, weight: float = 1.0):
    torch.manual_seed(0)
    widths = [f.shape[1] if f.dim() > 3 else f.shape[-1] for f in (student, teacher)]
    learned = HintLoss([fastkd.Hint("a", "b", weight=weight, loss=kind)], *[[w] for w in widths])
    learned.to(student.dtype)
    return learned, learned([student], [teacher])


SHAPES = [((3, 4), (3, 4)), ((3, 5, 4), (3, 5, 4)), ((3, 4, 6, 7), (3, 4, 6, 7))]


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_mse_and_cosine_by_torch(ours, theirs):
    torch.manual_seed(1)
    student, teacher = torch.randn(ours).double(), torch.randn(theirs).double()
    dim = 1 if len(ours) > 3 else -1
    truth = {
        "mse": torch.stack([F.mse_loss(a, b) for a, b in zip(student, teacher, strict=True)]),
        "cosine": (1 - F.cosine_similarity(student, teacher, dim=dim)).reshape(3, -1).mean(1),
    }
    for kind, expected in truth.items():
        _, value = loss_of(kind, student, teacher, weight=0.5)
        torch.testing.assert_close(value, 0.5 * expected, rtol=1e-12, atol=0)


def test_attention_as_its_authors_compute_it():
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 4, 6, 7).double(), torch.randn(3, 9, 6, 7).double()

    def at(x):
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    learned, value = loss_of("attention", student, teacher)
    expected = (at(student) - at(teacher)).pow(2).mean()
    torch.testing.assert_close(value.mean(), expected, rtol=1e-12, atol=0)
    assert not list(learned.parameters())


def test_widths_that_differ_are_projected_as_by_a_1x1_convolution():
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 4, 6, 7).double(), torch.randn(3, 9, 6, 7).double()
    learned, value = loss_of("mse", student, teacher)
    project = learned.projections[0]
    by_convolution = F.conv2d(student, project.weight[:, :, None, None], project.bias)
    expected = F.mse_loss(by_convolution, teacher)
    torch.testing.assert_close(value.mean(), expected, rtol=1e-12, atol=0)


def test_the_projection_learns_and_the_student_through_it():
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(32, 6)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    trainer = fastkd.Trainer(
        student,
        teacher,
        optimizer,
        loss=fastkd.KDLoss(hard_weight=0.0, soft_weight=0.0),
        hints=[fastkd.Hint("1", "1", weight=2.0)],
        progress=False,
    )
    labels = torch.zeros(32, dtype=torch.int64)
    steps = list(trainer.steps([(inputs, labels)] * 150))
    assert float(steps[-1].hint) < 0.2 * float(steps[0].hint)
    assert float(steps[0].loss) == float(steps[0].hint)
    assert set(student.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_module_that_gives_a_tuple():
    class Block(nn.Module):
        def forward(self, x):
            return x + 1, "cache"

    model = nn.Sequential(Block())
    with Features(model, ["0"], "student") as features:
        model(torch.zeros(2, 3))
        assert torch.equal(features.take()[0], torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="'0' took no part in the forward pass"):
            features.take()


def test_a_model_without_modules_inside():
    with pytest.raises(ValueError, match="the student has no module 'a'; it has none"):
        Features(nn.Linear(2, 2), ["a"], "student")


def test_features_that_do_not_fit():
    with pytest.raises(ValueError, match=r"may differ in channels alone; got .* \(3, 6, 7, 4\)"):
        loss_of("mse", torch.zeros(3, 4, 6, 7), torch.zeros(3, 4, 5, 7))
    with pytest.raises(ValueError, match=r"positions, and the output of 'a' has none: .* \(3, 4\)"):
        loss_of("attention", torch.zeros(3, 4), torch.zeros(3, 4))
    model = nn.Sequential(nn.Flatten(0))
    with (
        Features(model, ["0"], "student"),
        pytest.raises(TypeError, match="of two or more dimensions"),
    ):
        model(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((1, "b"), {}, TypeError, "student must be the name of a module; got 1"),
        (("a", ""), {}, TypeError, "teacher must be the name of a module; got ''"),
        (("a", "b"), {"weight": 0}, ValueError, "weight must be positive and finite"),
        (("a", "b"), {"loss": "mae"}, ValueError, "one of 'mse', 'cosine', 'attention'; got 'mae'"),
    ],
)
def test_bad_arguments(arguments, options, error, words):
    with pytest.raises(error, match=words):
        fastkd.Hint(*arguments, **options)
