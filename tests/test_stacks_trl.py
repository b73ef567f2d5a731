"""Test that fastkd's trainers log the losses of TRL's trainers, and of a hand-written SFT loss."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # importing trl.experimental warns
for package in ("trl", "datasets", "tokenizers", "accelerate", "jinja2"):
    pytest.importorskip(package)

from datasets import Dataset  # noqa: E402
from stacks import (  # noqa: E402
    ALPHA,
    LENGTH,
    TEMPERATURE,
    VOCABULARY,
    llama,
    loss_by_hand,
    losses,
    sentences,
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

import fastkd  # noqa: E402
from fastkd.compat.trl import generalized_jsd_loss  # noqa: E402
from fastkd.integrations import trl as integration  # noqa: E402
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


def gkd_trainer(kind, folder, data, models=None, compute_metrics=None, **options):
    settings = {"max_length": 32, "max_new_tokens": 6, "lmbda": 0.0, **SHARED, **options}
    return kind(
        args=GKDConfig(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        compute_metrics=compute_metrics,
        **(models or models_of("teacher_model")),
    )


def gkd(*arguments, **options) -> list[float]:
    trainer = gkd_trainer(*arguments, **options)
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
def test_the_gkd_trainer_logs_trls_losses(options, tmp_path, monkeypatch):
    # integration.GKDTrainer must not call generalized_jsd_loss, which needs full logits.
    monkeypatch.setattr(integration.GKDTrainer, "generalized_jsd_loss", None)
    kinds = (GKDTrainer, FastGKD, integration.GKDTrainer)
    theirs, *ours = (gkd(kind, tmp_path, prompted(), **options) for kind in kinds)
    assert len(theirs) == STEPS
    for each in ours:
        assert each == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", [FastGKD, integration.GKDTrainer])
def test_the_gkd_trainer_has_loss_0_without_valid_tokens(kind, tmp_path):
    # TRL's own loss would be 0 / 0.
    data = prompted()
    rows = [{**row, "completion_mask": [0] * len(row["input_ids"])} for row in data.to_list()]
    empty = Dataset.from_list(rows)
    assert gkd(kind, tmp_path, empty, max_steps=3) == [0.0] * 3


def make_scaled_models(kind: str):
    """Return a student and a teacher with scaled, or soft-capped, logits."""
    shared = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 2}
    shared |= {"num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    name, options = {
        "scale": ("Cohere", {"logit_scale": 0.3}),
        "divided": ("Granite", {"logits_scaling": 4.0}),
        "softcap": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 4}),
    }[kind]
    models = {}
    for seed, role in enumerate(("model", "teacher_model")):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(
            **shared, **options, hidden_size=8 + 8 * seed, intermediate_size=16
        )
        models[role] = getattr(transformers, f"{name}ForCausalLM")(config)
    return models


@pytest.mark.parametrize("kind", ["scale", "divided", "softcap"])
def test_the_gkd_trainer_supports_scaled_and_capped_logits(kind, tmp_path):
    ours, theirs = (
        gkd(trainer, tmp_path, prompted(), make_scaled_models(kind), max_steps=5)
        for trainer in (integration.GKDTrainer, GKDTrainer)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    "compute_metrics", [None, lambda results: {"shape": results.predictions.shape}]
)
def test_the_gkd_trainer_evaluates(compute_metrics, tmp_path):
    ours, theirs = (
        gkd_trainer(kind, tmp_path, prompted(), compute_metrics=compute_metrics).evaluate()
        for kind in (integration.GKDTrainer, GKDTrainer)
    )
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert ours.get("eval_shape") == theirs.get("eval_shape")
    assert ("eval_shape" in ours) == (compute_metrics is not None)


@pytest.mark.parametrize("return_outputs", [False, True])
def test_the_gkd_trainer_scales_the_loss_by_the_processes(return_outputs, tmp_path, monkeypatch):
    # DDP averages gradients, so a loss divided by the count of all processes is multiplied by the
    # number of processes.
    trainer = gkd_trainer(integration.GKDTrainer, tmp_path, prompted())
    batch = next(iter(trainer.get_train_dataloader()))

    def loss(count):
        out = trainer.compute_loss(trainer.model, batch, return_outputs, count)
        return float(out[0].detach() if return_outputs else out.detach())

    shared, alone = loss(10), loss(None)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert loss(10) == pytest.approx(2 * shared) and loss(None) == alone
    trainer.args.average_tokens_across_devices = False
    assert loss(10) == shared


def train_two_steps(folder, processes: int) -> dict[str, list[float]]:
    """Train on batches of 4 in all processes together; return the logged values."""
    trainer = gkd_trainer(
        integration.GKDTrainer,
        folder,
        prompted(),
        max_steps=2,
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [entry[name] for entry in log] for name in ("loss", "grad_norm")}


def test_gkd_trainer_takes_the_same_steps_with_two_processes(tmp_path):
    # Under DDP, TRL's own losses are halved with two processes.
    file = tmp_path / "log.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, __file__, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = json.loads(file.read_text())
    for name, alone in train_two_steps(tmp_path, 1).items():
        assert ours[name] == pytest.approx(alone, rel=1e-5), name


def test_gkd_trainer_refuses_logits_that_it_cannot_compute(tmp_path):
    models = models_of("teacher_model")
    teacher_forward = models["teacher_model"].forward

    def forward(*arguments, **options):
        out = teacher_forward(*arguments, **options)
        return type(out)(logits=1.1 * out.logits)

    models["teacher_model"].forward = forward
    with pytest.raises(ValueError, match="the logits of LlamaForCausalLM are not its last hidden"):
        gkd(integration.GKDTrainer, tmp_path, prompted(), models)
    models = models_of("teacher_model")
    models["model"].set_output_embeddings(torch.nn.Embedding(VOCABULARY, 8))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM must be an nn\.Linear.* got Embedding"):
        gkd(integration.GKDTrainer, tmp_path, prompted(), models)


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
    """Compute TRL's chunked loss by :func:`fastkd.compat.trl.generalized_jsd_loss`."""
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


