"""Data sources: a local file or a hub data set to records.

Three kinds of rows are read: LLM-Adapters' `instruction`, `input`, `output`, `answer`; GSM8K's
`question`, `answer` with the final number after `####`; and, where a source is of a benchmark, the
fields of that benchmark's hub data set. Whatever does not fit ends in an error that names file,
record and field; records are counted from 1, blank lines are not counted.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rosa_lightning.hub_rows import written
from rosa_lightning.own_tasks import nearest
from rosa_lightning.streamed import ArrowRows, Lines, Streamed, select
from rosa_lightning.tasks import TASKS, Record, Task, check_gold, find_task, reference

Purpose = Literal["train", "test", "predict", "audit"]
"""What records are for: a response to train on, a gold answer, only a question, or to be looked at
whatever they lack."""

_STREAM_FROM = 2**28
"""Bytes from which on the records of a training source stay on disk."""
_SUFFIXES = ".json, .jsonl, .parquet"
_SCHEMAS = (
    "expected instruction, input, output, answer, or GSM8K's question, answer ('... #### 42')"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data source: a local file (`path`) or a Hugging Face data set (`hub`)."""

    name: str | None = None
    """Name in logs and tables; by default the file's name or the hub id's last part."""
    path: str | None = None
    """Local file: .json (a list of objects), .jsonl, .parquet; to predict also .txt."""
    hub: str | None = None
    """Hugging Face data set id, such as openai/gsm8k."""
    subset: str | None = None
    """Configuration of the hub data set, where it has several."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set."""
    task: str | None = None
    """Benchmark, which sets the answer format; by default told from the name, else text."""
    weight: float | None = None
    """Share in training, relative to the other sources; by default the number of records."""
    max_examples: int | None = None
    """Most records to use, chosen by data.seed; by default all."""
    stream: bool | None = None
    """To train: leave the records on disk and read each when it is its turn. By default, from
    256 MiB on. Not for .json, which is read whole."""

    @cached_property
    def label(self) -> str:
        """The name, given or told from the path or hub id."""
        return self.name or (Path(self.path).stem if self.path else str(self.hub).split("/")[-1])

    @cached_property
    def benchmark(self) -> str:
        """The task, given or told from label, hub id or subset; `text` where these name none."""
        if self.task is not None:
            return find_task(self.task) or self.task  # or the user's own
        told = (self.label, (self.hub or "").split("/")[-1], self.subset or "")
        return next((task for name in told if (task := find_task(name))), "text")

    @property
    def place(self) -> str:
        """Where the records are, for messages."""
        return self.path or f"hub data set {self.hub}"


def as_source(
    value: Source | Mapping[str, Any] | str | Path, tasks: Mapping[str, Task] = TASKS
) -> Source:
    """A `Source` from itself, from its fields in a mapping, or from a path; checked.

    Its task is one of `tasks`, and named as there where it is the user's own.

    Raises TypeError for another type and for a field that a source does not have, ValueError for
    fields that contradict each other or lie outside their range.
    """
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if isinstance(value, Mapping):
        known = [field.name for field in fields(Source)]
        for key in value:
            if key not in known:
                raise TypeError(
                    f"A data source has no field {key!r}{nearest(str(key), known)}. "
                    f"Its fields are {', '.join(known)}."
                )
        value = Source(**value)
    if not isinstance(value, Source):
        raise TypeError(
            f"A data source is given as {value!r}; expected its fields, such as "
            "{path: FILE, weight: 0.5}."
        )
    _check_fields(value, tasks)
    own = find_task(value.task or value.label, {k: v for k, v in tasks.items() if k not in TASKS})
    return value if own is None else replace(value, task=own)


# Not in __post_init__: jsonargparse would wrap these errors in twenty lines of its own.
def _check_fields(source: Source, tasks: Mapping[str, Task]) -> None:
    if (source.path is None) == (source.hub is None):
        given = "neither path nor hub" if source.path is None else "both path and hub"
        raise ValueError(
            f"A data source names {given}. Give exactly one: path: FILE, or hub: OWNER/NAME."
        )
    weight = source.weight
    if weight is not None and not (isinstance(weight, int | float) and 0 <= weight < math.inf):
        raise ValueError(
            f"Source {source.label} has weight {weight!r}. A weight is a number of at least 0; "
            "leave it out to weigh the source by its number of records."
        )
    limit = source.max_examples
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(
            f"Source {source.label} has max_examples {limit!r}. It is a whole number of at least "
            "1; leave it out to use all records, or the source to use none."
        )
    if source.stream and Path(source.path or "").suffix.lower() == ".json":
        raise ValueError(
            f"Source {source.label} has stream: true, but a .json file is one list, read whole. "
            "Write it one object a line as .jsonl, or as .parquet, or leave stream out."
        )
    if source.task is not None and find_task(source.task, tasks) is None:
        raise ValueError(
            f"Source {source.label} has task {source.task!r}{nearest(source.task, tasks)}. "
            f"There are {', '.join(tasks)}. Define others under data.tasks."
        )


