"""Test that adapters in fastkd.compat for sparse teachers give the libraries' results."""

import functools
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Optional

import peers
import pytest
import torch
from peers import MASKS, SINGLE, assert_equal_losses, draw

import fastkd
from fastkd.compat import axolotl, ms_swift, trl_async, trl_sdft, verl

# ---- TRL's SDFT and SDPO


KINDS = ("full_logit", "topk", "sampled_token")


@functools.cache
def sdft():
    names = ("compute_divergence", "add_tail_bucket")
    losses = [f"compute_{kind}_self_distillation_loss" for kind in KINDS]
    log_softmax = peers.compile_code(
        "trl", "trainer/utils.py", "selective_log_softmax", is_triton_available=lambda: False
    )
    file = "experimental/sdft/loss_utils.py"
    return peers.compile_code("trl", file, *names, *losses, **vars(log_softmax))


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


# k=1 without a tail is not tested: the only class has probability 1, so the loss is 0.
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


def test_trl_sdft_of_sampled_tokens_gives_its_own_loss():
    student, teacher, tokens = draw((2, 4, 11))
    assert_equal_losses(
        lambda s: trl_sdft.compute_sampled_token_self_distillation_loss(
            s, teacher, tokens, distillation_alpha=1.0
        ),
        lambda s: sdft().compute_sampled_token_self_distillation_loss(
            s, teacher, tokens, distillation_alpha=1.0
        ),
        student,
    )
    with pytest.raises(ValueError, match=r"distillation_alpha must be 1, .* got 0\.5"):
        trl_sdft.compute_sampled_token_self_distillation_loss(
            student, teacher, tokens, distillation_alpha=0.5
        )


# ---- TRL's AsyncDistillationTrainer


@functools.cache
def trl_async_loss():
    names = ("_add_tail_bucket", "_jsd_divergence", "_jsd_loss_chunk", "_chunked_jsd_loss")
    file = "experimental/async_distillation/async_distillation_trainer.py"
    return peers.compile_code("trl", file, *names)._chunked_jsd_loss


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize(
    ("scale", "softcap", "temperature", "teachers"),
    [(1.0, None, 1.0, None), (0.5, 4.0, 2.0, [0, 2, 2, 0, 0, 0])],
)
def test_trl_async_gives_its_own_loss(beta, add_tail, scale, softcap, temperature, teachers):
    # With lists of nearly all probability, TRL's tail is inexact in float32.
    teacher, other, _ = (tensor.float() / 3 for tensor in draw((6, 11)))
    hidden, weight, bias = teacher.roll(1, 0), other.T @ other / 30, other[0]
    values, ids = (teacher / temperature).log_softmax(-1).topk(4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 2:] = mask[3, 3] = False
    lists = (ids.masked_fill(~mask, -1), values, mask)
    numbers = None if teachers is None else torch.tensor(teachers)
    options = (beta, temperature, add_tail, numbers, 3, 4)

    def call(function, hidden, weight, bias):
        return function(hidden, weight, bias, scale, softcap, *lists, *options)

    for leaf, compute in (
        (hidden, lambda f, x: call(f, x, weight, None)[0]),
        (weight, lambda f, x: call(f, hidden, x, bias)[0]),
        (bias, lambda f, x: call(f, hidden, weight, x)[0]),
    ):
        ours, theirs = (
            functools.partial(compute, f) for f in (trl_async.chunked_jsd_loss, trl_async_loss())
        )
        assert_equal_losses(ours, theirs, leaf, SINGLE)
    ours, theirs = (
        call(f, hidden, weight, bias) for f in (trl_async.chunked_jsd_loss, trl_async_loss())
    )
    torch.testing.assert_close(ours, theirs, **SINGLE)
    assert len(ours) == 5 and ours[4].any() == (teachers is not None)


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
    """Assert that losses, gradients and token counts of fastkd and ms-swift are equal."""
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
    # Servers give lists of log-probabilities, and local teachers give lists of logits.
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
    # fastkd ignores a padding entry; ms-swift's loss is NaN (docs/compat.md).
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


