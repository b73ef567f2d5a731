"""fastkd in ``transformers.Trainer``, and the labels of causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import extras
from fastkd.losses import KDLoss, loss


def causal_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """The labels of a causal language model's batch, moved to the logits that predict them.

    Position i's logits predict token i + 1, so labels ``(B, L)`` move left by one, and the last
    position's become -100. Give it to :class:`fastkd.Trainer` as ``labels=``.

    Example:
        >>> import torch
        >>> from fastkd.integrations.transformers import causal_labels
        >>> causal_labels({"labels": torch.tensor([[5, 6, 7]])})
        tensor([[   6,    7, -100]])
    """
    labels = batch.get("labels")
    return None if labels is None else F.pad(labels[:, 1:].long(), (0, 1), value=-100)


class DistillationMixin:
    """Makes a ``transformers.Trainer`` distil: put it before the trainer among the bases.

    The loss is :func:`fastkd.loss` of the student's and the teacher's logits and the labels, which
    move by one for causal language models. It is divided by ``num_items_in_batch``, the number of
    tokens in all batches of an optimizer step, on all processes too where
    ``args.average_tokens_across_devices`` says so, as the loss of the library's own models is. The
    student is not asked for its own loss, unless it is an encoder-decoder, whose decoder takes the
    labels for its inputs.

    Args:
        teacher: a model called with the student's inputs; frozen, set to evaluation mode and moved
            to the student's device.
        kd_loss: options, with ``reduction="mean"`` and no ``normalizer``. Default ``KDLoss()``.
        arguments, options: those of the trainer.

    Raises:
        TypeError, ValueError: for a ``kd_loss`` that is not as above.

    Example:
        >>> import fastkd
        >>> from fastkd.integrations.transformers import DistillationMixin
        >>> def distil(student, teacher, args, data):
        ...     from transformers import Trainer
        ...     class DistillationTrainer(DistillationMixin, Trainer):
        ...         pass
        ...     loss = fastkd.KDLoss(temperature=2.0, alpha=0.5)
        ...     trainer = DistillationTrainer(
        ...         student, args, train_dataset=data, teacher=teacher, kd_loss=loss
        ...     )
        ...     trainer.train()
    """

    args: Any
    accelerator: Any
    model: Any

    def __init__(
        self, *arguments: Any, teacher: nn.Module, kd_loss: KDLoss | None = None, **options: Any
    ) -> None:
        """Freezes the teacher and makes the trainer."""
        self.kd_loss = KDLoss() if kd_loss is None else kd_loss
        if not isinstance(self.kd_loss, KDLoss):
            raise TypeError(f"kd_loss must be a fastkd.KDLoss; got {type(kd_loss).__name__}")
        for name, accepted in (("reduction", "mean"), ("normalizer", None)):
            given = self.kd_loss.options.get(name, accepted)
            if given != accepted:
                raise ValueError(f"kd_loss must have {name}={accepted!r}; got {given!r}")
        super().__init__(*arguments, **options)
        # So that the trainer counts the tokens, and does not divide by the number of batches.
        self.model_accepts_loss_kwargs = True
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._encoder_decoder = getattr(base.config, "is_encoder_decoder", False)
        # It decides what tokens are counted. The trainer's own answer misses models whose loss is
        # not in their class's name, such as GPT2LMHeadModel, and would count a token too many.
        self._loss_shifts_labels = not self._encoder_decoder and _is_causal(base)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.kd_loss.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a batch, as ``transformers.Trainer`` asks for it."""
        given = dict(inputs)
        labels = given.get("labels")
        if not self._encoder_decoder:
            given.pop("labels", None)
        outputs = model(**given)
        with torch.no_grad():
            teacher = self.teacher(**given)
        if self._loss_shifts_labels:
            labels = causal_labels(inputs)
        options = self.kd_loss.options_for(labels)
        if num_items_in_batch is not None:
            options = {**options, "normalizer": num_items_in_batch}
        total = loss(outputs.logits, teacher.logits, labels, **options)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            total = total * self.accelerator.num_processes  # gradients are averaged over them
        return (total, outputs) if return_outputs else total


def _is_causal(model: nn.Module) -> bool:
    """Whether position i of the logits predicts label i + 1."""
    auto = extras.load("transformers.models.auto.modeling_auto", "examples")
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return type(model).__name__ in names or getattr(model, "loss_type", None) == "ForCausalLM"
