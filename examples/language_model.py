"""Compare five ways to train a small language model, with and without a teacher, on a CPU.

    python examples/language_model.py [--seeds N] [--steps N] [--write docs/language-models.md]

The text is Python's documentation, and each character is a token. A tenth of the text is held out.
The teacher learns from the remaining text, and the students learn from a tenth of the remaining
text. The students have about a sixth of the teacher's parameters. All students are first trained on
labels, then in five ways, with equal steps, learning rates and numbers of tokens. No learning rate
was tuned.
"""

import argparse
import copy
import pathlib
from collections import defaultdict
from collections.abc import Callable
from pydoc_data.topics import topics
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd

LENGTH, PROMPT, BATCH, TOP_K, RATE = 48, 16, 16, 8, 2e-3
# The logits at position i predict token i + 1, so shift is 1. alpha is 0, so labels only mask rows.
OPTIONS: dict[str, Any] = {"shift": 1, "temperature": 1.0, "alpha": 0.0}
REVERSE = OPTIONS | {"divergence": "reverse_kl"}
Row = dict[str, list[float]]  # values of each seed, by the measure's name
INK = "#7d8590"  # readable on light and on dark pages


class GPT(nn.Module):
    """Map tokens ``(batch, length)`` to logits of all characters by a causal transformer."""

    def __init__(self, characters: int, width: int, depth: int) -> None:
        """Make the layers, whose attention heads have 32 channels."""
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), False)
        self.head = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits, which at position i predict token i + 1."""
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.layers(hidden, causal, is_causal=True))


def draw_windows(text: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Return random windows of a text, ``(number, LENGTH)``."""
    starts = torch.randint(len(text) - LENGTH, (number, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


@torch.no_grad()
def generate(model: GPT, tokens: Tensor) -> Tensor:
    """Continue prompts to ``LENGTH`` tokens by sampling at temperature 1."""
    while tokens.shape[1] < LENGTH:
        probabilities = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    return tokens


def mask_prompt(tokens: Tensor) -> Tensor:
    """Return the tokens as labels; the loss ignores the prompt."""
    return F.pad(tokens[:, PROMPT:], (PROMPT, 0), value=-100)


def score(model: GPT, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token; 0 for the first token of a sequence."""
    log_probs = model(tokens).log_softmax(-1)[:, :-1]
    return F.pad(log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1), (1, 0))


def alone(student: GPT, teacher: GPT, text: Tensor) -> Tensor:
    """Compute the cross entropy with the labels, without the teacher."""
    return F.cross_entropy(student(text)[:, :-1].mT, mask_prompt(text)[:, 1:])


def off_policy(student: GPT, teacher: GPT, text: Tensor) -> Tensor:
    """Compute the forward KL from the probabilities of all characters, on the training text."""
    return fastkd.loss(student(text), teacher(text), mask_prompt(text), **OPTIONS)


def off_policy_top_k(student: GPT, teacher: GPT, text: Tensor) -> Tensor:
    """Compute the forward KL from the teacher's most probable characters, on the training text."""
    log_probs, indices = teacher(text).log_softmax(-1).topk(TOP_K)
    # Like a server, TopK stores a list of predictions at the position of the predicted token.
    lists = fastkd.TopK(log_probs.roll(1, dims=1), indices.roll(1, dims=1))
    return fastkd.loss(student(text), lists, mask_prompt(text), **OPTIONS)


def on_policy(student: GPT, teacher: GPT, text: Tensor) -> Tensor:
    """Compute the reverse KL from the probabilities of all characters, on text of the student."""
    text = generate(student, text[:, :PROMPT])
    return fastkd.loss(student(text), teacher(text), mask_prompt(text), **REVERSE)


def on_policy_sampled(student: GPT, teacher: GPT, text: Tensor) -> Tensor:
    """Estimate the reverse KL from the teacher's log-probabilities of the student's tokens."""
    text = generate(student, text[:, :PROMPT])
    sampled = fastkd.Sampled(score(teacher, text), text, estimator="k1")
    return fastkd.loss(student(text), sampled, mask_prompt(text), **OPTIONS)


Loss = Callable[[GPT, GPT, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    loss.__name__.replace("_", " "): loss
    for loss in (alone, off_policy, off_policy_top_k, on_policy, on_policy_sampled)
}


def train(model: GPT, teacher: GPT, text: Tensor, objective: Loss, steps: int, seed: int) -> None:
    """Train a model by Adam, with a learning rate that falls to zero."""
    torch.manual_seed(seed)  # for the student's samples
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, teacher, draw_windows(text, BATCH, generator)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: GPT, teacher: GPT, text: Tensor, row: Row) -> None:
    """Append to ``row`` measures on held-out windows, and on continuations of their prompts."""
    torch.manual_seed(0)
    windows = draw_windows(text, 512, torch.Generator().manual_seed(0))
    text = generate(model, windows[:128, :PROMPT])
    terms = fastkd.terms(model(text), teacher(text), mask_prompt(text), **REVERSE)
    grams = text[:, PROMPT:].unfold(1, 4, 1).flatten(0, 1)
    row["held-out loss"].append(alone(model, teacher, windows).item())
    row["teacher's log-probability"].append(score(teacher, text)[:, PROMPT:].mean().item())
    row["entropy"].append(terms.student_entropy.item())
    row["reverse KL"].append(terms.soft.item())
    row["distinct 4-grams"].append(len(grams.unique(dim=0)) / len(grams))


def measure_sampling_error(student: GPT, teacher: GPT, text: Tensor) -> float:
    """Return the error of the gradient from sampled tokens, relative to the exact gradient."""
    gradients = []
    for objective in (on_policy, on_policy_sampled):
        torch.manual_seed(0)  # the student writes the same text for both losses
        parts = torch.autograd.grad(objective(student, teacher, text), list(student.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()


def run_experiment(seeds: int, steps: int) -> tuple[dict[str, Row], float]:
    """Train all models; return the measures of each, and the mean sampling error."""
    text = "\n".join(topics.values())
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    training, held_out = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    few = training[: len(training) // 10]
    rows: dict[str, Row] = defaultdict(lambda: defaultdict(list))
    errors = []
    torch.manual_seed(0)
    teacher = GPT(len(number), width=128, depth=2)
    train(teacher, teacher, training, alone, 8 * steps, 0)
    teacher.requires_grad_(False)
    measure(teacher, teacher, held_out, rows["teacher"])
    for seed in range(seeds):
        torch.manual_seed(seed)
        before = GPT(len(number), width=64, depth=1)
        train(before, teacher, few, alone, 10 * steps, seed)
        measure(before, teacher, held_out, rows["student before"])
        batch = draw_windows(few, BATCH, torch.Generator().manual_seed(seed))
        errors.append(measure_sampling_error(before, teacher, batch))
        for name, objective in LOSSES.items():
            student = copy.deepcopy(before)
            train(student, teacher, few, objective, steps, seed + seeds)
            measure(student, teacher, held_out, rows[name])
    return rows, mean(errors)


def summarize(values: list[float]) -> str:
    """Return the mean, and the standard error if there are several values."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean(values):.3f}" + f" ± {error:.3f}" * (len(values) > 1)


def describe(rows: dict[str, Row], error: float) -> str:
    """Return a table and comparisons of the models as Markdown; expected results get a reason."""
    lines = ["| | " + " | ".join(rows["teacher"]) + " |", "|-|" + "-:|" * len(rows["teacher"])]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(map(summarize, row.values()))} |")
    labels, off, top, on, k1 = LOSSES
    lines.append("")
    for first, second, key, expected, reason in (
        (off, labels, "held-out loss", "lower", "The teacher has read ten times as much text."),
        (
            top,
            off,
            "held-out loss",
            "higher",
            "A list does not say how the remaining probability is divided among tokens.",
        ),
        (on, off, "held-out loss", "higher", "The on-policy student was not trained on real text."),
        (on, off, "reverse KL", "lower", "On-policy training minimizes this measure."),
        (on, off, "entropy", "lower", "The reverse KL favors the teacher's likely tokens."),
        (k1, on, "reverse KL", "higher", f"The noise is {error:.0%} of the exact gradient."),
    ):
        gaps = [a - b for a, b in zip(rows[first][key], rows[second][key], strict=True)]
        result = "higher" if min(gaps) > 0 else "lower" if max(gaps) < 0 else "no clear difference"
        line = f"- **{first}** against **{second}**, {key}: {result}, {summarize(gaps)}."
        lines.append(f"{line} {reason}" if result == expected else line)
    narrow = [n for n in LOSSES if mean(rows[n]["entropy"]) < rows["teacher"]["entropy"][0]]
    lines.append(f"- Entropy below the teacher's (mode collapse): {', '.join(narrow) or 'none'}.")
    for key in ("held-out loss", "reverse KL"):
        lines.append(f"- Lowest {key}: {min((sum(rows[name][key]), name) for name in LOSSES)[1]}.")
    return "\n".join(lines)


def draw(rows: dict[str, Row], path: pathlib.Path) -> None:
    """Plot the first three measures, with a dot for each seed and a line for the teacher."""
    figure = Figure((10, 2.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 3, sharey=True), rows["teacher"], strict=False):
        axes.axvline(rows["teacher"][key][0], color=INK, linestyle="--")
        for name in list(rows)[:0:-1]:  # bottom to top, without the teacher
            axes.scatter(rows[name][key], [name] * len(rows[name][key]), color="#2f80d0", alpha=0.5)
        axes.set_xlabel(f"{key}, nats per character", color=INK)
        axes.tick_params(colors=INK)
        axes.spines[:].set_color(INK)
    figure.savefig(path, dpi=150, transparent=True)


def main() -> None:
    """Print the comparisons; with ``--write``, also update a document and its plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="students of each kind")
    parser.add_argument("--steps", type=int, default=120, help="of each of the five losses")
    parser.add_argument("--write", type=pathlib.Path, help="a document, between its markers")
    options = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain little from a second thread
    if options.write:
        begin, end = (f"<!-- language_model:{edge} -->" for edge in ("begin", "end"))
        before, _, rest = options.write.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not closed:
            parser.error(f"{options.write} must have the markers {begin} and {end}")
    rows, error = run_experiment(options.seeds, options.steps)
    text = describe(rows, error)
    print(text)
    if options.write:
        options.write.write_text(f"{before}{begin}\n{text}\n{end}{after}")
        draw(rows, options.write.with_suffix(".png"))


if __name__ == "__main__":
    main()
