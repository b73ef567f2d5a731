"""Distill a small student on scikit-learn's digits, and measure the effect of distillation.

    python examples/digits.py [--seeds N] [--epochs N] [--temperature T] [--alpha A]

A convolutional teacher is trained on all training images. Two small students are trained on a tenth
of these images. The student alone learns from labels, and the distilled student learns from labels
and the teacher's logits. The students have equal initial weights, batches, steps, optimizers and
learning rates, so only the loss differs. Hinton, Vinyals and Dean (2015, section 6) show that soft
targets help a student that sees few samples.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fastkd
from fastkd import reference

BATCH = 64
TEACHER_EPOCHS = 10
STUDENT_SHARE = 0.1  # share of the training images
# These values were chosen on validation images from the training set, never on test images. The
# candidates were hidden widths 2 to 32, temperatures 2 to 14, alphas 0 to 0.3, and learning rates
# 0.003 to 0.02. Both students have the learning rate that is best for the student alone.
# Distillation often did not help students with 2 to 6 hidden units.
STUDENT_WIDTH = 16
STUDENT_EPOCHS = 400
TEMPERATURE = 8.0
ALPHA = 0.1


# ---- data and models


class Digits(NamedTuple):
    """Hold a seed's training and test split of the 1,797 images of 8 x 8 pixels."""

    images: Tensor  # [images, 64], the teacher's training set
    labels: Tensor  # [images]
    few: Tensor  # indices of the student's images
    test_images: Tensor
    test_labels: Tensor


def load(seed: int) -> Digits:
    """Load the digits: 70 % to train, 30 % to test, stratified by class."""
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        torch.tensor(images / 16, dtype=torch.float32),
        torch.tensor(labels),
        test_size=0.3,
        stratify=labels,
        random_state=seed,
    )
    few, _ = train_test_split(
        torch.arange(len(train)),
        train_size=STUDENT_SHARE,
        stratify=train_labels,
        random_state=seed,
    )
    return Digits(train, train_labels, few, test, test_labels)


def make_teacher() -> nn.Module:
    """Make a teacher of two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def make_student() -> nn.Module:
    """Make a student with one hidden layer."""
    return nn.Sequential(nn.Linear(64, STUDENT_WIDTH), nn.ReLU(), nn.Linear(STUDENT_WIDTH, 10))


# ---- training


def train(
    model: nn.Module,
    images: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    bar: tqdm,
) -> None:
    """Train a model; ``loss_of`` takes a batch's logits and the indices of the batch's images."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss_of(model(images[index]), index).backward()
            optimizer.step()
        schedule.step()
        bar.update()


@torch.inference_mode()
def compute_accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the accuracy on the test images in percent."""
    return 100 * (model(digits.test_images).argmax(-1) == digits.test_labels).float().mean().item()


class Batch(NamedTuple):
    """Hold the arguments of the loss in one training step."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


def train_teacher(digits: Digits, seed: int, bar: tqdm) -> nn.Module:
    """Train a teacher on all training images."""
    torch.manual_seed(seed)
    teacher = make_teacher()
    train(
        teacher,
        digits.images,
        lambda logits, index: F.cross_entropy(logits, digits.labels[index]),
        epochs=TEACHER_EPOCHS,
        learning_rate=4e-3,
        seed=seed,
        bar=bar,
    )
    return teacher


def train_student(digits: Digits, seed: int, epochs: int, bar: tqdm) -> nn.Module:
    """Train a student on few images and their labels."""
    torch.manual_seed(seed)
    student = make_student()
    labels = digits.labels[digits.few]
    train(
        student,
        digits.images[digits.few],
        lambda logits, index: F.cross_entropy(logits, labels[index]),
        epochs=epochs,
        learning_rate=1e-2,
        seed=seed,
        bar=bar,
    )
    return student


def distill_student(
    digits: Digits, teacher: nn.Module, seed: int, options: argparse.Namespace, bar: tqdm
) -> tuple[nn.Module, list[Batch]]:
    """Train a student on few images, their labels and the teacher's logits; return its batches."""
    torch.manual_seed(seed)
    student = make_student()
    images, labels = digits.images[digits.few], digits.labels[digits.few]
    with torch.no_grad():
        teacher_logits = teacher(images)
    batches = []

    def distillation(logits: Tensor, index: Tensor) -> Tensor:
        batches.append(Batch(logits.detach(), teacher_logits[index], labels[index]))
        # This call replaces F.cross_entropy. alpha is the weight of the labels.
        return fastkd.loss(
            logits,
            teacher_logits[index],
            labels[index],
            temperature=options.temperature,
            alpha=options.alpha,
        )

    train(
        student,
        images,
        distillation,
        epochs=options.epochs,
        learning_rate=1e-2,
        seed=seed,
        bar=bar,
    )
    return student, batches


