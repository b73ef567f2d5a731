"""Bringing the values of training steps to the host without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Event, Tensor


class Watch:
    """Reads each step's values, and stops training when a loss is not finite.

    Those of a CPU are read at once, before they do harm. Those of another device are read a step
    late: their copy was started a step ago and has long arrived, so the host stays one step ahead
    of the device, whose queue never runs empty.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """``names``: of the values; ``loss`` is the first of them."""
        self._names = names
        self._pending: list[tuple[int, Tensor, Any]] = []

    def add(self, step: int, values: Tensor) -> list[tuple[int, dict[str, float]]]:
        """Starts reading a step's values, ``(names,)``; gives those that have arrived."""
        if values.device.type == "cpu":
            self._pending.append((step, values, None))
            return self.rest()
        arrived = self.rest()
        copied = values.to("cpu", non_blocking=True)
        event = Event(values.device)
        event.record()
        self._pending.append((step, copied, event))
        return arrived

    def rest(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for all that is on the way.

        Raises:
            FloatingPointError: if a loss is not finite; the message names the step and the term.
        """
        arrived = []
        for step, values, event in self._pending:
            if event is not None:
                event.synchronize()
            arrived.append((step, dict(zip(self._names, values.tolist(), strict=True))))
        self._pending.clear()
        for step, named in arrived:
            if not math.isfinite(named["loss"]):
                _stop(step, named)
        return arrived


def _stop(step: int, named: dict[str, float]) -> None:
    parts = [name for name in ("hard", "soft", "hint") if not math.isfinite(named.get(name, 0.0))]
    blame = f"its {' and '.join(parts)} term" if parts else "the weighted sum of finite terms"
    listed = ", ".join(f"{name} {named[name]:g}" for name in ("loss", "hard", "soft", "hint"))
    raise FloatingPointError(
        f"the loss of step {step} is not finite, through {blame} ({listed}). Look for NaN and inf "
        "in the inputs and in both models' logits, then at learning rate and precision. On a CPU "
        "the parameters are those before this step; on another device it was taken, so go back to "
        "the last checkpoint"
    )