def demo_source(split: Literal["train", "test"]) -> Source:
    """The embedded demonstration set, which `data.sources: demo` means."""
    file = resources.files("rosa_lightning") / "tiny" / f"demo_{split}.jsonl"
    return Source(name="demo", path=str(file), task="demo")


def source_list(
    key: str, given: Any, demo: Literal["train", "test"], tasks: Mapping[str, Task] = TASKS
) -> list[Source]:
    """The sources that a setting names; names must differ, as counts go by them."""
    if given is None:
        return []
    if given == "demo":
        return [demo_source(demo)]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(
            f"{key} is {given!r}; expected demo or a list of sources. "
            f"Set data.{key}: [{{path: FILE.jsonl}}]."
        )
    sources = [as_source(value, tasks) for value in given]
    names = [source.label for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two sources in data.{key} are named {name!r}. Give each a name: "
                "[{name: first, path: ...}, {name: second, path: ...}]."
            )
    for source in sources:
        if source.stream and key != "sources":
            raise ValueError(
                f"Source {source.label} in data.{key} has stream: true; only training sources "
                "are streamed. Leave it out."
            )
    return sources


def weighted_sources(sources: list[Source], temperature: float | None = None) -> list[Source]:
    """The sources that take part in training.

    Raises ValueError if there is none, if some have a weight and others not, or if shares are
    said twice, by weights and by a temperature.
    """
    if not sources:
        raise ValueError("data.sources names no source. Set it to demo or to a list of sources.")
    weighted = [source.label for source in sources if source.weight is not None]
    if temperature is not None and weighted:
        raise ValueError(
            f"data.temperature={temperature} sets the shares by size, but there are weights in "
            f"data.sources ({', '.join(weighted)}). Take out one or the other."
        )
    without = [source.label for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ValueError(
            f"In data.sources some sources have a weight and others not ({', '.join(without)}). "
            "Give each one a weight, or none."
        )
    used = [source for source in sources if source.weight != 0]
    if not used:
        raise ValueError(
            "The weights in data.sources sum to zero. Give one source a weight above 0."
        )
    return used


def load_records(
    source: Source,
    purpose: Purpose = "train",
    tasks: Mapping[str, Task] = TASKS,
    seed: int = 0,
) -> Sequence[Record]:
    """All records of a source, or `max_examples` of them, as `seed` chooses; in their order.

    To train, a record needs an output; to test, an answer or an output that states one, which the
    task's format can express; to predict and to audit, only what is asked. Large training sources
    are `Streamed`, and a record of another shape is found when it is read. Raises OSError for what
    cannot be read or reached, ValueError for what has not the expected shape.
    """
    source = as_source(source, tasks)
    task = tasks[source.benchmark]
    rows = _hub_rows(source, task, purpose) if source.hub else _file_rows(source, purpose)
    convert = partial(_record, source=source, task=task, purpose=purpose)
    records: Sequence[Record]
    if isinstance(rows, Lines):
        line = partial(_line_record, source=source, task=task, purpose=purpose)
        records = Streamed(rows, line)
    elif isinstance(rows, ArrowRows):
        records = Streamed(rows, convert)
    else:
        records = [convert(row, number) for number, row in enumerate(rows, start=1)]
    if not len(records):
        raise ValueError(
            f"{source.place} (task {task.name}) holds no records. Name a source that has some."
        )
    if source.max_examples is not None and source.max_examples < len(records):
        drawn = np.random.default_rng(seed).permutation(len(records))[: source.max_examples]
        mask = np.zeros(len(records), dtype=np.bool_)
        mask[drawn] = True
        records = select(records, mask)
    return records


def _streams(source: Source, purpose: Purpose, size: int) -> bool:
    """Whether records stay on disk; `size` is that of the data in bytes."""
    if purpose not in ("train", "audit"):
        return False
    return size >= _STREAM_FROM if source.stream is None else source.stream


# --- rows -----------------------------------------------------------------------------------


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
    return ArrowRows(rows) if _streams(source, purpose, rows.data.nbytes) else rows


def _file_rows(source: Source, purpose: Purpose) -> Iterable[Any] | Lines | ArrowRows:
    path = Path(source.place)
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
    return [_json_line(f"{path}, line {number}", line) for number, line in lines]


def _read_text(path: Path) -> str:
    with _reading(path):
        return path.read_bytes().decode("utf-8-sig")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it in UTF-8."
        ) from error
    except OSError as error:
        raise OSError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error