class Outcome(NamedTuple):
    """Hold the accuracies of all seeds, and the last seed's models and distillation batches."""

    models: dict[str, nn.Module]
    accuracies: dict[str, list[float]]
    batches: list[Batch]


def run(options: argparse.Namespace) -> Outcome:
    """Train a teacher, a student alone and a distilled student for each seed."""
    splits = [load(seed) for seed in range(options.seeds)]
    epochs = options.epochs
    with tqdm(total=options.seeds * TEACHER_EPOCHS, desc="teachers          ") as bar:
        teachers = [train_teacher(digits, seed, bar) for seed, digits in enumerate(splits)]
    with tqdm(total=options.seeds * epochs, desc="students alone    ") as bar:
        alone = [train_student(digits, seed, epochs, bar) for seed, digits in enumerate(splits)]
    distilled = []
    with tqdm(total=options.seeds * epochs, desc="students distilled") as bar:
        for seed, (digits, teacher) in enumerate(zip(splits, teachers, strict=True)):
            student, batches = distill_student(digits, teacher, seed, options, bar)
            distilled.append(student)
    models = {"teacher": teachers, "student alone": alone, "student distilled": distilled}
    accuracies = {
        name: [compute_accuracy(model, digits) for model, digits in zip(group, splits, strict=True)]
        for name, group in models.items()
    }
    return Outcome({name: group[-1] for name, group in models.items()}, accuracies, batches)


# ---- three implementations of the loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(temperature: float, alpha: float) -> Loss:
    """Make a loss function of PyTorch operations, as in tutorials."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        hard = F.cross_entropy(student, labels)
        soft = F.kl_div(
            F.log_softmax(student / temperature, -1),
            F.log_softmax(teacher / temperature, -1),
            reduction="batchmean",
            log_target=True,
        )
        return alpha * hard + (1 - alpha) * temperature**2 * soft

    return loss


def fused(temperature: float, alpha: float) -> Loss:
    """Make a loss function that calls fastkd.loss."""
    return lambda *batch: fastkd.loss(*batch, temperature=temperature, alpha=alpha)


def exact(temperature: float, alpha: float) -> Loss:
    """Make a loss function that calls fastkd.reference.loss in float64."""
    return lambda student, teacher, labels: reference.loss(
        student.double(),
        teacher.double(),
        labels,
        temperature=temperature,
        hard_weight=alpha,
        soft_weight=1 - alpha,
    )


def compute_loss_and_gradient(loss: Loss, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and the gradient with respect to the student's logits."""
    student = batch.student.detach().requires_grad_()
    value = loss(student, batch.teacher, batch.labels)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def compute_errors(loss: Loss, truth: Loss, batches: list[Batch]) -> tuple[float, float]:
    """Return the largest relative errors of the loss and of the gradient over the batches."""
    loss_error = gradient_error = 0.0
    for batch in batches:
        value, gradient = compute_loss_and_gradient(loss, batch)
        # Convert the batch to float64, so that the true gradient is not rounded to float32.
        double = Batch(batch.student.double(), batch.teacher.double(), batch.labels)
        true_value, true_gradient = compute_loss_and_gradient(truth, double)
        loss_error = max(loss_error, ((value - true_value) / true_value).abs().item())
        distance = (gradient - true_gradient).abs().max() / true_gradient.abs().max()
        gradient_error = max(gradient_error, distance.item())
    return loss_error, gradient_error


# ---- timing


