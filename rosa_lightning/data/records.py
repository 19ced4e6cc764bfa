"""The records of a data source: read, checked, and kept in an Arrow table.

Three kinds of rows are read: LLM-Adapters' `instruction`, `input`, `output`, `answer`; GSM8K's
`question`, `answer` with the final number after `####`; and the fields of the hub data set of the
source's task. Errors name file, record and field; records are counted from 1.
"""

from __future__ import annotations

import atexit
import hashlib
import math
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

from rosa_lightning.data.rows import kind_of, read_rows
from rosa_lightning.data.sources import Purpose, Source, as_source
from rosa_lightning.tasks.converters import written
from rosa_lightning.tasks.records import TASKS, Record, Task, check_gold, reference
from rosa_lightning.utils.files import check_input, check_name, part_beside
from rosa_lightning.utils.strict_json import half_character
from rosa_lightning.utils.text import one_line

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")

_SCHEMAS = (
    "expected instruction, input, output, answer, or GSM8K's question, answer ('... #### 42')"
)
_MAY_LACK = ("rationale",)
"""Fields of benchmarks that may be null; an answer too, in some splits."""
_COLUMNS = ("instruction", "input", "output", "answer", "index")
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
            Record(asked, context, output, answer, self.task.name, self.source, index, own)
            for asked, context, output, answer, index in zip(*values, strict=True)
        ]

    def sizes(self) -> NDArray[np.int32]:
        """Bytes of each record's texts, from the table's offsets alone."""
        import pyarrow.compute as pc

        sizes = np.zeros(len(self.rows), np.int32)
        for name in _COLUMNS[:3]:
            start = 0
            for chunk in self.rows.data.column(name).chunks:
                sizes[start : start + len(chunk)] += pc.binary_length(chunk).to_numpy()
                start += len(chunk)
        return sizes[self.positions]


def content_digest(records: Iterable[Record]) -> str:
    """A digest of what records say."""
    content = hashlib.blake2b(digest_size=8)
    for record in records:
        texts = (record.instruction, record.input, record.output, record.answer or "")
        content.update("\0".join(texts).encode() + b"\1")
    return f"records {content.hexdigest()}"


def load_records(
    source: Source,
    purpose: Purpose = "train",
    tasks: Mapping[str, Task] = TASKS,
    seed: int = 0,
    cache: Path | None = None,
) -> Sequence[Record]:
    """All records of a source, or `max_examples` of them, as `seed` chooses; in their order.

    To train, a record needs an output; to test, an answer or an output that states one, which the
    task's format can express; to predict and to audit, only what is asked. What is trained on is
    `Records`; large sources are converted once into a table in `cache` (a temporary one without),
    which stays on disk.

    Raises OSError for what cannot be read or reached, ValueError for what has not the expected
    shape.
    """
    source = as_source(source, tasks)
    task = tasks[source.benchmark]
    rows = read_rows(source, task, purpose)
    numbered = enumerate(rows.rows, start=1)
    records = (_record(row, number, source, task, purpose) for number, row in numbered)
    if rows.on_disk:
        first = [*islice(records, 1)]  # a file that is no data fails here, before it is hashed
        content = rows.content()
        table = _disk_table(chain(first, records), content, task, purpose, cache)
        kept = Records(table, task, source.label, f"file {content}")
        return kept.select(_drawn(len(kept), source, task, seed))
    found = list(records)
    found = [found[position] for position in _drawn(len(found), source, task, seed)]
    if purpose != "train":
        return found
    import datasets  # late, as it takes a second

    columns = {name: [getattr(record, name) for record in found] for name in _COLUMNS}
    return Records(datasets.Dataset.from_dict(columns, _features()), task, source.label)


