"""Test that adapters in fastkd.compat for classifiers give the libraries' results."""

import copy
import functools
import inspect

import peers
import pytest
import torch
from peers import DOUBLE, SINGLE, assert_equal_losses, draw, kl_rows
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.compat import deit, keras, mdistiller, timm, torchdistill

# Several libraries use kl_div's default reduction, about which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")

# ---- torchdistill

PATHS = ("head", "output", "classifier", "input")


def filled(student: Tensor, teacher: Tensor):
    return {"head": {"output": student}}, {"classifier": {"input": teacher}}


@functools.cache
def torchdistill_code():
    return peers.compile_code("torchdistill", "losses/mid_level.py", "KDLoss", "LogitStdKDLoss")


@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3},
        {"alpha": 0.3, "beta": 4.0, "label_smoothing": 0.1},
        {"alpha": 0.3, "weight": torch.arange(1.0, 6.0, dtype=torch.float64)},
        {"alpha": 0.0},
        {"alpha": None, "beta": 0.5},
    ],
    ids=lambda options: ", ".join(options),
)
def test_torchdistill_gives_its_own_loss(name, reduction, options):
    student, teacher, labels = draw((6, 5))
    ours = getattr(torchdistill, name)(*PATHS, temperature=4.0, reduction=reduction, **options)
    theirs = getattr(torchdistill_code(), name)(
        *PATHS, temperature=4.0, reduction=reduction, **options
    )
    for targets in (labels, None):
        assert_equal_losses(
            lambda s, targets=targets: ours(*filled(s, teacher), targets),
            lambda s, targets=targets: theirs(*filled(s, teacher), targets),
            student,
        )


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_torchdistill_accepts_pixels_and_soft_targets(reduction):
    ours = torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=0.3, reduction=reduction)
    theirs = torchdistill_code().KDLoss(*PATHS, temperature=2.0, alpha=0.3, reduction=reduction)
    student, teacher, _ = draw((2, 5, 3, 4))
    soft = torch.randn(2, 5, 3, 4, dtype=torch.float64).softmax(1)
    for targets in (torch.arange(24).view(2, 3, 4) % 5, soft):
        assert_equal_losses(
            lambda s, targets=targets: ours(*filled(s, teacher), targets),
            lambda s, targets=targets: theirs(*filled(s, teacher), targets),
            student,
        )


def test_torchdistill_ignores_rows_in_both_terms():
    # torchdistill's soft term includes ignored rows, a difference that docs/compat.md states.
    student, teacher, labels = draw((6, 5), "some ignored")
    valid = labels != -100
    ours = torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=0.3)
    theirs = torchdistill_code().KDLoss(*PATHS, temperature=2.0, alpha=0.3)
    assert_equal_losses(
        lambda s: ours(*filled(s, teacher), labels),
        lambda s: theirs(*filled(s[valid], teacher[valid]), labels[valid]),
        student,
    )
    assert ours(*filled(student, teacher), labels) != theirs(*filled(student, teacher), labels)


def test_torchdistill_refuses_unsupported_options():
    with pytest.raises(TypeError, match="alpha and beta must not both be None"):
        torchdistill.KDLoss(*PATHS, temperature=2.0)
    with pytest.raises(ValueError, match=r"reduction must be one of .*; got 'none'"):
        torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=0.5, reduction="none")
    with pytest.raises(ValueError, match=r"beta, by default 1 - alpha, must be .*; got -0\.5"):
        torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=1.5)
    with pytest.raises(ValueError, match=r"eps must be 1e-7; got 1e-05"):
        torchdistill.LogitStdKDLoss(*PATHS, temperature=2.0, eps=1e-5, alpha=0.5)


# ---- timm


def models(classes: int = 5) -> tuple[nn.Module, nn.Module]:
    """Return (teacher, student): linear float64 models with the attributes that timm reads."""
    torch.manual_seed(0)
    made = nn.Linear(3, classes).double(), nn.Linear(3, classes).double()
    for model in made:
        model.num_classes, model.in_chans = classes, 3
        model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    return made


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"task_loss_weight": 0.3},
        {"distill_loss_weight": 0.7},
        {"task_loss_weight": 2.0, "distill_loss_weight": 0.7},
    ],
    ids=lambda weights: ", ".join(weights) or "none",
)
def test_timm_gives_its_own_loss(weights, fused):
    teacher, student = models()
    images, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 5
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    theirs = peers.timm_task()(
        copy.deepcopy(student),
        teacher,
        nn.CrossEntropyLoss() if fused else smooth,
        temperature=4.0,
        verbose=False,
        **weights,
    )
    ours = timm.LogitDistillationTask(
        student, teacher, None if fused else smooth, temperature=4.0, **weights
    )
    got, expected = ours(images, labels), theirs(images, labels)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **DOUBLE)
    got["loss"].backward()
    expected["loss"].backward()
    torch.testing.assert_close(student.weight.grad, theirs.trainable_module.weight.grad, **DOUBLE)
    assert teacher.weight.grad is None


