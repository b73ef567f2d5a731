"""NeMo AutoModel's KDLoss: forward KL on tokens, T squared, masked by the labels, no hard term.

>>> import torch
>>> from fastkd.compat.nemo import KDLoss
>>> KDLoss(temperature=2.0)(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1, -100]))
tensor(0.)
"""

from __future__ import annotations

from torch import Tensor, nn

from fastkd import losses
from fastkd.compat.convention import Convention, absent, divisor, positive

CONVENTION = Convention(
    peer="NeMo AutoModel",
    before="from nemo_automodel.components.loss.kd_loss import KDLoss",
    after="from fastkd.compat.nemo import KDLoss",
    weighs="no weight here; the recipe's `kd_ratio` weighs the soft term",
    t_squared="yes",
    denominator="rows not ignored, or `num_batch_labels`",
    mask="rows whose label is `ignore_index`",
    differences=(
        "`fp32_upcast` and `chunk_size` are accepted and change nothing: the arithmetic is float32 "
        "always, and no probabilities are stored that chunks could make smaller.",
        "Logits sharded over the vocabulary (`tp_group`, DTensor) are refused.",
    ),
)


class KDLoss(nn.Module):
    """T^2 times the mean over rows of KL(teacher || student).

    Args:
        ignore_index: rows with this label are left out. Default -100.
        temperature: T > 0. Default 1.
        fp32_upcast: without effect.
        tp_group: must be None.
        chunk_size: without effect.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> KDLoss()(student, teacher, torch.tensor([0]))
        tensor(0.4621)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: None = None,
        chunk_size: int = 0,
    ) -> None:
        """Keeps the options, having checked them."""
        super().__init__()
        absent("tp_group", tp_group, "logits hold every class here")
        self.ignore_index = ignore_index
        self.temperature = positive("temperature", temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """The loss of logits ``(..., C)`` and labels ``(...)``."""
        for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if hasattr(value, "full_tensor"):
                raise TypeError(
                    f"{name} must be a tensor that holds every class; got {type(value).__name__} "
                    "(.full_tensor() it)"
                )
        count = None
        if num_batch_labels is not None:
            count = divisor("num_batch_labels", num_batch_labels)
        return losses.loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            hard_weight=0.0,
            ignore_index=self.ignore_index,
            normalizer=count,
        )
