"""Test transformers.Trainer with the mixin against a hand-written trainer."""

import copy
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from stacks import (  # noqa: E402
    ALPHA,
    LENGTH,
    TEMPERATURE,
    VOCABULARY,
    llama,
    loss_by_hand,
    losses,
    pad,
    sentences,
)

import fastkd  # noqa: E402
from fastkd import batches  # noqa: E402
from fastkd.integrations.transformers import DistillationMixin, causal_labels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 20


class Distilling(DistillationMixin, transformers.Trainer):
    pass


class ByHand(transformers.Trainer):
    """Compute the loss by PyTorch's operations, from logits without a key-value cache."""

    def __init__(self, *arguments, teacher, **options):
        super().__init__(*arguments, **options)
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.label_names = ["labels"]
        self.teacher = teacher

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        moved = inputs.pop("shift_labels", None)
        student = self.logits(model, inputs)
        with torch.no_grad():
            teacher = self.logits(self.teacher, inputs)
        if moved is None:
            student, teacher, moved = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        smoothing = self.args.label_smoothing_factor
        total = loss_by_hand(student, teacher, moved, num_items_in_batch, smoothing)
        total = total * self.accelerator.num_processes
        return (total, {"logits": student}) if return_outputs else total

    def logits(self, model, inputs):
        if isinstance(model, Head):
            return model.logits(inputs["input_ids"])
        return model(**inputs, use_cache=False).logits


def arguments(folder: pathlib.Path, **options) -> transformers.TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def trainer(
    kind,
    folder,
    *,
    student=None,
    teacher=None,
    data=None,
    collator=pad,
    gpus=1,
    loss=None,
    **options,
):
    training = arguments(folder, **options)
    training._n_gpu = gpus
    fastkd_options = {"kd_loss": loss or fastkd.KDLoss(temperature=TEMPERATURE, alpha=ALPHA)}
    return kind(
        copy.deepcopy(student) if student else llama(8, 0),
        training,
        train_dataset=sentences() if data is None else data,
        data_collator=collator,
        teacher=copy.deepcopy(teacher) if teacher else llama(16, 1).requires_grad_(False).eval(),
        **(fastkd_options if issubclass(kind, Distilling) else {}),
    )


def run(kind, folder, **options) -> list[float]:
    made = trainer(kind, folder, **options)
    made.train()
    return losses(made)


def collate_shifted(samples):
    """Collate a batch with ``shift_labels`` and wrong ``labels``, which must not be read."""
    batch = pad(samples)
    return {**batch, "shift_labels": causal_labels(batch), "labels": batch["labels"] * 0 + 7}


PACKED = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=False)
SITUATIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "packing": {"collator": PACKED},
    "bf16 autocast": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "shift_labels": {"collator": collate_shifted},
}


@pytest.mark.parametrize(
    "situation",
    [s if s == "accumulation" else pytest.param(s, marks=pytest.mark.slow) for s in SITUATIONS],
)
def test_each_step_has_the_loss_by_hand(situation, tmp_path):
    ours = run(Distilling, tmp_path, **SITUATIONS[situation])
    theirs = run(ByHand, tmp_path, **SITUATIONS[situation])
    assert len(ours) == STEPS
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("everywhere", [True, False])
def test_two_gpus_equal_one_with_doubled_batches(everywhere, tmp_path):
    # The trainer counts two simulated GPUs, though DataParallel finds none.
    even = [sample for sample in sentences(64) if len(sample["input_ids"]) % 2][:32]
    # The trainer divides the number of labels by the number of GPUs, rounded down. Sequences of odd
    # length have even numbers of shifted labels.
    for sample in even:
        sample["labels"] = sample["input_ids"]
    options = {"average_tokens_across_devices": everywhere, "data": even}
    ours = run(Distilling, tmp_path, gpus=2, **options)
    theirs = run(ByHand, tmp_path, per_device_train_batch_size=8, **options)
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("count", [5, torch.tensor(5), torch.tensor([5]), torch.full((2, 1), 5.0)])
def test_counts_may_have_every_shape(count, tmp_path):
    made = trainer(Distilling, tmp_path)
    batch = pad(sentences()[:4])
    expected = made.compute_loss(made.model, batch) * (causal_labels(batch) != -100).sum() / 5
    loss = made.compute_loss(made.model, batch, num_items_in_batch=count)
    torch.testing.assert_close(loss, expected)


