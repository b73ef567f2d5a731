"""Export a student for ONNX Runtime, ExecuTorch or ``torch.export``, and run exported models.

:func:`fastkd.export` writes a file, and compares the file's logits with the student's.
:func:`fastkd.deployment.load` makes a module of an exported file, or of a program in memory, which
:func:`fastkd.report` can measure. ``pip install fastkd[deploy]`` installs the required packages.
"""

from fastkd.deployment.exporting import Exported, export
from fastkd.deployment.loading import DeployedModel, load

__all__ = ["DeployedModel", "Exported", "export", "load"]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
