"""The rows of a data source as they stand in its file or hub data set, with their own fields.

Large ones stay on disk. What cannot be read ends in an error that names the file and the place in
it; blank lines are not counted.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rosa_lightning.data.sources import Purpose, Source
from rosa_lightning.data.streamed import ArrowRows, Lines
from rosa_lightning.tasks.records import Task
from rosa_lightning.utils import strict_json
from rosa_lightning.utils.files import check_input, check_name, open_input, read_bytes

_STREAM_FROM = 2**28
"""Bytes from which on the records of a training source stay on disk."""
_MOST_DECODED = 2**31
"""Bytes that a Parquet file may decode to, where its own size does not make more plausible."""
_RATIO = 100
"""Times its own size that a Parquet file may decode to in any case."""
_ROWS_A_READ = 256
_SUFFIXES = ".json, .jsonl, .parquet"


def read_rows(source: Source, task: Task, purpose: Purpose) -> Iterable[Any] | Lines | ArrowRows:
    """All rows of a source.

    Args:
        source: The source.
        task: What its rows are of; a hub data set may be pinned to a revision by it.
        purpose: What the rows are for.

    Raises:
        OSError: It cannot be read or reached.
        ValueError: It holds no rows that can be read.
    """
    return _hub_rows(source, task, purpose) if source.hub else _file_rows(source, purpose)


def _streams(source: Source, purpose: Purpose, size: int) -> bool:
    """Whether records stay on disk; `size` is that of the data in bytes."""
    if purpose not in ("train", "audit"):
        return False
    return size >= _STREAM_FROM if source.stream is None else source.stream


def _hub_rows(source: Source, task: Task, purpose: Purpose) -> Iterable[Any] | ArrowRows:
    import datasets  # over a second to import, and only hub sources need it

    revision = source.revision or (task.revision if source.hub == task.hub else None)
    subset, folder = source.subset, {}
    if revision == "refs/convert/parquet" and subset:  # on that branch a subset is a folder
        subset, folder = None, {"data_dir": subset}
    try:
        rows = datasets.load_dataset(
            source.hub, subset, split=source.split, revision=revision, **folder
        )
    except Exception as error:  # datasets, huggingface_hub and httpx share no base class
        reason = " ".join(str(error).split())[:300].rstrip(".") or "no reason given"
        raise OSError(
            f"Could not load hub data set {source.hub} (subset {source.subset}, split "
            f"{source.split}): {type(error).__name__}: {reason}. Check the id and the network, "
            "or name a local file instead of hub: {path: FILE.jsonl}."
        ) from error
    return ArrowRows(rows, source.place) if _streams(source, purpose, rows.data.nbytes) else rows


def _file_rows(source: Source, purpose: Purpose) -> Iterable[Any] | Lines | ArrowRows:
    path = Path(source.place)
    check_name(path)
    suffix = path.suffix.lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Name an existing file with path.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Name one file in it ({_SUFFIXES}).")
    if suffix == ".txt" and purpose != "predict":
        raise ValueError(
            f"{path} is a text file, which holds prompts only. Name it in data.predict_sources, "
            f"or give {_SUFFIXES} here."
        )
    with _reading(path):
        check_input(path)
    streams = suffix != ".json" and _streams(source, purpose, path.stat().st_size)
    if suffix == ".parquet":
        return _parquet_rows(path, streams)
    if suffix not in {".json", ".jsonl", ".txt"}:
        raise ValueError(f"{path} ends in {suffix!r}; expected {_SUFFIXES} (or .txt to predict).")
    if streams:
        with _reading(path):
            return Lines(path)
    text = _read_text(path)
    if suffix == ".json":
        return _json_rows(path, text)
    # Not splitlines: JSON strings may hold U+2028, which splitlines takes for a line end.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return [{"instruction": line.rstrip("\r")} for _, line in lines]
    return [json_line(f"{path}, line {number}", line) for number, line in lines]


def _read_text(path: Path) -> str:
    with _reading(path):
        text = read_bytes(path).decode("utf-8-sig")
    if "\0" in text:
        raise ValueError(f"{path} holds null bytes, as UTF-16 text does. Save it in UTF-8.")
    return text


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it in UTF-8."
        ) from error
    except OSError as error:
        if error.strerror is None:  # ours, and says what to do
            raise
        raise OSError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _json_rows(path: Path, text: str) -> list[Any]:
    try:
        rows = strict_json.parse(text)
    except strict_json.JSONError as error:
        hint = " If it holds one object a line, name it .jsonl." if error.extra_data else ""
        raise ValueError(f"{path} {error}. Expected a list of objects.{hint}") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds {kind_of(rows)} at the top; expected a list of objects: "
            '[{"instruction": ..., "output": ..., "answer": ...}, ...].'
        )
    return rows


def json_line(where: str, line: str) -> Any:
    """The value of one line of a JSONL file; `where` it stands is for the error."""
    try:
        return strict_json.parse(line)
    except strict_json.JSONError as error:
        raise ValueError(f"{where} {error}. Expected one object a line.") from error


def _parquet_rows(path: Path, streams: bool) -> list[Any] | ArrowRows:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_input(path) as file, parquet.ParquetFile(file) as table:
            _check_columns(path, table.schema_arrow.names)
            limit = max(_MOST_DECODED, _RATIO * path.stat().st_size)
            if not streams:
                return list(_decoded(path, table, limit))
            if path.stat().st_size < _STREAM_FROM:  # larger ones take as long as they are large
                for _ in _decoded(path, table, limit, rows=False):
                    pass
        import datasets

        with open_input(path) as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
        rows = datasets.Dataset.from_parquet(os.fspath(path))
        return ArrowRows(rows, str(path), f"parquet {content.hexdigest()}")
    except _UnfitError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"{path} cannot be read as Parquet: {reason}. Write it again, or as .jsonl."
        ) from error


class _UnfitError(ValueError):
    """A Parquet file that can be read, and cannot be used."""


def _check_columns(path: Path, names: list[str]) -> None:
    if not names:
        raise _UnfitError(
            f"{path} has no columns. Expected those of records: instruction, output, ..."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _UnfitError(
            f"{path} has two columns named {twice!r}. Leave out or rename one of them."
        )


def _decoded(path: Path, table: Any, limit: int, *, rows: bool = True) -> Iterator[Any]:
    """The rows of a Parquet file as mappings, or nothing; they may take so many bytes.

    Its metadata tells no decoded size: one text, kept once, may stand in a million rows.
    """
    about = table.metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    size = max(about.num_rows, *(each.total_uncompressed_size for each in columns), 0)
    values, decoded = max((each.num_values for each in columns), default=0), 0
    if max(size, values) <= limit:
        for batch in table.iter_batches(_ROWS_A_READ):
            decoded += batch.nbytes
            if decoded > limit:
                break
            if rows:
                yield from batch.to_pylist()
    if max(size, values, decoded) > limit:
        raise _UnfitError(
            f"{path} has {path.stat().st_size:,} bytes and decodes to more than {limit:,}, which "
            "do not fit into memory. Write it in parts, or as .jsonl."
        )


def kind_of(value: object) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
