"""Cached teachers: log-probabilities computed once, written to disk and read by sample id.

:func:`precompute` writes them, :class:`TeacherCache` reads them, and :class:`WithIds` adds the ids
to a dataset. ``docs/teachers.md`` has the file format, measured sizes and speeds. Needs
``pip install fastkd[train]``.
"""

from fastkd.batches import WithIds
from fastkd.teachers.cache import TeacherCache
from fastkd.teachers.digests import fingerprint
from fastkd.teachers.writing import precompute

__all__ = ["TeacherCache", "WithIds", "fingerprint", "precompute"]