def _features() -> datasets.Features:
    import datasets

    text, number = datasets.Value("large_string"), datasets.Value("int32")
    return datasets.Features(dict.fromkeys(_COLUMNS, text) | {"index": number})


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
    if cache is None:
        cache = Path(tempfile.mkdtemp(prefix="rosa-records-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    own = getattr(task.convert, "keywords", None)
    about = [content, task.name, task.format, task.labels, task.response, own, purpose]
    digest = hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()

    def write(path: Path) -> None:
        schema = features.arrow_schema
        rows = iter(datasets.utils.tqdm(records, desc="Reading", unit=" records"))
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as out:
            while some := list(islice(rows, _CHUNK)):
                columns = [[getattr(one, name) for one in some] for name in _COLUMNS]
                arrays = map(pyarrow.array, columns, schema.types)
                out.write_batch(pyarrow.RecordBatch.from_arrays([*arrays], schema=schema))

    return cached_table(cache / f"records-{digest}.arrow", features, None, write)


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


# --- rows to records ------------------------------------------------------------------------


def _record(row: Any, number: int, source: Source, task: Task, purpose: Purpose) -> Record:
    where = f"{source.location}, record {number}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {kind_of(row)}; expected an object with fields: {_SCHEMAS}.")
    own = None if task.name in TASKS else task
    converts = own is not None and task.convert is not None
    needed = task.fields[:-1] if purpose == "predict" else task.fields
    context = ""
    if "instruction" in row and not converts:
        asked, context, output = (_text(row, name, where) for name in _COLUMNS[:3])
        answer = _answer(row, where)
    elif task.convert is not None and all(field in row for field in needed):
        asked, output, answer = _converted(row, task, source, where, purpose)
    elif "question" in row and not converts:
        asked = _text(row, "question", where)
        output, answer = _gsm8k_solution(row, where, purpose)
    else:
        found = ", ".join(str(key)[:40] for key in list(row)[:20]) or "none"
        fields = f"{task.name}'s {', '.join(needed)}" if task.convert else ""
        wanted = f"expected {fields}" if converts else f"{_SCHEMAS}{fields and f', or {fields}'}"
        raise ValueError(f"{where} has the fields {found}; {wanted}.")
    record = Record(asked, context, output, answer, task.name, source.label, number, own)
    is_made = converts or "instruction" not in row
    _check_use(record, is_made or "output" in row, where, purpose)
    # To train, a given response may be right in other words; one made of the answer may not.
    if purpose == "test" or (purpose == "train" and is_made):
        try:
            check_gold(record)
        except ValueError as error:
            raise ValueError(
                f"{where} (task {task.name}): {error}. Correct the record, or give the source "
                "another task."
            ) from error
    return record


def _converted(
    row: Mapping[str, Any], task: Task, source: Source, where: str, purpose: Purpose
) -> tuple[str, str, str | None]:
    """Instruction, output and answer of a row with the fields of the task's hub data set."""
    assert task.convert is not None
    for field in task.fields:
        _check_value(row.get(field), field, where)
    try:
        for field in task.fields[:-1]:
            if row.get(field) is None and field not in _MAY_LACK:
                raise TypeError(f"field {field!r} is nothing")
        instruction, answer, output = task.convert({task.fields[-1]: None, **row})
        for made in (instruction, answer or "", output or ""):
            if not isinstance(made, str):
                raise TypeError(f"{kind_of(made)} stands where text is expected")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is no row of {task.name} ({task.hub or 'of data.tasks'}): {error}. Expected "
            f"its fields {', '.join(task.fields)}."
        ) from error
    if answer is None and purpose != "predict":
        given = f"split {source.split}" if source.hub else "file"
        known = f"; {task.hub} has answers in its split {task.split}" if task.hub else ""
        raise ValueError(
            f"{where} (task {task.name}): {task.fields[-1]} is {row[task.fields[-1]]!r}, as in "
            f"splits that hide the answers. Take another {given}{known}."
        )
    if answer is not None and output is None:
        output = task.response.replace("{answer}", written(answer))
    return instruction, output or "", answer


def _check_use(record: Record, has_output: bool, where: str, purpose: Purpose) -> None:
    if not record.instruction.strip():
        raise ValueError(f"{where}: field 'instruction' is empty; expected what is asked.")
    if purpose == "train" and not record.output.strip():
        raise ValueError(
            f"{where}: field 'output' is {'empty' if has_output else 'missing'}; training needs "
            "a response. Fill it in, or take the record out."
        )
    if purpose == "test" and reference(record) is None:
        raise ValueError(
            f"{where}: field 'answer' is missing or empty, and 'output' states none; a test "
            "needs the gold answer. Fill it in, or take the record out."
        )


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}: field {field!r} is {kind_of(value)}; expected text.")
    _check_value(value, field, where)
    return value or ""


def _check_value(value: Any, field: str, where: str) -> None:
    """Refuse what no text can say, also within lists: half a surrogate pair, NaN, bytes."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_value(part, field, where)
    elif isinstance(value, str):
        if half := half_character(value):
            raise ValueError(
                f"{where}: field {field!r} holds {half}, half of a character, which UTF-8 cannot "
                "express. Write the character whole, or take it out."
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: field {field!r} is {value}; expected a finite number.")
    elif not isinstance(value, int | None):
        raise ValueError(f"{where}: field {field!r} holds {kind_of(value)}; expected text.")


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    value = row.get("answer")
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: field 'answer' is {kind_of(value)}; expected text or a number.")
    _check_value(value, "answer", where)
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value).strip() or None


def _gsm8k_solution(row: Mapping[str, Any], where: str, purpose: Purpose) -> tuple[str, str | None]:
    """The worked solution, and the final number that stands after its last `####`."""
    value = row.get("answer")
    if purpose in {"predict", "audit"} and (value is None or value == ""):
        return "", None
    if not isinstance(value, str) or "####" not in value:
        found = "missing" if value is None else f"{str(value)[:40]!r}"
        raise ValueError(
            f"{where}: field 'answer' is {found}; beside 'question' expected GSM8K's solution "
            "ending in '#### 42'. (Other schemas: instruction, input, output, answer.)"
        )
    _check_value(value, "answer", where)
    return value, value.rsplit("####", 1)[1].strip() or None
