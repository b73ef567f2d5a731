"""Compute the losses of TRL's ``DistillationTrainer`` and ``GKDTrainer`` by fastkd.

Change one import, and nothing else::

    from fastkd.integrations.trl import DistillationTrainer  # instead of: from trl import ...
    from fastkd.integrations.trl import GKDTrainer           # ... from trl.experimental.gkd import

This module needs TRL 1.16, the only supported series: ``pip install 'trl~=1.16.0'``. The
losses are computed from hidden states and heads, so logits are in memory only for a chunk of
tokens. ``GKDTrainer`` makes two exceptions. The first step computes the logits of one sequence with
each model, to check the head. An evaluation that needs outputs computes all logits. Arguments,
configurations and logged metrics are TRL's.

The sum over tokens is divided as in TRL:

- ``DistillationTrainer``, training: by the tokens of all processes that are not ignored in an
  optimizer step, divided by the number of processes;
- ``GKDTrainer``, training: by the ``num_items_in_batch`` of transformers, the labels that are not
  -100 in the data set's batches of an optimizer step;
- evaluation: by the tokens that are not ignored in the batch, or 1 if all are ignored.

The trainers differ from TRL's in these points:

- A logit of -inf masks its class. If student and teacher both mask a class, TRL's losses are NaN;
  here the class contributes 0.
- TRL's ``DistillationTrainer`` computes forward and reverse KL as differences of large sums, which
  can be negative. Here the forward and the reverse KL are at least 0.
- TRL's ``GKDTrainer`` divides by the tokens of all processes, and then averages the gradients over
  processes, which divides again. Here the loss is multiplied by the number of processes, as TRL's
  ``SFTTrainer`` does.
- If all tokens of an optimizer step are ignored, the loss of TRL's ``GKDTrainer`` is 0 / 0; here
  the loss is 0.
- Logits of 16-bit hidden states are rounded to 16 bits, as in the models, and their divergence is
  computed in float32. TRL's ``DistillationTrainer`` does not round logits.
- If the teacher's head has more classes than the student's, TRL's ``DistillationTrainer`` drops
  the extra classes. Here different numbers of classes are an error.

With ``lmbda > 0`` or ``seq_kd``, ``GKDTrainer`` divides, as in TRL, by the number of tokens in the
data set's completions, not of generated tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import extras, losses
from fastkd.compat.convention import choose_divergence
from fastkd.compat.trl import generalized_jsd_loss

_SUPPORTED = "1.16"


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the generalized Jensen-Shannon divergence of two heads, with TRL's arguments.

    The function replaces ``_chunked_divergence_loss`` of ``trl.trainer.distillation_trainer``. Let
    p be the teacher's distribution, q the student's distribution, and m = beta p + (1 - beta) q.
    The loss of a token is

    - beta = 0: KL(p || q), the forward KL;
    - 0 < beta < 1: beta KL(p || m) + (1 - beta) KL(q || m);
    - beta = 1: KL(q || p), the reverse KL.

    Args:
        student_hidden_states, teacher_hidden_states: ``(..., width)``; the widths may differ.
        student_lm_head_weight, teacher_lm_head_weight: ``(classes, width)``.
        completion_mask: ``(...)``; tokens with 0 are ignored.
        beta: in [0, 1].
        num_items_in_batch: divides the sum over tokens. Default: the number of tokens that are not
            ignored, or 1 if all are ignored.
        student_lm_head_bias, teacher_lm_head_bias: ``(classes,)`` or None.
        student_logit_scale, teacher_logit_scale: positive factors of the logits.
        student_final_logit_softcapping, teacher_final_logit_softcapping: soft caps, applied after
            the scale, or None.
        temperature: divides the logits of student and teacher; the loss has no T^2.

    Returns:
        The loss, the sum of the student's entropies (nats, no gradient) and the number of tokens
        that are not ignored, all 0-d.

    Example:
        >>> import torch
        >>> from fastkd.integrations.trl import chunked_divergence_loss
        >>> hidden, weight = torch.eye(2)[None], torch.zeros(4, 2)
        >>> chunked_divergence_loss(hidden, hidden, weight, weight, torch.ones(1, 2), beta=1.0)
        (tensor(0.), tensor(2.7726), tensor(2))
    """
    valid = completion_mask != 0
    count = valid.sum()
    divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    with (
        _gather(student_lm_head_weight, student_lm_head_bias),
        _gather(teacher_lm_head_weight, teacher_lm_head_bias),
    ):
        terms = losses.terms(
            _make_head(
                student_hidden_states, student_lm_head_weight, student_lm_head_bias,
                student_final_logit_softcapping, student_logit_scale,
            ),
            _make_head(
                teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias,
                teacher_final_logit_softcapping, teacher_logit_scale,
            ),
            torch.where(valid, 0, -100),
            temperature=temperature,
            hard_weight=0.0,
            soft_weight=1 / temperature**2,
            normalizer=divisor,
            **choose_divergence(beta),
        )  # fmt: skip
    return terms.loss, terms.student_entropy * divisor, count


