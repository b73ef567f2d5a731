"""``python -m fastkd.compat``: prints ``docs/compat.md``, written from the adapters' records."""

from __future__ import annotations

from fastkd.compat import Convention, conventions

HEAD = """\
# Switching from another library

<!-- Written by `python -m fastkd.compat > docs/compat.md`; edit the records in
     python/fastkd/compat/ instead. -->

Libraries disagree on which term `alpha` weighs, on T², on what a mean divides by and on what is
masked. `fastkd.compat` has a module for each of these libraries, with its names, its signatures and
its conventions, so that switching is a changed import. With TRL's loss, for example, before:

```python
{before}

loss = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.1)
```

and after:

```python
{after}

loss = generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.1)
```

The loss is the same number and the student's gradient the same tensor, up to rounding; tests hold
every adapter against its library's own code where that can be installed (`make test`), and against
the formula written out where it cannot.

In `fastkd.loss` itself `alpha` weighs the **hard** term, the soft term is multiplied by T², a mean
is over the rows that are not ignored, and a row that is ignored counts in neither term.
"""

COMMON = """\
## What differs in all of them

- The loss is float32 (float64 for float64 logits), also where the library returns the dtype of the
  logits.
- The teacher gets no gradient. Teacher logits that require grad are an error: compute them under
  `torch.no_grad()`, or detach them.
- A mean over no rows is 0 with a zero gradient, never NaN.
- A label out of range is an error on the CPU, and NaN for its row on CUDA, also where the library
  only uses labels to mask.
"""

COLUMNS = {
    "from": "peer",
    "the weight is of": "weighs",
    "T²": "t_squared",
    "divided by": "denominator",
    "left out": "mask",
}


def page() -> str:
    """The whole page, Markdown."""
    example = next(record for record in conventions() if record.peer == "TRL")
    head = HEAD.format(before=example.before, after=example.after)
    return "\n".join([head, *_table(), "", COMMON, *map(_section, conventions())]).rstrip() + "\n"


def _table() -> list[str]:
    rows = [
        [getattr(record, field) for field in COLUMNS.values()]
        for record in sorted(conventions(), key=lambda record: record.peer.lower())
    ]
    lines = [list(COLUMNS), ["-"] * len(COLUMNS), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _section(record: Convention) -> str:
    differences = "\n".join(f"- {line}" for line in record.differences)
    return f"""\
## {record.peer}

```diff
- {record.before}
+ {record.after}
```

{differences or "- Nothing else differs."}
"""


if __name__ == "__main__":
    print(page(), end="")
