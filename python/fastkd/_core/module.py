"""A loss as a module: how it keeps its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class OptionsModule(nn.Module):
    """Keeps options as attributes, which may be assigned. Those that are tensors are buffers that
    follow the module to another device, and an ``nn.Parameter`` is a parameter of the module."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Keeps what is given, having checked it."""
        super().__init__()
        self.check_options(options)
        self._numbers: dict[str, Any] = {}
        for name, value in options.items():
            self._keep(name, value)

    @staticmethod
    def default_options() -> Mapping[str, Any]:
        """All options there are, by name."""
        raise NotImplementedError

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises unless these go together."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given; tensors are where the module is."""
        return {**self._numbers, **self._parameters, **self._buffers}

    def _keep(self, name: str, value: object) -> None:
        # As register_parameter() and register_buffer(), which refuse the name of an attribute.
        for kept in (self._numbers, self._parameters, self._buffers):
            kept.pop(name, None)
        self._non_persistent_buffers_set.discard(name)
        if isinstance(value, nn.Parameter):
            self._parameters[name] = value
        elif isinstance(value, Tensor):
            self._buffers[name] = value
            self._non_persistent_buffers_set.add(name)
        else:
            self._numbers[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an option, having checked it with the others; or an attribute."""
        if name not in self.default_options():
            return super().__setattr__(name, value)
        self.check_options({**self.options, name: value})
        self._keep(name, value)

    def __getattr__(self, name: str) -> Any:
        """An option, or its default; or what else a module has."""
        defaults = self.default_options()
        if name not in defaults or name in self._parameters or name in self._buffers:
            return super().__getattr__(name)
        return self._numbers.get(name, defaults[name])

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
