"""Where a pass over a loader is, so that another process can go on from there."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


class Position:
    """A place in a pass: the batches drawn, and the random states that decide those to come.

    Batches before it are drawn again and thrown away rather than skipped, since datasets and
    worker processes have random states of their own. And a loader draws ahead: Accelerate's has
    drawn the next batch when it gives one. So the last batch before this place is drawn with the
    random states that it was drawn with.
    """

    def __init__(self) -> None:
        """Before the first batch."""
        self.batches = 0
        self._order: dict[str, Any] | None = None  # as the pass began
        self._drawn: dict[str, Any] | None = None  # as the last batch was asked for
        self.resumed: dict[str, Any] | None = None  # as training goes on, until it does

    def state(self) -> dict[str, Any]:
        """All of it, and the random states of this moment, for ``torch.save``."""
        return {
            "batches": self.batches,
            "order": self._order,
            "drawn": self._drawn,
            "now": rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The place that :meth:`state` gave; :meth:`windows` goes there."""
        self.batches, self._order = state["batches"], state["order"]
        self._drawn, self.resumed = state["drawn"], state["now"]

    def windows(self, loader: Any, size: int) -> Iterator[list[Any]]:
        """The rest of the pass, ``size`` batches at a time; fewer at its end."""
        if self._order is not None:
            set_rng_state(self._order["rng"])
            for generator, own in zip(generators(loader), self._order["own"], strict=True):
                generator.set_state(own)
        self._order = {"rng": rng_state(), "own": [g.get_state() for g in generators(loader)]}
        iterator = iter(loader)
        for _ in itertools.islice(iterator, max(0, self.batches - 1)):
            pass
        if self.batches and self._drawn is not None:
            set_rng_state(self._drawn)
            next(iterator, None)
        if self.resumed is not None:
            set_rng_state(self.resumed)
            self.resumed = None
        while window := list(itertools.islice(self._draw(iterator), size)):
            yield window

    def _draw(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._drawn = rng_state()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.batches += 1
            yield batch


def generators(loader: Any) -> list[torch.Generator]:
    """The generators of its own from which a loader draws its order."""
    found: list[torch.Generator] = []
    for name in ("generator", "synchronized_generator"):
        generator = getattr(loader, name, None)
        if isinstance(generator, torch.Generator) and all(generator is not g for g in found):
            found.append(generator)
    return found


def rng_state() -> dict[str, Any]:
    """The states of Python's, torch's and, where it is in use, NumPy's generators."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` gave."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])
