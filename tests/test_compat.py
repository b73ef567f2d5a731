"""The adapters of fastkd.compat against the libraries' own code, or the formulas written out."""

import copy
import functools
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable

import peers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import compat
from fastkd.compat import (
    deit,
    distilbert,
    keras,
    liger,
    mdistiller,
    modelopt,
    nemo,
    textbrewer,
    timm,
    torchdistill,
    torchtune,
    trl,
)

ROOT = pathlib.Path(__file__).parents[1]
# torch's own words about what several libraries have as their default.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
# Relative and absolute; the libraries that compute in float32 whatever they get set the second.
DOUBLE = {"rtol": 1e-9, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 2e-6}
SHAPES = [(6, 5), (2, 4, 11)]
MASKS = ["all count", "some ignored"]


def draw(shape: tuple[int, ...], mask: str = "all count", ignore_index: int = -100):
    """Logits of student and teacher in float64, and labels."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    if mask == "some ignored":
        labels[..., ::3] = ignore_index
    return student, teacher, labels


def agree(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    student: Tensor,
    tolerance: dict[str, float] = DOUBLE,
) -> None:
    """The same value and the same gradient for the student's logits."""
    values, grads = [], []
    for function in (ours, theirs):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape)
        (grad,) = torch.autograd.grad(value, leaf, weights)
        values.append(value.detach().double())
        grads.append(grad)
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(values[0], values[1], **tolerance)
    torch.testing.assert_close(grads[0], grads[1], **tolerance)


# ---------------------------------------------------------------- torchtune

TORCHTUNE = [
    ("ForwardKLLoss", "ForwardKLWithChunkedOutputLoss", {}),
    ("ReverseKLLoss", "ReverseKLWithChunkedOutputLoss", {}),
    ("SymmetricKLLoss", "SymmetricKLWithChunkedOutputLoss", {}),
    ("SymmetricKLLoss", "SymmetricKLWithChunkedOutputLoss", {"sym_kd_ratio": 0.3}),
    ("SymmetricKLLoss", "SymmetricKLWithChunkedOutputLoss", {"sym_kd_ratio": 1.0}),
    ("SymmetricKLLoss", "SymmetricKLWithChunkedOutputLoss", {"sym_kd_ratio": 0.0}),
]


@functools.cache
def torchtune_code():
    kinds = ("Forward", "Reverse", "Symmetric")
    names = [f"{kind}{rest}" for kind in kinds for rest in ("KLLoss", "KLWithChunkedOutputLoss")]
    return peers.code("torchtune", "modules/loss/kd_losses.py", *names)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("name", "_", "options"), TORCHTUNE)
def test_torchtune(name, _, options, mask, normalize):
    student, teacher, labels = draw((7, 5), mask, -7)
    ours = getattr(torchtune, name)(**options, ignore_index=-7)
    theirs = getattr(torchtune_code(), name)(**options, ignore_index=-7)
    agree(
        lambda s: ours(s, teacher, labels, normalize),
        lambda s: theirs(s, teacher, labels, normalize),
        student,
        SINGLE,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("_", "name", "options"), TORCHTUNE)
def test_torchtune_chunked(_, name, options, mask):
    student, teacher, labels = draw((2, 7, 5), mask)
    ours = getattr(torchtune, name)(3, **options)
    theirs = getattr(torchtune_code(), name)(3, **options)
    agree(
        lambda s: ours(s.chunk(3, 1), teacher.chunk(3, 1), labels),
        lambda s: theirs(s.chunk(3, 1), teacher.chunk(3, 1), labels),
        student,
        SINGLE,
    )


@pytest.mark.parametrize(("whole", "chunked", "options"), TORCHTUNE)
def test_torchtune_without_a_row_is_zero(whole, chunked, options):
    student, teacher, labels = draw((2, 4, 5))
    student.requires_grad_()
    labels.fill_(-100)
    chunks = student.chunk(2, 1), teacher.chunk(2, 1)
    for loss in (
        getattr(torchtune, whole)(**options)(student, teacher, labels),
        getattr(torchtune, chunked)(2, **options)(*chunks, labels),
    ):
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert not grad.any()