def _json_rows(path: Path, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = " If it holds one object a line, name it .jsonl."
        raise ValueError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}. "
            f"Expected a list of objects.{hint}"
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds {_kind(rows)} at the top; expected a list of objects: "
            '[{"instruction": ..., "output": ..., "answer": ...}, ...].'
        )
    return rows


def _json_line(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: column {error.colno}: {error.msg}. Expected one object a line."
        ) from error


def _parquet_rows(path: Path, streams: bool) -> list[Any] | ArrowRows:
    import pyarrow
    from pyarrow import parquet

    try:
        if streams:
            import datasets

            parquet.read_schema(path)  # else datasets would say that it failed, and not why
            return ArrowRows(datasets.Dataset.from_parquet(str(path)))
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"{path} cannot be read as Parquet: {reason}. Write it again, or as .jsonl."
        ) from error
    return rows


# --- records --------------------------------------------------------------------------------


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _line_record(line: bytes, number: int, source: Source, task: Task, purpose: Purpose) -> Record:
    """A record of a streamed file."""
    where = f"{source.place}, record {number}"
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text (byte {error.start} of its line). Save it in UTF-8."
        ) from error
    return _record(_json_line(where, text), number, source, task, purpose)


def _record(row: Any, number: int, source: Source, task: Task, purpose: Purpose) -> Record:
    where = f"{source.place}, record {number}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {_kind(row)}; expected an object with fields: {_SCHEMAS}.")
    context = ""
    asks_itself = task.convert is not None and task.name not in TASKS
    needed = task.fields[:-1] if asks_itself and purpose == "predict" else task.fields
    if "instruction" in row and not asks_itself:
        asked = _text(row, "instruction", where)
        context, output = _text(row, "input", where), _text(row, "output", where)
        answer = _answer(row, where)
    elif task.convert is not None and all(field in row for field in needed):
        asked, output, answer = _converted(row, task, source, where, purpose)
    elif "question" in row and not asks_itself:
        asked = _text(row, "question", where)
        output, answer = _gsm8k_solution(row, where, purpose)
    else:
        found = ", ".join(str(key) for key in row) or "none"
        own = f"{task.name}'s {', '.join(needed)}" if task.convert else ""
        wanted = f"expected {own}" if asks_itself else f"{_SCHEMAS}{own and f', or {own}'}"
        raise ValueError(f"{where} has the fields {found}; {wanted}.")
    kept = None if task.name in TASKS else task
    record = Record(asked, context, output, answer, task.name, source.label, number, kept)
    of_hub = asks_itself or "instruction" not in row
    _check_use(record, of_hub or "output" in row, where, purpose)
    # To train, a given response may be right in other words; one made of the answer may not.
    if purpose == "test" or (purpose == "train" and of_hub):
        _check_gold(record, where)
    return record


def _converted(
    row: Mapping[str, Any], task: Task, source: Source, where: str, purpose: Purpose
) -> tuple[str, str, str | None]:
    """Instruction, output and answer of a row with the fields of the task's hub data set."""
    assert task.convert is not None
    try:
        instruction, answer, output = task.convert(row)
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


def _check_gold(record: Record, where: str) -> None:
    try:
        check_gold(record)
    except ValueError as error:
        raise ValueError(
            f"{where} (task {record.task}): {error}. Mend the record, or give the source another "
            "task."
        ) from error


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    """The field's text; empty where the field is missing or null."""
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is {_kind(value)}; expected text.")
    return value


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    value = row.get("answer")
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, str | int | float):
        return None if value is None else str(value).strip() or None
    raise ValueError(f"{where}: field 'answer' is {_kind(value)}; expected text or a number.")


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
    return value, value.rsplit("####", 1)[1].strip() or None