def test_timm_teacher_stays_in_evaluation_mode():
    task = timm.LogitDistillationTask(nn.Dropout(), nn.Dropout()).train()
    assert task.trainable_module.training and not task.teacher.training


def test_timm_refuses_a_name():
    message = r"got the name 'resnet50'\. Load it first: timm\.create_model\('resnet50'"
    with pytest.raises(TypeError, match=message):
        timm.LogitDistillationTask(nn.Linear(2, 3), "resnet50")


# ---- Keras


@pytest.fixture(scope="module")
def keras_package(tmp_path_factory):
    """Import Keras with torch as its backend, which Keras reads from the environment."""
    peers.find_package_folder("keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras as package
    assert package.backend.backend() == "torch"
    return package


def keras_loss(package, temperature: float):
    return package.distillation.LogitsDistillation(temperature, package.losses.KLDivergence())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_keras_logits_distillation_gives_its_own_loss(keras_package, temperature):
    student, teacher, _ = draw((6, 5))
    theirs = keras_loss(keras_package, temperature)
    ours = keras.LogitsDistillation(temperature)
    assert_equal_losses(
        lambda s: ours.compute_loss(teacher, s),
        lambda s: theirs.compute_loss(teacher.float(), s.float()),
        student,
        SINGLE,
    )


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("with_labels", [True, False])
def test_keras_distiller_trains_like_its_own(keras_package, weight, with_labels):
    torch.manual_seed(0)
    teacher, student = (
        keras_package.Sequential([keras_package.Input((3,)), keras_package.layers.Dense(5)])
        for _ in range(2)
    )
    theirs = keras_package.distillation.Distiller(
        teacher, student, keras_loss(keras_package, 3.0), student_loss_weight=weight
    )
    theirs.compile(loss=keras_package.losses.SparseCategoricalCrossentropy(from_logits=True))
    ours = keras.Distiller(
        teacher, student, keras.LogitsDistillation(3.0), student_loss_weight=weight
    )
    x, y = torch.randn(6, 3), torch.arange(6) % 5 if with_labels else None
    torch.testing.assert_close(ours.compute_loss(x, y), theirs.compute_loss(x, y), **SINGLE)
    if with_labels or weight < 1:  # at weight 1 without labels, the loss ignores the logits
        assert_equal_losses(
            lambda s: ours.compute_loss(x, y, s),
            lambda s: theirs.compute_loss(x, y, s),
            student(x).detach(),
            SINGLE,
        )


def test_keras_distiller_sets_training_modes(keras_package):
    # The teacher is frozen and in evaluation mode; a Keras student gets the argument ``training``.
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout())
    student = keras_package.Sequential(
        [
            keras_package.Input((3,)),
            keras_package.layers.Dense(5),
            keras_package.layers.Dropout(0.9),
        ]
    )
    ours = keras.Distiller(teacher, student, keras.LogitsDistillation()).train()
    x, y = torch.randn(6, 3), torch.arange(6) % 5
    before = copy.deepcopy(teacher.state_dict())
    assert ours.compute_loss(x, y) != ours.compute_loss(x, y)  # the student's dropout is active
    assert ours.compute_loss(x, y, training=False) == ours.compute_loss(x, y, training=False)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_the_keras_teacher_is_not_called_at_weight_1():
    logits, _, labels = draw((6, 5))
    no_teacher = nn.Linear(1, 1)  # a call would raise an error, since the inputs have width 5
    ours = keras.Distiller(
        no_teacher, nn.Identity(), keras.LogitsDistillation(), student_loss_weight=1.0
    )
    assert_equal_losses(
        lambda s: ours.compute_loss(s, labels), lambda s: F.cross_entropy(s, labels), logits
    )