def test_a_step_without_labels_changes_nothing(tmp_path):
    data = sentences()
    for sample in data:
        sample["labels"] = [-100] * len(sample["labels"])
    student = llama(8, 0)
    made = trainer(Distilling, tmp_path, student=student, data=data, weight_decay=0.0)
    made.train()
    assert losses(made) == [0.0] * STEPS
    for before, after in zip(student.parameters(), made.model.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def packed_and_padded():
    samples = sentences()[:5]
    return PACKED([dict(sample) for sample in samples]), pad(samples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixin", "fastkd.Trainer"])
def test_a_packed_batch_has_the_loss_of_the_padded_one(kind, tmp_path):
    # No sequence attends to the previous sequence, in the student or in the teacher.
    options = {"temperature": TEMPERATURE, "alpha": ALPHA}
    values = []
    for batch in packed_and_padded():
        student, teacher = llama(8, 0), llama(16, 1)
        assert student.config.use_cache and teacher.config.use_cache
        if kind == "mixin":
            made = trainer(Distilling, tmp_path, student=student, teacher=teacher)
            values.append(float(made.compute_loss(made.model, batch)))
        else:
            optimizer = torch.optim.SGD(student.parameters(), 0.1)
            made = fastkd.Trainer(
                student, teacher, optimizer, loss=fastkd.KDLoss(**options), labels=causal_labels,
                progress=False,
            )  # fmt: skip
            values.append(made.evaluate([batch]).loss)
            (step,) = made.steps([batch])
            assert float(step.loss) == pytest.approx(values[-1], rel=1e-6)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


class CacheRecorder(nn.Module):
    """Record the ``use_cache`` argument of each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(2, 3), []

    def forward(self, x, use_cache=None):
        self.seen.append(use_cache)
        return self.linear(x)


def test_models_are_called_without_a_cache(tmp_path):
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    teacher, student = CacheRecorder(), CacheRecorder()
    loader = [(x, y, torch.arange(4))]
    fastkd.teachers.precompute(teacher, loader, tmp_path / "cache", progress=False)
    fastkd.report(teacher, student, loader, seconds=0.01, batch_sizes=[2], show=False)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    fastkd.Trainer(student, teacher, optimizer, progress=False).fit(loader)
    assert {*teacher.seen, *student.seen} == {False}


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **keywords):
        return self.module(*inputs, **keywords)


def test_wrapped_models_are_called_without_a_cache_by_default():
    model = CacheRecorder()
    batches.outputs(Wrapped(model), {"x": torch.zeros(1, 2)})
    batches.outputs(Wrapped(model), {"x": torch.zeros(1, 2), "use_cache": True})
    batches.outputs(Wrapped(model), (torch.zeros(1, 2), True))
    # This model has no use_cache argument.
    batches.outputs(Wrapped(nn.Linear(2, 3)), torch.zeros(1, 2))
    assert model.seen == [False, True, True]


def test_a_compiled_model_is_called_without_a_cache():
    model = CacheRecorder()
    batches.outputs(torch.compile(model, backend="eager"), torch.zeros(1, 2))
    assert model.seen == [False]


def test_shifted_labels_are_not_shifted_again():
    shifted = torch.tensor([[5, -100]])
    assert causal_labels({"shift_labels": shifted}).equal(shifted)
    assert causal_labels({"shift_labels": None, "labels": shifted}).tolist() == [[-100, -100]]


def test_granite_gets_use_cache_by_its_base_model():
    # GraniteMoeForCausalLM takes use_cache in ``**kwargs`` alone; its base model names use_cache.
    config = transformers.GraniteMoeConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.GraniteMoeForCausalLM(config)
    with torch.no_grad():
        packed, padded = (
            batches.outputs(model, {k: v for k, v in batch.items() if k != "labels"})
            for batch in packed_and_padded()
        )
    assert packed.past_key_values is None and padded.past_key_values is None


# ---- models that return tensors, mappings and tuples


class Head(nn.Module):
    """Return ``form`` of the logits, in a module that is not from transformers."""

    def __init__(self, width, form, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.form, self.loss_type = form, "ForCausalLM"

    def logits(self, input_ids):
        return self.out(self.embed(input_ids).cumsum(1))

    def forward(self, input_ids):
        return self.form(self.logits(input_ids))


FORMS = {
    "tensor": lambda logits: logits,
    "mapping": lambda logits: {"features": logits * 2, "logits": logits},
    "tuple": lambda logits: (logits, logits * 2),
    "tuple with a loss": lambda logits: (logits.mean(), logits),
}


def collate_without_mask(samples):
    """Collate into batches of equal length, without an attention mask."""
    longest = {"input_ids": [0] * LENGTH, "labels": [-100] * LENGTH}
    batch = pad([*samples, longest])
    return {key: batch[key][:-1] for key in longest}


@pytest.mark.parametrize("form", FORMS)
def test_torch_modules_are_trained(form, tmp_path):
    models = {"student": Head(8, FORMS[form], 0), "teacher": Head(16, FORMS[form], 1)}
    ours = trainer(Distilling, tmp_path, collator=collate_without_mask, **models)
    theirs = trainer(ByHand, tmp_path, collator=collate_without_mask, **models)
    ours.train()
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    # If the model returns a mapping, predict() returns all entries, and else the logits alone.
    result = ours.predict(sentences()[:8])
    assert result.metrics["test_loss"] > 0
    predictions = result.predictions
    predictions = predictions if isinstance(predictions, tuple) else (predictions,)
    assert {value.shape for value in predictions} == {(8, LENGTH, VOCABULARY)}


def test_a_teacher_in_bf16_gets_its_dtype(tmp_path):
    # Floating-point inputs, such as images, are cast to the teacher's dtype.
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, pixel_values):
            return {"logits": self.linear(pixel_values)}

    data = [{"pixel_values": torch.randn(4), "labels": index % 3} for index in range(8)]
    teacher = Classifier().bfloat16()
    collator = transformers.default_data_collator
    made = trainer(
        Distilling, tmp_path, student=Classifier(), teacher=teacher, data=data, collator=collator
    )
    made.train()
    assert len(losses(made)) == STEPS


# ---- refused arguments


def assert_refused(error, match, folder, **options):
    student, before = llama(8, 0), llama(16, 1)
    teacher = options.pop("teacher", before)
    loss = options.pop("loss", None)
    others = options.pop("trainer", {})
    with pytest.raises(error, match=match):
        Distilling(
            student, arguments(folder, **options), train_dataset=sentences(), data_collator=pad,
            teacher=teacher, kd_loss=loss, **others,
        )  # fmt: skip
    assert all(parameter.requires_grad for parameter in before.parameters())
    assert before.training


def test_unsupported_arguments_are_refused(tmp_path):
    assert_refused(
        TypeError,
        "teacher must be a torch.nn.Module; got the name 'org/large'.*from_pretrained",
        tmp_path,
        teacher="org/large",
    )
    assert_refused(
        TypeError, "teacher must be a torch.nn.Module; got NoneType", tmp_path, teacher=None
    )
    assert_refused(
        ValueError,
        "kd_loss must have no parameter that requires grad.*got temperature",
        tmp_path,
        loss=fastkd.KDLoss(temperature=nn.Parameter(torch.tensor(2.0))),
    )
    assert_refused(
        ValueError,
        "compute_loss_func must be None",
        tmp_path,
        trainer={"compute_loss_func": lambda *arguments, **options: 0.0},
    )
    assert_refused(
        ValueError,
        "must agree where both are set; got 0.1 and 0.2",
        tmp_path,
        label_smoothing_factor=0.1,
        loss=fastkd.KDLoss(label_smoothing=0.2),
    )


def test_an_ignored_label_that_the_trainer_counts_is_refused(tmp_path):
    loss = fastkd.KDLoss(ignore_index=0)
    assert_refused(ValueError, "kd_loss must have ignore_index=-100; got 0", tmp_path, loss=loss)


def test_a_fixed_parameter_as_temperature_is_accepted(tmp_path):
    fixed = nn.Parameter(torch.tensor(TEMPERATURE), requires_grad=False)
    ours = run(Distilling, tmp_path, loss=fastkd.KDLoss(temperature=fixed, alpha=ALPHA))
    assert ours == pytest.approx(run(ByHand, tmp_path), rel=1e-5)


@pytest.mark.slow
def test_label_smoothing_of_the_loss_and_of_the_arguments_is_the_same(tmp_path):
    loss = fastkd.KDLoss(temperature=TEMPERATURE, alpha=ALPHA, label_smoothing=0.2)
    expected = run(Distilling, tmp_path, label_smoothing_factor=0.2)
    assert run(Distilling, tmp_path, loss=loss) == expected
    assert run(Distilling, tmp_path, loss=loss, label_smoothing_factor=0.2) == expected


# ---- interrupted runs, two processes


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": STEPS // 2}
    expected = run(Distilling, tmp_path / "one", **options)
    checkpoint = tmp_path / "one" / f"checkpoint-{STEPS // 2}"
    made = trainer(Distilling, tmp_path / "two", **options)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert losses(made) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(run(ByHand, tmp_path / "three"), rel=1e-5)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one_with_doubled_batches(tmp_path):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(tmp_path / f"{rank}.json")]
        environment = {**os.environ, **shared, **place}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    ours = json.loads((tmp_path / "0.json").read_text())
    expected = run(ByHand, tmp_path, per_device_train_batch_size=8)
    assert len(ours) == STEPS
    assert ours == pytest.approx(expected, rel=1e-5)


def main(out: str) -> None:
    """Train in one of two processes, and write the losses to ``out``."""
    path = pathlib.Path(out)
    made = trainer(Distilling, path.parent / path.stem, ddp_backend="gloo")
    assert made.accelerator.num_processes == 2
    made.train()
    path.write_text(json.dumps(losses(made)))


if __name__ == "__main__":
    main(sys.argv[1])
