"""Write docs/objectives.md from the code: ``python docs/objectives.py``."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn

import fastkd
from fastkd import reference
from fastkd._core import dispatch
from fastkd._core.arguments import prepare
from fastkd._core.objective import Options

PATH = pathlib.Path(__file__).with_suffix(".md")

_INTRO = """\
# Options and divergences

<!-- Written by `python docs/objectives.py`; a test compares. -->

For every row, with the student's logits `z`, the teacher's logits `w` and the label `y`,

```math
\\text{loss} = a\\,\\mathrm{CE}(\\mathrm{softmax}(z), y) + b\\,T^2 D(p, q)
```

with $q = \\mathrm{softmax}(z / T)$ and $p = \\mathrm{softmax}(w / T_t)$. $a$ is `hard_weight`, $b$
is `soft_weight`, and $T_t$ is `teacher_temperature`, by default $T$ for logits. `alpha` is short
for `hard_weight=alpha, soft_weight=1 - alpha`. [maths.md](maths.md) derives the divergences, their
gradients and the cost of masked classes. `fastkd.explain(**options)` prints in words what a set of
options computes.

## Options

| option | default | |
|---|---|---|
| `temperature` | 2.0 | from 1e-18 to 1e18; one number, or one for each row; may be learned |
| `teacher_temperature` | `temperature` | default 1 if `teacher_form` is not `"logits"` |
| `alpha` | 0.5 | weight of the hard term |
| `hard_weight`, `soft_weight` | | instead of `alpha`; one number each, or one for each row |
| `ignore_index` | -100 | rows with this label count in neither term |
| `reduction` | `"mean"` | over the rows; or `"sum"`, or `"none"` for one loss for each row |
| `normalizer` | rows not ignored | denominator of `"mean"`, such as a global token count |
| `label_smoothing`, `class_weight` | 0.0, `None` | of the hard term, as in `F.cross_entropy` |
| `divergence`, `mix` | `"forward_kl"` | the soft term; `fastkd.divergences()` lists them |
| `teacher_form` | `"logits"` | the teacher's tensor: `"logits"`, `"log_probs"` or `"probs"` |
| `teacher_weights`, `ensemble` | equal, `"probs"` | how a list of teachers is averaged |
| `standardize` | `False` | in the soft term, scale rows of logits to mean 0, standard deviation 1 |
| `dim` | -1 | the dimension of the classes; 1 for logits `(N, C, d1, ...)`, which are not copied |
| `shift` | 0 | 1 for causal language models: row i predicts label i + 1; nothing is copied |
| `inplace` | `False` | write the gradient over the student's logits, to save memory |
| `chunks` | `"auto"` | how many logits of a `Head` are in memory; or a `fastkd.chunks.plan` |

With a `TopK` or `Sampled` teacher, the default temperature is 1, and labels are class indices. With
other teachers, labels are class indices or probabilities. Without labels, `alpha` and `hard_weight`
must be 0 or omitted. Slices such as `logits[..., :n]` of student and teacher leave padded classes
out, and are not copied. [`fastkd.loss`](reference/loss.md) documents shapes, dtypes and errors.
"""

_MATRIX = """
## What goes together, and what is fused

| | |
|---|---|
| ● | one fused pass, on the CPU and on CUDA |
| ◑ | two fused passes on the CPU, without `inplace`; PyTorch operations on CUDA or if compiled |
| ○ | PyTorch operations (`fastkd.reference`), with their memory and time |
| – | refused, with a message that gives the reason |

A separate kernel averages several teachers, and converts a teacher's probabilities to logits. On
the CPU this kernel handles a few rows at a time, which stay in the cache for the fused pass. On
CUDA it first writes the average of up to 32 teachers into one float32 tensor; PyTorch operations
average more than 32. Teachers whose classes are not adjacent in memory are copied.

