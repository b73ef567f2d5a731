"""Test docs/compat.md, and the behavior that most adapters in fastkd.compat share."""

import pathlib
import re
from types import SimpleNamespace

import pytest
import torch
from peers import assert_equal_losses, draw
from torch import nn

from fastkd import compat
from fastkd.compat import (
    axolotl,
    deit,
    distilbert,
    keras,
    liger,
    mdistiller,
    modelopt,
    ms_swift,
    nemo,
    textbrewer,
    torchdistill,
    torchtune,
    trl,
    trl_async,
    trl_sdft,
    verl,
)

ROOT = pathlib.Path(__file__).parents[1]
KD = torchdistill.KDLoss("s", "output", "t", "output", temperature=2.0, alpha=0.3)
SOFT = deit.DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), "soft", 0.5, tau=2.0)
NO_LISTS = dict.fromkeys(("topk_logprobs", "topk_indices", "labels"))
AXOLOTL = axolotl.LigerFusedLinearKLTopKLogprobLoss(0.0, 1.0, temperature=2.0, beta=0.1)


def axolotl_loss(s, t, y):
    """Compute the axolotl adapter's loss from logits, with an identity matrix as the head."""
    values, ids = t.log_softmax(-1).topk(3)
    mask, no_labels = (y != -100)[:, None].expand_as(ids), torch.full_like(y, -100)
    head = torch.eye(5, dtype=s.dtype, device=s.device)
    return AXOLOTL(head, s[None], ids[None], values[None], mask[None], no_labels[None])


def trl_async_loss(s, t, y):
    """Compute the loss of TRL's AsyncDistillationTrainer, with an identity matrix as the head."""
    values, ids = t.log_softmax(-1).topk(3)
    head = torch.eye(5, dtype=s.dtype, device=s.device)
    lists = (ids, values, torch.ones_like(ids, dtype=torch.bool))
    return trl_async.chunked_jsd_loss(s, head, None, 1.0, None, *lists, 0.1, 2.0, True, None, 1, 9)[
        0
    ]


def verl_loss(s, t, y):
    lists = (part[None] for part in t.log_softmax(-1).topk(3))
    return verl.compute_forward_kl_topk(s[None], *lists, None, "thd")["distillation_losses"].sum()


# Each function computes an adapter's loss from student logits, teacher logits and labels.
MASKING = {
    "axolotl": axolotl_loss,
    "distilbert": lambda s, t, y: distilbert.step_loss(
        s[None], t[None], y[None] >= 0, y[None], alpha_mlm=1.0, alpha_clm=0.0, alpha_mse=0.1
    ),
    "liger JSD": lambda s, t, y: liger.LigerJSD()(s.log_softmax(-1), t.log_softmax(-1), y),
    "liger TVD": lambda s, t, y: liger.LigerTVDLoss()(s.softmax(-1), t.softmax(-1), y),
    "ms-swift": lambda s, t, y: ms_swift.gkd_loss(
        s[None], SimpleNamespace(full_logits=t[None], **NO_LISTS), y[None], 0.1, 2.0
    )[0],
    "nemo": nemo.KDLoss(temperature=2.0),
    "torchdistill": lambda s, t, y: KD({"s": {"output": s}}, {"t": {"output": t}}, y),
    "torchtune": torchtune.SymmetricKLLoss(0.3),
    "trl": lambda s, t, y: trl.generalized_jsd_loss(s, t, y, 0.1, 2.0, "mean"),
}
OTHERS = {
    "deit": lambda s, t, y: SOFT(t, (s, s), y),
    "keras": lambda s, t, y: keras.LogitsDistillation().compute_loss(t, s),
    "liger KL": lambda s, t, y: liger.LigerKLDIVLoss()(s.log_softmax(-1), t.softmax(-1)),
    "mdistiller": lambda s, t, y: mdistiller.dkd_loss(s, t, y, 1.0, 8.0, 4.0),
    "modelopt": lambda s, t, y: modelopt.LogitsDistillationLoss(2.0)(s, t),
    "sdft": lambda s, t, y: trl_sdft.compute_full_logit_self_distillation_loss(
        s, t, distillation_alpha=0.1
    ).sum(),
    "sdft, sampled": lambda s, t, y: trl_sdft.compute_sampled_token_self_distillation_loss(
        s, t, y, distillation_alpha=1.0
    ).sum(),
    "textbrewer": lambda s, t, y: textbrewer.kd_mse_loss(s, t, torch.full_like(y, 3).to(s)),
    "trl, async": trl_async_loss,
    "verl": verl_loss,
}


@pytest.mark.parametrize("name", MASKING)
def test_without_a_valid_row_the_loss_is_zero(name):
    student, teacher, labels = draw((6, 5))
    student.requires_grad_()
    loss = MASKING[name](student, teacher, labels.fill_(-100))
    assert loss == 0
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad.any()


@pytest.mark.parametrize("name", [name for name in MASKING if "liger" not in name])
def test_an_ignored_row_may_hold_anything(name):
    student, teacher, labels = draw((6, 5), "some ignored")
    clean = MASKING[name](student, teacher, labels)
    student[labels == -100] = teacher[labels == -100] = torch.nan
    assert MASKING[name](student, teacher, labels) == clean


@pytest.mark.parametrize("name", [*MASKING, *OTHERS])
def test_losses_are_float32_for_narrower_logits(name):
    student, teacher, labels = draw((6, 5))
    narrow = student.bfloat16().requires_grad_()
    loss = {**MASKING, **OTHERS}[name](narrow, teacher.bfloat16(), labels)
    assert loss.dtype is torch.float32
    (grad,) = torch.autograd.grad(loss, narrow)
    assert grad.dtype is torch.bfloat16 and grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("name", [name for name in (*MASKING, *OTHERS) if name != "deit"])
def test_a_teacher_that_requires_grad_is_refused(name):
    student, teacher, labels = draw((6, 5))
    with pytest.raises(ValueError, match=r"teacher(\.log_probs)? requires grad"):
        {**MASKING, **OTHERS}[name](student, teacher.requires_grad_(), labels)


@pytest.mark.cuda
@pytest.mark.parametrize("name", [*MASKING, *OTHERS])
def test_cuda_agrees_with_the_cpu(name):
    student, teacher, labels = draw((6, 5), "some ignored" if name in MASKING else "all count")
    function = {**MASKING, **OTHERS}[name]
    assert_equal_losses(
        lambda s: function(s.cuda(), teacher.cuda(), labels.cuda()).cpu(),
        lambda s: function(s, teacher, labels),
        student,
    )


def test_every_adapter_has_a_section():
    imports = re.findall(r"^\+ (from .*)$", (ROOT / "docs" / "compat.md").read_text(), re.MULTILINE)
    assert [line.split()[1] for line in imports] == [f"fastkd.compat.{n}" for n in compat.__all__]
    for line in imports:
        exec(line, {})
