"""Load the native ops, and load autograd in C++ if it was built with the installed torch."""

from __future__ import annotations

from typing import Any

import torch

try:
    from fastkd import _C
except ImportError as error:  # pragma: no cover - needs a broken installation
    raise ImportError(
        f"fastkd's native library could not be loaded ({error}). It needs torch >= 2.10 (this is "
        f"{torch.__version__}); if it was built for another Python, reinstall it."
    ) from error

__all__ = ["CUDA_KERNELS", "EAGER", "FAST_PATH", "_C", "is_dynamo_compiling"]

# A module variable saves an attribute lookup in each call of a loss.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling

CUDA_KERNELS = bool(_C.cuda_architectures)


def _load_eager() -> tuple[Any, str]:
    """Register autograd in C++ (csrc/torch/eager.cpp) if it was built with the installed torch.

    Return the module (None if not registered) and a description for ``fastkd info``.
    """
    try:
        from fastkd import _eager
    except ImportError:  # the module is not built, or needs a symbol that the installed torch lacks
        return None, f"off: not built for torch {torch.__version__}: install from source to get it"
    if (built := _eager.torch_version) != torch.__version__:
        return (
            None,
            f"off: built with torch {built}, running {torch.__version__}: reinstall to get it",
        )
    _eager.register_kernels()
    return _eager, "on, autograd in C++"


EAGER, FAST_PATH = _load_eager()
"""``EAGER``: the module of autograd in C++, or None if :mod:`fastkd._core.autograd` is used.
``FAST_PATH``: a description of the autograd in use, for ``fastkd info``."""
