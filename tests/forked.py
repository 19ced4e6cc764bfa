"""Processes of their own that start at once: forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.warm"])


def start(work: Callable[..., object], *given: object, log: Path, **env: str) -> ForkServerProcess:
    """Call a function of a module in the folder of its log, with these variables set as well.

    The process leads a group of its own. Its status is 1 if the function fails, and what the
    function returns if that is a number.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    process = _context.Process(target=_run, args=(work, given, environment, log.absolute()))
    with contextlib.chdir(ROOT):  # where the first start finds what it imports
        process.start()
    return process


def finish(work: Callable[..., object], *given: object, log: Path) -> None:
    """Call a function in a process of its own, which is to end well."""
    process = start(work, *given, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()


def _run(work: Callable[..., object], given: tuple, environment: dict[str, str], log: Path) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(log.parent)
    status = work(*given)
    sys.exit(status if isinstance(status, int) else 0)
