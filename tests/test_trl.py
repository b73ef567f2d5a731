"""Test that the loss of fastkd.integrations.trl equals TRL's code, without trainers."""

import functools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import peers
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastkd import extras
from fastkd.integrations import trl

ROWS, CLASSES, WIDTH, TEACHER_WIDTH = (2, 7), 11, 8, 6
SOFTCAPS = {"student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 3.0}
SCALES = {"student_logit_scale": 0.7, "teacher_logit_scale": 1.3}


@functools.cache
def compile_trl_loss():
    """Return TRL's _chunked_divergence_loss with its PyTorch code, for devices without Triton."""
    names = {"_BLOCK_SIZE": 0, "_MM_OUT_DTYPE": False, "_use_triton": lambda device: False}
    steps = peers.compile_code(
        "trl", "kernels/chunked_logprob.py", "_torch_transform", "_addmm_fp32", **names
    )
    function = peers.compile_code(
        "trl",
        "kernels/chunked_divergence.py",
        *("ChunkedDivergenceFunction", "_stats_tile", "_jsd_tile", "_backward_tile"),
        *("_compute_dtype", "_project"),
        **{**names, **vars(steps), "math": math, "TOKEN_CHUNK_SIZE": 4, "VOCAB_CHUNK_SIZE": 5},
        maybe_gather_lm_head_ctx=lambda *_: nullcontext(),
    ).ChunkedDivergenceFunction
    file = "trainer/distillation_trainer.py"
    loss = peers.compile_code(
        "trl", file, "_chunked_divergence_loss", ChunkedDivergenceFunction=function, **names
    )
    return loss._chunked_divergence_loss


def draw(bias: bool = False, dtype: torch.dtype = torch.float32):
    """Draw (student's tensors, teacher's tensors, mask)."""
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    student = [tensor(*ROWS, WIDTH), tensor(CLASSES, WIDTH), tensor(CLASSES)]
    teacher = [tensor(*ROWS, TEACHER_WIDTH), tensor(CLASSES, TEACHER_WIDTH), tensor(CLASSES)]
    mask = (torch.rand(ROWS, generator=generator) > 0.3).long()
    return student[: 2 + bias], teacher[: 2 + bias], mask


def run(function, student, teacher, mask, beta, **options):
    """Compute loss, summed entropies, count, and the gradients of the student's tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in student]
    if len(leaves) == 3:
        options |= {"student_lm_head_bias": leaves[2], "teacher_lm_head_bias": teacher[2]}
    out = function(leaves[0], teacher[0], leaves[1], teacher[1], mask, beta, **options)
    assert not (out[1].requires_grad or out[2].requires_grad)
    return [*(value.detach() for value in out), *torch.autograd.grad(out[0], leaves)]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "options", [{}, SOFTCAPS, SCALES, {**SOFTCAPS, **SCALES}], ids=["", "softcap", "scale", "both"]
)
def test_value_and_gradients_are_trls(beta, temperature, options):
    for count, bias in ((None, True), (30, False), (torch.tensor(30.0), True)):
        call = (*draw(bias), beta)
        inputs = {**options, "temperature": temperature, "num_items_in_batch": count}
        ours, theirs_result = (
            run(f, *call, **inputs) for f in (trl.chunked_divergence_loss, compile_trl_loss())
        )
        torch.testing.assert_close(ours, theirs_result, **peers.SINGLE)


@pytest.mark.parametrize("count", [None, 0, 5])
def test_without_a_valid_token_the_loss_is_zero(count):
    student, teacher, mask = draw()
    loss, entropy, tokens, *grads = run(
        trl.chunked_divergence_loss, student, teacher, 0 * mask, 0.5, num_items_in_batch=count
    )
    assert loss == entropy == tokens == 0
    assert not any(grad.any() for grad in grads)


def test_ignored_tokens_may_hold_anything():
    student, teacher, mask = draw()
    clean = run(trl.chunked_divergence_loss, student, teacher, mask, 1.0)
    student[0][mask == 0] = teacher[0][mask == 0] = math.nan
    ours = run(trl.chunked_divergence_loss, student, teacher, mask, 1.0)
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_class_that_both_mask_contributes_nothing(beta):
    # TRL's loss is NaN if both models mask a class.
    student, teacher, mask = draw(bias=True)
    without = run(
        trl.chunked_divergence_loss,
        *([hidden, weight[1:], bias[1:]] for hidden, weight, bias in (student, teacher)),
        mask,
        beta,
    )
    student[2][0] = teacher[2][0] = -math.inf
    ours = run(trl.chunked_divergence_loss, student, teacher, mask, beta)
    torch.testing.assert_close(ours[:4], without[:4])
    assert run(compile_trl_loss(), student, teacher, mask, beta)[0].isnan()


def test_the_loss_of_a_close_teacher_is_exact():
    # TRL subtracts large sums, so TRL's loss may be negative.
    student, _, _ = draw()
    noise = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(1))
    call = student, [student[0], student[1] + 1e-5 * noise], torch.ones(ROWS)
    double = [[tensor.double() for tensor in tensors] for tensors in call[:2]]
    for beta in (0.0, 1.0):
        exact = run(trl.chunked_divergence_loss, *double, call[2], beta)[0]
        ours = run(trl.chunked_divergence_loss, *call, beta)[0]
        assert float(ours) == pytest.approx(float(exact), rel=0.02)
    assert min(run(compile_trl_loss(), *call, beta)[0] for beta in (0.0, 1.0)) < 0


def test_heads_of_different_classes_are_refused():
    # For heads of different classes, TRL drops the teacher's last classes.
    student, teacher, mask = draw()
    with pytest.raises(ValueError, match=r"must have the same classes; got \(11,\) and \(10,\)"):
        run(trl.chunked_divergence_loss, [student[0], student[1][:10]], teacher, mask, 0.0)
    assert run(compile_trl_loss(), [student[0], student[1][:10]], teacher, mask, 0.0)[0].isfinite()


def test_a_weight_of_another_dtype_is_converted():
    # As in TRL, a backbone in bfloat16 may have a head in another dtype.
    student, teacher, mask = draw()
    student[0], teacher[0] = student[0].bfloat16(), teacher[0].bfloat16()
    ours = run(trl.chunked_divergence_loss, student, teacher, mask, 0.5)
    assert [grad.dtype for grad in ours[3:]] == [torch.bfloat16, torch.float32]
    expected = run(compile_trl_loss(), student, teacher, mask, 0.5)
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.01)


def test_autocast_sums_the_gradient_in_the_dtype_of_the_weight():
    call = (*draw(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(trl.chunked_divergence_loss, *call)
    exact = run(trl.chunked_divergence_loss, *call)
    assert ours[4].dtype is torch.float32
    assert not torch.equal(ours[4], exact[4])
    torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.01)


def test_distributed_weights_are_gathered():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        student, teacher, mask = draw(bias=True)
        expected = run(trl.chunked_divergence_loss, student, teacher, mask, 0.5)
        for tensors in (student, teacher):
            tensors[1:] = [distributed.tensor.distribute_tensor(x, mesh) for x in tensors[1:]]
        ours = run(trl.chunked_divergence_loss, student, teacher, mask, 0.5)
    finally:
        distributed.destroy_process_group()
    assert isinstance(ours[4], DTensor) and isinstance(ours[5], DTensor)
    ours[4:] = [grad.to_local() for grad in ours[4:]]
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_other_versions_of_trl_are_refused(monkeypatch):
    monkeypatch.setattr(extras, "load", lambda module, extra: SimpleNamespace(__version__="1.15.0"))
    # An earlier test may have made the class.
    monkeypatch.delitem(vars(trl), "DistillationTrainer", raising=False)
    with pytest.raises(ImportError, match=r"needs TRL 1\.16, .* got TRL 1\.15\.0: pip install"):
        trl.DistillationTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'SFTTrainer'"):
        trl.SFTTrainer  # noqa: B018
