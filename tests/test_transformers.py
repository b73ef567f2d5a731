"""Test transformers.Trainer with the mixin: the mean over tokens, shifted labels, refusals."""

import copy
import doctest

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastkd  # noqa: E402
from fastkd.integrations import transformers as integration  # noqa: E402
from fastkd.integrations.transformers import DistillationMixin, causal_labels  # noqa: E402

VOCABULARY = 32


class DistillationTrainer(DistillationMixin, transformers.Trainer):
    pass


def model(width: int, seed: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=width, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sentences(count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Make padded sentences, so that batches differ in their numbers of valid tokens."""
    torch.manual_seed(3)
    tokens = torch.randint(VOCABULARY, (count, 12))
    lengths = torch.arange(count) % 7 + 4
    labels = tokens.masked_fill(torch.arange(12) >= lengths.unsqueeze(1), -100)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def trainer_of(student, teacher, folder, accumulate: int = 1, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        learning_rate=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    data = sentences()
    return DistillationTrainer(
        student, arguments, train_dataset=data, eval_dataset=data, teacher=teacher, **options
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_that_of_the_mean_over_all_tokens(accumulate, tmp_path):
    student, teacher = model(8, 0), model(16, 1)
    expected = copy.deepcopy(student)
    batch = {k: torch.stack([s[k] for s in sentences()]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        answer = teacher(batch["input_ids"]).logits
    optimizer = torch.optim.SGD(expected.parameters(), 0.5)
    loss = fastkd.loss(
        expected(batch["input_ids"]).logits[:, :-1], answer[:, :-1], batch["labels"][:, 1:],
        temperature=3.0, alpha=0.3,
    )  # fmt: skip
    loss.backward()
    optimizer.step()
    trainer = trainer_of(
        student, teacher, tmp_path, accumulate, kd_loss=fastkd.KDLoss(temperature=3.0, alpha=0.3)
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(float(loss.detach()), rel=1e-5)
    trainer.train()
    for (name, ours), theirs in zip(student.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(
        float(loss.detach()), rel=1e-5
    )
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_causal_labels_are_those_of_sliced_logits():
    batch = {k: torch.stack([s[k] for s in sentences()]) for k in ("input_ids", "labels")}
    student, teacher = torch.randn(8, 12, 5), torch.randn(8, 12, 5)
    labels = (batch["labels"] % 5).masked_fill(batch["labels"] < 0, -100)
    ours = fastkd.loss(student, teacher, causal_labels({"labels": labels}))
    theirs = fastkd.loss(student[:, :-1], teacher[:, :-1], labels[:, 1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_docstrings_run():
    assert doctest.testmod(integration).attempted > 0 == doctest.testmod(integration).failed


def test_only_mean_losses_of_kdloss_are_accepted(tmp_path):
    with pytest.raises(ValueError, match="reduction='mean'; got 'sum'"):
        trainer_of(model(8, 0), model(8, 1), tmp_path, kd_loss=fastkd.KDLoss(reduction="sum"))
    with pytest.raises(ValueError, match="shift=0; got 1"):  # the mixin shifts the labels
        trainer_of(model(8, 0), model(8, 1), tmp_path, kd_loss=fastkd.KDLoss(shift=1))
    with pytest.raises(TypeError, match=r"fastkd\.KDLoss; got function"):
        trainer_of(model(8, 0), model(8, 1), tmp_path, kd_loss=fastkd.loss)


def test_a_batch_without_labels_is_refused_if_the_loss_has_a_hard_term(tmp_path):
    batch = {"input_ids": torch.stack([sample["input_ids"] for sample in sentences()])}
    for loss, refused in ((None, True), (fastkd.KDLoss(alpha=0.0), False)):
        trainer = trainer_of(model(8, 0), model(8, 1), tmp_path, kd_loss=loss)
        if refused:
            with pytest.raises(ValueError, match=r"labels must not be None.*KDLoss\(alpha=0\.0\)"):
                trainer.compute_loss(trainer.model, batch)
        else:
            assert trainer.compute_loss(trainer.model, batch) > 0
