"""The records of a data source: read, checked, and kept in an Arrow table.

Records are counted from 1.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from rosa_lightning.data.row_kinds import to_record
from rosa_lightning.data.rows import read_rows
from rosa_lightning.data.sources import Purpose, Source, as_source
from rosa_lightning.tasks.records import TASKS, Record, Task, Turn
from rosa_lightning.utils.files import check_input, check_name, part_beside
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

_COLUMNS = ("instruction", "input", "output", "answer", "turns", "index")
_CHUNK = 1000
"""Records that are read or written at a time."""


class Indexed(Sequence[T]):
    """A sequence whose items are read by position, some at a time."""

    def __init__(self, size: int) -> None:
        self.positions: NDArray[np.uint32] = np.arange(size, dtype=np.uint32)
        """The items in the order of the sequence, 4 bytes each."""

    @abstractmethod
    def at(self, positions: NDArray[np.uint32]) -> list[T]:
        """The items at these positions of the table."""

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self.at(self.positions[index])
        return self.at(self.positions[[index]])[0]

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def take(self, indices: Any) -> list[T]:
        """The items at these indices of the sequence."""
        return self.at(self.positions[indices])

    def select(self, chosen: NDArray[Any]) -> Self:
        """The items at these indices, or where a mask is true."""
        selected = copy(self)
        selected.positions = self.positions[chosen]
        return selected


class Records(Indexed[Record]):
    """Records of one source in a `datasets.Dataset`, in memory or mapped from disk."""

    def __init__(self, rows: Any, task: Task, source: str, content: str | None = None) -> None:
        super().__init__(len(rows))
        self.rows, self.task, self.source = rows, task, source
        self.content = content or content_digest(self)
        """A digest of the source's content."""

    @property
    def on_disk(self) -> bool:
        """Whether the table is larger than memory might be."""
        return self.content.startswith("file")

    def at(self, positions: NDArray[np.uint32]) -> list[Record]:
        """The records in these rows."""
        start, size = int(positions[0]) if len(positions) else 0, len(positions)
        in_one_piece = np.array_equal(positions, np.arange(start, start + size))
        chosen = slice(start, start + size) if in_one_piece else positions.tolist()
        return self.converted(self.rows[chosen])

    def converted(self, columns: Mapping[str, list[Any]]) -> list[Record]:
        """Rows as records."""
        own = None if self.task.name in TASKS else self.task
        values = (columns[name] for name in _COLUMNS)
        return [
            Record(
                *(asked, context, output, answer, self.task.name, self.source, index),
                own_task=own,
                turns=_turns(turns),
            )
            for asked, context, output, answer, turns, index in zip(*values, strict=True)
        ]

    def sizes(self) -> NDArray[np.int32]:
        """Bytes of each record's texts, from the table's offsets alone."""
        import pyarrow.compute as pc

        sizes = np.zeros(len(self.rows), np.int32)
        for name in ("instruction", "input", "output", "turns"):
            start = 0
            for chunk in self.rows.data.column(name).chunks:
                lengths = pc.fill_null(pc.binary_length(chunk), 0)
                sizes[start : start + len(chunk)] += lengths.to_numpy()
                start += len(chunk)
        return sizes[self.positions]


def content_digest(records: Iterable[Record]) -> str:
    """A digest of what records say."""
    content = hashlib.blake2b(digest_size=8)
    for record in records:
        texts = (record.instruction, record.input, record.output, record.answer or "")
        turns = [text for turn in record.turns for text in turn]
        content.update("\0".join([*texts, *turns]).encode() + b"\1")
    return f"records {content.hexdigest()}"