Other devices, function transforms (`torch.func`) and second derivatives always use PyTorch
operations. To bound the memory, PyTorch operations compute a large batch in parts, and compute each
part again in the backward pass.
"""

_ROWS, _CLASSES = 2, 3


def _cases() -> dict[str, dict[str, Any]]:
    """Return the arguments of a call for each row of the page's matrix."""
    logits, rows = torch.zeros(_ROWS, _CLASSES), torch.ones(_ROWS)
    labels = torch.zeros(_ROWS, dtype=torch.int64)
    return {
        "class indices": {},
        "probabilities as labels": {"labels": logits.softmax(-1)},
        "no labels": {"labels": None},
        "`label_smoothing`": {"label_smoothing": 0.1},
        "`class_weight`": {"class_weight": torch.ones(_CLASSES)},
        "`class_weight`, `label_smoothing`": {
            "class_weight": torch.ones(_CLASSES),
            "label_smoothing": 0.1,
        },
        "weights of rows": {"hard_weight": rows, "soft_weight": rows},
        "temperatures of rows": {"temperature": rows},
        "`teacher_temperature`": {"teacher_temperature": 1.0},
        "learned temperature": {"temperature": nn.Parameter(torch.tensor(2.0))},
        "learned weights": {"hard_weight": nn.Parameter(rows), "soft_weight": 1.0},
        '`teacher_form="log_probs"`': {"teacher_form": "log_probs"},
        '`teacher_form="probs"`': {"teacher_form": "probs"},
        'several teachers, `ensemble="probs"`': {"teacher": [logits, logits]},
        'several teachers, `ensemble="logits"`': {
            "teacher": [logits, logits],
            "ensemble": "logits",
        },
        "`standardize`": {"standardize": True},
        "`dim=1`": {
            "student": logits.unsqueeze(-1),
            "teacher": logits.unsqueeze(-1),
            "labels": labels.unsqueeze(-1),
            "dim": 1,
        },
    }


def _cell(divergence: str, case: dict[str, Any]) -> str:
    """Return the symbol of a call in the page's matrix, such as "●" for one fused pass."""
    logits = torch.zeros(_ROWS, _CLASSES)
    arguments = {
        "student": logits,
        "teacher": logits,
        "labels": torch.zeros(_ROWS, dtype=torch.int64),
        **case,
    }
    student, teacher, labels = (arguments.pop(name) for name in ("student", "teacher", "labels"))
    try:
        call = prepare(student, teacher, labels, Options(**arguments, divergence=divergence))
    except ValueError:
        return "–"
    missing = dispatch.list_missing_features(call.student, call.labels, call.objective)
    if not missing:
        return "●"
    return "◑" if dispatch.IN_TWO_PASSES.issuperset(missing) else "○"


def _table(rows: list[list[str]]) -> str:
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def write_page() -> str:
    """Return the text of docs/objectives.md."""
    listed = [["`divergence=`", "D", "`mix=`", "source"]]
    for name, kind in reference.DIVERGENCES.items():
        mix = ""
        if kind.mix is not None:
            low, high = kind.mix_range
            ends = "()" if kind.mix_open else "[]" if high < float("inf") else "[)"
            mix = f"{kind.mix:g}, in {ends[0]}{low:g}, {high:g}{ends[1]}; {kind.mix_meaning}"
        listed.append([f"`{name}`", kind.formula.replace("|", "\\|"), mix, kind.source])
    matrix = [["", *(f"`{name}`" for name in reference.DIVERGENCES)]]
    for label, case in _cases().items():
        matrix.append([label, *(_cell(name, case) for name in reference.DIVERGENCES)])
    examples = (
        {"temperature": 4.0, "alpha": 0.1},
        {
            "divergence": "jsd",
            "mix": 0.1,
            "soft_weight": 1.0,
            "hard_weight": 0.0,
            "teacher_form": "log_probs",
            "reduction": "sum",
        },
    )
    shown = [_INTRO, "## Divergences\n", _table(listed), _MATRIX, _table(matrix), "\n## In words"]
    for options in examples:
        arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
        text = fastkd.explain(show=False, **options)
        shown.append(f"\n```text\n>>> fastkd.explain({arguments})\n{text}\n```")
    return "\n".join(shown) + "\n"


if __name__ == "__main__":
    PATH.write_text(write_page(), encoding="utf-8")
