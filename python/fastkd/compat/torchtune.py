"""Compute torchtune's losses at temperature 1, without a hard term; labels mask tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import losses, validation
from fastkd.compat.convention import mask_rows


class _MaskedLoss(nn.Module):
    """Mask rows by labels of any shape that has one label for each row."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def _make_options(
        self, student_logits: Tensor, labels: Tensor, normalize: bool
    ) -> dict[str, Any]:
        rows = student_logits.shape[:-1]
        if labels.numel() != rows.numel():
            raise ValueError(
                f"labels must have {rows.numel()} entries, one for each row of student_logits of "
                f"shape {tuple(student_logits.shape)}; got shape {tuple(labels.shape)}"
            )
        mask = mask_rows(labels.reshape(rows), self.ignore_index)
        return {"temperature": 1.0, "reduction": "mean" if normalize else "sum", **mask}


class ForwardKLLoss(_MaskedLoss):
    """Compute the mean over rows of the soft cross entropy: forward KL plus the teacher's entropy.

    Args:
        ignore_index: rows with this label are ignored. Default -100.

    Example:
        >>> import torch
        >>> from fastkd.compat.torchtune import ForwardKLLoss
        >>> ForwardKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    divergence: losses.DivergenceName = "soft_cross_entropy"

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """Compute the loss of logits ``(..., classes)``: the mean over rows.

        With ``normalize=False``, the loss is the sum over rows.
        """
        options = self._make_options(student_logits, labels, normalize)
        return losses.loss(student_logits, teacher_logits, divergence=self.divergence, **options)


class ReverseKLLoss(ForwardKLLoss):
    """Compute the mean over rows of KL(student || teacher).

    :class:`ForwardKLLoss` describes the arguments.
    """

    divergence: losses.DivergenceName = "reverse_kl"


class SymmetricKLLoss(_MaskedLoss):
    """Compute r times :class:`ForwardKLLoss` plus 1 - r times :class:`ReverseKLLoss`.

    Args:
        sym_kd_ratio: r, the weight of the forward KL, in [0, 1]. Default 0.5.
        ignore_index: rows with this label are ignored. Default -100.

    Example:
        >>> import torch
        >>> from fastkd.compat.torchtune import SymmetricKLLoss
        >>> SymmetricKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.6931)
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        """Check and store the options."""
        super().__init__(ignore_index)
        self.sym_kd_ratio = validation.check_number("sym_kd_ratio", sym_kd_ratio, 0.0, 1.0)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """Compute the loss of logits ``(..., classes)``: the mean over rows.

        With ``normalize=False``, the loss is the sum over rows.
        """
        options = self._make_options(student_logits, labels, normalize)
        options.update(divergence="symmetric_kl", mix=self.sym_kd_ratio)
        terms = losses.terms(student_logits, teacher_logits, **options)
        # torchtune has the soft cross entropy, which is forward KL plus the teacher's entropy, in
        # place of the forward KL.
        return terms.loss + self.sym_kd_ratio * terms.teacher_entropy


class ForwardKLWithChunkedOutputLoss(nn.Module):
    """Compute :class:`ForwardKLLoss` of a list of logits ``(batch, tokens / chunks, classes)``.

    For logits in one tensor, use :class:`ForwardKLLoss`, which makes a single pass.

    Args:
        num_output_chunks: the largest number of chunks. Default 8.
        arguments, options: the arguments of :class:`ForwardKLLoss`.

    Example:
        >>> import torch
        >>> from fastkd.compat.torchtune import ForwardKLWithChunkedOutputLoss
        >>> chunks, labels = [torch.zeros(1, 2, 4)] * 2, torch.tensor([[0, 1, 2, -100]])
        >>> ForwardKLWithChunkedOutputLoss()(chunks, chunks, labels)
        tensor(1.3863)
    """

    loss_class: type[ForwardKLLoss | SymmetricKLLoss] = ForwardKLLoss

    def __init__(self, num_output_chunks: int = 8, *arguments: Any, **options: Any) -> None:
        """Check and store the options."""
        super().__init__()
        self.loss = self.loss_class(*arguments, **options)
        self.num_output_chunks = num_output_chunks

    def forward(
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """Compute the mean loss of rows that are not ignored; labels are ``(batch, tokens)``."""
        tokens = [chunk.shape[1] for chunk in student_logits]
        if len(tokens) > self.num_output_chunks or sum(tokens) != labels.shape[1]:
            raise ValueError(
                f"student_logits must be at most num_output_chunks={self.num_output_chunks} chunks "
                f"of the labels' {labels.shape[1]} tokens in all; got chunks of {tokens} tokens"
            )
        chunks = zip(student_logits, teacher_logits, torch.split(labels, tokens, 1), strict=True)
        total = torch.stack([self.loss(*chunk, normalize=False) for chunk in chunks]).sum()
        return total / (labels.long() != self.loss.ignore_index).sum().clamp(min=1)


class ReverseKLWithChunkedOutputLoss(ForwardKLWithChunkedOutputLoss):
    """Compute :class:`ReverseKLLoss` of a list of logits, ``(batch, tokens / chunks, classes)``.

    Arguments are ``num_output_chunks``, and those of :class:`ReverseKLLoss`.
    """

    loss_class = ReverseKLLoss


class SymmetricKLWithChunkedOutputLoss(ForwardKLWithChunkedOutputLoss):
    """Compute :class:`SymmetricKLLoss` of a list of logits, ``(batch, tokens / chunks, classes)``.

    Arguments are ``num_output_chunks``, and those of :class:`SymmetricKLLoss`.
    """

    loss_class = SymmetricKLLoss