def test_torchtune_chunks_that_do_not_fit_the_labels():
    student, teacher, labels = draw((2, 4, 5))
    loss = torchtune.ForwardKLWithChunkedOutputLoss(2)
    with pytest.raises(ValueError, match=r"student_logits must be at most num_output_chunks=2"):
        loss(student.chunk(4, 1), teacher.chunk(4, 1), labels)
    with pytest.raises(ValueError, match=r"4 tokens in all; got chunks of \[2\] tokens"):
        loss(student.chunk(2, 1)[:1], teacher.chunk(2, 1)[:1], labels)


# ------------------------------------------------------------- torchdistill

PATHS = ("head", "output", "classifier", "input")


def filled(student: Tensor, teacher: Tensor):
    return {"head": {"output": student}}, {"classifier": {"input": teacher}}


@functools.cache
def torchdistill_code():
    return peers.code("torchdistill", "losses/mid_level.py", "KDLoss", "LogitStdKDLoss")


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
def test_torchdistill(name, reduction, options):
    student, teacher, labels = draw((6, 5))
    ours = getattr(torchdistill, name)(*PATHS, temperature=4.0, reduction=reduction, **options)
    theirs = getattr(torchdistill_code(), name)(
        *PATHS, temperature=4.0, reduction=reduction, **options
    )
    for targets in (labels, None):
        agree(
            lambda s, targets=targets: ours(*filled(s, teacher), targets),
            lambda s, targets=targets: theirs(*filled(s, teacher), targets),
            student,
        )


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_torchdistill_images_and_soft_targets(reduction):
    """Per-pixel classes, where the two terms have different denominators; and mixup's targets."""
    ours = torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=0.3, reduction=reduction)
    theirs = torchdistill_code().KDLoss(*PATHS, temperature=2.0, alpha=0.3, reduction=reduction)
    student, teacher, _ = draw((2, 5, 3, 4))
    soft = torch.randn(2, 5, 3, 4, dtype=torch.float64).softmax(1)
    for targets in (torch.arange(24).view(2, 3, 4) % 5, soft):
        agree(
            lambda s, targets=targets: ours(*filled(s, teacher), targets),
            lambda s, targets=targets: theirs(*filled(s, teacher), targets),
            student,
        )


def test_torchdistill_ignored_rows_are_out_of_both_terms():
    """Documented difference: the soft term of ignored rows is trained on in torchdistill."""
    student, teacher, labels = draw((6, 5), "some ignored")
    kept = labels != -100
    ours = torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=0.3)
    theirs = torchdistill_code().KDLoss(*PATHS, temperature=2.0, alpha=0.3)
    agree(
        lambda s: ours(*filled(s, teacher), labels),
        lambda s: theirs(*filled(s[kept], teacher[kept]), labels[kept]),
        student,
    )
    assert ours(*filled(student, teacher), labels) != theirs(*filled(student, teacher), labels)


def test_torchdistill_refuses():
    with pytest.raises(TypeError, match="alpha and beta must not both be None"):
        torchdistill.KDLoss(*PATHS, temperature=2.0)
    with pytest.raises(ValueError, match="reduction must be one of .*; got 'none'"):
        torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=0.5, reduction="none")
    with pytest.raises(ValueError, match=r"beta must be .*; got -0\.5"):
        torchdistill.KDLoss(*PATHS, temperature=2.0, alpha=1.5)
    with pytest.raises(ValueError, match=r"eps must be 1e-7; got 1e-05"):
        torchdistill.LogitStdKDLoss(*PATHS, temperature=2.0, eps=1e-5, alpha=0.5)


# ---------------------------------------------------------------------- TRL


@functools.cache
def trl_loss():
    file = "experimental/gkd/gkd_trainer.py"
    return peers.code("trl", file, "generalized_jsd_loss").generalized_jsd_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_trl(beta, temperature, reduction, mask):
    student, teacher, labels = draw((2, 4, 11), mask)
    options = {
        "labels": None if mask == "no labels" else labels,
        "beta": beta,
        "temperature": temperature,
        "reduction": reduction,
    }
    agree(
        lambda s: trl.generalized_jsd_loss(s, teacher, **options),
        lambda s: trl_loss()(s, teacher, **options),
        student,
    )


