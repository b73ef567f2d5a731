"""Test that messages about frequent mistakes name the call that works."""

import re
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd import KDLoss, TopK

N, C, T = 4, 10, 6
rows, classes = torch.arange(N), torch.arange(C)


def logits(*shape: int) -> Tensor:
    return torch.randn(shape or (N, C), generator=torch.Generator().manual_seed(0))


def loss(student: Any = None, teacher: Any = None, *arguments: Any, **options: Any) -> Tensor:
    student = logits() if student is None else student
    return fastkd.loss(student, student if teacher is None else teacher, *arguments, **options)


class ModelOutput(OrderedDict):
    """Imitate a model output of transformers: a dictionary with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


top = torch.log_softmax(logits(), -1).topk(3)
image, pixels = logits(2, C, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
text, tokens = logits(2, T, C), torch.zeros(2, T, dtype=torch.long)

MISTAKES = {
    # names of options
    "a misspelt option": (lambda: loss(temprature=2.0), "Did you mean 'temperature'?"),
    "T for the temperature": (lambda: loss(T=2.0), "Did you mean 'temperature'?"),
    "TRL's beta": (lambda: loss(beta=0.0), 'beta=0 is divergence="forward_kl"'),
    "a weight of the soft term": (lambda: KDLoss(kd_weight=0.5), "alpha weighs the hard term"),
    "weight of cross_entropy": (lambda: loss(weight=classes), "Did you mean 'class_weight'?"),
    "targets": (lambda: loss(targets=rows), "Did you mean 'labels'?"),
    "log_target of kl_div": (lambda: loss(log_target=True), 'teacher_form="log_probs"'),
    "top_k": (lambda: loss(top_k=3), "Pass a fastkd.TopK as teacher"),
    "an option of a plan": (
        lambda: fastkd.chunks.plan(fastkd.Head(logits(), logits(3, C)), logits(N, 3), tau=2.0),
        "Did you mean 'temperature'?",
    ),
    "a name that is nearer to teacher_temperature": (
        lambda: loss(student_temperature=2.0), "Did you mean 'temperature'?",
    ),
    "axolotl's kd_alpha": (lambda: loss(kd_alpha=0.5), "alpha weighs the hard term"),
    "Liger's weight_hard_loss": (
        lambda: loss(None, None, rows, weight_hard_loss=0.5), "Did you mean 'hard_weight'?",
    ),
    "transformers' shift_labels": (lambda: loss(shift_labels=rows), "Did you mean 'labels'?"),
    "an attention mask": (lambda: loss(text, text, tokens, attention_mask=tokens), "label -100"),
    "options without names": (lambda: KDLoss(4.0, 0.1), "temperature=4.0, alpha=0.1"),
    "tensors instead of options": (
        lambda: KDLoss(logits(), logits(), rows), "KDLoss()(student, teacher, labels)",
    ),
    "a temperature without its name": (lambda: loss(None, None, rows, 4.0), "temperature=4.0"),
    "a misspelt function": (lambda: fastkd.KDloss(), "Did you mean 'KDLoss'?"),
    # values of options
    "kl": (lambda: loss(divergence="kl"), "Did you mean 'forward_kl'?"),
    "a hyphen": (lambda: loss(divergence="Reverse-KL"), "Did you mean 'reverse_kl'?"),
    "js": (lambda: KDLoss(divergence="js"), "Did you mean 'jsd'?"),
    "DistiLLM's name of a divergence": (
        lambda: loss(divergence="srkl"), "Did you mean 'skewed_reverse_kl'?",
    ),
    "a boolean shift": (lambda: loss(text, text, tokens, shift=True), "Did you mean shift=1?"),
    "batchmean": (lambda: KDLoss(reduction="batchmean"), '"mean" divides by the rows'),
    "avg": (lambda: KDLoss(reduction="avg"), "Did you mean 'mean'?"),
    "softmax": (lambda: loss(teacher_form="softmax"), "Did you mean 'probs'?"),
    "the JSD at its end": (
        lambda: loss(divergence="jsd", mix=0.0), "beta=0, pass divergence='forward_kl'",
    ),
    "a misspelt tail": (lambda: TopK(*top, tail="renormalise"), "Did you mean 'renormalize'?"),
    # student and teacher
    "a model output": (
        lambda: loss(logits(), ModelOutput(logits=logits())), "Pass teacher.logits",
    ),
    "a student's output": (lambda: loss(SimpleNamespace(logits=logits())), "Pass student.logits"),
    "a dictionary of outputs": (
        lambda: loss(logits(), {"logits": logits()}), 'Pass teacher["logits"]',
    ),
    "a tuple of outputs": (lambda: loss((logits(), None), logits()), "such as student[0]"),
    "a model": (lambda: loss(nn.Linear(2, 2)), "Pass the module's output"),
    "a layer as weight": (
        lambda: loss(fastkd.Head(logits(N, 3), nn.Linear(3, C))), "such as linear.weight",
    ),
    "stacked teachers": (
        lambda: loss(logits(), torch.stack([logits(), logits()])), "list(teacher) passes 2",
    ),
    "an array": (lambda: loss(logits().numpy()), "torch.from_numpy(student)"),
    "labels as teacher": (lambda: loss(logits(), rows, logits()), "student, teacher, labels"),
    "a teacher with a gradient": (
        lambda: loss(logits(), logits().requires_grad_()), "torch.no_grad()",
    ),
    "padded vocabularies": (lambda: loss(logits(), logits(N, C + 2)), "teacher[..., :10]"),
    "another device": (
        lambda: loss(logits(), logits().to("meta")), "teacher.to(student.device)",
    ),
    "torch.topk's result": (lambda: loss(logits(), top), "is a fastkd.TopK(log_probs, indices)"),
    "torch.topk's order": (lambda: TopK(top.indices, top.values), "The first field is log_probs"),
    "probabilities for logarithms": (
        lambda: loss(logits(), TopK(torch.full((N, 3), 0.9), top.indices)),
        "must be logarithms of probabilities",
    ),
    "the logits of the most probable classes": (
        lambda: loss(logits(), TopK(*logits().topk(3))), "torch.log_softmax(logits",
    ),
    # labels
    "pixels without dim": (lambda: loss(image, image, pixels), "With dim=1, logits"),
    "a column of labels": (lambda: loss(None, None, rows[:, None]), "labels.squeeze(-1)"),
    "labels of pixels with a channel": (
        lambda: loss(image, image, pixels[:, None], dim=1), "labels.squeeze(1)",
    ),
    "labels with a channel, without dim": (
        lambda: loss(image, image, pixels[:, None]), "With dim=1, logits",
    ),
    "flat labels": (lambda: loss(text, text, tokens.flatten()), "labels.view(2, 6)"),
    "flat logits": (
        lambda: loss(text.flatten(0, 1), text.flatten(0, 1), tokens), "labels.flatten()",
    ),
    "boolean labels": (lambda: loss(None, None, rows > 1), "labels.long()"),
    "one-hot labels": (lambda: loss(None, None, torch.eye(N, C).long()), "labels.argmax(-1)"),
    "labels of one position less": (lambda: loss(text, text, tokens[:, 1:]), "shift=1"),
    "logits of one position less": (
        lambda: loss(text[:, :-1], text[:, :-1], tokens), "Pass labels[:, 1:], or the logits",
    ),
    "labels as floats": (lambda: loss(None, None, rows.float()), "labels.long()"),
    "a list of labels": (lambda: loss(None, None, [0, 1, 2, 3]), "torch.as_tensor(labels)"),
    "an array of labels": (lambda: loss(None, None, np.arange(N)), "torch.as_tensor(labels)"),
    "padding of -1": (lambda: loss(None, None, rows - 1), "ignore_index=-1 ignores"),
    "classes from 1 on": (lambda: loss(None, None, rows + 7), "numbered from 0"),
    "a hard term without labels": (lambda: loss(alpha=0.5), "Pass labels, or alpha=0.0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_the_call_that_works(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises((TypeError, ValueError, AttributeError), match=re.escape(words)):
        call()


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'xyz'$"):
        fastkd.loss(logits(), logits(), xyz=1)
    with pytest.raises(ValueError, match=r"got 'xyz'$"):
        fastkd.KDLoss(divergence="xyz")
