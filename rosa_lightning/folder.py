"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from rosa_lightning.opening import check_name, writing


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write into, beside the final one, and rename it when all is written.

    After an error nothing stays behind, folders made on the way included.

    Raises:
        ValueError: The path exists already.
        OSError: It cannot be written to, or the disk is full.
    """
    # Resolved, so that nothing is made for the sake of `a/../b`.
    check_name(path)
    target = Path(path).resolve()
    if target.exists() or Path(path).is_symlink():
        raise ValueError(f"{path} exists already. Give a folder that does not, or remove it first.")
    made = [parent for parent in target.parents if not parent.exists()]
    written = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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


def write_file(path: Path, *content: bytes | array[Any]) -> None:
    """Write a file that is never seen half-written, whoever else writes it at the same time.

    Raises:
        OSError: It cannot be written, or the disk is full; names the file.
        ValueError: The path holds a null character.
    """
    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        with writing(path), beside.open("xb") as file:
            file.writelines(content)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def _open_to_others(folder: Path) -> None:
    """Give what was written the permissions that the user's mask says; temporary is private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
