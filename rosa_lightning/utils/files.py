"""Reading regular files within bounds; writing files and folders that appear whole or not at all.

A pipe or a device in the place of a file would hang its reader, and a link that somebody put into
a shared folder would have another file overwritten.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO
from uuid import uuid4

SETTINGS_BYTES = 2**26
"""Largest file of settings that is read."""
LINE_BYTES = 2**26
"""Longest line of a file that is read line by line."""
SHARDED_METADATA = "meta.pt"
"""The file of a sharded checkpoint's folder that holds all but the tensors; Lightning's name."""
_KINDS = {"p": "a pipe", "s": "a socket", "c": "a device", "b": "a device", "d": "a folder"}
"""What is no regular file, by the letter of `stat.filemode`."""


# Reading.


def check_input(path: str | Path) -> None:
    """Check that a file which a library will open is a regular one, links followed.

    Raises:
        OSError: There is none, or it is no regular file.
        ValueError: The path holds a null character.
    """
    check_name(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.filemode(mode)[0], "something else")
        error = IsADirectoryError if stat.S_ISDIR(mode) else OSError
        raise error(f"{path} is {kind}, and a regular file is expected. Name a file.")


def check_name(path: str | Path) -> None:
    """Raise ValueError for a path with a null character, which no file can have."""
    if "\0" in os.fspath(path):
        raise ValueError(f"the path {os.fspath(path)!r} holds a null character. Take it out.")


def open_input(path: str | Path) -> BufferedReader:
    """Open a regular file to read bytes from; errors as `check_input`."""
    check_input(path)
    return open(path, "rb")


def file_digest(path: str | Path) -> str:
    """What tells a regular file's content from others, as 16 characters."""
    with open_input(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """A regular file's content of at most ``most`` bytes, by default half of the machine's memory.

    Raises:
        OSError, ValueError: As `check_input`; ValueError also for a larger file.
    """
    limit = memory_bytes() // 2 if most is None else most
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(
                f"{path} has {size:,} bytes, and at most {limit:,} are read. Give a smaller file."
            )
        return file.read()


def read_text(path: str | Path) -> str:
    """A file's UTF-8 text of at most `SETTINGS_BYTES`, without a byte order mark.

    Errors as `read_bytes`.
    """
    try:
        return read_bytes(path, SETTINGS_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it in UTF-8."
        ) from error


def read_lines(file: IO[bytes], name: str | Path) -> Iterator[bytes]:
    """The lines of an open file with their line breaks; ValueError for one beyond `LINE_BYTES`."""
    lines = iter(lambda: file.readline(LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > LINE_BYTES:
            raise ValueError(
                f"{name}, line {number} has more than {LINE_BYTES:,} bytes. Give a text file of "
                "shorter lines."
            )
        yield line


def check_archive(file: IO[bytes], name: str | Path) -> None:
    """Refuse a file of torch's that would unpack to more than its own size.

    torch stores the parts of a file uncompressed. It would also read compressed ones, which may
    unpack to thousands of times their size, and its format from before 2020, which may claim any.

    The file is open at its start, and is left there; messages call it by the name.
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


def shown(path: str | Path) -> str:
    """A path as seen from the working folder, where that is shorter."""
    whole = os.path.abspath(path)
    return min(whole, os.path.relpath(whole), key=len)


def printable(name: object) -> str:
    """Text without halves of surrogate pairs, which stand for bytes of names not in UTF-8."""
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", str(name))


def memory_bytes() -> int:
    """The machine's memory; 16 GiB where it cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return 2**34


def user_cache() -> Path | None:
    """This package's folder in the user's cache folder; None for a user without a home."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if caches.startswith("~") else Path(caches) / "rosa_lightning"


# Writing.


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Give a folder to write into, beside the final one, and rename it when all is written.

    After an error nothing stays behind, folders made on the way included.

    Raises:
        ValueError: The path exists already.
        OSError: It cannot be written to, or the disk is full.
    """
    check_name(path)
    target = Path(path).resolve()  # so that nothing is made for the sake of `a/../b`
    if target.exists() or Path(path).is_symlink():
        raise ValueError(f"{path} exists already. Give a folder that does not, or remove it first.")
    with part_beside(target, is_folder=True) as part, writing(path):
        yield part
        part.rename(target)


def atomic_write(path: Path, *content: bytes | memoryview) -> None:
    """Write a file that is never seen half-written, nor found so after a power failure.

    Raises:
        OSError: It cannot be written, or the disk is full; names the file. An older one of that
            name is still there.
        ValueError: The path holds a null character.
    """
    check_name(path)
    with writing(path, beside=True), part_beside(path) as part:
        with part.open("r+b") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def check_writable(folder: Path, what: str, remedy: str) -> None:
    """Check that files can be written into a folder and removed, whether it exists yet or not.

    Raises:
        OSError: They cannot; says what would be written, and the remedy.
    """
    try:
        with part_beside(folder / "any") as part:
            part.write_bytes(bytes(4096))
    except OSError as error:
        said = type(error)(
            f"{what} cannot be written to {folder}: {error.strerror or error}. {remedy}"
        )
        said.errno = error.errno
        raise said from error


@contextmanager
def part_beside(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Give an empty file or folder beside another path, to be written and renamed to it.

    Folders on the way are made, and removed if they are empty at the end. What is still there at
    the end is removed, and so is what processes left in this folder that were killed while writing.
    A lock tells those from what is in use.
    """
    from filelock import FileLock, Timeout

    made = [parent for parent in path.parents if not parent.exists()]
    part = path.with_name(f".rosa-{uuid4().hex[:8]}.part")  # short, whatever the name
    lock = part.with_name(f"{part.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(".rosa-????????.part.lock"):
            with suppress(OSError, Timeout), FileLock(left, timeout=0):
                _remove(left.with_suffix(""))
                left.unlink()
        with FileLock(lock):
            try:
                part.mkdir() if is_folder else part.touch(exist_ok=False)
                yield part
            finally:
                _remove(part)
                _remove(lock)
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def put_in_place(part: Path, path: Path) -> None:
    """Rename a file or folder that is whole, in the place of what may be there.

    The older one is beside it for a moment, as ``.<name>.old-<digits>``, and then removed.

    Raises:
        OSError: It cannot be renamed; names the path.
    """
    with writing(path, beside=True):
        for inner in (*part.rglob("*"), part):
            if inner.is_file():
                with inner.open("r+b") as file:
                    os.fsync(file.fileno())
        older = path.with_name(f".{path.name}.old-{uuid4().hex[:8]}")
        if path.exists() or path.is_symlink():
            path.rename(older)
        part.rename(path)
        _remove(older)


@contextmanager
def writing(path: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Name the file in errors of the system that name none, such as that of a full disk.

    ``beside``: it is written beside its place and renamed, so it is named in all errors.
    """
    try:
        yield
    except OSError as error:
        if not beside and (error.filename is not None or error.errno is None):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Make room, or write to another place." if full else "Write to another place."
        named = type(error)(f"{path} cannot be written: {error.strerror or error}. {remedy}")
        named.errno = error.errno
        raise named from error


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
