"""The rows of a data source as they stand in its file or hub data set, with their own fields."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosa_lightning.data.sources import Purpose, Source
from rosa_lightning.tasks.records import Task
from rosa_lightning.utils import strict_json
from rosa_lightning.utils.files import (
    check_input,
    check_name,
    open_input,
    read_bytes,
    read_lines,
)
from rosa_lightning.utils.text import one_line

_STREAM_FROM = 2**28
"""Bytes from which on the records of a training source stay on disk."""
_MOST_DECODED = 2**31
"""Bytes that a Parquet file may decode to, where its own size does not make more plausible."""
_RATIO = 100
"""Times its own size that a Parquet file may decode to in any case."""
_ROWS_A_READ = 256
_SUFFIXES = ".json, .jsonl, .parquet"


@dataclass(frozen=True)
class Rows:
    """All rows of a source, to be gone through once."""

    rows: Iterable[Any]
    on_disk: bool
    """Whether they are too many for memory."""
    content: Callable[[], str]
    """Gives a digest of what holds them."""


def read_rows(source: Source, task: Task, purpose: Purpose) -> Rows:
    """The rows of a source; OSError or ValueError, also while they are gone through."""
    return _hub_rows(source, task, purpose) if source.hub else _file_rows(source, purpose)


def _stays(source: Source, purpose: Purpose, size: int) -> bool:
    wanted = size >= _STREAM_FROM if source.stream is None else source.stream
    return wanted and purpose in ("train", "audit")


def _hub_rows(source: Source, task: Task, purpose: Purpose) -> Rows:
    import datasets  # late, as it takes a second

    revision = source.revision or (task.revision if source.hub == task.hub else None)
    subset, options = source.subset, dict[str, Any]()
    if revision == "refs/convert/parquet" and subset:  # on that branch a subset is a folder
        subset, options = None, {"data_dir": subset}
    if source.stream and _stays(source, purpose, 0):
        options["streaming"] = True
    try:
        rows = datasets.load_dataset(
            source.hub, subset, split=source.split, revision=revision, **options
        )
    except Exception as error:  # datasets, huggingface_hub and httpx share no base class
        reason = one_line(error, 300).rstrip(".") or "no reason given"
        raise OSError(
            f"Could not load hub data set {source.hub} (subset {source.subset}, split "
            f"{source.split}): {type(error).__name__}: {reason}. Check the id and the network, "
            "or name a local file instead of hub: {path: FILE.jsonl}."
        ) from error
    size = 0 if "streaming" in options else rows.data.nbytes
    # Revisions differ in the files in the cache, or in those files' hashes.
    told_by = getattr(rows, "cache_files", None) or rows.info.download_checksums
    about = repr([source.hub, source.subset, source.split, revision, told_by])
    digest = hashlib.blake2b(about.encode(), digest_size=8).hexdigest()
    return Rows(rows, _stays(source, purpose, size), lambda: digest)


def _file_rows(source: Source, purpose: Purpose) -> Rows:
    path = Path(source.location)
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
    readers = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".txt": _text_lines}
    if suffix not in readers:
        raise ValueError(f"{path} ends in {suffix!r}; expected {_SUFFIXES} (or .txt to predict).")
    with _reading(path):
        check_input(path)
    stays = suffix != ".json" and _stays(source, purpose, path.stat().st_size)

    def digest() -> str:
        with open_input(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()

    return Rows(readers[suffix](path), stays, digest)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # ours, and says what to do
            raise
        raise OSError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _decoded(where: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text (byte {error.start}). Save it in UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{where} holds null bytes, as UTF-16 text does. Save it in UTF-8.")
    return text


def _json(path: Path) -> Iterator[Any]:
    with _reading(path):
        content = read_bytes(path)
    try:
        rows = strict_json.parse(_decoded(str(path), content))
    except strict_json.JSONError as error:
        hint = " If it holds one object a line, name it .jsonl." if error.extra_data else ""
        raise ValueError(f"{path} {error}. Expected a list of objects.{hint}") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds {kind_of(rows)} at the top; expected a list of objects: "
            '[{"instruction": ..., "output": ..., "answer": ...}, ...].'
        )
    yield from rows


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, and where they stand."""
    with _reading(path), open_input(path) as file:
        for number, content in enumerate(read_lines(file, path), start=1):
            where = f"{path}, line {number}"
            if (line := _decoded(where, content).rstrip("\r\n")).strip():
                yield where, line


def _json_lines(path: Path) -> Iterator[Any]:
    for where, line in _lines(path):
        try:
            yield strict_json.parse(line)
        except strict_json.JSONError as error:
            raise ValueError(f"{where} {error}. Expected one object a line.") from error


def _text_lines(path: Path) -> Iterator[Any]:
    for _, line in _lines(path):
        yield {"instruction": line}


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_input(path) as file, parquet.ParquetFile(file) as table:
            yield from _decoded_rows(path, table)
    except _UnfitError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        reason = one_line(error, 200).rstrip(".")
        raise ValueError(
            f"{path} cannot be read as Parquet: {reason}. Write it again, or as .jsonl."
        ) from error


class _UnfitError(ValueError):
    """A Parquet file that can be read, and cannot be used."""


def _decoded_rows(path: Path, table: Any) -> Iterator[Any]:
    """The rows of a Parquet file, as long as they decode to a plausible size.

    Its metadata tells no decoded size: one text, kept once, may stand in a million rows.
    """
    names = table.schema_arrow.names
    if not names:
        raise _UnfitError(
            f"{path} has no columns. Expected those of records: instruction, output, ..."
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise _UnfitError(
            f"{path} has two columns named {twice[0]!r}. Leave out or rename one of them."
        )
    size, about = path.stat().st_size, table.metadata
    limit = max(_MOST_DECODED, _RATIO * size)
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    told = (max(one.total_uncompressed_size, one.num_values) for one in columns)
    too_large = _UnfitError(
        f"{path} has {size:,} bytes and decodes to more than {limit:,}, which do not fit into "
        "memory. Write it in parts, or as .jsonl."
    )
    if max(about.num_rows, *told, 0) > limit:
        raise too_large
    decoded = 0
    for batch in table.iter_batches(_ROWS_A_READ):
        decoded += batch.nbytes
        if decoded > limit:
            raise too_large
        yield from batch.to_pylist()


def kind_of(value: object) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
