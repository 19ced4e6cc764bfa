"""The rows of a data source as they stand in its file or hub data set, with their own fields."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO, Any

from rosa_lightning.data.sources import COMPRESSED, Purpose, Source, file_kind, is_pattern
from rosa_lightning.tasks.records import Task
from rosa_lightning.utils import strict_json
from rosa_lightning.utils.files import (
    LINE_BYTES,
    check_input,
    check_name,
    file_digest,
    memory_bytes,
    open_input,
    read_bytes,
    read_lines,
)
from rosa_lightning.utils.text import one_line

_STREAM_FROM = 2**28
"""Bytes from which on the records of a training source stay on disk."""
_MOST_DECODED = 2**31
"""Bytes that a file may decode to, where its own size does not make more plausible."""
_RATIO = 100
"""Times its own size that a file may decode to in any case."""
_PACKED = 4
"""Times its compressed size that text has, about."""
_TEXT_BYTES = 2**26
"""Largest .txt file, which is one record."""
_ROWS_A_READ = 256


@dataclass(frozen=True)
class Rows:
    """All rows of a source, to be gone through once."""

    rows: Iterable[tuple[str, Any]]
    """Each with what messages call it: its file or hub data set, and its number there from 1."""
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
    return Rows(_numbered(source.location, rows), _stays(source, purpose, size), lambda: digest)


def _numbered(where: object, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{where}, record {number}", row


def _file_rows(source: Source, purpose: Purpose) -> Rows:
    paths = _files(source.location)
    for path in paths:
        if file_kind(path) == ".txt" and purpose == "test":
            raise ValueError(
                f"{path} is a text file, which holds no answers. Name it in data.sources or "
                f"data.predict_sources, or give {', '.join(_READERS)} here."
            )
        if file_kind(path) not in _READERS:
            expected = f"{', '.join(_READERS)}, also with {' or '.join(COMPRESSED)}"
            raise ValueError(f"{path} ends in {path.suffix!r}; expected {expected}.")
        with _reading(path):
            check_input(path)

    def rows() -> Iterator[tuple[str, Any]]:
        for path in paths:
            kind = file_kind(path)
            asks = kind == ".txt" and purpose == "predict"
            yield from _numbered(path, (_text_lines if asks else _READERS[kind])(path))

    def digest() -> str:
        digests = [file_digest(path) for path in paths]
        if len(digests) == 1:
            return digests[0]
        return hashlib.blake2b(bytes.fromhex("".join(digests)), digest_size=8).hexdigest()

    sizes = [p.stat().st_size * (_PACKED if p.suffix.lower() in COMPRESSED else 1) for p in paths]
    is_whole = len(paths) == 1 and file_kind(paths[0]) == ".json"
    return Rows(rows(), not is_whole and _stays(source, purpose, sum(sizes)), digest)


def _files(location: str) -> list[Path]:
    """The file, or those of a folder or pattern, sorted."""
    path = Path(location)
    check_name(path)
    if path.is_dir():
        known = (one for one in path.rglob("*") if file_kind(one) in _READERS)
        shown = (one for one in known if not re.search(r"(^|/)\.", str(one.relative_to(path))))
        found = sorted(one for one in shown if not one.is_dir())
        if not found:
            suffixes = ", ".join(_READERS)
            raise IsADirectoryError(
                f"{path} is a folder without data. Name a file or a folder with {suffixes} files."
            )
        return found
    if path.exists():
        return [path]
    if not is_pattern(location):
        raise FileNotFoundError(f"{path} does not exist. Name an existing file with path.")
    found = sorted(map(Path, glob(location, recursive=True)))
    if not found:
        raise FileNotFoundError(f"{path} matches no file. Name files that exist with path.")
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # ours, and says what to do
            raise
        raise OSError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read from, decompressed by its name."""
    import pyarrow

    how = COMPRESSED.get(path.suffix.lower())
    with _reading(path), open_input(path) as file:
        if how is None:
            yield file
            return
        try:
            with pyarrow.CompressedInputStream(file, how) as stream:
                yield io.BufferedReader(stream)
        except (pyarrow.ArrowException, OSError) as error:
            reason = one_line(error, 200).rstrip(".")
            raise ValueError(f"{path} cannot be decompressed: {reason}. Write it again.") from error


def _most(path: Path) -> int:
    """Bytes that a file may decode to."""
    return max(_MOST_DECODED, _RATIO * path.stat().st_size)


def _whole(path: Path, most: int | None = None) -> str:
    """The text of a file that is read at once."""
    if path.suffix.lower() not in COMPRESSED:
        with _reading(path):
            return _decoded(str(path), read_bytes(path, most))
    limit = min(memory_bytes() // 2, _most(path)) if most is None else most
    with _opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} decompresses to more than {limit:,} bytes. Write it in parts.")
    return _decoded(str(path), content)


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
    text = _whole(path)
    try:
        if strict_json.is_list(text):
            yield from strict_json.items(text)
            return
        found = strict_json.parse(text)
    except strict_json.JSONError as error:
        hint = " If it holds one object a line, name it .jsonl." if error.extra_data else ""
        raise ValueError(f"{path} {error}. Expected a list of objects.{hint}") from error
    raise ValueError(
        f"{path} holds {kind_of(found)} at the top; expected a list of objects: "
        '[{"instruction": ..., "output": ..., "answer": ...}, ...].'
    )


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, and where they stand."""
    for where, text in _all_lines(path):
        if (line := text.rstrip("\r\n")).strip():
            yield where, line


def _all_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines with their line breaks, and where they stand."""
    size, most = 0, _most(path)
    with _opened(path) as file:
        for number, content in enumerate(read_lines(file, path), start=1):
            size += len(content)
            if size > most:
                raise ValueError(
                    f"{path} decompresses to more than {most:,} bytes. Write it in parts."
                )
            where = f"{path}, line {number}"
            yield where, _decoded(where, content)


def _json_lines(path: Path) -> Iterator[Any]:
    for where, line in _lines(path):
        try:
            yield strict_json.parse(line)
        except strict_json.JSONError as error:
            raise ValueError(f"{where} {error}. Expected one object a line.") from error


def _csv(path: Path) -> Iterator[Any]:
    """Rows of a CSV file with a header; all values are text."""
    limit = csv.field_size_limit(LINE_BYTES)  # of the whole process
    reader = csv.DictReader((line for _, line in _all_lines(path)), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(
                f"{path} has the header {', '.join(names)}; expected a different name for each "
                "column. Write one as the first line."
            )
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num} has not the header's {len(names)} values. Put "
                    "values that hold commas, quotes or line breaks in quotes."
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.reader.line_num} is not CSV: {one_line(error)}. Write it "
            "again, or as .jsonl."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _document(path: Path) -> Iterator[Any]:
    yield {"text": _whole(path, _TEXT_BYTES)}


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
    size, about, limit = path.stat().st_size, table.metadata, _most(path)
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


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".csv": _csv,
    ".txt": _document,
}


def kind_of(value: object) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")
