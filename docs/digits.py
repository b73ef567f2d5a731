"""Write the accuracies of examples/digits.py into README.md and docs/first-distillation.md.

``python docs/digits.py`` trains on ten seeds, and also draws docs/digits.png and
docs/soft-targets.png.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

import digits  # noqa: E402 - the script of examples/

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
INK = "#7d8590"  # readable on white and on the dark backgrounds of GitHub and of the docs
COLORS = {"teacher": "#8d99ae", "student distilled": "#2a9d6f", "student alone": "#e09f3e"}


def summarize(outcome: digits.Outcome) -> str:
    """Return sentences about the sizes and accuracies of the models."""
    sizes = {
        name: sum(parameter.numel() for parameter in model.parameters())
        for name, model in outcome.models.items()
    }
    means = {name: statistics.mean(values) for name, values in outcome.accuracies.items()}
    smaller = sizes["teacher"] / sizes["student distilled"]
    seeds = len(outcome.accuracies["teacher"])
    return (
        f"The student has {sizes['student alone']:,} parameters, **{smaller:.0f}x fewer** than the "
        f"teacher's {sizes['teacher']:,}. It recognizes\n**{means['student distilled']:.1f} %** of "
        f"the test images if it is distilled, and **{means['student alone']:.1f} %** if it learns "
        f"from the same few labels alone. The teacher\nrecognizes {means['teacher']:.1f} %. These "
        f"are means over {seeds} seeds.\n"
    )


def write(document: pathlib.Path, text: str) -> None:
    """Replace the text between the markers of a document."""
    head, rest = document.read_text().split(BEGIN, 1)
    document.write_text(f"{head}{BEGIN}\n{text}{END}{rest.split(END, 1)[1]}")


def set_style(axes: Axes) -> None:
    """Remove frame and tick marks; color tick labels to be readable on light and dark pages."""
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=0)


def save(figure: Figure, name: str) -> None:
    """Save a picture in docs/ with a transparent background."""
    figure.savefig(DOCS / name, dpi=160, transparent=True)
    plt.close(figure)


def draw_accuracies(outcome: digits.Outcome) -> None:
    """Draw the accuracies: a dot for each seed, and a line at the mean."""
    figure, axes = plt.subplots(figsize=(8, 2.1), layout="constrained")
    for row, (name, color) in enumerate(COLORS.items()):
        values = outcome.accuracies[name]
        mean = statistics.mean(values)
        axes.plot(values, [row] * len(values), "o", color=color, alpha=0.6, markersize=7)
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=3)
        axes.annotate(
            f"{mean:.1f} %", (mean, row - 0.33), color=INK, ha="center", va="bottom", weight="bold"
        )
    axes.set_yticks(range(len(COLORS)), COLORS)
    axes.set_ylim(len(COLORS) - 0.5, -0.8)
    axes.set_xlabel("test accuracy, %; a dot is a seed, a line the mean", color=INK)
    set_style(axes)
    axes.grid(axis="x", color=INK, alpha=0.25)
    save(figure, "digits.png")


def draw_soft_targets(teacher: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Draw an image, and the teacher's class probabilities at three temperatures."""
    with torch.no_grad():
        logits = teacher(images)
    doubt = (logits.softmax(-1).amax(-1) - 0.95).abs()
    shown = torch.where(logits.argmax(-1) == labels, doubt, 1.0).argmin()
    print(f"soft-targets.png shows a {labels[shown]}")
    figure, panels = plt.subplots(2, 2, figsize=(6, 4), layout="constrained")
    panels = panels.flat
    panels[0].imshow(images[shown].view(8, 8), cmap="gray_r")
    panels[0].axis("off")
    for axes, temperature in zip(panels[1:], (1, 4, 20), strict=True):
        axes.bar(
            range(10), (logits[shown] / temperature).softmax(-1), color=COLORS["student distilled"]
        )
        axes.set_title(f"T = {temperature}", color=INK)
        axes.set_xticks(range(10))
        axes.set_yticks([0, 0.5, 1])
        axes.set_ylim(0, 1)
        axes.grid(axis="y", color=INK, alpha=0.25)
        set_style(axes)
    figure.suptitle("An image, and its teacher's probabilities", color=INK)
    save(figure, "soft-targets.png")


def main() -> None:
    """Run the seeds, write the sentences, and draw the pictures."""
    torch.set_num_threads(1)
    options = argparse.Namespace(
        seeds=10, epochs=digits.STUDENT_EPOCHS, temperature=digits.TEMPERATURE, alpha=digits.ALPHA
    )
    outcome = digits.run(options)
    for document in (DOCS.parent / "README.md", DOCS / "first-distillation.md"):
        write(document, summarize(outcome))
    draw_accuracies(outcome)
    last = digits.load(options.seeds - 1)
    draw_soft_targets(outcome.models["teacher"], last.test_images, last.test_labels)


if __name__ == "__main__":
    main()
