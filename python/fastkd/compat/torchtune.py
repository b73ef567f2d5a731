"""torchtune's losses on tokens: temperature 1, no hard term, masked by the labels.

>>> import torch
>>> from fastkd.compat.torchtune import ForwardKLLoss
>>> student = torch.zeros(3, 4, requires_grad=True)
>>> ForwardKLLoss()(student, torch.zeros(3, 4), torch.tensor([1, 0, -100]))
tensor(1.3863, grad_fn=...)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd._core import checks
from fastkd.compat.convention import Convention

CONVENTION = Convention(
    peer="torchtune",
    before="from torchtune.modules.loss import ForwardKLLoss",
    after="from fastkd.compat.torchtune import ForwardKLLoss",
    weighs="no weight here; the recipes' `kd_ratio` weighs the soft term",
    t_squared="no temperature",
    denominator="rows not ignored",
    mask="rows whose label is `ignore_index`",
    differences=(
        "Where only the student masks a class (-inf), torchtune leaves the class out; here the "
        "forward KL is infinite there, as it is by its definition. The same holds for a class that "
        "only the teacher masks, and the reverse KL.",
        "With every row ignored torchtune returns a constant, or 0 / 0 from the chunked reverse "
        "and symmetric losses; here it is 0 with a zero gradient.",
        "The chunked losses cut the labels where the logits were cut, whatever cut them; "
        "`num_output_chunks` is only checked against the number of chunks.",
    ),
)


def _as_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels in the shape of the logits' rows."""
    rows = logits.shape[:-1]
    if labels.numel() != rows.numel():
        raise ValueError(
            f"labels must be as many as student_logits of shape {tuple(logits.shape)} have rows, "
            f"{rows.numel()}; got shape {tuple(labels.shape)}"
        )
    return labels.reshape(rows)


class ForwardKLLoss(nn.Module):
    """Mean over rows of -sum p log q: forward KL plus the teacher's entropy, a constant.

    Args:
        ignore_index: rows with this label are left out. Default -100.

    Example:
        >>> import torch
        >>> ForwardKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """

    divergence = "soft_cross_entropy"

    def __init__(self, ignore_index: int = -100) -> None:
        """Keeps the option."""
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """The loss of logits ``(..., C)`` and as many labels as rows, or with False its sum."""
        return losses.loss(
            student_logits,
            teacher_logits,
            _as_rows(labels, student_logits),
            temperature=1.0,
            hard_weight=0.0,
            ignore_index=self.ignore_index,
            reduction="mean" if normalize else "sum",
            divergence=self.divergence,
        )


class ReverseKLLoss(ForwardKLLoss):
    """Mean over rows of KL(q || p); arguments as in :class:`ForwardKLLoss`.

    Example:
        >>> import torch
        >>> ReverseKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.)
    """

    divergence = "reverse_kl"


class SymmetricKLLoss(nn.Module):
    """``sym_kd_ratio`` times torchtune's forward KL, plus the rest times its reverse KL.

    Args:
        sym_kd_ratio: weight of the forward KL, in [0, 1]. Default 0.5.
        ignore_index: rows with this label are left out. Default -100.

    Example:
        >>> import torch
        >>> SymmetricKLLoss()(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.6931)
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        self.sym_kd_ratio = checks.number("sym_kd_ratio", sym_kd_ratio, 0.0, 1.0)
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """The loss of logits ``(..., C)`` and as many labels as rows, or with False its sum."""
        terms = losses.terms(
            student_logits,
            teacher_logits,
            _as_rows(labels, student_logits),
            temperature=1.0,
            hard_weight=0.0,
            ignore_index=self.ignore_index,
            reduction="mean" if normalize else "sum",
            divergence="symmetric_kl",
            mix=self.sym_kd_ratio,
        )
        # torchtune's forward half is -sum p log q, which is larger by the teacher's entropy.
        return terms.loss + self.sym_kd_ratio * terms.teacher_entropy


class _Chunked(nn.Module):
    """Logits as a list of chunks ``(batch, tokens / chunks, C)``, labels ``(batch, tokens)``."""

    def __init__(self, whole: ForwardKLLoss | SymmetricKLLoss, num_output_chunks: int) -> None:
        super().__init__()
        self.whole = whole
        self.num_output_chunks = num_output_chunks

    def forward(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        labels: Tensor,
    ) -> Tensor:
        """The mean over all rows not ignored, of all chunks."""
        tokens = [chunk.shape[1] for chunk in student_logits]
        if len(tokens) > self.num_output_chunks or sum(tokens) != labels.shape[1]:
            raise ValueError(
                f"student_logits must be at most num_output_chunks={self.num_output_chunks} chunks "
                f"of the labels' {labels.shape[1]} tokens in all; got chunks of {tokens} tokens"
            )
        chunks = zip(student_logits, teacher_logits, torch.split(labels, tokens, 1), strict=True)
        sums = [self.whole(*chunk, normalize=False) for chunk in chunks]
        valid = (checks.to_int64(labels) != self.whole.ignore_index).sum()
        total: Tensor = sum(sums[1:], sums[0])
        return total / valid.clamp(min=1)


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """:class:`ForwardKLLoss` of lists of chunks. Without chunks it is one pass: prefer that.

    Example:
        >>> import torch
        >>> chunks, labels = [torch.zeros(1, 2, 4)] * 2, torch.tensor([[0, 1, 2, -100]])
        >>> ForwardKLWithChunkedOutputLoss()(chunks, chunks, labels)
        tensor(1.3863)
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        """Keeps the options."""
        super().__init__(ForwardKLLoss(ignore_index), num_output_chunks)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """:class:`ReverseKLLoss` of lists of chunks. Without chunks it is one pass: prefer that.

    Example:
        >>> import torch
        >>> chunks, labels = [torch.zeros(1, 2, 4)] * 2, torch.tensor([[0, 1, 2, -100]])
        >>> ReverseKLWithChunkedOutputLoss()(chunks, chunks, labels)
        tensor(0.)
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        """Keeps the options."""
        super().__init__(ReverseKLLoss(ignore_index), num_output_chunks)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """:class:`SymmetricKLLoss` of lists of chunks. Without chunks it is one pass: prefer that.

    Example:
        >>> import torch
        >>> chunks, labels = [torch.zeros(1, 2, 4)] * 2, torch.tensor([[0, 1, 2, -100]])
        >>> SymmetricKLWithChunkedOutputLoss()(chunks, chunks, labels)
        tensor(0.6931)
    """

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        """Keeps the options."""
        super().__init__(SymmetricKLLoss(sym_kd_ratio, ignore_index), num_output_chunks)
