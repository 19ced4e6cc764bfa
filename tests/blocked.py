"""What cannot be imported for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str, anew: str) -> Iterator[None]:
    """Importing these packages, or any part of them, fails, and one is imported anew."""

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in (*names, anew)]

    before = {name: sys.modules.pop(name) for name in loaded()}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(before)
