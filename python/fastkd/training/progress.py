"""What a training run tells of itself: a bar, and values for Accelerate's trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fastkd import extras


class Progress:
    """Shows and logs values that have reached the host."""

    def __init__(self, accelerator: Any, shown: bool, names: Sequence[str]) -> None:
        """``shown``: whether there is a bar, on the main process; ``names``: of the values."""
        self._accelerator, self._names = accelerator, names
        self._hidden = not (shown and accelerator.is_main_process)
        self._bar: Any = None
        self._tqdm = extras.load("tqdm", "train").tqdm  # now, rather than in the first step

    @contextlib.contextmanager
    def over(self, total: int | None, done: int) -> Iterator[None]:
        """A bar of ``total`` steps, unless there is one already."""
        if self._bar is not None:
            yield
            return
        with self._tqdm(total=total, initial=done, disable=self._hidden) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def begin(self, epoch: int) -> None:
        """A pass, counted from 0."""
        self._bar.set_description(f"epoch {epoch + 1}")

    def advance(self) -> None:
        """By a step."""
        self._bar.update()

    def show(self, known: Sequence[tuple[int, dict[str, float]]]) -> None:
        """The values of steps, logged and beside the bar."""
        for step, values in known:
            chosen = {name: values[name] for name in self._names}
            self.log(chosen, step)
            if self._bar is not None:
                shown = {name: f"{value:.3g}" for name, value in chosen.items()}
                self._bar.set_postfix(shown, refresh=False)

    def log(self, values: dict[str, float], step: int) -> None:
        """Passes values to Accelerate's trackers, if there are any."""
        if self._accelerator.log_with:
            if not self._accelerator.trackers:
                self._accelerator.init_trackers("fastkd")
            self._accelerator.log(values, step=step)
