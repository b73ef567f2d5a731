"""Compute ms-swift's gkd_loss, a generalized Jensen-Shannon divergence of logits or top-k lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import losses
from fastkd.compat.convention import check_positive, choose_divergence


def gkd_loss(
    student_logits: Tensor, teacher_output: Any, labels: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the sum over tokens of a KL or Jensen-Shannon divergence, and the number of tokens.

    The loss has no T^2 and no shift: label i belongs to row i of the logits.

    Args:
        student_logits: ``(batch, length, C)``, with C classes.
        teacher_output: ms-swift's ``TeacherOutput``, or an object with its four attributes. Either
            ``full_logits`` ``(batch, length, C)`` or ``topk_logprobs`` and ``topk_indices``
            ``(batch, length, k)`` are not None. ``labels`` is None if student and teacher have
            equal labels. Top-k lists are softened by ``temperature`` and renormalized. A token
            whose list is all -inf is ignored.
        labels: ``(batch, length)``; tokens with -100 are ignored. If the teacher has labels, too,
            the n-th labeled token of the teacher belongs to the n-th labeled token of the student.
        beta: weight of the teacher in the mixture, in [0, 1]. 0 gives the forward KL, and 1 the
            reverse KL.
        temperature: T > 0 of student and teacher.

    Example:
        >>> import torch
        >>> from fastkd.compat.ms_swift import gkd_loss
        >>> from types import SimpleNamespace
        >>> student, teacher = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
        >>> output = SimpleNamespace(
        ...     full_logits=teacher, topk_logprobs=None, topk_indices=None, labels=None
        ... )
        >>> gkd_loss(student, output, torch.tensor([[1]]), beta=0.0, temperature=1.0)
        (tensor(0.4621), tensor(1))
    """
    check_positive("temperature", temperature)
    student, valid = student_logits, labels != -100
    lists, indices = teacher_output.topk_logprobs, teacher_output.topk_indices
    is_sparse = lists is not None and indices is not None
    if not is_sparse and teacher_output.full_logits is None:
        raise ValueError(
            "teacher_output must have full_logits, or topk_logprobs and topk_indices; got None"
        )
    outputs = [lists, indices] if is_sparse else [teacher_output.full_logits]
    if teacher_output.labels is not None:
        teacher_valid = teacher_output.labels != -100
        if not torch.equal(teacher_valid, valid):
            # Teacher and student have the same labeled tokens, at different positions.
            student, outputs = student[valid], [each[teacher_valid] for each in outputs]
            valid = valid[valid]
    teacher: Tensor | losses.TopK = outputs[0]
    if is_sparse:
        valid = valid & ~torch.isneginf(outputs[0]).all(-1)
        log_probs = (outputs[0] / temperature).log_softmax(-1)
        teacher = losses.TopK(log_probs, outputs[1], tail="renormalize")
    total = losses.loss(
        student,
        teacher,
        torch.where(valid, 0, -100),
        temperature=temperature,
        hard_weight=0.0,
        soft_weight=1 / temperature**2,
        reduction="sum",
        **choose_divergence(beta),
    )
    return total, valid.sum()