def test_signatures_are_those_of_the_libraries(keras_package):
    pairs = [
        (timm.LogitDistillationTask, peers.timm_task()),
        (keras.Distiller, keras_package.distillation.Distiller),
        (keras.Distiller.compute_loss, keras_package.distillation.Distiller.compute_loss),
        (keras.LogitsDistillation, keras_package.distillation.LogitsDistillation),
    ]
    for ours, theirs in pairs:
        arguments, expected = (
            inspect.signature(function).parameters for function in (ours, theirs)
        )
        names = [name for name, p in expected.items() if p.kind is not p.VAR_KEYWORD]
        assert [*arguments] == names
        assert [p.default for p in arguments.values()] == [expected[name].default for name in names]
    logits = torch.zeros(2, 5)
    assert keras.LogitsDistillation().compute_loss(logits, logits, sample_weight=None) == 0


def test_unused_parameters_must_have_their_defaults():
    teacher, student = models()
    for name in ("criterion_kwargs", "teacher_pretrained_path", "teacher_pretrained_cfg_overlay"):
        with pytest.raises(ValueError, match=f"{name} must be None: .*; got 'x'"):
            timm.LogitDistillationTask(student, teacher, **{name: "x"})
    with pytest.raises(ValueError, match="loss_type must be one of 'kl'; got 'mse'"):
        timm.LogitDistillationTask(student, teacher, loss_type="mse")
    with pytest.raises(ValueError, match=r"distillation_loss_weights must be None: .*; got \[2\]"):
        keras.Distiller(teacher, student, keras.LogitsDistillation(), [2])
    ours = keras.Distiller(teacher, student, keras.LogitsDistillation())
    with pytest.raises(ValueError, match=r"sample_weight must be None: .*; got 3"):
        ours.compute_loss(torch.zeros(1, 3).double(), sample_weight=3)


def test_keras_refuses_unsupported_losses():
    with pytest.raises(ValueError, match="loss must be one of 'kl_divergence'; got 'mse'"):
        keras.LogitsDistillation(loss="mse")
    teacher, student = models()
    with pytest.raises(TypeError, match=r"distillation_losses must be one .*; got list"):
        keras.Distiller(teacher, student, [keras.LogitsDistillation()])


# ---- DeiT and mdistiller (no packages, so the tests contain their formulas)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_deit_gives_its_own_loss(kind, alpha):
    teacher, _ = models()
    heads, _, labels = draw((2, 6, 5))
    labels, images = labels[0], torch.randn(6, 3, dtype=torch.float64)
    base = nn.CrossEntropyLoss(label_smoothing=0.1)
    arguments = teacher(images).detach()

    def formula(heads: Tensor) -> Tensor:
        if kind == "none":
            return base(heads[0], labels)
        theirs = {
            "soft": kl_rows(heads[1], arguments, 3.0).sum() / heads[1].numel(),
            "hard": F.cross_entropy(heads[1], arguments.argmax(-1)),
        }[kind]
        return (1 - alpha) * base(heads[0], labels) + alpha * theirs

    ours = deit.DistillationLoss(base, teacher, kind, alpha, tau=3.0)
    assert_equal_losses(lambda s: ours(images, (s[0], s[1]), labels), formula, heads)


def test_deit_needs_two_heads():
    teacher, _ = models()
    loss = deit.DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 3.0)
    with pytest.raises(ValueError, match=r"outputs must be a pair .*; got one tensor"):
        loss(torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mdistiller_kd_gives_its_own_loss(temperature):
    student, teacher, _ = draw((6, 5))
    assert_equal_losses(
        lambda s: mdistiller.kd_loss(s, teacher, temperature),
        lambda s: kl_rows(s, teacher, temperature).mean(),
        student,
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.5, 0.0), (2.0, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mdistiller_dkd_gives_its_own_loss(alpha, beta, temperature):
    student, teacher, target = draw((6, 5))
    others = torch.ones(6, 5, dtype=torch.bool).scatter(1, target[:, None], False)

    def formula(student: Tensor) -> Tensor:
        p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
        p_t, q_t = (x.gather(1, target[:, None]).squeeze(1) for x in (p, q))
        tckd = p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()
        nckd = kl_rows(student[others].view(6, 4), teacher[others].view(6, 4), temperature)
        return (alpha * temperature**2 * tckd + beta * nckd).mean()

    assert_equal_losses(
        lambda s: mdistiller.dkd_loss(s, teacher, target, alpha, beta, temperature),
        formula,
        student,
    )


def test_mdistiller_dkd_refuses_alpha_zero():
    student, teacher, target = draw((6, 5))
    with pytest.raises(ValueError, match=r"alpha must be positive and finite; got 0\.0"):
        mdistiller.dkd_loss(student, teacher, target, 0.0, 8.0, 4.0)
