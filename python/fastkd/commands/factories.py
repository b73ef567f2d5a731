"""Make the models and data of a configuration, by calling functions of trusted modules only.

A configuration may come from somebody else, and must not be able to run any code. A factory is a
function or class that it names. A factory's module is trusted, and imported, only if it is in the
configuration file's folder or is named by ``--module``. A trusted module must also define the
factory: ``my_models:os.system`` is refused.
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
    """Call the factories that parts of a configuration name, if their modules are trusted.

    Args:
        folder: the configuration file's folder; the modules in it are trusted.
        modules: names of other trusted modules, from ``--module``. Their submodules are trusted.
    """

    def __init__(self, folder: pathlib.Path, modules: Sequence[str]) -> None:
        """Append the folder and the working directory to ``sys.path``.

        At its end, their files cannot replace modules of Python or of installed packages.
        """
        self._folder, self._modules = folder.resolve(), tuple(modules)
        for path in (str(self._folder), str(pathlib.Path.cwd())):
            if path not in sys.path:
                sys.path.append(path)

    def _is_trusted(self, module: str) -> bool:
        """Return True if the module is named by --module, or if its package is in the folder."""
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
        """Call a part's factory with the part's options.

        Raises:
            ConfigError: if the factory's module is not trusted or does not define the factory, or
                if the factory does not take the options.
        """
        assert part.factory is not None
        module_name, _, attribute = part.factory.partition(":")
        if not self._is_trusted(module_name):
            if _spec(module_name) is None:
                raise ConfigError(f"{name}: there is no module {module_name!r} to import")
            package = module_name.partition(".")[0]
            if any((self._folder / file).exists() for file in (package, f"{package}.py")):
                raise ConfigError(
                    f"{name}: another module {package!r} is imported instead of the one in "
                    f"{self._folder}; rename the latter"
                )
            raise ConfigError(
                f"{name}: the module {module_name!r} is not in {self._folder}, the folder of the "
                "configuration. If you trust the module, called with any options, add --module "
                f"{module_name}"
            )
        try:
            factory: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists, but a module that it imports does not
            raise ConfigError(f"{name}: there is no module {module_name!r} to import") from None
        for step in attribute.split("."):
            if not hasattr(factory, step):
                raise ConfigError(f"{name}: {module_name} has no {attribute!r}")
            factory = getattr(factory, step)
        if not callable(factory):
            raise ConfigError(
                f"{name}: {part.factory} must be a function or class; got {type(factory).__name__}"
            )
        defined_in = getattr(factory, "__module__", None)
        if not isinstance(defined_in, str) or not self._is_trusted(defined_in):
            raise ConfigError(
                f"{name}: {part.factory} must be a function or class that {module_name} defines; "
                f"got one of {defined_in or type(factory).__name__}. Define a function in "
                f"{module_name} that calls it"
            )
        try:
            inspect.signature(factory).bind(**part.options)
        except TypeError as error:
            raise ConfigError(
                f"{name}.options: {part.factory} does not take these options: {error}"
            ) from None
        except ValueError:  # compiled code may have no signature to check
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
        """Make a module, and load its weights if the part names a file of them."""
        model = self.make(name, part)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{name}: {part.factory} must return a torch.nn.Module; got {type(model).__name__}"
            )
        if part.weights is not None:
            _load(name, model, pathlib.Path(part.weights))
        return model


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Find a module's top-level package without importing anything."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # a module that was made in memory has no spec
        return None


def _load(name: str, model: nn.Module, path: pathlib.Path) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{name}.weights must be a .safetensors file, since other formats may run code; got "
            f"{path}"
        )
    if not path.is_file():
        raise ConfigError(
            f"{name}.weights: there is no file {path} (distill writes the student's weights)"
        )
    errors = (extras.load("safetensors", "train").SafetensorError, RuntimeError)
    try:
        extras.load("safetensors.torch", "train").load_model(model, str(path))
    except errors as error:
        raise ConfigError(f"{name}.weights: {path} does not fit: {line(error)}") from None
