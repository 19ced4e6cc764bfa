"""Opening files that others may have put there: regular ones, in bounds, and no link written to.

A pipe, a socket or a device in the place of a file would hang its reader or never end, and a link
that somebody put into a shared folder would have another file written over.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, BinaryIO, TextIO

SETTINGS_BYTES = 2**26
"""Largest file of settings that is read; those that are met have up to a megabyte or two."""
LINE_BYTES = 2**26
"""Longest line of a file that is read line by line."""

_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
# A pipe without a writer would block already when it is opened.
_READ |= getattr(os, "O_NONBLOCK", 0)
_WRITE = os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_input(path: str | Path) -> None:
    """Check that a file which a library will open is one that can be read to its end.

    Raises:
        OSError: There is none, or it is no regular file (behind links).
        ValueError: The path holds a null character.
    """
    check_name(path)
    _check_regular(path, os.stat(path).st_mode)


def check_name(path: str | Path) -> None:
    """Raise ValueError for a path with a null character, which no file can have."""
    if "\0" in os.fspath(path):
        raise ValueError(
            f"the path {os.fspath(path)!r} holds a null character, which no file name can. Take it "
            "out."
        )


def open_input(path: str | Path) -> BufferedReader:
    """Open a regular file to read bytes from; links are followed.

    Raises:
        OSError, ValueError: As `check_input`.
    """
    check_input(path)
    file = os.fdopen(os.open(path, _READ), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been exchanged since
    except OSError:
        file.close()
        raise
    return file


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """A regular file's content.

    Args:
        path: The file.
        most: Bytes that it may have; by default half of the machine's memory.

    Raises:
        OSError, ValueError: As `check_input`; ValueError also for a larger file.
    """
    limit = memory_bytes() // 2 if most is None else most
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else file.read(limit + 1)
    if max(size, len(content)) > limit:
        raise ValueError(
            f"{path} has {max(size, len(content)):,} bytes, and at most {limit:,} are read. Give a "
            "smaller file."
        )
    return content


def read_text(path: str | Path, most: int = SETTINGS_BYTES) -> str:
    """A regular file's UTF-8 text, without a byte order mark.

    Raises:
        OSError, ValueError: As `read_bytes`; ValueError also for what is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it in UTF-8."
        ) from error


def read_lines(file: IO[bytes], name: str | Path) -> Iterator[bytes]:
    """The lines of an open file, with their line breaks.

    Raises:
        ValueError: A line is longer than `LINE_BYTES`, as in a file that is no text.
    """
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise ValueError(
                f"{name}, line {number} has more than {LINE_BYTES:,} bytes. Give a text file of "
                "shorter lines."
            )
        yield line


def open_new(path: Path) -> BinaryIO:
    """Make a file of a name that belongs to this package, in place of an older one.

    Neither a link nor a hard link of that name is written through: it is removed, and what it
    led to stays as it is.

    Raises:
        OSError: It cannot be made, or somebody makes one of that name again and again.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, _WRITE | os.O_EXCL | os.O_WRONLY, 0o666), "wb")


def open_new_text(path: Path) -> TextIO:
    """As `open_new`, for text; halves of surrogate pairs are spelt as JSON spells them."""
    return TextIOWrapper(open_new(path), encoding="utf-8", errors="backslashreplace", newline="\n")


def open_lock(path: Path) -> BinaryIO:
    """Open a file to lock, made where there is none; what it holds is left alone.

    Raises:
        OSError: It cannot be opened, or is a link or no regular file.
    """
    wait_not = getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(path, _WRITE | os.O_RDWR | wait_not, 0o666), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


@contextmanager
def writing(path: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Name the file in errors of the system that name none, such as that of a full disk.

    Args:
        path: The file.
        beside: It is written beside its place and renamed: name it in all errors.
    """
    try:
        yield
    except OSError as error:
        if not beside and (error.filename is not None or error.errno is None):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "Make room, or write to another place." if full else "Write to another place."
        named = type(error)(f"{path} cannot be written: {error.strerror or error}. {mend}")
        named.errno = error.errno
        raise named from error


def check_archive(file: IO[bytes], name: str | Path) -> None:
    """Check that a file of torch's holds no more than its own size says, before it is unpacked.

    torch stores the parts of a file as they are. Compressed ones, which it would read too, may
    unpack to thousands of times their size; its format of before 2020 may claim any size.

    Args:
        file: Open, at its start; is left there.
        name: What to call it.

    Raises:
        ValueError: Says what it is.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(
            f"{name} is not whole, or no file of torch's format since 1.6 ({error}). Give one that "
            "torch.save has written."
        ) from error
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    unpacked = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or unpacked > size:
        raise ValueError(
            f"{name} has {size:,} bytes and unpacks to {unpacked:,}, which no file of torch does. "
            "Do not trust it."
        )


def printable(name: object) -> str:
    """Text without halves of surrogate pairs, which stand for bytes of names not in UTF-8."""
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", str(name))


def memory_bytes() -> int:
    """The machine's memory; 16 GiB where it cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**34


def _check_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    error = IsADirectoryError if stat.S_ISDIR(mode) else OSError
    raise error(f"{path} is {kind}, and a regular file is expected. Name a file.")