@pytest.mark.parametrize("count", [12, torch.tensor(12)], ids=["number", "tensor"])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_trl_with_a_global_count(mask, count):
    student, teacher, labels = draw((2, 4, 11), mask)
    options = {"labels": None if mask == "no labels" else labels, "num_items_in_batch": count}
    agree(
        lambda s: trl.generalized_jsd_loss(s, teacher, **options),
        lambda s: trl_loss()(s, teacher, **options),
        student,
    )


def test_trl_refuses():
    student, teacher, _ = draw((2, 3, 5))
    with pytest.raises(ValueError, match="reduction must be one of .*; got 'none'"):
        trl.generalized_jsd_loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]; got 1\.5"):
        trl.generalized_jsd_loss(student, teacher, beta=1.5)


# -------------------------------------------------------------------- Liger
# Its modules are Triton kernels, which need a GPU. Its chunked losses are PyTorch, and so is the JSD
# in them; KL is torch's own function by its documentation, and TVD is written out.


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_liger_jsd(beta, mask):
    file = "chunked_loss/jsd_loss.py"
    summed = peers.code("liger_kernel", file, "distillation_loss_fn", math=math)
    student, teacher, labels = draw((7, 11), mask)
    target = None if mask == "no labels" else labels
    rows = int((labels != -100).sum())
    ours = liger.LigerJSD(beta=beta)
    agree(
        lambda s: ours(s.log_softmax(-1), teacher.log_softmax(-1), target),
        lambda s: summed.distillation_loss_fn(s, teacher, beta, target) / rows,
        student,
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
def test_liger_kl(reduction, log_target):
    student, teacher, _ = draw((7, 11))
    target = teacher.log_softmax(-1) if log_target else teacher.softmax(-1)
    ours = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    theirs = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    agree(
        lambda s: ours(s.log_softmax(-1), target),
        lambda s: theirs(s.log_softmax(-1), target),
        student,
    )


def test_liger_kl_needs_no_eps():
    """Documented difference: a target of 0, or smaller than eps, contributes what it should."""
    student, teacher, _ = draw((7, 11))
    teacher[:, 0], teacher[:, 1] = -math.inf, -60.0
    agree(
        lambda s: liger.LigerKLDIVLoss()(s.log_softmax(-1), teacher.softmax(-1)),
        lambda s: F.kl_div(s.log_softmax(-1), teacher.softmax(-1), reduction="mean"),
        student,
    )
    with pytest.raises(ValueError, match=r"eps has no use here.*; got 1e-05"):
        liger.LigerKLDIVLoss(eps=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_liger_tvd(reduction, mask):
    student, teacher, labels = draw((7, 11), mask)
    kept = labels != -100
    divisor = {"batchmean": kept.sum(), "mean": kept.sum() * 11, "sum": 1}[reduction]
    target = None if mask == "no labels" else labels
    ours = liger.LigerTVDLoss(reduction=reduction)
    agree(
        lambda s: ours(s.softmax(-1), teacher.softmax(-1), target),
        lambda s: 0.5 * (s.softmax(-1) - teacher.softmax(-1))[kept].abs().sum() / divisor,
        student,
    )


def test_liger_tvd_has_finite_gradients_where_a_probability_is_zero():
    student, teacher, _ = draw((7, 11))
    student[:, 0], student[:, 1] = -math.inf, -1000.0
    agree(
        lambda s: liger.LigerTVDLoss()(s.softmax(-1), teacher.softmax(-1)),
        lambda s: 0.5 * (s.softmax(-1) - teacher.softmax(-1)).abs().sum() / 7,
        student,
    )


def test_liger_tvd_pulls_nowhere_where_probabilities_are_equal():
    """Documented difference: Liger had the subgradient -1/2 there."""
    p = torch.full((2, 4), 0.25, requires_grad=True)
    (grad,) = torch.autograd.grad(liger.LigerTVDLoss()(p, p.detach()), p)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_takes_other_dtypes(dtype):
    student, teacher, labels = (x.to(dtype) if x.is_floating_point() else x for x in draw((7, 11)))
    p, q = teacher.softmax(-1), student.requires_grad_().softmax(-1)
    for loss in (
        liger.LigerJSD()(q.log(), p.log(), labels),
        liger.LigerKLDIVLoss()(q.log(), p),
        liger.LigerTVDLoss()(q, p, labels),
    ):
        assert loss.dtype is torch.float32 and loss.isfinite()
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert grad.dtype is dtype and grad.isfinite().all()


@pytest.mark.parametrize("make", [liger.LigerKLDIVLoss, liger.LigerTVDLoss])
def test_liger_refuses_losses_for_each_class(make):
    with pytest.raises(ValueError, match="reduction must be one of .*; got 'none'"):
        make(reduction="none")


# --------------------------------------------------------------------- timm


@functools.cache
def timm_task():
    as_it_is = {"unwrap_model": lambda model: model, "get_state_dict": None}
    base = peers.code("timm", "task/task.py", "TrainingTask", **as_it_is).TrainingTask
    return peers.code(
        "timm",
        "task/distillation.py",
        "DistillationTeacher",
        "_resolve_teacher",
        "LogitDistillationTask",
        TrainingTask=base,
        **as_it_is,
        resolve_classification_loss=lambda criterion, device, criterion_kwargs: criterion,
    ).LogitDistillationTask


def models(classes: int = 5) -> tuple[nn.Module, nn.Module]:
    """(teacher, student): linear, in float64, with what timm asks of a model."""
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
def test_timm(weights, fused):
    teacher, student = models()
    images, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 5
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    theirs = timm_task()(
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


# -------------------------------------------------------------------- Keras


@pytest.fixture(scope="module")
def keras_package(tmp_path_factory):
    """Keras on the torch backend; it reads its backend from the environment when imported."""
    peers.folder("keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras as package
    assert package.backend.backend() == "torch"
    return package


def keras_loss(package, temperature: float):
    """Keras' KL of softened probabilities: the instance, not the name (see the page)."""
    return package.distillation.LogitsDistillation(temperature, package.losses.KLDivergence())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_keras_logits_distillation(keras_package, temperature):
    student, teacher, _ = draw((6, 5))
    theirs = keras_loss(keras_package, temperature)
    ours = keras.LogitsDistillation(temperature)
    agree(
        lambda s: ours.compute_loss(teacher, s),
        lambda s: theirs.compute_loss(teacher.float(), s.float()),
        student,
        SINGLE,
    )


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("with_labels", [True, False])
def test_keras_distiller(keras_package, weight, with_labels):
    torch.manual_seed(0)
    teacher, student = (
        keras_package.Sequential([keras_package.Input((3,)), keras_package.layers.Dense(5)])
        for _ in range(2)
    )
    theirs = keras_package.distillation.Distiller(
        teacher, student, keras_loss(keras_package, 3.0), student_loss_weight=weight
    )
    theirs.compile(loss=keras_package.losses.SparseCategoricalCrossentropy(from_logits=True))
    ours = keras.Distiller(teacher, student, keras.LogitsDistillation(3.0), weight)
    x, y = torch.randn(6, 3), torch.arange(6) % 5 if with_labels else None
    torch.testing.assert_close(ours.compute_loss(x, y), theirs.compute_loss(x, y), **SINGLE)
    if with_labels or weight < 1:  # the gradient for logits, which both take as y_pred
        agree(
            lambda s: ours.compute_loss(x, y, s),
            lambda s: theirs.compute_loss(x, y, s),
            student(x).detach(),
            SINGLE,
        )


def test_keras_refuses():
    with pytest.raises(ValueError, match="loss must be one of 'kl_divergence'; got 'mse'"):
        keras.LogitsDistillation(loss="mse")
    teacher, student = models()
    with pytest.raises(TypeError, match="distillation_losses must be one .*; got list"):
        keras.Distiller(teacher, student, [keras.LogitsDistillation()])


# --------------------------------------------------- TextBrewer, modelopt, NeMo


@pytest.mark.parametrize("name", ["kd_ce_loss", "kd_mse_loss"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["1", "8", "tensor", "one for each row"])
def test_textbrewer(name, shape, kind):
    student, teacher, _ = draw(shape)
    rows = math.prod(shape[:-1])
    temperature = {
        "1": 1,
        "8": 8,
        "tensor": torch.tensor(3.0),
        "one for each row": torch.arange(1.0, rows + 1).double().view(shape[:-1]),
    }[kind]
    theirs = getattr(peers.code("textbrewer", "losses.py", name), name)
    ours = getattr(textbrewer, name)
    agree(
        lambda s: ours(s, teacher, temperature), lambda s: theirs(s, teacher, temperature), student
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_modelopt(reduction, shape):
    student, teacher, _ = draw(shape)
    theirs = peers.code(
        "modelopt", "torch/distill/losses.py", "LogitsDistillationLoss", Loss=nn.modules.loss._Loss
    ).LogitsDistillationLoss(temperature=3.0, reduction=reduction)
    ours = modelopt.LogitsDistillationLoss(temperature=3.0, reduction=reduction)
    agree(lambda s: ours(s, teacher), lambda s: theirs(s, teacher), student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [None, 24])
@pytest.mark.parametrize("mask", MASKS)
def test_nemo(temperature, count, mask):
    student, teacher, labels = draw((2, 4, 11), mask)
    names = ("KDLoss", "_forward_kl_from_log_probs", "_kl_forward_chunked")
    theirs = peers.code(
        "nemo_automodel", "components/loss/kd_loss.py", *names, _HAVE_DTENSOR=False
    ).KDLoss(temperature=temperature, chunk_size=3)
    ours = nemo.KDLoss(temperature=temperature, chunk_size=3)
    agree(
        lambda s: ours(s, teacher, labels, count),
        lambda s: theirs(s, teacher, labels, count),
        student,
        SINGLE,
    )


def test_nemo_refuses_a_sharded_vocabulary():
    with pytest.raises(ValueError, match="tp_group must be None"):
        nemo.KDLoss(tp_group="group")


# ------------------------------------------------- no package: formulas written out


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of each row."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_deit(kind, alpha):
    teacher, _ = models()
    heads, _, labels = draw((2, 6, 5))
    labels, images = labels[0], torch.randn(6, 3, dtype=torch.float64)
    base = nn.CrossEntropyLoss(label_smoothing=0.1)
    given = teacher(images).detach()

    def formula(heads: Tensor) -> Tensor:
        if kind == "none":
            return base(heads[0], labels)
        theirs = {
            "soft": kl_rows(heads[1], given, 3.0).sum() / heads[1].numel(),
            "hard": F.cross_entropy(heads[1], given.argmax(-1)),
        }[kind]
        return (1 - alpha) * base(heads[0], labels) + alpha * theirs

    ours = deit.DistillationLoss(base, teacher, kind, alpha, tau=3.0)
    agree(lambda s: ours(images, (s[0], s[1]), labels), formula, heads)


def test_deit_needs_two_heads():
    teacher, _ = models()
    loss = deit.DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 3.0)
    with pytest.raises(ValueError, match="outputs must be a pair .*; got one tensor"):
        loss(torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mdistiller_kd(temperature):
    student, teacher, _ = draw((6, 5))
    agree(
        lambda s: mdistiller.kd_loss(s, teacher, temperature),
        lambda s: kl_rows(s, teacher, temperature).mean(),
        student,
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.5, 0.0), (2.0, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mdistiller_dkd(alpha, beta, temperature):
    student, teacher, target = draw((6, 5))
    others = torch.ones(6, 5, dtype=torch.bool).scatter(1, target[:, None], False)

    def formula(student: Tensor) -> Tensor:
        p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
        p_t, q_t = (x.gather(1, target[:, None]).squeeze(1) for x in (p, q))
        tckd = p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()
        nckd = kl_rows(student[others].view(6, 4), teacher[others].view(6, 4), temperature)
        return (alpha * temperature**2 * tckd + beta * nckd).mean()

    agree(
        lambda s: mdistiller.dkd_loss(s, teacher, target, alpha, beta, temperature),
        formula,
        student,
    )


def test_mdistiller_dkd_refuses_alpha_zero():
    student, teacher, target = draw((6, 5))
    with pytest.raises(ValueError, match=r"alpha must be positive and finite; got 0\.0"):
        mdistiller.dkd_loss(student, teacher, target, 0.0, 8.0, 4.0)


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize(
    "weights",
    [
        {"alpha_ce": 5.0, "alpha_mlm": 2.0, "alpha_clm": 0.0},
        {"alpha_ce": 0.5, "alpha_clm": 0.5},
        {"alpha_ce": 0.5, "alpha_mlm": 0.0, "alpha_clm": 0.0, "alpha_mse": 0.1},
        {"alpha_ce": 0.5, "alpha_mlm": 2.0, "alpha_clm": 0.0, "alpha_mse": 0.1},
    ],
    ids=["mlm", "clm", "mse", "mlm and mse"],
)
def test_distilbert(weights, restrict):
    student, teacher, labels = draw((2, 6, 5), "some ignored")
    attention = torch.ones(2, 6, dtype=torch.long)
    attention[1, 4:] = 0  # among them a row with a label, and one without
    rows = labels > -1 if restrict else attention.bool()

    def formula(s: Tensor) -> Tensor:
        given = {"alpha_mlm": 0.0, "alpha_mse": 0.0, **weights}
        total = given["alpha_ce"] * kl_rows(s[rows], teacher[rows], 2.0).mean()
        total = total + given["alpha_mlm"] * F.cross_entropy(s.flatten(0, 1), labels.flatten())
        shifted = F.cross_entropy(s[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        total = total + given["alpha_clm"] * shifted
        squared = (s[rows] - teacher[rows]).square().sum() / rows.sum()
        return total + given["alpha_mse"] * squared

    agree(
        lambda s: distilbert.step_loss(
            s, teacher, attention, labels, restrict_ce_to_mask=restrict, **weights
        ),
        formula,
        student,
    )


def test_distilbert_padding_may_hold_anything():
    student, teacher, labels = draw((2, 6, 5))
    attention = torch.ones(2, 6)
    attention[1, 4:], labels[1, 4:] = 0, -100
    options = {"alpha_mlm": 2.0, "alpha_clm": 0.0, "alpha_mse": 0.1}
    clean = distilbert.step_loss(student, teacher, attention, labels, **options)
    student[1, 4:] = teacher[1, 4:] = math.nan
    assert distilbert.step_loss(student, teacher, attention, labels, **options) == clean


def test_distilbert_refuses_two_hard_terms():
    student, teacher, labels = draw((2, 6, 5))
    with pytest.raises(ValueError, match="alpha_mlm and alpha_clm must not both be positive"):
        distilbert.step_loss(student, teacher, torch.ones(2, 6), labels, alpha_mlm=1.0)


# --------------------------------------------------------------- all of them


def test_a_teacher_that_requires_grad_is_refused():
    student, teacher, labels = draw((6, 5))
    teacher.requires_grad_()
    with pytest.raises(ValueError, match="teacher"):
        torchtune.ForwardKLLoss()(student.requires_grad_(), teacher, labels)


def test_adapters_run_on(device):
    student, teacher, labels = (x.to(device) for x in draw((2, 4, 11), "some ignored"))
    chosen = [
        (torchtune.SymmetricKLLoss(0.3), (labels,)),
        (nemo.KDLoss(temperature=2.0), (labels,)),
        (trl.generalized_jsd_loss, (labels, 0.1, 2.0)),
        (modelopt.LogitsDistillationLoss(2.0), ()),
        (textbrewer.kd_mse_loss, (torch.full((2, 4), 3.0),)),
        (functools.partial(distilbert.step_loss, alpha_mse=0.1), (labels >= 0, labels)),
    ]
    for function, rest in chosen:
        there = [x.to(device) if isinstance(x, Tensor) else x for x in rest]
        here = [x.cpu() if isinstance(x, Tensor) else x for x in rest]
        agree(
            lambda s, f=function, rest=there: f(s, teacher, *rest),
            lambda s, f=function, rest=here: f(s.cpu(), teacher.cpu(), *rest).to(device),
            student,
        )


def test_every_adapter_has_a_record():
    modules = {
        path.stem
        for path in (ROOT / "python" / "fastkd" / "compat").glob("*.py")
        if not path.stem.startswith("_") and path.stem != "convention"
    }
    recorded = {
        record.after.split()[1].removeprefix("fastkd.compat.") for record in compat.CONVENTIONS
    }
    assert recorded == modules
    for record in compat.CONVENTIONS:
        exec(record.after, {})


def test_the_page_is_what_the_records_say():
    done = subprocess.run(
        [sys.executable, "-m", "fastkd.compat"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "docs" / "compat.md").read_text(), (
        "run: python -m fastkd.compat > docs/compat.md"
    )
