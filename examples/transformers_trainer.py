"""Distill in transformers.Trainer by a mixin: a small GPT-2 and a smaller one, on text.

    python examples/transformers_trainer.py [--steps N]

The text is pydoc_data.topics, which Python includes; the tokens are its characters.
"""

import argparse
import pathlib
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastkd
from fastkd.integrations.transformers import DistillationMixin

LENGTH = 64


class DistillationTrainer(DistillationMixin, Trainer):
    """Trainer with the mixin, which must come first."""


def model(vocabulary: int, width: int, layers: int) -> GPT2LMHeadModel:
    """Make a GPT-2 of any size, initialized from its own seed."""
    sizes = {"n_positions": LENGTH, "n_embd": width, "n_layer": layers, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **ends))


def main() -> None:
    """Train a teacher on text, then a student on text and teacher."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of teacher and student each")
    steps = parser.parse_args().steps

    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    torch.manual_seed(0)
    text = "\n".join(topics.values())
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    samples = [{"input_ids": window, "labels": window} for window in windows]
    held_out, training = samples[:64], samples[64:]

    def arguments(rate: float) -> TrainingArguments:
        return TrainingArguments(
            str(pathlib.Path(tempfile.gettempdir()) / "fastkd-transformers"),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_steps=steps,
            learning_rate=rate,
            report_to=[],
            save_strategy="no",
            logging_steps=max(1, steps // 3),
            disable_tqdm=True,
        )

    teacher = model(len(characters), 64, 2)
    Trainer(teacher, arguments(3e-3), train_dataset=training).train()
    student = model(len(characters), 32, 1)
    trainer = DistillationTrainer(
        student,
        arguments(5e-3),
        train_dataset=training,
        eval_dataset=held_out,
        teacher=teacher,
        kd_loss=fastkd.KDLoss(temperature=2.0, alpha=0.5),
    )
    trainer.train()
    print(f"held-out distillation loss: {trainer.evaluate()['eval_loss']}")


if __name__ == "__main__":
    main()
