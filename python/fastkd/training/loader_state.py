"""Save and restore the position in a pass over a data loader, and the order of its batches.

Accelerate's ``use_stateful_dataloader`` does not restore the order of a shuffled loader.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


class LoaderState:
    """Count the batches of a pass, and store the random states that determine the next batches.

    A restored pass first draws and drops the batches before its position, since datasets and worker
    processes may have random states that cannot be saved. The last dropped batch is drawn with the
    random states of its first draw, because Accelerate's loader draws one batch ahead. Between two
    passes, the position is 0, and the random states determine the next shuffle.
    """

    def __init__(self) -> None:
        """Start before the first pass."""
        self.restored: dict[str, Any] = {}  # random states that iterate() restores and then drops
        self._generators: list[torch.Generator] = []
        self.reset()

    def reset(self) -> None:
        """Go to the start of a pass."""
        self.batches = 0
        self._pass_start: dict[str, Any] = {}
        self._last_draw: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the random states of the pass's start, the last draw and now."""
        now = self.restored or get_random_states(self._generators)
        draws = {"pass_start": self._pass_start, "last_draw": self._last_draw}
        return {"batches": self.batches, **draws, "now": now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position at which :meth:`iterate` continues."""
        self.batches, self._pass_start = state["batches"], state["pass_start"]
        self._last_draw, self.restored = state["last_draw"], state["now"]

    def iterate(self, loader: Any, size: int) -> Iterator[list[Any]]:
        """Yield lists of ``size`` remaining batches of the pass; the last list may be shorter."""
        self._generators = find_generators(loader)
        if self.restored:
            self._set(self._pass_start or self.restored)
        self._pass_start = get_random_states(self._generators)
        iterator = iter(loader)
        if self.batches:
            for _ in itertools.islice(iterator, self.batches - 1):
                pass
            self._set(self._last_draw)
            next(iterator, None)
            self._set(self.restored)
        self.restored = {}
        while window := list(itertools.islice(self._draw(iterator), size)):
            yield window

    def _draw(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._last_draw = get_random_states(self._generators)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.batches += 1
            yield batch

    def _set(self, states: dict[str, Any]) -> None:
        """Set the random states; raise if generators were added or removed within a pass."""
        saved, current = len(states["loader"]), len(self._generators)
        if self.batches and saved != current:
            raise ValueError(
                f"loader has {current} generators, and the loader of the checkpoint had {saved}; "
                "make the loader as it was"
            )
        for generator, state in zip(self._generators, states["loader"], strict=False):
            generator.set_state(state)
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(states["cuda"])
        if "numpy" in states and "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(states["numpy"])


def find_generators(loader: Any) -> list[torch.Generator]:
    """Return the distinct generators of a loader and its samplers."""
    parts: list[Any] = [loader]
    generators: dict[int, torch.Generator] = {}
    for part in parts:  # the list grows in the loop
        for name in ("generator", "synchronized_generator", "sampler", "batch_sampler"):
            value = getattr(part, name, None)
            if isinstance(value, torch.Generator):
                generators[id(value)] = value
            elif value is not None and value not in parts:
                parts.append(value)
    return list(generators.values())


def get_random_states(generators: list[torch.Generator]) -> dict[str, Any]:
    """Return the states of ``generators``, Python, torch, CUDA and, if imported, NumPy."""
    states: dict[str, Any] = {
        "loader": [generator.get_state() for generator in generators],
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states