def measure_medians(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each call, timed in turns."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + repeats // 5):
        for call, times in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            if turn >= repeats // 5:  # the first calls warm up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in samples]


def compare(batch: Batch, temperature: float, alpha: float, repeats: int) -> tuple[float, float]:
    """Return the median seconds of loss and gradient by eager PyTorch and by fastkd."""
    losses = (eager(temperature, alpha), fused(temperature, alpha))
    return tuple(
        measure_medians(
            [lambda loss=loss: compute_loss_and_gradient(loss, batch) for loss in losses], repeats
        )
    )


# ---- the report


def compute_spread(values: list[float]) -> float:
    """Return the standard deviation over the seeds; 0 for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def make_table(outcome: Outcome) -> Table:
    """Return a table with a row for each model."""
    seeds = len(outcome.accuracies["teacher"])
    table = Table(title=f"scikit-learn's digits, seeds: {seeds}; latency: 1 image, 1 CPU thread")
    table.add_column("model", no_wrap=True)
    for heading in ("test accuracy, %", "parameters", "bytes", "latency, µs"):
        table.add_column(heading, justify="right")
    image = torch.zeros(1, 64)
    with torch.inference_mode():
        latencies = measure_medians(
            [lambda model=model: model(image) for model in outcome.models.values()], 1000
        )
    for (name, model), latency in zip(outcome.models.items(), latencies, strict=True):
        values = outcome.accuracies[name]
        weights = model.state_dict().values()
        table.add_row(
            name,
            f"{statistics.mean(values):.1f} ± {compute_spread(values):.1f}",
            f"{sum(weight.numel() for weight in weights):,}",
            f"{sum(weight.numel() * weight.element_size() for weight in weights):,}",
            f"{1e6 * latency:.0f}",
        )
    return table


def describe_gain(outcome: Outcome) -> str:
    """Return sentences that say whether distillation helped."""
    teacher, alone, distilled = outcome.accuracies.values()
    gains = [after - before for before, after in zip(alone, distilled, strict=True)]
    gain, deviation = statistics.mean(gains), compute_spread(gains)
    if len(gains) == 1:
        return f"{gain:+.1f} points by distillation; one seed has no spread, so this may be chance."
    better = sum(difference > 0 for difference in gains)
    facts = f"{gain:+.1f} ± {deviation:.1f} points, better in {better} of {len(gains)} seeds."
    if gain < -deviation:
        return f"Distillation did harm here: {facts}"
    if gain <= deviation:
        return f"Distillation made no clear difference here: {facts}"
    share = 100 * gain / (statistics.mean(teacher) - statistics.mean(alone))
    return (
        f"Distillation helped: {facts} The student keeps its size and speed, and {share:.0f} % of "
        "the gap to its teacher is closed."
    )


def describe_errors(batches: list[Batch], temperature: float, alpha: float) -> str:
    """Describe the errors of fastkd and eager PyTorch on ``batches`` against the reference."""
    truth = exact(temperature, alpha)
    ours = compute_errors(fused(temperature, alpha), truth, batches)
    theirs = compute_errors(eager(temperature, alpha), truth, batches)
    return (
        f"Agreement with the float64 reference on the {len(batches)} batches of the last "
        f"distillation, largest relative error: loss {ours[0]:.1e}, gradient {ours[1]:.1e} "
        f"(eager PyTorch in float32: {theirs[0]:.1e}, {theirs[1]:.1e})."
    )


def describe_speed(batches: dict[str, tuple[Batch, int]], temperature: float, alpha: float) -> str:
    """Compare the times of loss and backward pass with eager PyTorch's, on named batches."""
    parts = []
    for name, (batch, repeats) in batches.items():
        before, after = compare(batch, temperature, alpha, repeats)
        ratio = f"{before / after:.1f} times as fast"
        if after > before:
            ratio = f"{after / before:.1f} times as slow"
        shape = " x ".join(map(str, batch.student.shape))
        parts.append(f"{ratio} on {name}, {shape} ({1e6 * after:,.0f} µs, not {1e6 * before:,.0f})")
    return "Loss and gradient against eager PyTorch, float32, 1 thread: " + "; ".join(parts)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Distills a small student on real digits.")
    parser.add_argument("--seeds", type=int, default=10, help="how many runs to average over")
    parser.add_argument("--epochs", type=int, default=STUDENT_EPOCHS, help="of the students")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of the labels, 0 to 1")
    options = parser.parse_args()
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    return options


def main() -> None:
    """Train the models, measure them, and print the results."""
    options = parse_arguments()
    temperature, alpha = options.temperature, options.alpha
    # Models this small gain nothing from a second thread. `make bench` uses all threads.
    torch.set_num_threads(1)
    outcome = run(options)
    table = make_table(outcome)

    generator = torch.Generator().manual_seed(0)
    language_model = Batch(
        3 * torch.randn(128, 32000, generator=generator),
        3 * torch.randn(128, 32000, generator=generator),
        torch.randint(32000, (128,), generator=generator),
    )
    timed = {
        "these batches": (outcome.batches[0], 300),
        "the logits of a language model": (language_model, 15),
    }
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print(
        f"Mean ± standard deviation over seeds. Both students saw the same {STUDENT_SHARE:.0%} of "
        "the teacher's training images, in the same order, for the same number of steps, from the "
        f"same first weights. Temperature {temperature:g}, alpha {alpha:g}.\n"
    )
    console.print(describe_errors(outcome.batches, temperature, alpha) + "\n")
    console.print(describe_speed(timed, temperature, alpha) + ".\n")
    console.print(describe_gain(outcome), style="bold")


if __name__ == "__main__":
    main()