# ---- axolotl


@functools.cache
def axolotl_code():
    names = ("LigerFusedLinearKLTopKLogprobFunction", "LigerFusedLinearKLTopKLogprobLoss")
    normalize = peers.compile_code("axolotl", "integrations/kd/utils.py", "normalize_logprobs")
    return peers.compile_code(
        "axolotl",
        "integrations/kd/kernels/liger.py",
        *names,
        LigerFusedLinearDistillationBase=torch.autograd.Function,
        normalize_logprobs=normalize.normalize_logprobs,
    ).LigerFusedLinearKLTopKLogprobLoss


def axolotl_losses(**options):
    """Return (fastkd's loss, axolotl's loss)."""
    ours = axolotl.LigerFusedLinearKLTopKLogprobLoss(**options)
    return ours, axolotl_code()(**options, compiled=False, chunk_size=4)


def axolotl_batch():
    """Draw (hidden states, head, (indices, normalized log-probabilities, mask, labels), bias)."""
    hidden, teacher, labels = draw((2, 6, 11), "some ignored")
    values, ids = teacher.log_softmax(-1).topk(4)
    mask = (labels != -100)[..., None].expand_as(ids).int()
    head = torch.randn(11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return hidden, head, (ids, values.log_softmax(-1), mask, labels), head[0]


AXOLOTL = [(0.0, True), (0.3, True), (1.0, True), (0.0, False)]


@pytest.mark.parametrize(("beta", "normalize"), AXOLOTL)
@pytest.mark.parametrize("weights", [(0.1, 0.9), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("mask", ["of the labels", "of other positions", "all"])
def test_axolotl_gives_its_own_loss(beta, normalize, weights, mask):
    hidden, head, (ids, values, listed, labels), bias = axolotl_batch()
    if mask != "of the labels":  # a token may have a label and no list, or a list and no label
        listed = listed.roll(1, 1) if mask == "of other positions" else torch.ones_like(listed)
    lists = (ids, values, listed, labels)
    ours, theirs = axolotl_losses(
        weight_hard_loss=weights[0],
        weight_soft_loss=weights[1],
        beta=beta,
        normalize_topk=normalize,
    )
    for call, leaf in (
        (lambda f, x: f(head, x, *lists), hidden),
        (lambda f, x: f(x, hidden, *lists, bias), head),
        (lambda f, x: f(head, hidden, *lists, x), bias),
    ):
        assert_equal_losses(
            functools.partial(call, ours), functools.partial(call, theirs), leaf, SINGLE
        )


def test_axolotl_without_cross_entropy():
    hidden, head, lists, _ = axolotl_batch()
    ours, theirs = axolotl_losses(compute_ce_loss=False)
    assert_equal_losses(
        lambda x: ours(head, x, *lists), lambda x: theirs(head, x, *lists), hidden, SINGLE
    )


@pytest.mark.parametrize(("beta", "normalize"), AXOLOTL)
def test_axolotl_at_another_temperature(beta, normalize):
    # The gradient of axolotl's soft term lacks the factor temperature**2 (docs/compat.md).
    hidden, head, lists, _ = axolotl_batch()
    options = {"temperature": 3.0, "beta": beta, "normalize_topk": normalize}
    ours, theirs = axolotl_losses(weight_hard_loss=0.0, **options)

    def corrected(x):
        value = theirs(head, x, *lists)
        return value.detach() + 3.0**2 * (value - value.detach())

    assert_equal_losses(lambda x: ours(head, x, *lists), corrected, hidden, SINGLE)
    ours, theirs = axolotl_losses(**options)
    torch.testing.assert_close(ours(head, hidden, *lists), theirs(head, hidden, *lists), **SINGLE)


@pytest.mark.parametrize(("mark", "log_prob"), [(0, -1e9), (1, -torch.inf)])
def test_axolotl_with_padding_in_a_list(mark, log_prob):
    # axolotl counts padding in the student's sum, or returns NaN (docs/compat.md).
    hidden, head, (ids, values, listed, labels), _ = axolotl_batch()
    ours, theirs = axolotl_losses(weight_hard_loss=0.0, beta=0.0)
    padded = (
        torch.cat([ids, torch.zeros_like(ids[..., :1])], -1),
        torch.cat([values, torch.full_like(values[..., :1], log_prob)], -1),
        torch.cat([listed, listed[..., :1] * mark], -1),
        labels,
    )
    short = ours(head, hidden, ids, values, listed, labels)
    torch.testing.assert_close(ours(head, hidden, *padded), short)
    wrong = theirs(head, hidden, *padded)
    assert wrong.isnan() if mark else wrong > short * 1.01


def test_axolotl_refuses_unsupported_options():
    with pytest.raises(ValueError, match=r"weight_soft_loss must be in \[0, 1\]; got 2"):
        axolotl.LigerFusedLinearKLTopKLogprobLoss(weight_soft_loss=2)
    with pytest.raises(ValueError, match=r"beta must be 0 with normalize_topk=False.*; got 0\.5"):
        axolotl.LigerFusedLinearKLTopKLogprobLoss(beta=0.5, normalize_topk=False)


# ---- verl


@functools.cache
def verl_code():
    names = ("compute_forward_kl_topk", "kl_divergence", "_chunked_topk_log_probs")
    world = {"get_ulysses_sequence_parallel_world_size": lambda: 1, "slice_input_tensor": None}
    return peers.compile_code("verl", "trainer/distillation/fsdp/losses.py", *names, **world)


def verl_config(**options):
    defaults = {"log_prob_min_clamp": None, "chunked_topk_chunk_size": 3}
    return SimpleNamespace(distillation_loss=SimpleNamespace(**{**defaults, **options}))


def nested(rows):
    """Return rows as a nested tensor of two sequences, of 3 and 4 tokens, like verl's tensors."""
    return torch.nested.nested_tensor_from_jagged(rows, torch.tensor([0, 3, 7]))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_verl_gives_its_own_loss(k, chunked):
    student, teacher, _ = draw((1, 7, 11))
    lists = teacher[0].log_softmax(-1).topk(k)
    call = (nested(lists[0]), nested(lists[1]), verl_config(use_chunked_topk=chunked), "thd")
    plain = (lists[0][None], lists[1][None].int(), None, "thd")
    theirs = verl_code().compute_forward_kl_topk
    for name in ("distillation_losses", "student_mass", "teacher_mass"):
        expected = theirs(student, *call)[name].double()
        ours = verl.compute_forward_kl_topk(student, *plain)[name]
        torch.testing.assert_close(ours, expected, **SINGLE)
    assert_equal_losses(
        lambda s: verl.compute_forward_kl_topk(s, *call)["distillation_losses"],
        lambda s: theirs(s, *call)["distillation_losses"],
        student,
        SINGLE,
    )


def test_verl_where_a_position_has_no_list():
    # verl's servers list token 0 k times at the last position, where the loss is 0.
    student, teacher, _ = draw((1, 7, 11))
    values, ids = teacher.log_softmax(-1).topk(4)
    values[0, -1], ids[0, -1] = 0.0, 0
    student.requires_grad_()
    losses = verl.compute_forward_kl_topk(student, values, ids, None, "thd")["distillation_losses"]
    losses.sum().backward()
    assert losses[0, -1] == 0 and not student.grad[0, -1].any() and student.grad[0, :-1].any()


def test_verl_does_not_clamp_log_probabilities():
    # verl's loss is constant below log_prob_min_clamp, unlike fastkd's (docs/compat.md).
    student, teacher = torch.zeros(1, 1, 3), torch.tensor([[[0.5, 0.4]]]).log()
    ids, config = torch.tensor([[[0, 1]]]), verl_config(log_prob_min_clamp=-10.0)
    lists = [
        torch.nested.nested_tensor_from_jagged(x[0], torch.tensor([0, 1])) for x in (teacher, ids)
    ]
    lower, values = student.clone(), []
    student[0, 0, 1], lower[0, 0, 1] = -20.0, -30.0
    for loss in (verl_code().compute_forward_kl_topk, verl.compute_forward_kl_topk):
        values.append(
            [loss(x, *lists, config, "thd")["distillation_losses"] for x in (student, lower)]
        )
    (theirs, theirs_lower), (ours, ours_lower) = values
    torch.testing.assert_close(theirs, theirs_lower)
    torch.testing.assert_close(ours_lower - ours, torch.tensor([[4.0]]))


def test_verl_with_a_tail():
    # With tail="ignore" the loss may be negative; verl's caller of this loss clamps the loss at 0.
    log_probs, ids = torch.tensor([[[0.5, 0.3]]]).log(), torch.tensor([[[0, 1]]])
    student = torch.tensor([[[0.6, 0.35, 0.05]]]).log()
    truncated, ghost = (
        verl.compute_forward_kl_topk(student, log_probs, ids, None, "thd", tail=tail)
        for tail in ("ignore", "ghost")
    )
    assert truncated["distillation_losses"] < 0 < ghost["distillation_losses"]


@functools.cache
def verl_estimators():
    masked = {
        "masked_mean": lambda values, mask: (values * mask).sum() / mask.sum(),
        "masked_sum": lambda values, mask: (values * mask).sum(),
    }
    names = ("kl_penalty", "kl_penalty_forward", "compute_policy_loss_vanilla", "agg_loss")
    return peers.compile_code(
        "verl", "trainer/ppo/core_algos.py", *names, verl_F=SimpleNamespace(**masked), AlgoConfig=()
    )


class Config(SimpleNamespace):
    """Hold options that verl reads as attributes and by get()."""

    def get(self, name, default):
        return getattr(self, name, default)


CLIP = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={})


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_verl_estimators_are_those_of_sampled(name):
    student, teacher, tokens = draw((2, 4, 11))
    student, teacher = student / 6, teacher / 6  # keeps k3 below 10, where verl clamps it
    chosen = tokens[..., None]
    log_p = teacher.log_softmax(-1).gather(-1, chosen)[..., 0]

    def theirs(logits):
        log_q = logits.log_softmax(-1).gather(-1, chosen)[..., 0]
        estimate = verl_estimators().kl_penalty(log_q, log_p, name)
        if name != "k1":
            return verl_estimators().agg_loss(estimate, torch.ones_like(estimate), "token-mean")
        return verl_estimators().compute_policy_loss_vanilla(
            log_q.detach(), log_q, -estimate.detach(), torch.ones_like(estimate), config=CLIP
        )[0]

    sampled = fastkd.Sampled(log_p, tokens, estimator=name)
    assert_equal_losses(lambda s: fastkd.loss(s, sampled), theirs, student)


def test_verl_policy_gradient_of_k3():
    # With k3 as the advantage, verl's loss has the gradient of the reverse KL minus the forward KL.
    student, teacher, _ = draw((1, 5))
    student, teacher = student / 6, teacher / 6  # keeps k3 below 10, where verl clamps it
    log_p = teacher[0].log_softmax(-1)

    def expected(logits):
        log_q = logits[0].log_softmax(-1)
        estimate = verl_estimators().kl_penalty(log_q, log_p, "k3").detach()
        surrogate = (log_q.exp().detach() * estimate * log_q).sum()  # the expected loss over tokens
        return surrogate - surrogate.detach()

    def difference(logits):
        q, p = (x.log_softmax(-1) for x in (logits[0], teacher[0]))
        value = (q.exp() * (q - p)).sum() - (p.exp() * (p - q)).sum()
        return value - value.detach()

    assert_equal_losses(expected, difference, student)
