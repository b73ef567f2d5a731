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
    random states that it was drawn with. Between two passes there are no batches, but the states
    count all the same: the next order is drawn from them.
    """

    def __init__(self) -> None:
        """Before the first pass."""
        self.resumed: dict[str, Any] = {}  # as training goes on, until it does
        self._generators: list[torch.Generator] = []  # of the loader
        self.end()

    def end(self) -> None:
        """Between two passes."""
        self.batches = 0
        self._order: dict[str, Any] = {}  # as the pass began
        self._drawn: dict[str, Any] = {}  # as the last batch was asked for

    def state(self) -> dict[str, Any]:
        """All of it, and the random states of this moment, for ``torch.save``."""
        return {
            "batches": self.batches,
            "order": self._order,
            "drawn": self._drawn,
            "now": self.resumed or self._states(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The place that :meth:`state` gave; :meth:`windows` goes there."""
        self.batches, self._order = state["batches"], state["order"]
        self._drawn, self.resumed = state["drawn"], state["now"]

    def windows(self, loader: Any, size: int) -> Iterator[list[Any]]:
        """The rest of the pass, ``size`` batches at a time; fewer at its end."""
        self._generators = generators(loader)
        if self.resumed:
            self._set_states(self._order or self.resumed)
        self._order = self._states()
        iterator = iter(loader)
        if self.batches:
            for _ in itertools.islice(iterator, self.batches - 1):
                pass
            set_rng_state(self._drawn)
            next(iterator, None)
            self._set_states(self.resumed)
        self.resumed = {}
        while window := list(itertools.islice(self._draw(iterator), size)):
            yield window

    def _states(self) -> dict[str, Any]:
        """Those of this moment, the loader's own included."""
        return {"rng": rng_state(), "own": [own.get_state() for own in self._generators]}

    def _set_states(self, states: dict[str, Any]) -> None:
        set_rng_state(states["rng"])
        had, has = len(states["own"]), len(self._generators)
        if self.batches and had != has:  # between two passes the loader may be another one
            raise ValueError(
                f"loader has {has} random generators of its own, and that of the checkpoint had "
                f"{had}; make it as it was"
            )
        for own, state in zip(self._generators, states["own"], strict=False):
            own.set_state(state)

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
    """The generators that a loader and its samplers have of their own."""
    parts: list[Any] = [loader]
    found: list[Any] = []
    for part in parts:  # which grows on the way
        for name in ("generator", "synchronized_generator"):
            found.append(getattr(part, name, None))
        for name in ("sampler", "batch_sampler"):
            inner = getattr(part, name, None)
            if inner is not None and all(inner is not other for other in parts):
                parts.append(inner)
    unique = {id(own): own for own in found if isinstance(own, torch.Generator)}
    return list(unique.values())


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
