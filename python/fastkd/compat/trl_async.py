"""Compute the loss of TRL's experimental AsyncDistillationTrainer from a head and top-k lists."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd import losses
from fastkd.compat.convention import choose_divergence


def chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the sum over tokens of a KL or Jensen-Shannon divergence from the teacher's lists.

    The loss has no T^2.

    Args:
        hidden_valid: ``(tokens, width)``.
        lm_head_weight, lm_head_bias: ``(classes, width)``, and ``(classes,)`` or None.
        logit_scale: positive factor of the logits.
        final_logit_softcapping: soft cap, applied after the scale, or None.
        target_ids, teacher_target_logps: ``(tokens, k)``: the teacher's list of each token.
        valid_candidate_mask: ``(tokens, k)``; entries with False list no class.
        beta: in [0, 1]. 0 gives the forward KL, and 1 the reverse KL.
        temperature: T > 0 of the student. The teacher's lists must be computed at T as well.
        add_tail_bucket: if True, the classes that are not listed count as one extra class; if
            False, student and teacher are renormalized over the list.
        teacher_id_idx: ``(tokens,)``: the number of each token's teacher, or None.
        num_teachers: the number of teachers.
        chunk_size: has no effect; :func:`fastkd.loss` plans the chunks.

    Returns:
        The loss; sums over tokens of the divergence, of the student's and of the teacher's entropy;
        and, for each teacher, its number of tokens and their sums of divergence and of teacher's
        entropy, ``(3 * num_teachers,)``. Only the loss has a gradient.

    Example:
        >>> import torch
        >>> from fastkd.compat.trl_async import chunked_jsd_loss
        >>> hidden, weight, ids = torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([[0, 1]])
        >>> log_probs, mask = torch.tensor([[0.5, 0.3]]).log(), torch.ones(1, 2, dtype=torch.bool)
        >>> options = (0.0, 1.0, True, None, 1, 256)
        >>> chunked_jsd_loss(hidden, weight, None, 1.0, None, ids, log_probs, mask, *options)[0]
        tensor(0.0690)
    """
    weight, bias = (
        None if x is None else x.to(hidden_valid.dtype) for x in (lm_head_weight, lm_head_bias)
    )
    assert weight is not None
    terms = losses.terms(
        losses.Head(hidden_valid, weight, bias, final_logit_softcapping, logit_scale),
        losses.TopK(
            teacher_target_logps,
            target_ids.masked_fill(~valid_candidate_mask, -1),
            tail="ghost" if add_tail_bucket else "renormalize",
        ),
        temperature=temperature,
        soft_weight=1 / temperature**2,
        # Sums for each teacher need one number for each token.
        reduction="sum" if teacher_id_idx is None else "none",
        **choose_divergence(beta),
    )
    of_teachers = terms.soft.new_zeros(num_teachers, 3)
    if teacher_id_idx is not None:
        columns = (torch.ones_like(terms.soft), terms.soft, terms.teacher_entropy)
        of_teachers.index_add_(0, teacher_id_idx, torch.stack(columns, dim=-1))
    sums = (terms.loss, terms.soft, terms.student_entropy, terms.teacher_entropy)
    return (*(term.sum() for term in sums), of_teachers.flatten())  # type: ignore[return-value]
