"""Read, show and log the values of each training step; raise if the loss is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Event, Tensor

from fastkd import extras


class Progress:
    """Read the values of training steps, and pass them to a progress bar and Accelerate's trackers.

    Values on the CPU are read at once, so a loss that is not finite raises before the optimizer
    step. Values on another device are copied asynchronously and read one step later. The host can
    then queue a step while the device computes the previous step.
    """

    def __init__(
        self, accelerator: Any, *, show: bool, names: Sequence[str], logged: Sequence[str]
    ) -> None:
        """Store the ``names`` of a step's values; those in ``logged`` are also shown and logged."""
        self._accelerator, self._names, self._logged = accelerator, names, logged
        self._disabled = not (show and accelerator.is_main_process)
        self._bar: Any = None
        self._pending: list[tuple[int, Tensor, Any]] = []
        # A missing package raises here, not in the first step.
        self._tqdm = extras.load("tqdm", "train").tqdm

    @contextlib.contextmanager
    def show_bar(self, total: int | None, done: int) -> Iterator[Any]:
        """Yield the progress bar; if no bar is shown yet, make a bar of ``total`` steps."""
        if self._bar is not None:
            yield self._bar
            return
        with self._tqdm(total=total, initial=done, disable=self._disabled) as self._bar:
            try:
                yield self._bar
            finally:
                self._bar = None

    def add(self, step: int, values: Tensor) -> None:
        """Report the values of a step: at once on a CPU, one step later on another device."""
        if values.device.type == "cpu":
            self._pending.append((step, values, None))
            self.flush()
            return
        self.flush()
        copy = values.to("cpu", non_blocking=True)
        event = Event(values.device)
        event.record()
        self._pending.append((step, copy, event))

    def flush(self) -> None:
        """Wait for all pending values, and report the values; raise if a loss is not finite."""
        pending, self._pending = self._pending, []
        for step, values, event in pending:
            if event is not None:
                event.synchronize()
            named = dict(zip(self._names, values.tolist(), strict=True))
            if not math.isfinite(named["loss"]):
                terms = [k for k in ("hard", "soft", "hint") if not math.isfinite(named[k])]
                cause = f"its {' and '.join(terms)} term" if terms else "a sum of finite terms"
                listed = ", ".join(f"{k} {named[k]:g}" for k in ("loss", "hard", "soft", "hint"))
                raise FloatingPointError(
                    f"the loss of step {step} is not finite, because of {cause} ({listed}). Look "
                    "for NaN and inf in the inputs and in both models' logits, then at learning "
                    "rate and precision. On a CPU the parameters are those before this step. Other "
                    "devices have taken the step: go back to the last checkpoint"
                )
            logged = {name: named[name] for name in self._logged}
            self.log(logged, step)
            if self._bar is not None:
                shown = {name: f"{value:.3g}" for name, value in logged.items()}
                self._bar.set_postfix(shown, refresh=False)

    def log(self, values: dict[str, float], step: int) -> None:
        """Pass values to Accelerate's trackers, if the accelerator has trackers."""
        if self._accelerator.log_with:
            if not self._accelerator.trackers:
                self._accelerator.init_trackers("fastkd")
            self._accelerator.log(values, step=step)
