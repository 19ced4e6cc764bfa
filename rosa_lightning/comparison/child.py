"""Runs a command of this package for `runner`: alone in its folder, and no longer than its parent.

    python -m rosa_lightning.comparison.child LOCK COMMAND ...

The parent holds the other end of standard input. That end closes when the parent is gone, by
whatever signal, on every system.
"""

import os
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress

from filelock import FileLock

GRACE_S = 600.0
"""How long a run may take to write its checkpoint, in seconds."""


def _end_with_parent() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves a checkpoint
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the command, once no other process works in its folder."""
    lock = sys.argv.pop(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with FileLock(lock):
        runpy.run_module("rosa_lightning", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
