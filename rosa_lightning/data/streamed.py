"""Records that stay on disk and are read when they are asked for.

An index makes them a sequence like any other: order, shares, held-out split, ranks and resumption
are those of records in memory, which a stream with a shuffle buffer could not give.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, NoReturn, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from rosa_lightning.utils.files import open_input, read_lines

T = TypeVar("T")
S = TypeVar("S")

_LINES_A_BLOCK = 8
"""The index holds the start of every eighth line: one byte of memory a line."""
_ROWS_A_READ = 1000


class Rows(Protocol):
    """Rows on disk."""

    digest: str
    """Tells their content from any other; empty where that is not known."""

    def __len__(self) -> int: ...

    def read(self, positions: NDArray[Any]) -> Iterator[Any]:
        """The rows at these positions, counted from 0; ascending ones are read fastest."""
        ...


class Lines:
    """The lines of a file that are not blank, as bytes without their line break.

    The file is opened anew for each read, so that worker processes can share this object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, count, offset = [], 0, 0
        content = hashlib.blake2b(digest_size=8)
        with open_input(path) as file:
            self._state = _state(file)
            if file.read(3) == b"\xef\xbb\xbf":  # byte order mark
                offset = 3
            file.seek(offset)
            for line in read_lines(file, path):
                content.update(line)
                if not line.isspace():
                    if count % _LINES_A_BLOCK == 0:
                        starts.append(offset)
                    count += 1
                offset += len(line)
            self._check_unchanged(file)
        self._count = count
        self.digest = f"lines {content.hexdigest()}"
        """Tells the file's content from any other."""
        self._starts = np.array([*starts, offset], dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    def read(self, positions: NDArray[Any]) -> Iterator[bytes]:
        """The lines at these positions. Raises ValueError if the file has changed."""
        current, lines = -1, [b""]
        with open_input(self.path) as file:
            self._check_unchanged(file)
            for position in positions:
                block, line = divmod(int(position), _LINES_A_BLOCK)
                if block != current:
                    current, lines = block, self._block(file, block)
                yield lines[line]

    def _block(self, file: BinaryIO, block: int) -> list[bytes]:
        start, stop = self._starts[block : block + 2].tolist()
        file.seek(start)
        lines = [line for line in file.read(stop - start).split(b"\n") if line.strip()]
        if len(lines) != min(_LINES_A_BLOCK, self._count - block * _LINES_A_BLOCK):
            self._fail()
        return lines

    def _check_unchanged(self, file: BinaryIO) -> None:
        """See that it is the file that was indexed; lines of equal length would not tell."""
        if _state(file) != self._state:
            self._fail()

    def _fail(self) -> NoReturn:
        raise ValueError(
            f"{self.path} has changed since it was first read. Leave it as it is while it is "
            "trained on, and begin anew."
        )


class ArrowRows:
    """The rows of a `datasets.Dataset`, whose Arrow file is mapped into memory."""

    def __init__(self, dataset: Any, name: str = "the data set", digest: str = "") -> None:
        self.dataset, self.name, self.digest = dataset, name, digest

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, positions: NDArray[Any]) -> Iterator[dict[str, Any]]:
        """The rows at these positions, a mapping each."""
        for start in range(0, len(positions), _ROWS_A_READ):
            try:
                columns = self.dataset[positions[start : start + _ROWS_A_READ].tolist()]
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.name} holds text that is not UTF-8 in records {positions[start] + 1} "
                    "and following. Save it in UTF-8."
                ) from error
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))


class Streamed(Sequence[T], Generic[T]):
    """Some rows on disk, each converted when it is asked for.

    Args:
        rows: All of them.
        convert: Makes an item of a row and its number, counted from 1.
        positions: Which rows; all by default.
    """

    def __init__(
        self,
        rows: Rows,
        convert: Callable[[Any, int], T],
        positions: NDArray[np.uint32] | None = None,
    ) -> None:
        self._rows, self._convert = rows, convert
        self._positions = np.arange(len(rows), dtype=np.uint32) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Streamed[T]: ...
    def __getitem__(self, index: int | slice) -> T | Streamed[T]:
        if isinstance(index, slice):
            return Streamed(self._rows, self._convert, self._positions[index])
        position = self._positions[[index]]
        return self._convert(next(self._rows.read(position)), int(position[0]) + 1)

    def __iter__(self) -> Iterator[T]:
        """All of them, in one pass over the file."""
        rows = self._rows.read(self._positions)
        for position, row in zip(self._positions, rows, strict=True):
            yield self._convert(row, int(position) + 1)

    @property
    def digest(self) -> str:
        """Tells the content of all rows from any other; empty where that is not known."""
        return self._rows.digest

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each line, or characters of each row's values, in one pass over the file."""
        rows = self._rows.read(self._positions)
        return np.fromiter(map(_size, rows), np.int64, len(self))

    def select(self, indices: NDArray[Any]) -> Streamed[T]:
        """The items at these indices, or where a mask is true."""
        return Streamed(self._rows, self._convert, self._positions[indices])

    def map(self, function: Callable[[T], S]) -> Streamed[S]:
        """What `function` makes of each item when it is asked for."""
        return Streamed(self._rows, partial(_composed, self._convert, function), self._positions)


def _state(file: BinaryIO) -> tuple[int, int, int]:
    """What tells an open file from another, and from itself before a change."""
    now = os.fstat(file.fileno())
    return now.st_size, now.st_mtime_ns, now.st_ino


def _size(row: bytes | Mapping[str, Any]) -> int:
    return len(row) if isinstance(row, bytes) else sum(len(str(value)) for value in row.values())


def _composed(
    convert: Callable[[Any, int], T], function: Callable[[T], S], row: Any, number: int
) -> S:
    return function(convert(row, number))


def select(items: Sequence[T], mask: NDArray[np.bool_]) -> Sequence[T]:
    """The items where the mask is true, in memory or streamed as `items` is."""
    if isinstance(items, Streamed):
        return items.select(mask)
    return [item for item, chosen in zip(items, mask, strict=True) if chosen]
