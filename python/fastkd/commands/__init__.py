"""The commands of ``fastkd`` and ``python -m fastkd``."""
