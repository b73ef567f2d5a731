"""The native library, which registers the ops."""

from __future__ import annotations

import torch

try:
    from fastkd import _C
except ImportError as error:  # pragma: no cover - needs a broken installation
    raise ImportError(
        f"fastkd's native library could not be loaded ({error}). It needs torch >= 2.10 (this is "
        f"{torch.__version__}); if it was built for another Python, reinstall it."
    ) from error

__all__ = ["CUDA_KERNELS", "_C"]

CUDA_KERNELS = bool(_C.cuda_architectures)
