"""A terminal to run in: what stands on its screen in the end."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CODES = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+|\x1b")


def screen(written: str, width: int) -> list[str]:
    """The lines that a terminal of a width shows, those that have scrolled up too."""
    rows, row, column = [""], 0, 0
    for found in _CODES.finditer(written):
        text, (private, number, code) = found[0], found.groups()
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif code == "A":
            row = max(0, row - int(number or 1))
        elif code == "K" and number == "2":
            rows[row] = ""
        elif code is None:
            for character in text:
                if column == width:
                    row, column = row + 1, 0
                    rows += [""] * (row + 1 - len(rows))
                line = rows[row].ljust(column)
                rows[row] = line[:column] + character + line[column + 1 :]
                column += 1
        else:
            assert code in "mhl" or private, text
    return [line.rstrip() for line in rows]


@contextmanager
def terminal(monkeypatch, width: int) -> Iterator[list[str]]:
    """Let both streams be a terminal of a width; its lines are there afterwards."""
    lines: list[str] = []
    master, slave = os.openpty()
    written = bytearray()

    def read() -> None:
        while True:
            try:
                block = os.read(master, 65536)
            except OSError:  # the other end is closed
                return
            written.extend(block)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch:
        for name, value in {"COLUMNS": width, "LINES": 40, "TERM": "xterm-256color"}.items():
            patch.setenv(name, str(value))
        with os.fdopen(slave, "w", buffering=1) as stream:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            yield lines
    reader.join()
    os.close(master)
    lines += screen(written.decode().replace("\r\n", "\n"), width)
