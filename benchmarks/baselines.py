"""Define the baselines, which are the implementations of the loss that the benchmarks time.

A baseline's function takes a case, and returns a function of (student, teacher, labels). The
returned function computes the loss as the documentation of the baseline's package shows:

    alpha * CE(student, labels) + (1 - alpha) * T^2 * KL(teacher || student)

If a package computes another formula, the baseline's description (``what``) says so, and ``truth``
names the formula that checks the baseline (truth.py). If a package is missing or cannot run, the
baseline's function raises ``UnavailableError``, and the report shows the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from benchmarks.cases import Case

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnavailableError(Exception):
    """Tell why a baseline cannot run on this machine."""


@dataclass(frozen=True)
class Baseline:
    """Describe an implementation of the loss."""

    name: str
    make: Callable[[Case], LossFunction]
    what: str
    truth: str = "kd"
    """Formula that checks loss and gradient: "kd", "soft_ce" or "jsd" (truth.py)."""
    overwrites: bool = False
    """True if the baseline overwrites the student's logits; suite.py then passes copies."""
    non_leaf: bool = False
    """True if the student's logits must be the output of an operation, not a leaf."""
    compiles: str = "no"
    """Mode of torch.compile: "no" for none, "default", or "best" with autotuning."""
    half_only: bool = False
    """True for 16-bit logits only, because another baseline is identical in float32."""
    language_models_only: bool = False

    def is_for(self, case: Case) -> bool:
        """Return True if the benchmarks measure the baseline on a case."""
        if self.compiles != "no" and case.compiled not in (self.compiles, "best"):
            return False
        if self.half_only and case.dtype == "fp32":
            return False
        if self.non_leaf and not (case.memory and case.gradient):
            return False
        return not (self.language_models_only and case.classes < 30000)


BASELINES: list[Baseline] = []


def baseline(
    name: str, what: str, **options: Any
) -> Callable[[Callable[[Case], LossFunction]], Callable[[Case], LossFunction]]:
    """Return a decorator that adds a function to ``BASELINES`` as a baseline."""

    def add(make: Callable[[Case], LossFunction]) -> Callable[[Case], LossFunction]:
        BASELINES.append(Baseline(name, make, what, **options))
        return make

    return add


def find_baseline(name: str) -> Baseline:
    """Return the baseline with this name."""
    return next(each for each in BASELINES if each.name == name)


def import_package(module: str, package: str) -> Any:
    """Import a module of a package, or raise UnavailableError."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == module.split(".")[0]:
            raise UnavailableError(f"not installed (pip install {package})") from error
        raise UnavailableError(f"{package} is installed but needs {error.name}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise UnavailableError(f"{package} cannot be imported: {reason}") from error


def _arrange_pixels(case: Case, *tensors: Tensor) -> Iterator[Tensor]:
    """Return the tensors, as (1, classes, pixels) or (1, pixels) if the rows are pixels."""
    return (tensor.t()[None] if case.pixels else tensor for tensor in tensors)


@baseline("fastkd", "fastkd.loss")
def fused(case: Case) -> LossFunction:
    """Make a loss function that calls fastkd.loss."""
    options: dict[str, Any] = {"temperature": case.temperature, "alpha": case.alpha}
    if case.pixels:
        options["dim"] = 1
    return lambda s, t, y: fastkd.loss(*_arrange_pixels(case, s, t, y), **options)  # type: ignore[arg-type]


@baseline(
    "fastkd in place",
    "fastkd.loss(inplace=True): the gradient over the student's logits",
    overwrites=True,
    non_leaf=True,
)
def fused_in_place(case: Case) -> LossFunction:
    """Make a loss function that calls fastkd.loss with ``inplace=True``."""
    options: dict[str, Any] = {"temperature": case.temperature, "alpha": case.alpha}
    return lambda s, t, y: fastkd.loss(s, t, y, inplace=True, **options)


@baseline("eager", "PyTorch as tutorials write it, in the logits' dtype")
def eager(case: Case) -> LossFunction:
    """Make a loss function of F.cross_entropy and F.kl_div."""
    temperature, alpha = case.temperature, case.alpha

    def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher, labels = _arrange_pixels(case, student, teacher, labels)
        hard = F.cross_entropy(student, labels)
        log_q = F.log_softmax(student / temperature, dim=1)
        p = F.softmax(teacher / temperature, dim=1)
        soft = F.kl_div(log_q, p, reduction="sum") / case.rows
        return alpha * hard + (1 - alpha) * temperature**2 * soft

    return kd


@baseline("eager fp32", "eager on logits cast to float32, as autocast casts them", half_only=True)
def eager_upcast(case: Case) -> LossFunction:
    """Make the eager loss function on logits cast to float32."""
    kd = eager(case)

    def upcast(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return kd(student.float(), teacher.float(), labels)

    return upcast


@baseline("torch.compile", "torch.compile(eager), default mode, static shapes", compiles="default")
def compiled(case: Case) -> LossFunction:
    """Make the eager loss function, compiled in Inductor's default mode."""
    return torch.compile(eager(case), dynamic=False)


