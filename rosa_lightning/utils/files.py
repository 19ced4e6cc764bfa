"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from rosa_lightning.utils.opening import check_name, writing

_PART = re.compile(r"\.rosa-[0-9a-f]{8}\.part")
"""Names of what is being written, or was when its process was killed."""


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write into, beside the final one, and rename it when all is written.

    After an error nothing stays behind, folders made on the way included.

    Raises:
        ValueError: The path exists already.
        OSError: It cannot be written to, or the disk is full.
    """
    check_name(path)
    # Resolved, so that nothing is made for the sake of `a/../b`.
    target = Path(path).resolve()
    if target.exists() or Path(path).is_symlink():
        raise ValueError(f"{path} exists already. Give a folder that does not, or remove it first.")
    made = [parent for parent in target.parents if not parent.exists()]
    written = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with writing(path):
            yield written
        _open_to_others(written)
        written.rename(target)
    except BaseException:
        if written is not None:
            shutil.rmtree(written, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def write_file(path: Path, *content: bytes | memoryview | array[Any]) -> None:
    """Write a file that is never seen half-written, whoever else writes it at the same time.

    When this returns, the file is on the disk, and not in memory alone. What another process left
    that was killed while writing into the same folder is removed.

    Raises:
        OSError: It cannot be written, or the disk is full; names the file. One that was there is
            there still.
        ValueError: The path holds a null character.
    """
    check_name(path)
    with writing(path, beside=True), part_beside(path) as part:
        with _open_part(part) as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)


def check_writable(folder: Path, what: str, mend: str) -> None:
    """Check that files can be written into a folder and taken away; leaves nothing behind.

    Args:
        folder: It need not be there.
        what: What would be written, for the message.
        mend: The sentence that says how to mend it.

    Raises:
        OSError: They cannot.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with part_beside(folder / "any") as part, _open_part(part) as file:
            file.write(bytes(4096))
    except OSError as error:
        said = type(error)(
            f"{what} cannot be written to {folder}: {error.strerror or error}. {mend}"
        )
        said.errno = error.errno
        raise said from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def part_beside(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Give an empty file or folder, in the folder of another, to be written and then renamed.

    Folders on the way are made.

    It is locked, so that nobody takes it for what a killed process has left. What is still there at
    the end is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    while True:
        part = path.with_name(f".rosa-{uuid4().hex[:8]}.part")  # short, whatever the name
        part.mkdir() if is_folder else part.touch(exist_ok=False)
        lock = _locked(part)
        if part.exists():
            break
        _unlock(lock)  # taken for a leftover before it was locked
    try:
        yield part
    finally:
        _remove(part)
        _unlock(lock)


def put_in_place(part: Path, path: Path) -> None:
    """Rename a folder that is whole, in the place of a file or folder that may be there.

    What was there is removed when the new one has its place. Where the file system cannot exchange
    two names at once (NFS), the older one is beside it for a moment, as ``.<name>.old-<digits>``.

    Raises:
        OSError: It cannot be renamed; names the path.
    """
    with writing(path, beside=True):
        for inner in (*part.rglob("*"), part):
            _sync(inner)
        if not (path.exists() or path.is_symlink()):
            part.rename(path)
        elif not _exchange(part, path):
            older = path.with_name(f".{path.name}.old-{uuid4().hex[:8]}")
            path.rename(older)
            part.rename(path)
            _remove(older)
        _sync(path.parent)


def _open_part(part: Path) -> BinaryIO:
    """Open a part to write into, and no link that somebody has put in its place."""
    return os.fdopen(os.open(part, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)), "wb")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; whether that can be done here."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    status = libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return bool(status == 0)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Remove parts that nobody holds: those of processes that were killed."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _PART.fullmatch(path.name) and not path.is_symlink():
                lock = _locked(path, wait=False)
                if lock is not None:
                    _remove(path)
                    _unlock(lock)


def _locked(path: Path, wait: bool = True) -> int | None:
    """Lock a file or folder; None where it is held by another, or there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with suppress(OSError):  # gone, held, or on a file system without locks
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(lock)
            raise
        return lock
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with suppress(PermissionError, IsADirectoryError):  # folders cannot be opened on Windows
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot
                raise
        finally:
            os.close(number)


def _open_to_others(folder: Path) -> None:
    """Give what was written the permissions that the user's mask says; temporary is private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
