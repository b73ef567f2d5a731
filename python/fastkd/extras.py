"""Import packages of fastkd's extras where they are used: ``import fastkd`` needs torch alone."""

from __future__ import annotations

import importlib
from typing import Any


def check(extra: str, *modules: str) -> None:
    """Raise ImportError, as :func:`load` does, unless all these modules can be imported.

    Call it before work that would be lost if a later import failed.
    """
    for module in modules:
        load(module, extra)


def load(module: str, extra: str) -> Any:
    """Import a module and return it.

    Raises:
        ImportError: if it is not installed; the message names the extra of fastkd that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is installed, and one of its own imports is missing
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'fastkd[{extra}]'"
        ) from None