@baseline(
    "torch.compile best",
    "torch.compile(eager fp32, mode='max-autotune-no-cudagraphs'): its fastest form in most cases",
    compiles="best",
)
def compiled_best(case: Case) -> LossFunction:
    """Make the eager loss function in float32, compiled by Inductor with autotuning."""
    return torch.compile(eager_upcast(case), dynamic=False, mode="max-autotune-no-cudagraphs")


def _import_liger(case: Case) -> Any:
    if not torch.cuda.is_available():
        raise UnavailableError("needs Triton and a GPU")
    return import_package("liger_kernel.transformers", "liger-kernel")


@baseline(
    "Liger KL + CE", "LigerKLDIVLoss on eager softmaxes + LigerCrossEntropyLoss", overwrites=True
)
def liger_kl(case: Case) -> LossFunction:
    """Make Liger-Kernel's loss; the cross entropy, which overwrites the logits, comes last."""
    liger = _import_liger(case)
    soft_loss = liger.LigerKLDIVLoss(reduction="batchmean")
    hard_loss = liger.LigerCrossEntropyLoss()
    temperature, alpha = case.temperature, case.alpha

    def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        p = F.softmax(teacher / temperature, dim=-1)
        soft = soft_loss(log_q, p)
        return alpha * hard_loss(student, labels) + (1 - alpha) * temperature**2 * soft

    return kd


@baseline(
    "Liger JSD",
    "LigerJSD(beta=0.5) on eager log-softmaxes: another divergence, no hard term; for its speed",
    truth="jsd",
    overwrites=True,
    language_models_only=True,
)
def liger_jsd(case: Case) -> LossFunction:
    """Make Liger-Kernel's Jensen-Shannon divergence (JSD), without a hard term."""
    jsd = _import_liger(case).LigerJSD(beta=0.5)
    temperature = case.temperature

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        return jsd(log_q, F.log_softmax(teacher / temperature, dim=-1))  # type: ignore[no-any-return]

    return loss


@baseline("torchdistill", "torchdistill.losses.mid_level.KDLoss")
def torchdistill(case: Case) -> LossFunction:
    """Make torchdistill's loss, which reads logits from dictionaries."""
    module = import_package("torchdistill.losses.mid_level", "torchdistill")
    criterion = module.KDLoss("", "output", "", "output", case.temperature, alpha=case.alpha)

    def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        io = {"": {"output": student}}
        return criterion(io, {"": {"output": teacher}}, labels)  # type: ignore[no-any-return]

    return kd


def load_torchtune_losses() -> Any:
    """Import torchtune's file of losses alone, because the package needs an old torchao."""
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError("not installed (pip install torchtune)")
    path = Path(package.submodule_search_locations[0], "modules", "loss", "kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UnavailableError("this torchtune has no modules/loss/kd_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@baseline(
    "torchtune",
    "torchtune's ForwardKLLoss on logits / T + F.cross_entropy: without the teacher's entropy",
    truth="soft_ce",
)
def torchtune(case: Case) -> LossFunction:
    """Make a loss function of torchtune's ForwardKLLoss and F.cross_entropy."""
    criterion = load_torchtune_losses().ForwardKLLoss()
    temperature, alpha = case.temperature, case.alpha

    def kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = criterion(student / temperature, teacher / temperature, labels)
        return (  # type: ignore[no-any-return]
            alpha * F.cross_entropy(student, labels) + (1 - alpha) * temperature**2 * soft
        )

    return kd


def floor(case: Case) -> LossFunction:
    """Make a function that sums the student's logits, to time PyTorch's overhead."""
    return lambda s, t, y: s.sum()
