"""Import optional packages (extras) where they are used; ``import fastkd`` needs torch alone."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """Report a package that is not installed; the message names the extra that installs it."""


def check(extra: str, *modules: str) -> None:
    """Raise MissingPackageError unless all ``modules`` can be imported.

    Call ``check`` before work that would be lost if a later import failed.
    """
    for module in modules:
        load(module, extra)


def load(module: str, extra: str) -> Any:
    """Import a module and return it.

    Raises:
        MissingPackageError: if the module's package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is installed, and one of its own imports is missing
        raise MissingPackageError(
            f"this needs {package}, which is not installed: pip install 'fastkd[{extra}]'"
        ) from None
