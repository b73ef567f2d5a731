"""fastkd in the training loops of other libraries, each in a module of its own."""

from fastkd.integrations import transformers

__all__ = ["transformers"]
