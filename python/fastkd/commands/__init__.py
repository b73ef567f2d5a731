"""Implement the commands ``distill``, ``sweep``, ``report`` and ``export`` of ``fastkd``."""
