"""Test that adapters in fastkd.compat for language models give the libraries' results."""

import functools
import math

import peers
import pytest
import torch
from peers import MASKS, SHAPES, SINGLE, assert_equal_losses, draw, kl_rows
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd.compat import distilbert, liger, modelopt, nemo, textbrewer, torchtune, trl

# Several libraries use kl_div's default reduction, about which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")

# ---- torchtune

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
    return peers.compile_code("torchtune", "modules/loss/kd_losses.py", *names)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("name", "_", "options"), TORCHTUNE)
def test_torchtune_gives_its_own_loss(name, _, options, mask, normalize):
    student, teacher, labels = draw((7, 5), mask, -7)
    ours = getattr(torchtune, name)(**options, ignore_index=-7)
    theirs = getattr(torchtune_code(), name)(**options, ignore_index=-7)
    assert_equal_losses(
        lambda s: ours(s, teacher, labels, normalize),
        lambda s: theirs(s, teacher, labels, normalize),
        student,
        SINGLE,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("_", "name", "options"), TORCHTUNE)
def test_torchtune_chunked_gives_its_own_loss(_, name, options, mask):
    student, teacher, labels = draw((2, 7, 5), mask)
    ours = getattr(torchtune, name)(3, **options)
    theirs = getattr(torchtune_code(), name)(3, **options)
    assert_equal_losses(
        lambda s: ours(s.chunk(3, 1), teacher.chunk(3, 1), labels),
        lambda s: theirs(s.chunk(3, 1), teacher.chunk(3, 1), labels),
        student,
        SINGLE,
    )


@pytest.mark.parametrize(("unchunked", "chunked", "options"), TORCHTUNE)
def test_torchtune_without_a_valid_row_is_zero(unchunked, chunked, options):
    student, teacher, labels = draw((2, 4, 5))
    student.requires_grad_()
    labels.fill_(-100)
    chunks = student.chunk(2, 1), teacher.chunk(2, 1)
    for loss in (
        getattr(torchtune, unchunked)(**options)(student, teacher, labels),
        getattr(torchtune, chunked)(2, **options)(*chunks, labels),
    ):
        assert loss == 0
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert not grad.any()


def test_torchtune_refuses_chunks_that_do_not_fit_the_labels():
    student, teacher, labels = draw((2, 4, 5))
    loss = torchtune.ForwardKLWithChunkedOutputLoss(2)
    with pytest.raises(ValueError, match=r"student_logits must be at most num_output_chunks=2"):
        loss(student.chunk(4, 1), teacher.chunk(4, 1), labels)
    with pytest.raises(ValueError, match=r"4 tokens in all; got chunks of \[2\] tokens"):
        loss(student.chunk(2, 1)[:1], teacher.chunk(2, 1)[:1], labels)


