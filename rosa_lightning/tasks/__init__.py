"""What a benchmark is.

The table of tasks (`registry`), hub rows as samples (`converters`), records and their candidates
(`records`), answers found in text and compared (`answers`), and a user's own tasks (`custom`).
"""

from rosa_lightning.utils.lazy import lazy_names

_HOMES = {
    "TASKS": "registry",
    "Record": "records",
    "Sample": "converters",
    "Task": "registry",
    "candidates": "records",
    "extract_answer": "records",
    "same_answer": "records",
    "with_own_tasks": "custom",
}

__all__ = [*_HOMES]

__getattr__ = lazy_names(__name__, _HOMES)
