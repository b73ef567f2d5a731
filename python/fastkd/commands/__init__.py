"""Implement the commands of ``fastkd`` and ``python -m fastkd``."""
