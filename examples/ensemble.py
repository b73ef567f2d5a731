"""Distill five classifiers into one network, as Bucila, Caruana and Niculescu-Mizil (2006) did.

    python examples/ensemble.py [--seeds N] [--steps N]

Five classifiers, the teachers, each learn from 100 labeled images of their own. A network, the
student, sees no label, and learns from the mean of the teachers' probabilities on 600 unlabeled
images. The program compares this student with students of one teacher each, and with a student that
learns from the first teacher's labeled images alone.
"""

import argparse
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

import fastkd

LABELED, UNLABELED = 100, 600


def make_teachers(seed: int) -> dict[str, object]:
    """Return five untrained classifiers of scikit-learn, by name."""
    return {
        "extra trees": ExtraTreesClassifier(100, random_state=seed),
        "nearest neighbors": KNeighborsClassifier(3, weights="distance"),
        "logistic regression": LogisticRegression(max_iter=1000),
        "linear discriminants": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        "hidden layer": MLPClassifier(64, max_iter=1000, random_state=seed),
    }


def train(
    images: Tensor, teachers: list[Tensor], labels: Tensor | None, steps: int, seed: int
) -> nn.Module:
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
    """Train students on each teacher, on all teachers, and on labels, for several seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500, help="of each student")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks this small gain nothing from a second thread
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    accuracies: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        teachers = make_teachers(seed)
        labeled, many, test = torch.randperm(len(images)).tensor_split(
            [LABELED * len(teachers), LABELED * len(teachers) + UNLABELED]
        )
        samples = labeled.split(LABELED)
        probs = {
            name: torch.tensor(teacher.fit(images[few], labels[few]).predict_proba(images[many]))
            for (name, teacher), few in zip(teachers.items(), samples, strict=True)
        }
        groups = {name: [teacher] for name, teacher in probs.items()} | {"all": [*probs.values()]}
        students = {
            name: train(images[many], group, None, options.steps, seed)
            for name, group in groups.items()
        }
        alone = train(images[samples[0]], [], labels[samples[0]], options.steps, seed)
        students["none (labels alone)"] = alone
        for name, student in students.items():
            right = student(images[test]).argmax(-1) == labels[test]
            accuracies.setdefault(name, []).append(100 * right.float().mean().item())
    for name, values in accuracies.items():
        print(f"teacher {name}: the student's test accuracy {mean(values):.1f} %")
    for name in filter("all".__ne__, accuracies):
        gains = [a - b for a, b in zip(accuracies["all"], accuracies[name], strict=True)]
        error = 2 * stdev(gains) / len(gains) ** 0.5
        print(f"all against {name}: {mean(gains):+.1f} ± {error:.1f} points (2 standard errors)")


if __name__ == "__main__":
    main()
