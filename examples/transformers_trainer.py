"""Distill a small GPT-2 into a smaller GPT-2 by transformers.Trainer and a mixin.

    python examples/transformers_trainer.py [--seeds N] [--steps N]

The text ships with Python (pydoc_data.topics), and each character is a token. The teacher is
trained on all of the text but 128 windows, which are held out. The students are trained on 4,992
characters, with and without the teacher, for the same number of steps.
"""

import argparse
import pathlib
import tempfile
from pydoc_data.topics import topics
from statistics import mean, stdev

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import fastkd
from fastkd.integrations.transformers import DistillationMixin

LENGTH = 64


class DistillationTrainer(DistillationMixin, Trainer):
    """Train with the distillation loss, by a mixin that overrides methods of Trainer."""


def make_model(vocabulary: int, width: int, layers: int) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights."""
    sizes = {"n_positions": LENGTH, "n_embd": width, "n_layer": layers, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **ends))


def make_arguments(rate: float, steps: int, seed: int) -> TrainingArguments:
    """Return the arguments of a training without logs and checkpoints."""
    return TrainingArguments(
        str(pathlib.Path(tempfile.gettempdir()) / "fastkd-transformers"),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=rate,
        seed=seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def main() -> None:
    """Train a teacher, then a student alone and a student distilled for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of the students")
    options = parser.parse_args()

    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    text = "\n".join(topics.values())
    characters = sorted(set(text))
    number = {character: index for index, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": window, "labels": window} for window in windows[order]]
    held_out, training = samples[:128], samples[128:]

    def evaluate(trained: GPT2LMHeadModel) -> float:
        """Return the cross entropy on held-out text, in nats per character."""
        trainer = Trainer(trained, make_arguments(0.0, 1, 0), eval_dataset=held_out)
        return trainer.evaluate()["eval_loss"]

    set_seed(0)
    teacher = make_model(len(characters), 64, 2)
    Trainer(teacher, make_arguments(3e-3, 4 * options.steps, 0), train_dataset=training).train()
    print(f"teacher: cross entropy {evaluate(teacher):.3f}")
    gains = []
    for seed in range(options.seeds):
        few, common = training[:78], make_arguments(5e-3, options.steps, seed)
        set_seed(seed)
        alone = make_model(len(characters), 32, 1)
        Trainer(alone, common, train_dataset=few).train()
        set_seed(seed)
        distilled = make_model(len(characters), 32, 1)
        DistillationTrainer(
            distilled,
            common,
            train_dataset=few,
            teacher=teacher,
            kd_loss=fastkd.KDLoss(temperature=1.0, alpha=0.1),
        ).train()
        losses = evaluate(alone), evaluate(distilled)
        gains.append(losses[0] - losses[1])
        print(f"seed {seed}: cross entropy: alone {losses[0]:.3f}, distilled {losses[1]:.3f}")
    error = 2 * stdev(gains) / len(gains) ** 0.5
    print(f"gain by distillation: {mean(gains):+.3f} ± {error:.3f} nats (2 standard errors)")


if __name__ == "__main__":
    main()
