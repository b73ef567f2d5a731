"""Adapters in fastkd.compat for sparse teachers give the results of the libraries."""

import functools
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Optional

import peers
import pytest
import torch
from peers import MASKS, assert_equal_losses, draw

from fastkd.compat import ms_swift, trl_sdft

# ---- TRL's SDFT and SDPO


@functools.cache
def sdft():
    names = ("compute_divergence", "add_tail_bucket")
    losses = ("compute_topk_self_distillation_loss", "compute_full_logit_self_distillation_loss")
    return peers.compile_code("trl", "experimental/sdft/loss_utils.py", *names, *losses)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_trl_sdft_gives_its_own_loss(alpha):
    student, teacher, _ = draw((2, 4, 11))
    assert_equal_losses(
        lambda s: trl_sdft.compute_full_logit_self_distillation_loss(
            s, teacher, distillation_alpha=alpha
        ),
        lambda s: sdft().compute_full_logit_self_distillation_loss(
            s, teacher, distillation_alpha=alpha
        ),
        student,
    )


# k=1 without a tail is left out: its only class has the probability 1.
@pytest.mark.parametrize(
    ("k", "add_tail"), [(1, True), (3, True), (3, False), (10, True), (10, False)]
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_trl_sdft_top_k_gives_its_own_loss(k, add_tail, alpha):
    student, teacher, _ = draw((2, 4, 11))
    options = {
        "distillation_topk": k,
        "distillation_alpha": alpha,
        "distillation_add_tail": add_tail,
    }
    assert_equal_losses(
        lambda s: trl_sdft.compute_topk_self_distillation_loss(s, teacher, **options),
        lambda s: sdft().compute_topk_self_distillation_loss(s, teacher, **options),
        student,
    )


# ---- ms-swift


@functools.cache
def swift():
    names = ("TeacherOutput", "jsd_loss", "_align_vocab", "extract_active", "gkd_loss")
    defaults = ("default_log_softmax", "default_kl_div", "default_gather")
    theirs = peers.compile_code(
        "swift", "rlhf_trainers/gkd_loss.py", *names, *defaults, Enum=Enum, Optional=Optional
    )
    theirs.TeacherOutput.__module__ = __name__
    dataclass(theirs.TeacherOutput)  # peers.compile_code removes decorators
    return theirs


def outputs(**arguments):
    fields = dict.fromkeys(("full_logits", "topk_logprobs", "topk_indices", "labels"))
    return SimpleNamespace(**{**fields, **arguments})


def assert_same_loss(student, target, beta, temperature, **teacher):
    """Assert equal sums, gradients and token counts."""
    call = (target, beta, temperature)
    theirs = swift().TeacherOutput(**teacher)
    assert_equal_losses(
        lambda s: ms_swift.gkd_loss(s, outputs(**teacher), *call)[0],
        lambda s: swift().gkd_loss(s, theirs, *call)[0],
        student,
    )
    count = ms_swift.gkd_loss(student, outputs(**teacher), *call)[1]
    assert count == swift().gkd_loss(student, theirs, *call)[1] > 0


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("mask", MASKS)
def test_ms_swift_gives_its_own_loss(beta, temperature, mask):
    student, teacher, labels = draw((2, 6, 11), mask)
    assert_same_loss(student, labels, beta, temperature, full_logits=teacher, labels=labels)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("form", ["log-probabilities", "logits"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ms_swift_accepts_lists(form, temperature, beta):
    """Lists of log-probabilities (from servers) and of logits (local teachers) are accepted."""
    student, teacher, labels = draw((2, 6, 11), "some ignored")
    values, indices = (teacher if form == "logits" else teacher.log_softmax(-1)).topk(4)
    values[0, 1] = -torch.inf  # a token that the server did not score has no soft term
    lists = {"topk_logprobs": values, "topk_indices": indices}
    assert_same_loss(student, labels, beta, temperature, **lists, labels=labels)


@pytest.mark.parametrize("form", ["dense", "lists"])
def test_ms_swift_accepts_another_prompt_of_the_teacher(form):
    student, teacher, labels = draw((1, 6, 11), "some ignored")
    shifted = labels.roll(1, 1)
    arguments = {"full_logits": teacher}
    if form == "lists":
        values, indices = teacher.log_softmax(-1).topk(4)
        arguments = {"topk_logprobs": values, "topk_indices": indices}
    assert_same_loss(student, labels, 0.0, 2.0, **arguments, labels=shifted)


def test_ms_swift_accepts_padding_in_a_list():
    """A padding entry lists no class; ms-swift's loss is NaN (documented difference)."""
    student, teacher, labels = draw((2, 6, 11))
    values, indices = teacher.log_softmax(-1).topk(4)
    padded = torch.cat([values, torch.full_like(values[..., :1], -torch.inf)], -1)
    ids = torch.cat([indices, torch.zeros_like(indices[..., :1])], -1)
    short, long = (
        ms_swift.gkd_loss(student, outputs(topk_logprobs=v, topk_indices=i), labels, 0.0, 1.0)[0]
        for v, i in ((values, indices), (padded, ids))
    )
    torch.testing.assert_close(long, short)
    theirs = swift().TeacherOutput(topk_logprobs=padded, topk_indices=ids)
    assert swift().gkd_loss(student, theirs, labels, 0.0, 1.0)[0].isnan()


def test_ms_swift_refuses_unsupported_options():
    student, teacher, labels = draw((2, 6, 11))
    with pytest.raises(ValueError, match="must have full_logits, or topk_logprobs and topk_indic"):
        ms_swift.gkd_loss(student, outputs(), labels, 0.0, 1.0)
    with pytest.raises(ValueError, match="teacher must have the same shape"):
        ms_swift.gkd_loss(student[..., :9], outputs(full_logits=teacher), labels, 0.0, 1.0)
