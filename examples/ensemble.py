"""Distill five different classifiers into one network, as Bucila, Caruana and Niculescu-Mizil did.

    python examples/ensemble.py [--seeds N] [--steps N]

Five kinds of classifiers, such as a forest and nearest neighbors, learn from 100 labeled digits. A
network that sees no label learns from their probabilities on 1,000 images (Model Compression,
2006). A student of all teachers is compared with the students of each, and with one trained alone,
on the labels.
"""

import argparse
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import BernoulliNB
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import fastkd

LABELED, UNLABELED = 100, 1000


def make_teachers(seed: int) -> dict[str, object]:
    """Return classifiers of scikit-learn that make different mistakes."""
    return {
        "extra trees": ExtraTreesClassifier(200, random_state=seed),
        "neighbors": KNeighborsClassifier(5, weights="distance"),
        "logistic regression": LogisticRegression(max_iter=1000),
        "linear discriminants": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        "naive Bayes": BernoulliNB(binarize=0.5),
    }


def train(images: Tensor, teachers: list[Tensor], labels: Tensor | None, steps: int, seed: int):
    """Train a network on the teachers' probabilities, or on labels alone if there is no teacher."""
    torch.manual_seed(seed)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        logits = student(images[index])
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels[index])
        else:  # the mean of the teachers' probabilities
            probs = [teacher[index] for teacher in teachers]
            loss = fastkd.loss(logits, probs, teacher_form="probs", temperature=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def main() -> None:
    """Train the students of each teacher, of all, and of the labels, for several seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="of each student")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks this small gain nothing from a second one
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    accuracies: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        few, many, test = torch.randperm(len(images)).split([LABELED, UNLABELED, 697])
        probs = {
            name: torch.tensor(teacher.fit(images[few], labels[few]).predict_proba(images[many]))
            for name, teacher in make_teachers(seed).items()
        }
        groups = {name: [teacher] for name, teacher in probs.items()} | {"all": [*probs.values()]}
        students = {
            name: train(images[many], group, None, options.steps, seed)
            for name, group in groups.items()
        }
        students["none: labels alone"] = train(images[few], [], labels[few], options.steps, seed)
        for name, student in students.items():
            right = student(images[test]).argmax(-1) == labels[test]
            accuracies.setdefault(name, []).append(100 * right.float().mean().item())
    for name, values in accuracies.items():
        print(f"teacher {name}: the student's test accuracy {mean(values):.1f} %")
    *single, _, alone = accuracies
    best = max(single, key=lambda name: mean(accuracies[name]))
    for name in (alone, best):
        gains = [a - b for a, b in zip(accuracies["all"], accuracies[name], strict=True)]
        error = 2 * stdev(gains) / len(gains) ** 0.5
        print(f"all against {name}: {mean(gains):+.1f} ± {error:.1f} points (2 standard errors)")


if __name__ == "__main__":
    main()
