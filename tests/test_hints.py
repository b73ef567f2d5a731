"""Test feature hints: distances, projections, and invalid arguments."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastkd
from fastkd.training.hints import Features, HintLoss


def loss_of(kind: str, student: torch.Tensor, teacher: torch.Tensor, **options):
    hint = fastkd.Hint(student="a", teacher="b", loss=kind, **options)
    (losses,) = HintLoss([hint])([student], [teacher])
    return losses


SHAPES = [((3, 4), (3, 4)), ((3, 5, 4), (3, 5, 4)), ((3, 4, 6, 7), (3, 4, 6, 7))]


@pytest.mark.parametrize(("ours", "theirs"), SHAPES)
def test_mse_and_cosine_equal_torch(ours, theirs):
    torch.manual_seed(1)
    student, teacher = torch.randn(ours).double(), torch.randn(theirs).double()
    dim = 1 if len(ours) > 3 else -1
    truth = {
        "mse": torch.stack([F.mse_loss(a, b) for a, b in zip(student, teacher, strict=True)]),
        "cosine": (1 - F.cosine_similarity(student, teacher, dim=dim)).reshape(3, -1).mean(1),
    }
    for kind, expected in truth.items():
        value = loss_of(kind, student, teacher, weight=0.5)
        torch.testing.assert_close(value, 0.5 * expected, rtol=1e-12, atol=0)


def test_attention_equals_its_authors_code():
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 4, 6, 7).double(), torch.randn(3, 9, 6, 7).double()

    def at(x):
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    value = loss_of("attention", student, teacher)
    expected = (at(student) - at(teacher)).pow(2).mean()
    torch.testing.assert_close(value.mean(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("ours", "theirs", "project"),
    [((3, 4, 6, 7), (3, 9, 6, 7), nn.Conv2d(4, 9, 1)), ((3, 5, 4), (3, 5, 9), nn.Linear(4, 9))],
)
def test_a_projection_computes_in_its_own_dtype(ours, theirs, project):
    torch.manual_seed(1)
    student, teacher = torch.randn(ours).double(), torch.randn(theirs)
    value = loss_of("mse", student, teacher, project=project)
    expected = F.mse_loss(project(student.float()), teacher)
    torch.testing.assert_close(value.mean(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("listed", [False, True])
def test_the_projection_and_the_student_learn(listed):
    # If ``listed`` is False, the Trainer adds the projection's parameters to the optimizer.
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = torch.randn(32, 6)
    project = nn.Linear(8, 16)
    before = project.weight.detach().clone()
    parameters = [*student.parameters(), *(project.parameters() if listed else ())]
    optimizer = torch.optim.Adam(parameters, 0.02)
    trainer = fastkd.Trainer(
        student,
        teacher,
        optimizer,
        loss=fastkd.KDLoss(hard_weight=0.0, soft_weight=0.0),
        hints=[fastkd.Hint(student="1", teacher="1", weight=2.0, project=project)],
        progress=False,
    )
    labels = torch.zeros(32, dtype=torch.int64)
    steps = list(trainer.steps([(inputs, labels)] * 150))
    assert float(steps[-1].hint) < 0.2 * float(steps[0].hint)
    assert float(steps[0].loss) == float(steps[0].hint)
    assert len(optimizer.param_groups[0]["params"]) == 6
    assert not torch.equal(project.weight, before)
    assert set(student.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_module_may_return_a_tuple():
    class Block(nn.Module):
        def forward(self, x):
            return x + 1, "cache"

    model = nn.Sequential(Block())
    with Features(model, ["0"], "student") as features:
        model(torch.zeros(2, 3))
        assert torch.equal(features.pop()[0], torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="forward pass did not call the student module '0'"):
            features.pop()


def test_a_model_without_submodules_is_refused():
    with pytest.raises(ValueError, match="the student has no module 'a'; it has no submodules"):
        Features(nn.Linear(2, 2), ["a"], "student")


def test_features_that_do_not_fit_are_refused():
    for kind in ("mse", "attention"):
        with pytest.raises(ValueError, match=r"have the same shape .*; got \(3, 6, 7, 4\)"):
            loss_of(kind, torch.zeros(3, 4, 6, 7), torch.zeros(3, 4, 5, 7))
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(3, 9\).*project=.*nn.Linear"):
        loss_of("mse", torch.zeros(3, 4), torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"positions, and the output of 'a' has none: .* \(3, 4\)"):
        loss_of("attention", torch.zeros(3, 4), torch.zeros(3, 4))
    model = nn.Sequential(nn.Flatten(0))
    with (
        Features(model, ["0"], "student"),
        pytest.raises(TypeError, match="of two or more dimensions"),
    ):
        model(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": 0}, "weight must be positive and finite"),
        ({"loss": "mae"}, "one of 'mse', 'cosine', 'attention'; got 'mae'"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fastkd.Hint(student="a", teacher="b", **options)


def test_names_must_be_keywords():
    with pytest.raises(TypeError, match="positional"):
        fastkd.Hint("a", "b")
