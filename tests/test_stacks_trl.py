"""TRL's GKD, distillation and SFT trainers, 20 steps: their own loss beside that of fastkd."""

import os

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # a warning, when it is imported
for package in ("trl", "datasets", "tokenizers", "accelerate", "jinja2"):
    pytest.importorskip(package)

from datasets import Dataset  # noqa: E402
from stacks import (  # noqa: E402
    ALPHA,
    LENGTH,
    TEMPERATURE,
    VOCABULARY,
    by_hand,
    llama,
    losses,
    sentences,
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

import fastkd  # noqa: E402
from fastkd.compat import convention  # noqa: E402
from fastkd.compat.trl import generalized_jsd_loss  # noqa: E402
from fastkd.integrations.transformers import DistillationMixin  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS = 20
SHARED = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def models_of(kind: str):
    return {"model": llama(8, 0), kind: llama(16, 1)}


# ---- GKDTrainer


class FastGKD(GKDTrainer):
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)


def gkd(kind, folder, data, **options) -> list[float]:
    settings = {"max_length": 32, "max_new_tokens": 6, "lmbda": 0.0, **SHARED, **options}
    trainer = kind(
        args=GKDConfig(str(folder), **settings),
        train_dataset=data,
        processing_class=tokenizer(),
        **models_of("teacher_model"),
    )
    trainer.train()
    return losses(trainer)


def prompted() -> Dataset:
    rows = []
    for sample in sentences():
        tokens = sample["input_ids"]
        completion = [0, 0] + [1] * (len(tokens) - 2)
        row = {"prompt": text(tokens[:2]), "input_ids": tokens, "completion_mask": completion}
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 0.5},
        {"beta": 1.0},
        {"gradient_accumulation_steps": 2},
        {"lmbda": 1.0},
        {"seq_kd": True},
    ],
    ids=lambda options: ", ".join(f"{name} {value}" for name, value in options.items()),
)
def test_gkd_trainer(options, tmp_path):
    ours, theirs = (gkd(kind, tmp_path, prompted(), **options) for kind in (FastGKD, GKDTrainer))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_gkd_trainer_where_no_token_of_a_step_counts(tmp_path):
    """Its own loss is 0 / 0."""
    data = prompted()
    rows = [{**row, "completion_mask": [0] * len(row["input_ids"])} for row in data.to_list()]
    empty = Dataset.from_list(rows)
    assert gkd(FastGKD, tmp_path, empty, max_steps=3) == [0.0] * 3


# ---- DistillationTrainer


def with_logits(
    student_hidden_states,
    teacher_hidden_states,
    student_lm_head_weight,
    teacher_lm_head_weight,
    completion_mask,
    beta,
    num_items_in_batch=None,
    temperature=1.0,
    **_,
):
    """TRL's chunked loss by :func:`fastkd.compat.trl.generalized_jsd_loss`."""
    labels = torch.where(completion_mask != 0, 0, -100)
    loss = generalized_jsd_loss(
        student_hidden_states @ student_lm_head_weight.T,
        teacher_hidden_states @ teacher_lm_head_weight.detach().T,
        labels,
        beta=beta,
        temperature=temperature,
        num_items_in_batch=num_items_in_batch,
    )
    return loss, torch.zeros(()), completion_mask.sum()


def with_heads(
    student_hidden_states,
    teacher_hidden_states,
    student_lm_head_weight,
    teacher_lm_head_weight,
    completion_mask,
    beta,
    num_items_in_batch=None,
    temperature=1.0,
    **_,
):
    """The same by two :class:`fastkd.Head`, which never has the logits of all rows either."""
    loss = fastkd.loss(
        fastkd.Head(student_hidden_states, student_lm_head_weight),
        fastkd.Head(teacher_hidden_states, teacher_lm_head_weight),
        torch.where(completion_mask != 0, 0, -100),
        temperature=temperature,
        hard_weight=0.0,
        soft_weight=1 / temperature**2,
        normalizer=num_items_in_batch,
        **convention.choose_divergence(beta),
    )
    return loss, torch.zeros(()), completion_mask.sum()


def distillation(folder, **options) -> list[float]:
    settings = {"max_completion_length": 6, **SHARED, **options}
    trainer = DistillationTrainer(
        args=DistillationConfig(str(folder), **settings),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in prompted()]),
        processing_class=tokenizer(),
        **models_of("teacher_model"),
    )
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(
    "function, options",
    [
        (with_logits, {"beta": 0.5, "temperature": 2.0}),
        (with_heads, {"beta": 0.0}),
        (with_heads, {"beta": 0.5, "temperature": 2.0}),
        (with_heads, {"gradient_accumulation_steps": 2}),
    ],
    ids=["logits, jsd", "heads, forward KL", "heads, jsd", "heads, accumulation"],
)
def test_distillation_trainer(options, function, tmp_path, monkeypatch):
    theirs = distillation(tmp_path, **options)
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", function)
    ours = distillation(tmp_path, **options)
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---- SFTTrainer with the mixin


class Distilling(DistillationMixin, SFTTrainer):
    pass


class ByHand(SFTTrainer):
    def __init__(self, *arguments, teacher, **options):
        super().__init__(*arguments, **options)
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        student = model(**inputs, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            teacher = self.teacher(**inputs, use_cache=False).logits[:, :-1]
        return by_hand(student, teacher, labels, num_items_in_batch)


def sft(kind, folder, **options) -> list[float]:
    mine = {"kd_loss": fastkd.KDLoss(temperature=TEMPERATURE, alpha=ALPHA)}
    trainer = kind(
        llama(8, 0),
        args=SFTConfig(str(folder), max_length=2 * LENGTH, **{**SHARED, **options}),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in sentences()]),
        processing_class=tokenizer(),
        teacher=llama(16, 1),
        **(mine if kind is Distilling else {}),
    )
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer(packing, tmp_path):
    options = {"packing": packing, "gradient_accumulation_steps": 2}
    ours, theirs = (sft(kind, tmp_path, **options) for kind in (Distilling, ByHand))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_packing_gives_the_loss_of_padding(tmp_path):
    """Of all sentences in one step."""
    options = {"max_steps": 1, "per_device_train_batch_size": 32}
    packed, padded = (sft(Distilling, tmp_path, packing=each, **options) for each in (True, False))
    assert packed == pytest.approx(padded, rel=1e-6)