def _columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Records as columns of a table, conversations as JSON."""
    columns = {name: [getattr(record, name) for record in records] for name in _COLUMNS}
    columns["turns"] = [json.dumps(turns) if turns else None for turns in columns["turns"]]
    return columns


def _turns(column: str | None) -> tuple[Turn, ...]:
    return () if column is None else tuple(Turn(*turn) for turn in json.loads(column))


def load_records(
    source: Source,
    purpose: Purpose = "train",
    tasks: Mapping[str, Task] = TASKS,
    seed: int = 0,
    cache: Path | None = None,
) -> Sequence[Record]:
    """All records of a source, or `max_examples` of them, as `seed` chooses; in their order.

    What a record needs for a purpose, `to_record` says. What is trained on is `Records`; large
    sources are converted once into a table in `cache` (a temporary one without), which stays on
    disk.

    Raises OSError for what cannot be read or reached, ValueError for what has not the expected
    shape.
    """
    source = as_source(source, tasks)
    task = tasks[source.benchmark]
    rows = read_rows(source, task, purpose)
    numbered = enumerate(rows.rows, start=1)
    records = (to_record(row, at, number, source, task, purpose) for number, (at, row) in numbered)
    if rows.on_disk:
        first = [*islice(records, 1)]  # a file that is no data fails here, before it is hashed
        content = f"{rows.content()}{json.dumps(source.columns) if source.columns else ''}"
        table = _disk_table(chain(first, records), content, task, purpose, cache)
        kept = Records(table, task, source.label, f"file {content}")
        return kept.select(_drawn(len(kept), source, task, seed))
    if purpose != "train":
        found = list(records)
        return [found[position] for position in _drawn(len(found), source, task, seed)]
    import datasets  # late, as it takes a second
    import pyarrow

    features = _features()
    whole = pyarrow.Table.from_batches(_batches(records, features), features.arrow_schema)
    drawn = _drawn(len(whole), source, task, seed)
    table = whole if len(drawn) == len(whole) else whole.take(drawn)
    info = datasets.DatasetInfo(features=features)
    return Records(datasets.Dataset(table, info), task, source.label)


def _features() -> datasets.Features:
    import datasets

    text, number = datasets.Value("large_string"), datasets.Value("int32")
    return datasets.Features(dict.fromkeys(_COLUMNS, text) | {"index": number})


def _batches(records: Iterable[Record], features: datasets.Features) -> Iterator[Any]:
    """Records as Arrow batches."""
    import pyarrow

    schema, rest = features.arrow_schema, iter(records)
    while some := list(islice(rest, _CHUNK)):
        arrays = map(pyarrow.array, _columns(some).values(), schema.types)
        yield pyarrow.RecordBatch.from_arrays([*arrays], schema=schema)


def _drawn(count: int, source: Source, task: Task, seed: int) -> NDArray[np.int64]:
    """Positions of at most `max_examples` records, in their order."""
    if not count:
        raise ValueError(
            f"{source.location} (task {task.name}) holds no records. Name a source that has some."
        )
    if source.max_examples is None or source.max_examples >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(count)[: source.max_examples])


def _disk_table(
    records: Iterator[Record], content: str, task: Task, purpose: Purpose, cache: Path | None
) -> datasets.Dataset:
    """The records in an Arrow file that is mapped into memory."""
    import datasets
    import pyarrow

    features = _features()
    cache = temporary_folder() if cache is None else cache
    own = getattr(task.convert, "keywords", None)
    about = [_COLUMNS, content, task.name, task.format, task.labels, task.response, own, purpose]
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()

    def write(path: Path) -> None:
        rows = datasets.utils.tqdm(records, desc="Reading", unit=" records")
        schema = features.arrow_schema
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as out:
            for batch in _batches(rows, features):
                out.write_batch(batch)

    return cached_table(cache / f"records-{digest}.arrow", features, None, write)


def temporary_folder() -> Path:
    """A folder that is removed at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="rosa-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def cached_table(
    path: Path, features: datasets.Features, rows: int | None, write: Callable[[Path], object]
) -> datasets.Dataset:
    """The table in a file, written first if there is none, or one without these rows or features.

    Of several processes that want the same file one writes it, and the others wait.
    """
    import datasets
    import pyarrow

    check_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if os.path.lexists(path):
            try:
                check_input(path)
                found = datasets.Dataset.from_file(os.fspath(path))
                if found.features == features and (rows is None or len(found) == rows):
                    return found
                reason = "it holds other records"
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                reason = one_line(error, 200)
            rank_zero_warn(f"{path} is damaged ({reason}), so it is written anew.")
            path.unlink()
        with part_beside(path, is_folder=True) as part:
            write(part / path.name)
            (part / path.name).replace(path)
        return datasets.Dataset.from_file(os.fspath(path))
