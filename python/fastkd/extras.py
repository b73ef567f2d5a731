"""Packages beyond torch, loaded where needed, so that ``import fastkd`` needs torch alone."""

from __future__ import annotations

import importlib
from typing import Any


class MissingPackageError(ImportError):
    """Error about a package that is not installed; the message names the extra that installs it."""


def check(extra: str, *modules: str) -> None:
    """Raise unless these modules can be imported; called before work that would be lost.

    Raises:
        MissingPackageError: if one of their packages is not installed.
    """
    for module in modules:
        load(module, extra)


def load(module: str, extra: str) -> Any:
    """Import and return a module.

    Raises:
        MissingPackageError: if its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # installed, but broken: its own message says more
        raise MissingPackageError(
            f"this needs {package}, which is not installed: pip install 'fastkd[{extra}]'"
        ) from None
