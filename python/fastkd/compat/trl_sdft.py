"""Compute the losses of TRL's experimental SDFTTrainer and SDPOTrainer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd import losses
from fastkd.compat.convention import choose_divergence


def compute_full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """Compute a KL or Jensen-Shannon divergence of each token, ``(...)``, at temperature 1.

    Args:
        student_logits, teacher_logits: ``(..., C)``, with C classes.
        distillation_alpha: the ``beta`` of :func:`fastkd.compat.trl.generalized_jsd_loss`. 0 gives
            the forward KL, and 1 the reverse KL.

    Example:
        >>> import torch
        >>> from fastkd.compat.trl_sdft import compute_full_logit_self_distillation_loss
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0)
        tensor([0.4621])
    """
    return losses.loss(
        student_logits,
        teacher_logits,
        temperature=1.0,
        reduction="none",
        **choose_divergence(distillation_alpha),
    )


def compute_topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """Compute a divergence of each token, ``(...)``, on the student's most probable classes.

    Args:
        student_logits, teacher_logits: ``(..., C)``, with C classes.
        distillation_topk: the number of classes.
        distillation_alpha: as in :func:`compute_full_logit_self_distillation_loss`.
        distillation_add_tail: if True, the classes that are not chosen count as one extra class; if
            False, student and teacher are renormalized over the chosen classes.

    Example:
        >>> import torch
        >>> from fastkd.compat.trl_sdft import compute_topk_self_distillation_loss
        >>> student, teacher = torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> options = {"distillation_alpha": 0.0, "distillation_add_tail": True}
        >>> compute_topk_self_distillation_loss(student, teacher, distillation_topk=2, **options)
        tensor([0.4628])
    """
    chosen = student_logits.detach().topk(distillation_topk, dim=-1).indices
    total = torch.logsumexp(teacher_logits, dim=-1, keepdim=True)
    teacher = losses.TopK(
        teacher_logits.gather(-1, chosen) - total,
        chosen,
        tail="ghost" if distillation_add_tail else "renormalize",
    )
    return losses.loss(
        student_logits,
        teacher,
        temperature=1.0,
        reduction="none",
        **choose_divergence(distillation_alpha),
    )


def compute_sampled_token_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    completion_ids: Tensor,
    *,
    distillation_alpha: float,
) -> Tensor:
    """Compute a loss of each token, ``(...)``, whose gradient estimates that of the reverse KL.

    The loss is (log q - log p), detached, times log q. p and q are the probabilities that teacher
    and student give the token. The gradient is that of a :class:`fastkd.Sampled` with ``"k1"``.

    Args:
        student_logits, teacher_logits: ``(..., C)``, with C classes.
        completion_ids: ``(...)``: the tokens, sampled from the student.
        distillation_alpha: must be 1, the reverse KL.

    Example:
        >>> import torch
        >>> from fastkd.compat.trl_sdft import compute_sampled_token_self_distillation_loss
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> compute_sampled_token_self_distillation_loss(
        ...     student, teacher, torch.tensor([0]), distillation_alpha=1.0
        ... )
        tensor([1.3133])
    """
    if distillation_alpha != 1:
        raise ValueError(
            "distillation_alpha must be 1, the reverse KL, for a sampled token; got "
            f"{distillation_alpha!r}"
        )
    chosen = completion_ids.unsqueeze(-1).long()
    log_p = (teacher_logits.gather(-1, chosen) - teacher_logits.logsumexp(-1, True)).squeeze(-1)
    teacher = losses.Sampled(log_p, completion_ids, "k1")
    k1 = losses.loss(student_logits, teacher, temperature=1.0, reduction="none")
    # k1 is log q - log p, and its gradient is k1 times that of log q. Replace only the value.
    value = k1.detach()
    return k1 - value + value * (value + log_p)