@pytest.mark.parametrize("name", ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"])
def test_torchtune_refuses_labels_of_another_length(name):
    student, teacher, labels = draw((2, 4, 5))
    loss = getattr(torchtune, name)()
    assert loss(student, teacher, labels.flatten()) == loss(student, teacher, labels)
    with pytest.raises(ValueError, match=r"labels must have 8 entries, .* got shape \(6,\)"):
        loss(student, teacher, labels.flatten()[:6])


# ---- TRL


@functools.cache
def trl_loss():
    file = "experimental/gkd/gkd_trainer.py"
    return peers.compile_code("trl", file, "generalized_jsd_loss").generalized_jsd_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_trl_gives_its_own_loss(beta, temperature, reduction, mask):
    student, teacher, labels = draw((2, 4, 11), mask)
    options = {
        "labels": None if mask == "no labels" else labels,
        "beta": beta,
        "temperature": temperature,
        "reduction": reduction,
    }
    assert_equal_losses(
        lambda s: trl.generalized_jsd_loss(s, teacher, **options),
        lambda s: trl_loss()(s, teacher, **options),
        student,
    )


@pytest.mark.parametrize("count", [12, torch.tensor(12)], ids=["number", "tensor"])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_trl_accepts_a_global_count(mask, count):
    student, teacher, labels = draw((2, 4, 11), mask)
    options = {"labels": None if mask == "no labels" else labels, "num_items_in_batch": count}
    assert_equal_losses(
        lambda s: trl.generalized_jsd_loss(s, teacher, **options),
        lambda s: trl_loss()(s, teacher, **options),
        student,
    )


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1)])
def test_trl_accepts_a_count_for_every_gpu(shape):
    # The loss is averaged over num_items_in_batch's entries, one per GPU, as in TRL's trainer.
    student, teacher, labels = draw((2, 4, 11), "some ignored")
    options = {"labels": labels, "num_items_in_batch": torch.full(shape, 5.0).double()}
    assert_equal_losses(
        lambda s: trl.generalized_jsd_loss(s, teacher, **options),
        lambda s: trl_loss()(s, teacher, **options).mean(),
        student,
    )


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.zeros(2, 1)])
def test_trl_without_a_valid_row_in_the_step_is_zero(count):
    student, teacher, labels = draw((2, 4, 11))
    student.requires_grad_()
    labels = torch.full_like(labels, -100)
    loss = trl.generalized_jsd_loss(student, teacher, labels, num_items_in_batch=count)
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_trl_refuses_unsupported_options():
    student, teacher, _ = draw((2, 3, 5))
    with pytest.raises(ValueError, match=r"reduction must be one of .*; got 'none'"):
        trl.generalized_jsd_loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]; got 1\.5"):
        trl.generalized_jsd_loss(student, teacher, beta=1.5)
    for count in (0, torch.tensor(0)):
        for labels in (None, torch.zeros(2, 3, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"^num_items_in_batch must be positive.*; got 0"):
                trl.generalized_jsd_loss(student, teacher, labels, num_items_in_batch=count)


# ---- Liger (Triton kernels, which need a GPU)
# The oracles are PyTorch code: Liger's chunked JSD loss, torch's kl_div, and a total variation.


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_liger_jsd_gives_its_own_loss(beta, mask):
    file = "chunked_loss/jsd_loss.py"
    summed = peers.compile_code("liger_kernel", file, "distillation_loss_fn", math=math)
    student, teacher, labels = draw((7, 11), mask)
    target = None if mask == "no labels" else labels
    rows = int((labels != -100).sum())
    ours = liger.LigerJSD(beta=beta)
    assert_equal_losses(
        lambda s: ours(s.log_softmax(-1), teacher.log_softmax(-1), target),
        lambda s: summed.distillation_loss_fn(s, teacher, beta, target) / rows,
        student,
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("log_target", [False, True])
def test_liger_kl_gives_its_own_loss(reduction, log_target):
    student, teacher, _ = draw((7, 11))
    target = teacher.log_softmax(-1) if log_target else teacher.softmax(-1)
    ours = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    theirs = nn.KLDivLoss(reduction=reduction, log_target=log_target)
    assert_equal_losses(
        lambda s: ours(s.log_softmax(-1), target),
        lambda s: theirs(s.log_softmax(-1), target),
        student,
    )


def test_heads_give_the_loss_of_ligers_fused_linear_jsd():
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (9, 5), (6, 4), (9, 4))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    student, teacher = tensors[:2], tensors[2:]
    labels = torch.tensor([1, 2, -100, 4, 5, 8])
    for x in student:
        x.requires_grad_()
    expected = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=0.1, temperature=2.0, compiled=False
    )(*student, *teacher, labels)
    loss = fastkd.loss(
        fastkd.Head(*student), fastkd.Head(*teacher), labels, temperature=2.0,
        divergence="jsd", mix=0.1, hard_weight=0.3, soft_weight=0.7 / 2.0**2,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(each, student) for each in (loss, expected))
    torch.testing.assert_close(*gradients)


def test_liger_kl_needs_no_eps():
    # fastkd computes exact contributions of targets below Liger's eps (docs/compat.md).
    student, teacher, _ = draw((7, 11))
    teacher[:, 0], teacher[:, 1] = -math.inf, -60.0
    assert_equal_losses(
        lambda s: liger.LigerKLDIVLoss()(s.log_softmax(-1), teacher.softmax(-1)),
        lambda s: F.kl_div(s.log_softmax(-1), teacher.softmax(-1), reduction="mean"),
        student,
    )
    with pytest.raises(ValueError, match=r"eps has no use here.*; got 1e-05"):
        liger.LigerKLDIVLoss(eps=1e-5)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("mask", [*MASKS, "no labels"])
def test_liger_tvd_gives_its_own_loss(reduction, mask):
    student, teacher, labels = draw((7, 11), mask)
    valid = labels != -100
    divisor = {"batchmean": valid.sum(), "mean": valid.sum() * 11, "sum": 1}[reduction]
    target = None if mask == "no labels" else labels
    ours = liger.LigerTVDLoss(reduction=reduction)
    assert_equal_losses(
        lambda s: ours(s.softmax(-1), teacher.softmax(-1), target),
        lambda s: 0.5 * (s.softmax(-1) - teacher.softmax(-1))[valid].abs().sum() / divisor,
        student,
    )


def test_liger_tvd_has_finite_gradients_where_a_probability_is_zero():
    student, teacher, _ = draw((7, 11))
    student[:, 0], student[:, 1] = -math.inf, -1000.0
    assert_equal_losses(
        lambda s: liger.LigerTVDLoss()(s.softmax(-1), teacher.softmax(-1)),
        lambda s: 0.5 * (s.softmax(-1) - teacher.softmax(-1)).abs().sum() / 7,
        student,
    )


