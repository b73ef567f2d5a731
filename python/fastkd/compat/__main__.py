"""``python -m fastkd.compat``: print ``docs/compat.md``, written from the adapters' records."""

from __future__ import annotations

from fastkd.compat import Convention, conventions, trl

HEAD = """\
# Switching from another library

<!-- Written by `python -m fastkd.compat > docs/compat.md`; edit the records in
     python/fastkd/compat/ instead. -->

Libraries disagree on which term `alpha` weighs, on T², on what a mean divides by and on which rows
are masked. `fastkd.compat` has a module for each of these libraries, with the library's names,
signatures and conventions, so switching means changing an import. With TRL's loss, for example,
before:

```python
{before}

loss = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.1)
```

and after:

```python
{after}

loss = generalized_jsd_loss(student_logits, teacher_logits, labels, beta=0.1)
```

The loss and the student's gradient are equal to the library's up to rounding. Tests compare every
adapter with its library's own code where that can be installed (`make test`), and with the formula
written out where it cannot.

In `fastkd.loss` itself `alpha` weighs the **hard** term and the soft term is multiplied by T². A
mean is over the rows that are not ignored; an ignored row counts in neither term.
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
    "library": "library",
    "weights": "weights",
    "T²": "t_squared",
    "divided by": "denominator",
    "masked": "mask",
}


def make_page() -> str:
    """Return the page as Markdown."""
    head = HEAD.format(before=trl.CONVENTION.before, after=trl.CONVENTION.after)
    records = sorted(conventions(), key=lambda record: record.library.lower())
    rows = [[getattr(record, field) for field in COLUMNS.values()] for record in records]
    table = [f"| {' | '.join(row)} |" for row in (list(COLUMNS), ["-"] * len(COLUMNS), *rows)]
    return "\n".join([head, *table, "", COMMON, *map(_make_section, conventions())])[:-1]


def _make_section(record: Convention) -> str:
    differences = record.differences or ("Nothing else differs.",)
    return "\n".join(
        [
            f"## {record.library}\n",
            f"```diff\n- {record.before}\n+ {record.after}\n```\n",
            *(f"- {line}" for line in differences),
            "",
        ]
    )


if __name__ == "__main__":
    print(make_page())
