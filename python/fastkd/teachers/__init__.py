"""An offline teacher: its log-probabilities, computed once, read by sample id ever after.

:func:`precompute` writes them, :class:`TeacherCache` reads them, :class:`WithIds` gives a dataset's
samples the ids by which they are found. ``docs/teachers.md`` has the file format, measured sizes
and speeds. Needs ``pip install fastkd[train]``.
"""

from fastkd.batches import WithIds
from fastkd.teachers.cache import TeacherCache
from fastkd.teachers.digests import fingerprint
from fastkd.teachers.writing import precompute

__all__ = ["TeacherCache", "WithIds", "fingerprint", "precompute"]
