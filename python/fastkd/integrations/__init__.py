"""Use fastkd in the trainers of other libraries; each library has a module."""

from fastkd.integrations import transformers

__all__ = ["transformers"]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
