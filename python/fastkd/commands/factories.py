"""Make the models and data of a configuration, by calling functions of trusted modules only.

A configuration may come from somebody else, and must not be able to run arbitrary code. A factory
is a function or class that a configuration names as ``module:function``. A module is trusted, and
imported, only if the module is in the configuration file's folder or ``--module`` names it. A
trusted module must also define the factory: ``my_models:system`` is refused if it is ``os.system``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from fastkd import extras


class ConfigError(ValueError):
    """Report an error in a configuration or on the command line, without a traceback."""


class Factories:
    """Call the factories named in the options of a training, if their modules are trusted.

    The methods that make objects take the name of one option and all options of the training. For
    the name ``student``, :meth:`make_model` reads ``student``, ``student_options`` and
    ``student_weights``.
    """

    def __init__(self, folder: pathlib.Path, modules: Sequence[str]) -> None:
        """Trust the modules in ``folder`` and the modules named in ``modules``, with submodules."""
        self._folder, self._modules = folder.resolve(), tuple(modules)
        # Folders at the end of sys.path cannot replace modules of Python or of installed packages.
        for path in (str(self._folder), str(pathlib.Path.cwd())):
            if path not in sys.path:
                sys.path.append(path)

    def make_data(self, name: str, training: Any) -> Any:
        """Make a data set or a DataLoader; return None if the option is not set."""
        if not getattr(training, name):
            return None
        data = self._make(name, training)
        if not isinstance(data, DataLoader) and not hasattr(data, "__getitem__"):
            raise ConfigError(
                f"{name} must return a data set or a DataLoader; got {type(data).__name__}"
            )
        return data

    def make_model(self, name: str, training: Any) -> nn.Module:
        """Make a module, and load weights if the training names a file of weights."""
        path = pathlib.Path(getattr(training, f"{name}_weights"))
        if path.name and (path.suffix != ".safetensors" or not path.is_file()):
            raise ConfigError(
                f"{name}_weights must be an existing .safetensors file, since other formats may "
                f"run code; got {path}"
            )
        model = self._make(name, training)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{name} must return a torch.nn.Module; got {type(model).__name__}")
        if path.name:
            safetensors = extras.load("safetensors", "train")
            try:
                extras.load("safetensors.torch", "train").load_model(model, str(path))
            except (safetensors.SafetensorError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"{name}_weights: {path} does not fit: {reason}") from None
        return model

    def _make(self, name: str, training: Any) -> Any:
        """Call the factory in the option ``name`` with the arguments in ``{name}_options``."""
        factory, options = getattr(training, name), getattr(training, f"{name}_options")
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", factory):
            raise ConfigError(f"{name} must be module:function; got {factory!r}")
        module, _, attribute = factory.partition(":")
        if not self._is_trusted(module):
            spec = _find_spec(module)
            place = "not found" if spec is None else f"{spec.origin}, outside {self._folder}"
            raise ConfigError(
                f"{name}: the module {module} is {place}. A module must be in the folder of the "
                "configuration and have a name of its own. If you trust another module, called "
                f"with any arguments, add --module {module}"
            )
        function = getattr(importlib.import_module(module), attribute, None)
        defined_in = getattr(function, "__module__", None)
        if not callable(function) or not self._is_trusted(str(defined_in)):
            raise ConfigError(
                f"{name}: {factory} must be a function or class that {module} defines; got "
                f"{type(function).__name__} of {defined_in}. Define a function that calls it"
            )
        try:
            inspect.signature(function).bind(**options)
        except TypeError as error:
            raise ConfigError(f"{name}_options do not fit {factory}: {error}") from None
        return function(**options)

    def _is_trusted(self, module: str) -> bool:
        """Return True if --module names the module, or its package is in the trusted folder."""
        if any(f"{module}.".startswith(f"{trusted}.") for trusted in self._modules):
            return True
        spec = _find_spec(module)
        if spec is None:
            return False
        # A package may have several folders; built-in and frozen modules have none.
        places = spec.submodule_search_locations or [str(spec.origin)] * spec.has_location
        folders = {pathlib.Path(place).parent.resolve() for place in places}
        return folders == {self._folder}


def _find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Find the top-level package of a module without an import."""
    try:
        return importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # a module that was made in memory has no spec
        return None
