"""Make the models and data of a configuration, by the user's code and no other.

A configuration is data, and may come from somebody else. So a factory's module has to lie beside
the configuration file or to be named on the command line; nothing else is imported. And the factory
has to be defined in such a module: ``my_models:os.system`` is not.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from fastkd import extras
from fastkd.commands.config import ConfigError, Part, line


class Factories:
    """Make what parts name, by functions and classes of trusted modules alone.

    Args:
        folder: of the configuration file; the modules in it are trusted.
        modules: names of other trusted modules, whose submodules are trusted, too.
    """

    def __init__(self, folder: pathlib.Path, modules: Sequence[str]) -> None:
        """Let modules in the folder, and in the working folder, be found after all others."""
        self._folder, self._modules = folder.resolve(), tuple(modules)
        for path in (str(self._folder), str(pathlib.Path.cwd())):
            if path not in sys.path:
                sys.path.append(path)

    def _is_trusted(self, module: str) -> bool:
        """Return True if a module was named, or if Python finds its package in the folder."""
        if any(f"{module}.".startswith(f"{trusted}.") for trusted in self._modules):
            return True
        spec = _spec(module)
        if spec is None:
            return False
        if spec.submodule_search_locations is not None:
            places = [pathlib.Path(place).parent for place in spec.submodule_search_locations]
        else:  # built-in and frozen modules have no location
            places = [pathlib.Path(spec.origin or "").parent] if spec.has_location else []
        return bool(places) and all(place.resolve() == self._folder for place in places)

    def make(self, name: str, part: Part) -> Any:
        """Call a part's factory.

        Raises:
            ConfigError: if its module is not trusted or does not define it, or if it does not take
                the options.
        """
        assert part.factory is not None
        module_name, _, attribute = part.factory.partition(":")
        if not self._is_trusted(module_name):
            if _spec(module_name) is None:
                raise ConfigError(f"{name}: there is no module {module_name!r} to import")
            package = module_name.partition(".")[0]
            if any((self._folder / file).exists() for file in (package, f"{package}.py")):
                raise ConfigError(
                    f"{name}: Python has another module {package!r} than the one in "
                    f"{self._folder}; rename yours"
                )
            raise ConfigError(
                f"{name}: the module {module_name!r} does not lie in {self._folder}, where the "
                f"configuration is. If you trust it with any options, add --module {module_name}"
            )
        try:
            factory: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there; what it imports is not
            raise ConfigError(f"{name}: there is no module {module_name!r} to import") from None
        for step in attribute.split("."):
            if not hasattr(factory, step):
                raise ConfigError(f"{name}: {module_name} has no {attribute!r}")
            factory = getattr(factory, step)
        if not callable(factory):
            raise ConfigError(
                f"{name}: {part.factory} is no function, but {type(factory).__name__}"
            )
        defined_in = getattr(factory, "__module__", None)
        if not isinstance(defined_in, str) or not self._is_trusted(defined_in):
            raise ConfigError(
                f"{name}: {part.factory} must be a function or class that {module_name} defines; "
                f"it is one of {defined_in or type(factory).__name__}. Write a function that "
                "calls it"
            )
        try:
            inspect.signature(factory).bind(**part.options)
        except TypeError as error:
            raise ConfigError(
                f"{name}.options: {part.factory} does not take them: {error}"
            ) from None
        except ValueError:  # compiled code may not say what it takes
            pass
        return factory(**part.options)

    def make_data(self, name: str, part: Part) -> Any:
        """Make a data set, or a loader of one."""
        data = self.make(name, part)
        if not isinstance(data, DataLoader) and not hasattr(data, "__getitem__"):
            raise ConfigError(
                f"{name}: {part.factory} must return a data set or a DataLoader; got "
                f"{type(data).__name__}"
            )
        return data

    def make_model(self, name: str, part: Part) -> nn.Module:
        """Make a module, with its weights if a file of them is named."""
        model = self.make(name, part)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{name}: {part.factory} must return a torch.nn.Module; got {type(model).__name__}"
            )
        if part.weights is not None:
            _load(name, model, pathlib.Path(part.weights))
        return model


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module's package without importing it, or anything else."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # of a module that was made in memory
        return None


def _load(name: str, model: nn.Module, path: pathlib.Path) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{name}.weights must be a .safetensors file, since others may run code; got {path}"
        )
    if not path.is_file():
        raise ConfigError(f"{name}.weights: there is no file {path} (distill writes the student's)")
    errors = (extras.load("safetensors", "train").SafetensorError, RuntimeError)
    try:
        extras.load("safetensors.torch", "train").load_model(model, str(path))
    except errors as error:
        raise ConfigError(f"{name}.weights: {path} does not fit: {line(error)}") from None
