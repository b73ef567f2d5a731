"""Read a teacher's log-probabilities from disk, or from the replies of inference servers.

:func:`precompute` writes a teacher's log-probabilities to disk. :class:`TeacherCache` reads the
log-probabilities by sample id, and :class:`WithIds` adds ids to a dataset. A cache needs ``pip
install fastkd[train]``. :mod:`fastkd.teachers.served` reads the replies of inference servers.
``docs/teachers.md`` describes the file format, and has measured sizes and speeds.
"""

from fastkd.batches import WithIds
from fastkd.teachers import served
from fastkd.teachers.cache import TeacherCache
from fastkd.teachers.digests import fingerprint
from fastkd.teachers.writing import precompute

__all__ = ["TeacherCache", "WithIds", "fingerprint", "precompute", "served"]


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
