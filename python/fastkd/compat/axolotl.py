"""Compute the loss of axolotl's KD plugin, from hidden states, a head and top-k lists."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import losses, validation
from fastkd._core import shapes
from fastkd._core.values import Tail
from fastkd.compat.convention import check_positive, choose_divergence


class LigerFusedLinearKLTopKLogprobLoss(nn.Module):
    """Compute the **sum** over tokens of a divergence and a cross entropy.

    The loss is weight_soft_loss * T^2 * divergence + weight_hard_loss * CE. axolotl's
    trainer divides the sum by the number of tokens.

    Args:
        weight_hard_loss: weight of the cross entropy, in [0, 1]; axolotl's ``kd_ce_alpha``.
        weight_soft_loss: weight of the divergence, in [0, 1]; axolotl's ``kd_alpha``.
        temperature: T > 0 of the student. The teacher's lists must be computed at T as well.
        beta: weight of the teacher in the mixture of the Jensen-Shannon divergence, in [0, 1]. 0
            gives the forward KL, and 1, the default, the reverse KL.
        ignore_index: tokens with this label do not count in the cross entropy. Default -100.
        compiled, chunk_size: have no effect; :func:`fastkd.loss` plans the chunks.
        compute_ce_loss: False omits the cross entropy. Default True.
        normalize_topk: True renormalizes student and teacher over the list. If False, ``beta`` must
            be 0, and the divergence is the sum over the list of p log(p / q). The teacher's p and
            the student's q are then not renormalized. Default True.

    Example:
        >>> import torch
        >>> from fastkd.compat.axolotl import LigerFusedLinearKLTopKLogprobLoss
        >>> head, hidden, labels = torch.eye(3), torch.zeros(1, 2, 3), torch.tensor([[-100, 2]])
        >>> ids, log_probs = torch.tensor([[[0, 1]] * 2]), torch.tensor([[[0.9, 0.1]] * 2]).log()
        >>> mask = torch.tensor([[[1, 1], [0, 0]]])  # the second token has no list
        >>> criterion = LigerFusedLinearKLTopKLogprobLoss(0.0, 1.0, beta=0.0)
        >>> criterion(head, hidden, ids, log_probs, mask, labels)
        tensor(0.3681)
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        weight = validation.check_number("weight_hard_loss", weight_hard_loss, 0.0, 1.0)
        self.weight_hard_loss = weight if compute_ce_loss else 0.0
        self.weight_soft_loss = validation.check_number(
            "weight_soft_loss", weight_soft_loss, 0.0, 1.0
        )
        self.temperature = check_positive("temperature", temperature)
        self.options = choose_divergence(beta)
        if not normalize_topk and beta != 0:
            raise ValueError(
                "beta must be 0 with normalize_topk=False, for which only the forward KL is "
                f"available; got {beta!r}. Pass normalize_topk=True"
            )
        self.ignore_index = ignore_index
        self.tail: Tail = "renormalize" if normalize_topk else "ignore"

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of one batch as a 0-d tensor.

        Args:
            lm_head_weight: ``(C, width)``, with C classes.
            student_hidden_states: ``(batch, length, width)``.
            target_token_ids, target_logprobs, target_mask: ``(batch, length, k)``. A list belongs
                to the hidden state at its position; an entry with mask 0 is padding.
            true_labels: ``(batch, length)``, **not** shifted: the label at position i + 1 belongs
                to the hidden state at position i.
            student_bias: ``(C,)`` or None.
        """
        listed = target_mask.bool()
        ids = target_token_ids.masked_fill(~listed, -1)
        labels = F.pad(true_labels[:, 1:], (0, 1), value=self.ignore_index)
        has_label = labels != self.ignore_index
        # A row with a list and without a label gets label 0, which is in range, and hard weight 0.
        labels = labels.masked_fill(~has_label & listed.any(-1), 0)
        return losses.loss(
            losses.Head(student_hidden_states, lm_head_weight, student_bias),
            losses.TopK(target_logprobs, ids, self.tail),
            labels,
            temperature=self.temperature,
            hard_weight=has_label.to(shapes.accumulator(lm_head_weight)) * self.weight_hard_loss,
            soft_weight=self.weight_soft_loss,
            ignore_index=self.ignore_index,
            reduction="sum",
            **self.options,
        )
