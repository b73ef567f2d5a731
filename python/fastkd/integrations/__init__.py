"""Use fastkd in other libraries' training loops; each library has its own module."""

from fastkd.integrations import transformers

__all__ = ["transformers"]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
