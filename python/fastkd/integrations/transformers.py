"""Use fastkd in ``transformers.Trainer``, and shift the labels of causal language models.

``pip install fastkd[transformers]`` installs what this module needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import batches, extras
from fastkd.losses import KDLoss, check_has_labels, loss


def causal_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the labels of a causal language model's batch, shifted to align with the logits.

    The logits at position i predict token i + 1, so labels ``(batch, length)`` are shifted left by
    one, and the last position gets -100. If the batch has ``shift_labels``, the function returns
    them as int64, without a shift. Without labels, the function returns None. Pass this function to
    :class:`fastkd.Trainer` as ``labels=``.

    Example:
        >>> import torch
        >>> from fastkd.integrations.transformers import causal_labels
        >>> causal_labels({"labels": torch.tensor([[5, 6, 7]])})
        tensor([[   6,    7, -100]])
    """
    shifted = batch.get("shift_labels")
    if shifted is not None:
        return cast(Tensor, shifted).long()
    labels = batch.get("labels")
    return None if labels is None else F.pad(labels[:, 1:].long(), (0, 1), value=-100)


class DistillationMixin:
    """Make a ``transformers.Trainer`` distill; put this class before the trainer among the bases.

    The loss is :func:`fastkd.loss` of the student's and the teacher's logits and the labels, which
    are shifted by one for causal language models (:func:`causal_labels`). As in transformers'
    models, the loss is divided by ``num_items_in_batch``: the number of labels other than -100 in
    all batches of an optimizer step. With ``args.average_tokens_across_devices`` this number is
    summed over all processes. ``args.label_smoothing_factor`` smooths the labels of the hard term.
    The student gets no labels, so that the student computes no loss. An encoder-decoder gets
    labels, from which it makes the inputs of its decoder.

    Student and teacher may be any modules that take a batch as keyword arguments. A model may
    return logits as a tensor, or as the entry ``logits`` of an output. In a tuple, the logits are
    the first tensor that is not 0-d. A causal language model of another library needs an attribute
    ``loss_type = "ForCausalLM"``.

    Args:
        teacher: a model called with the student's inputs; frozen, set to evaluation mode and moved
            to the student's device.
        kd_loss: the loss, with ``reduction="mean"``, ``ignore_index=-100``, no ``normalizer``, no
            ``shift`` and no learned parameters. Default ``KDLoss()``. Batches without labels need
            ``alpha=0.0`` or ``hard_weight=0.0``.
        arguments, options: the trainer's arguments; ``compute_loss_func`` must be None.

    Raises:
        TypeError: if ``teacher`` is not a module or ``kd_loss`` is not a :class:`fastkd.KDLoss`.
        ValueError: for unsupported options of ``kd_loss``; for a ``compute_loss_func``; or if
            ``args.label_smoothing_factor`` and ``label_smoothing`` of ``kd_loss`` are set and
            differ. In training, for a batch without labels, as above.

    Example:
        >>> import fastkd
        >>> from fastkd.integrations.transformers import DistillationMixin
        >>> def distill(student, teacher, args, data):
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
    label_names: Any

    def __init__(
        self, *arguments: Any, teacher: nn.Module, kd_loss: KDLoss | None = None, **options: Any
    ) -> None:
        """Make the trainer and freeze the teacher."""
        self.kd_loss = KDLoss() if kd_loss is None else kd_loss
        _check_loss(self.kd_loss)
        _check_teacher(teacher)
        super().__init__(*arguments, **options)
        _check_trainer(self, self.kd_loss)
        # True makes the trainer pass num_items_in_batch, and not divide by the number of batches.
        self.model_accepts_loss_kwargs = True
        # The trainer drops an input that neither the model's signature nor label_names has.
        self.label_names = self.label_names or ["labels"]
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        config = getattr(base, "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        # The trainer reads this attribute to count tokens, and sets it to False for some causal
        # models, such as GPT2LMHeadModel. The count would then be too large by one token for each
        # sequence.
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
        """Compute the distillation loss of a batch; ``transformers.Trainer`` calls this method."""
        arguments = dict(inputs)
        labels = arguments.get("labels")
        is_shifted = arguments.pop("shift_labels", None) is not None
        if not self._encoder_decoder:
            arguments.pop("labels", None)
        outputs = batches.outputs(model, arguments)
        logits = _get_logits(outputs, model)
        dtype = batches.dtype_of(self.teacher)
        arguments = batches.to(arguments, self.args.device, dtype)
        with torch.no_grad():
            teacher = _get_logits(batches.outputs(self.teacher, arguments), self.teacher)
        if is_shifted or self._loss_shifts_labels:
            labels = causal_labels(inputs)
        check_has_labels(self.kd_loss, labels)
        options = self.kd_loss.options
        if labels is not None and self.args.label_smoothing_factor:
            options = {**options, "label_smoothing": self.args.label_smoothing_factor}
        scale: float = 1
        if num_items_in_batch is not None:
            count = num_items_in_batch
            if isinstance(count, Tensor):  # nn.DataParallel gets the count once for each GPU
                count = count.reshape(-1)[:1]
            options = {**options, "normalizer": count}
            if self.args.average_tokens_across_devices:
                # Gradients are averaged over processes, but the count is a sum over processes.
                scale = self.accelerator.num_processes
            elif self.args.n_gpu > 1:
                # With nn.DataParallel, the trainer divided the count by the number of GPUs, but
                # the logits here come from all GPUs.
                scale = 1 / self.args.n_gpu
        total = loss(logits, teacher, labels, **options) * scale
        if not return_outputs:
            return total
        # The trainer drops the first item of outputs that are no mapping, as if the item were a
        # loss. The first item of a tensor is the first sample.
        return total, outputs if isinstance(outputs, dict) else {"logits": logits}


def _check_loss(kd_loss: object) -> None:
    """Raise unless transformers.Trainer can normalize the loss, and no option requires grad."""
    if not isinstance(kd_loss, KDLoss):
        raise TypeError(f"kd_loss must be a fastkd.KDLoss; got {type(kd_loss).__name__}")
    # The trainer computes the normalizer: it counts the labels that are not -100.
    defaults = {"reduction": "mean", "normalizer": None, "ignore_index": -100, "shift": 0}
    for name, accepted in defaults.items():
        value = kd_loss.options.get(name, accepted)
        if value != accepted:
            raise ValueError(f"kd_loss must have {name}={accepted!r}; got {value!r}")
    learned = [name for name, value in kd_loss.named_parameters() if value.requires_grad]
    if learned:
        raise ValueError(
            "kd_loss must have no parameter that requires grad, since transformers.Trainer "
            f"optimizes and saves only the student's parameters; got {learned[0]}. "
            "Pass a number or a tensor, or train with fastkd.Trainer"
        )


def _check_teacher(teacher: object) -> None:
    if isinstance(teacher, str):
        raise TypeError(
            f"teacher must be a torch.nn.Module; got the name {teacher!r}. Load it first: "
            f"AutoModelForCausalLM.from_pretrained({teacher!r}), or another class of transformers"
        )
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module; got {type(teacher).__name__}")


def _check_trainer(trainer: Any, kd_loss: KDLoss) -> None:
    """Raise if the trainer has a loss function, or a label smoothing that kd_loss contradicts."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(
            "compute_loss_func must be None with DistillationMixin, whose loss is kd_loss; got "
            f"{trainer.compute_loss_func!r}. Omit it, or override compute_loss"
        )
    factor = trainer.args.label_smoothing_factor
    smoothing = kd_loss.options.get("label_smoothing", 0.0)
    if factor and smoothing and factor != smoothing:
        raise ValueError(
            "args.label_smoothing_factor and kd_loss's label_smoothing must agree where both are "
            f"set; got {factor} and {smoothing}. Set one of them"
        )


def _get_logits(output: Any, model: nn.Module) -> Tensor:
    """Return the logits in a model's output.

    In a tuple, the logits are the first tensor that is not 0-d; a 0-d tensor is a loss.
    """
    if isinstance(output, (tuple, list)):
        tensors = (item for item in output if isinstance(item, Tensor) and item.dim())
        output = next(tensors, output)
    return batches.logits_of(output, model)


def _is_causal(model: nn.Module) -> bool:
    """Return True if position i of the logits predicts label i + 1."""
    auto = extras.load("transformers.models.auto.modeling_auto", "transformers")
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return type(model).__name__ in names or getattr(model, "loss_type", None) == "ForCausalLM"