def test_liger_tvd_has_no_gradient_where_probabilities_are_equal():
    # At equal probabilities, the gradient is 0, but -1/2 in old releases of Liger (docs/compat.md).
    p = torch.full((2, 4), 0.25, requires_grad=True)
    (grad,) = torch.autograd.grad(liger.LigerTVDLoss()(p, p.detach()), p)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_accepts_other_dtypes(dtype):
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
    with pytest.raises(ValueError, match=r"reduction must be one of .*; got 'none'"):
        make(reduction="none")


# ---- TextBrewer, modelopt, NeMo


@pytest.mark.parametrize("name", ["kd_ce_loss", "kd_mse_loss"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["1", "8", "tensor", "one entry", "one for each row"])
def test_textbrewer_gives_its_own_loss(name, shape, kind):
    student, teacher, _ = draw(shape)
    rows = math.prod(shape[:-1])
    temperature = {
        "1": 1,
        "8": 8,
        "tensor": torch.tensor(3.0),
        "one entry": torch.tensor([3.0]),
        "one for each row": torch.arange(1.0, rows + 1).double().view(shape[:-1]),
    }[kind]
    theirs = getattr(peers.compile_code("textbrewer", "losses.py", name), name)
    ours = getattr(textbrewer, name)
    assert_equal_losses(
        lambda s: ours(s, teacher, temperature), lambda s: theirs(s, teacher, temperature), student
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_modelopt_gives_its_own_loss(reduction, shape):
    student, teacher, _ = draw(shape)
    theirs = peers.compile_code(
        "modelopt", "torch/distill/losses.py", "LogitsDistillationLoss", Loss=nn.modules.loss._Loss
    ).LogitsDistillationLoss(temperature=3.0, reduction=reduction)
    ours = modelopt.LogitsDistillationLoss(temperature=3.0, reduction=reduction)
    assert_equal_losses(lambda s: ours(s, teacher), lambda s: theirs(s, teacher), student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [None, 24])
@pytest.mark.parametrize("mask", MASKS)
def test_nemo_gives_its_own_loss(temperature, count, mask):
    student, teacher, labels = draw((2, 4, 11), mask)
    names = ("KDLoss", "_forward_kl_from_log_probs", "_kl_forward_chunked")
    theirs = peers.compile_code(
        "nemo_automodel", "components/loss/kd_loss.py", *names, _HAVE_DTENSOR=False
    ).KDLoss(temperature=temperature, chunk_size=3)
    ours = nemo.KDLoss(temperature=temperature, chunk_size=3)
    assert_equal_losses(
        lambda s: ours(s, teacher, labels, count),
        lambda s: theirs(s, teacher, labels, count),
        student,
        SINGLE,
    )


def test_nemo_refuses_a_sharded_vocabulary():
    with pytest.raises(ValueError, match="tp_group must be None"):
        nemo.KDLoss(tp_group="group")

    class Sharded(torch.Tensor):
        """Imitate torch.distributed.tensor.DTensor, which needs several processes."""

        full_tensor = torch.Tensor.clone

    student, teacher, labels = draw((2, 4, 11))
    with pytest.raises(TypeError, match=r"teacher_logits must be .*; got Sharded"):
        nemo.KDLoss()(student, teacher.as_subclass(Sharded), labels)


def test_nemo_refuses_a_count_of_zero():
    with pytest.raises(ValueError, match=r"^num_batch_labels must be positive and finite; got 0"):
        nemo.KDLoss()(*draw((2, 4, 11)), 0)


# ---- DistilBERT (no package, so the test contains the formula)


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
def test_distilbert_gives_its_own_loss(weights, restrict):
    student, teacher, labels = draw((2, 6, 5), "some ignored")
    attention = torch.ones(2, 6, dtype=torch.long)
    attention[1, 4:] = 0  # two tokens of padding
    rows = labels > -1 if restrict else attention.bool()

    def formula(s: Tensor) -> Tensor:
        arguments = {"alpha_mlm": 0.0, "alpha_mse": 0.0, **weights}
        total = arguments["alpha_ce"] * kl_rows(s[rows], teacher[rows], 2.0).mean()
        total = total + arguments["alpha_mlm"] * F.cross_entropy(s.flatten(0, 1), labels.flatten())
        shifted = F.cross_entropy(s[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        total = total + arguments["alpha_clm"] * shifted
        squared = (s[rows] - teacher[rows]).square().sum() / rows.sum()
        return total + arguments["alpha_mse"] * squared

    assert_equal_losses(
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
