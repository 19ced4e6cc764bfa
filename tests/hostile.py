"""What stands where a file is expected, and a bound on the time that reading it may take."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

KINDS = ("a pipe", "a socket", "a device", "a folder")


def put(kind: str, path: Path) -> Path:
    """Put something at a path that is no regular file."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)  # names of sockets are short
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@contextmanager
def limited(seconds: int = 20) -> Iterator[None]:
    """A hang is a failure."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
