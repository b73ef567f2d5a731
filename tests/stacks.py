"""Tiny language models, text and hand-written losses, for tests with other libraries' trainers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 32, 12
TEMPERATURE, ALPHA = 3.0, 0.3


def llama(width: int, seed: int) -> Any:
    """Return a randomly initialized Llama without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,  # spreads the teacher's logits
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def sentences(count: int = 32) -> list[dict[str, list[int]]]:
    """Return token ids and labels of different lengths, so that batches differ in token count."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index in range(count):
        length = 4 + index * 5 % (LENGTH - 3)
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = tokens.clone()
        labels[: index % 3] = -100  # a prompt without labels
        samples.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return samples


def pad(samples: list[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Collate sentences into a padded batch."""

    def column(name: str, value: int) -> Tensor:
        rows = [torch.tensor(sample[name]) for sample in samples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    labels, tokens = column("labels", -100), column("input_ids", 0)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def by_hand(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    count: Tensor | float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss by PyTorch's operations from labels aligned with the logits."""
    rows = labels != -100
    student, teacher = student[rows].float(), teacher[rows].float()
    hard = F.cross_entropy(student, labels[rows], reduction="sum", label_smoothing=smoothing)
    p, q = ((logits / TEMPERATURE).log_softmax(-1) for logits in (teacher, student))
    soft = F.kl_div(q, p, reduction="sum", log_target=True) * TEMPERATURE**2
    return (ALPHA * hard + (1 - ALPHA) * soft) / (rows.sum() if count is None else count)


def losses(trainer: Any) -> list[float]:
    """Return the losses that a transformers trainer has logged, one per step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
