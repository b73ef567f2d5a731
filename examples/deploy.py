# %% [markdown]
# # From teacher to device
#
# A convolutional network, the **teacher**, recognizes handwritten digits well, but is too large
# for some devices. This notebook trains a small **student** on the teacher's outputs, and compares
# this student with a student that is trained on labels alone. Then the notebook exports the student
# to ONNX Runtime and ExecuTorch, also with 8-bit integers, and measures every model on one thread.
#
# The notebook needs `pip install "fastkd[report,deploy,examples]"`.
# `deploy.py` and `deploy.ipynb` have the same cells.

# %%
import statistics
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd

torch.set_num_threads(1)  # a device often has one core to spare
torch.manual_seed(0)
pixels, digits = load_digits(return_X_y=True)
images, test_images, labels, test_labels = train_test_split(
    torch.tensor(pixels / 16, dtype=torch.float32),
    torch.tensor(digits),
    test_size=0.3,
    stratify=digits,
    random_state=0,
)
folder = Path(tempfile.mkdtemp())
print(f"{len(images)} images to learn from, {len(test_images)} to test on")


# %% [markdown]
# ## The teacher
#
# The teacher has two convolutions and two linear layers, and is trained on all training images.


# %%
def train(model, images, loss_of, epochs, seed=0):
    """Train a model; `loss_of` gets a batch's logits and the indices of its images."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            loss_of(model(images[index]), index).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return 100 * (model(test_images).argmax(-1) == test_labels).float().mean().item()


teacher = nn.Sequential(
    nn.Unflatten(1, (1, 8, 8)),
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(1024, 256),
    nn.ReLU(),
    nn.Linear(256, 10),
)
train(teacher, images, lambda logits, index: F.cross_entropy(logits, labels[index]), epochs=8)
print(f"teacher: {accuracy(teacher):.1f} % of the test images are right")

# %% [markdown]
# ## The student, alone and distilled
#
# The student has three linear layers, and sees a tenth of the training images. The student trained
# alone learns from the labels of these images. The distilled student learns from the same labels,
# and from the teacher's logits on the same images. The loss of the distilled student is
#
# $$\alpha\,\text{CE}(z, y)
# + (1 - \alpha)\,T^2\,\text{KL}\big(\text{softmax}(w/T)\,\|\,\text{softmax}(z/T)\big),$$
#
# where z are the student's logits, w the teacher's logits, y the labels, T is the temperature, and
# α the weight of the labels. CE is the cross entropy, and KL the Kullback-Leibler divergence. Both
# students begin with the same weights, and see the same images in the same order. T = 4 and α = 0.1
# were chosen on splits of the data other than the split above.
#
# The gain of one seed may be chance. So both students are trained with ten seeds, and each seed
# draws its own images and initial weights.


# %%
def make_student():
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def train_students(seed):
    few, _ = train_test_split(
        torch.arange(len(images)), train_size=0.1, stratify=labels, random_state=seed
    )
    x, y = images[few], labels[few]
    with torch.no_grad():
        teacher_logits = teacher(x)

    def distillation(logits, index):
        return fastkd.loss(logits, teacher_logits[index], y[index], temperature=4.0, alpha=0.1)

    torch.manual_seed(seed)
    alone = train(make_student(), x, lambda z, index: F.cross_entropy(z, y[index]), 60, seed)
    torch.manual_seed(seed)
    return alone, train(make_student(), x, distillation, 60, seed)


pairs = [train_students(seed) for seed in range(10)]
scores = [[accuracy(model) for model in pair] for pair in pairs]
gains = [distilled - alone for alone, distilled in scores]
error = statistics.stdev(gains) / len(gains) ** 0.5
print(
    f"distillation changes the accuracy by {statistics.mean(gains):+.1f} points, with a standard "
    f"error of {error:.1f} over {len(gains)} seeds"
)
assert statistics.mean(gains) > 2 * error

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for seed, (before, after) in enumerate(scores):
    axis.plot([seed, seed], [before, after], color="gray", zorder=1)
axis.scatter(range(len(scores)), [before for before, _ in scores], label="student alone")
axis.scatter(range(len(scores)), [after for _, after in scores], label="student distilled")
axis.axhline(accuracy(teacher), color="gray", ls="--", label="teacher")
axis.set(xlabel="seed", ylabel="test accuracy [%]", xticks=range(len(scores)))
axis.legend()
plt.show()

# %% [markdown]
# ## To the device
#
# `fastkd.export` writes a file that runs without PyTorch, and compares the file's logits with the
# student's. `quantize="int8"` stores weights in 8 bits, and computes with 8-bit activations.
# The second argument, training images, determines the ranges of the activations.

# %%
alone, distilled = pairs[0]
files = {
    "ONNX": ("student.onnx", "onnx", None),
    "ONNX int8": ("student-int8.onnx", "onnx", "int8"),
    "ExecuTorch int8": ("student-int8.pte", "executorch", "int8"),
}
exported = {
    name: fastkd.export(distilled, images[:256], folder / file, format, quantize, rows=test_images)
    for name, (file, format, quantize) in files.items()
}
for name, each in exported.items():
    print(
        f"{name}: {each.bytes:,} bytes; largest difference of a logit {each.difference:.2g}; "
        f"the same digit as the student's on {each.agreement:.1%} of {each.rows} images"
    )

# %% [markdown]
# ## Measure all models
#
# `fastkd.report` measures the size, memory, latency, accuracy and calibration of all models, on the
# same test images and in turns. The report accepts exported files in place of PyTorch models.

# %%
report = fastkd.report(
    teacher,
    {
        "student alone": alone,
        "student distilled": distilled,
        **{name: each.path for name, each in exported.items()},
    },
    DataLoader(TensorDataset(test_images, test_labels), batch_size=128),
    title="Handwritten digits, from teacher to device",
    seconds=0.2,
)
report.save(folder)
print(f"\nthe whole report: {folder / 'report.html'}")

# %% [markdown]
# The 8-bit student may lose at most half a percentage point of accuracy. Its file may have at most
# 0.35 times the bytes of the 32-bit student's file.

# %%
by_name = {model.name: model for model in report.models}
full, small = by_name["ONNX"], by_name["ONNX int8"]
lost = 100 * (full.answers.accuracy - small.answers.accuracy)
share = small.size.bytes / full.size.bytes
print(f"int8: {lost:.2f} points of accuracy lost, {share:.2f} times the bytes")
assert lost <= 0.5 and share <= 0.35

figure, axis = plt.subplots(figsize=(11, 4.6), layout="constrained")
axis.imshow(plt.imread(folder / "tradeoff.png"))
axis.axis("off")
plt.show()
