"""Use fastkd in the trainers of other libraries; each library has a module."""

from fastkd.integrations import transformers, trl

__all__ = ["transformers", "trl"]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