def _gather(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """Return a context that gathers parameters partitioned by DeepSpeed ZeRO-3."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    utils = extras.load("trl.trainer.utils", "trl")
    return utils.maybe_gather_lm_head_ctx(*parameters)  # type: ignore[no-any-return]


def _make_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> losses.Head:
    """Make a head of gathered tensors, cast to the dtype of ``hidden`` unless autocast is on."""

    def convert(parameter: Tensor) -> Tensor:
        if hasattr(parameter, "full_tensor"):  # a DTensor, under FSDP2
            parameter = parameter.full_tensor()
        # Under autocast, the loss casts the parameter, and sums the gradient in the original dtype.
        if torch.is_autocast_enabled(hidden.device.type):
            return parameter
        return parameter.to(hidden.dtype)

    bias = None if bias is None else convert(bias)
    return losses.Head(hidden, convert(weight), bias, softcap, scale)


class _Distillation:
    """Run TRL's ``DistillationTrainer`` with :func:`chunked_divergence_loss`.

    Arguments and configuration are those of ``trl.DistillationTrainer`` (TRL 1.16).

    Example:
        >>> def distill(student, teacher, prompts):
        ...     from fastkd.integrations.trl import DistillationTrainer
        ...     DistillationTrainer(student, teacher, train_dataset=prompts).train()
    """

    def _compute_loss(self, *arguments: Any) -> Any:
        """Run TRL's method with fastkd's loss as its global ``_chunked_divergence_loss``.

        TRL's module is not changed, so TRL's own trainers keep their loss.
        """
        method = super()._compute_loss.__func__  # type: ignore[misc]
        names = {**method.__globals__, "_chunked_divergence_loss": chunked_divergence_loss}
        return FunctionType(method.__code__, names)(self, *arguments)


class _GKD:
    """Run TRL's ``GKDTrainer`` with :func:`chunked_divergence_loss`, a chunk of logits at a time.

    Arguments and configuration are those of ``trl.experimental.gkd.GKDTrainer`` (TRL 1.16). Student
    and teacher must be causal language models of transformers. Logits must be the product of the
    last hidden state and an ``nn.Linear``, scaled and soft-capped as the model's configuration
    says. The first step computes all logits of the batch's first sequence, to check this condition.
    Later, all logits exist only if evaluation needs them, for instance for ``compute_metrics``.

    Raises:
        ValueError: in the first step, if the logits of a model are not such a product.

    Example:
        >>> def distill(student, teacher, args, data, tokenizer):
        ...     from fastkd.integrations.trl import GKDTrainer
        ...     trainer = GKDTrainer(
        ...         student, teacher, args, train_dataset=data, processing_class=tokenizer
        ...     )
        ...     trainer.train()
    """

    args: Any
    accelerator: Any
    beta: float
    teacher_model: nn.Module
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)
    _has_checked_heads = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the loss of a batch; ``transformers.Trainer`` calls this method."""
        factor = 1
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is a sum over processes, but gradients are averaged over processes.
            factor = self.accelerator.num_processes // self.get_tp_size()  # type: ignore[attr-defined]
        if return_outputs:
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch
            )
            return loss * factor, outputs
        student = self.accelerator.unwrap_model(model)
        loss = _call_inside(model, student, self._compute_loss, student, inputs, num_items_in_batch)
        return loss * factor

    def _compute_loss(
        self, student: Any, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if not self._has_checked_heads:
            for model in (student, teacher):
                _check_head(model, tokens)
            self._has_checked_heads = True
        with torch.no_grad():
            hidden = _call_inside(self.teacher_model, teacher, _compute_hidden, teacher, tokens)
        loss, _, _ = chunked_divergence_loss(
            _compute_hidden(student, tokens)[:, :-1],
            hidden[:, :-1],
            completion_mask=inputs["labels"][:, 1:] != -100,
            beta=self.beta,
            num_items_in_batch=num_items_in_batch,
            **_make_head_arguments(student, "student"),
            **_make_head_arguments(teacher, "teacher"),
        )
        return loss


def _call_inside(wrapper: nn.Module, module: nn.Module, function: Any, *arguments: Any) -> Any:
    """Call ``function`` inside the forward of ``wrapper``, in place of the module's forward.

    The wrapper (DDP, FSDP, DeepSpeed) then prepares the module's parameters as in a forward pass.
    """
    redirection = extras.load("trl.models.utils", "trl")._ForwardRedirection()
    return redirection(wrapper, module, function, *arguments)


def _compute_hidden(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """Compute the hidden states that are the head's input, ``(batch, length, width)``."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return base.base_model(**tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _make_head_arguments(model: Any, owner: str) -> dict[str, Any]:
    """Return the arguments of ``chunked_divergence_loss`` for a head, ordered as in _make_head."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return {
        f"{owner}_lm_head_weight": head.weight,
        f"{owner}_lm_head_bias": head.bias,
        f"{owner}_final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        f"{owner}_logit_scale": _get_logit_scale(config),
    }


def _get_logit_scale(config: Any) -> float:
    """Return the factor of a model's logits from the fields of the configuration that TRL reads."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale  # type: ignore[no-any-return]
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling  # type: ignore[no-any-return]


@torch.no_grad()
def _check_head(model: Any, tokens: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the last hidden state and the head give the model's logits."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"the output embeddings of {name} must be an nn.Linear, without an adapter; got "
            f"{type(head).__name__}. Use trl.experimental.gkd.GKDTrainer"
        )
    first = {key: value[:1] for key, value in tokens.items()}
    was_training = model.training
    model.eval()
    expected, hidden = model(**first, use_cache=False).logits, _compute_hidden(model, first)
    model.train(was_training)
    arguments = _make_head_arguments(model, "any").values()
    with _gather(head.weight, head.bias):
        logits = _make_head(hidden, *arguments).logits().to(expected.dtype)
    tolerance = 0.01 * expected.abs().max().item()  # larger than rounding errors of bfloat16
    if logits.shape != expected.shape or not torch.allclose(logits, expected, 0.0, tolerance):
        raise ValueError(
            f"the logits of {name} are not its last hidden state times its output embeddings, with "
            "the scale and the soft cap of its configuration. Use trl.experimental.gkd.GKDTrainer"
        )


_TRAINERS = {
    "DistillationTrainer": (_Distillation, "trl.trainer.distillation_trainer"),
    "GKDTrainer": (_GKD, "trl.experimental.gkd.gkd_trainer"),
}


def __getattr__(name: str) -> Any:
    """Make a trainer class when it is first used, because TRL takes seconds to import."""
    if name not in _TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    version = extras.load("trl", "trl").__version__
    if not version.startswith(f"{_SUPPORTED}."):
        raise ImportError(
            f"{__name__} needs TRL {_SUPPORTED}, whose code it replaces; got TRL {version}: "
            f"pip install 'trl~={_SUPPORTED}.0'"
        )
    mixin, module = _TRAINERS[name]
    base = getattr(extras.load(module, "trl"), name)
    globals()[name] = type(name, (mixin, base), {"__doc__": mixin.__doc__, "__module__": __name__})
    return globals()[name]


def __dir__() -> list[str]:
    """Return the names of the module and of trainers that are not made yet."""
    return sorted({*globals(), *_TRAINERS})