def distillation(kind, folder, **options):
    settings = {"max_completion_length": 6, **SHARED, **options}
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in prompted()])
    trainer = kind(
        args=DistillationConfig(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        **models_of("teacher_model"),
    )
    trainer.train()
    return trainer


def test_the_distillation_trainer_with_logits_logs_trls_losses(tmp_path, monkeypatch):
    options = {"beta": 0.5, "temperature": 2.0}
    theirs = losses(distillation(DistillationTrainer, tmp_path, **options))
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", with_logits)
    ours = losses(distillation(DistillationTrainer, tmp_path, **options))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 0.1, "eval_strategy": "steps", "eval_steps": 10},
        {"beta": 0.5, "temperature": 2.0},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["forward KL", "evaluation", "temperature", "reverse KL, accumulation"],
)
def test_the_distillation_trainer_logs_trls_losses(options, tmp_path, monkeypatch):
    theirs = distillation(DistillationTrainer, tmp_path, **options).state.log_history
    # integration.DistillationTrainer must not call TRL's loss.
    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", None)
    ours = distillation(integration.DistillationTrainer, tmp_path, **options).state.log_history
    for name in ("loss", "grad_norm", "entropy", "eval_loss", "eval_entropy"):
        ours_values, theirs_values = (
            [entry[name] for entry in log if name in entry] for log in (ours, theirs)
        )
        assert len(ours_values) == (STEPS if "eval" not in name else 2 * ("eval_steps" in options))
        assert ours_values == pytest.approx(theirs_values, rel=1e-5), name


def test_the_trainers_can_be_pickled_by_name():
    # torch.save and spawned processes pickle the classes of trainers by name.
    for name in ("DistillationTrainer", "GKDTrainer"):
        kind = getattr(integration, name)
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert name in dir(integration)


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
        return loss_by_hand(student, teacher, labels, num_items_in_batch)


def sft(kind, folder, **options) -> list[float]:
    fastkd_options = {"kd_loss": fastkd.KDLoss(temperature=TEMPERATURE, alpha=ALPHA)}
    trainer = kind(
        llama(8, 0),
        args=SFTConfig(str(folder), max_length=2 * LENGTH, **{**SHARED, **options}),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in sentences()]),
        processing_class=tokenizer(),
        teacher=llama(16, 1),
        **(fastkd_options if kind is Distilling else {}),
    )
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("packing", [False, True])
def test_the_sft_trainer_logs_losses_by_hand(packing, tmp_path):
    options = {"packing": packing, "gradient_accumulation_steps": 2}
    ours, theirs = (sft(kind, tmp_path, **options) for kind in (Distilling, ByHand))
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_packing_gives_the_loss_of_padding(tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 32}
    packed, padded = (sft(Distilling, tmp_path, packing=each, **options) for each in (True, False))
    assert packed == pytest.approx(padded, rel=1e-6)


if __name__ == "__main__":  # each of the two processes runs this
    log = train_two_steps(pathlib.Path(sys.argv[1]).parent, 2)
    if os.environ["RANK"] == "0":
        pathlib.Path(sys.argv[1]).write_text(json.dumps(log))
