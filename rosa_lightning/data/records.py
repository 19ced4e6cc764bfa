"""The records of a data source.

Three kinds of rows are read: LLM-Adapters' `instruction`, `input`, `output`, `answer`; GSM8K's
`question`, `answer` with the final number after `####`; and, where a source is of a benchmark, the
fields of that benchmark's hub data set. Whatever does not fit ends in an error that names file,
record and field; records are counted from 1.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from rosa_lightning.data.source_rows import json_line, kind_of, read_rows
from rosa_lightning.data.sources import Purpose, Source, as_source
from rosa_lightning.data.streamed import ArrowRows, Lines, Streamed, select
from rosa_lightning.tasks.converters import written
from rosa_lightning.tasks.records import TASKS, Record, Task, check_gold, reference
from rosa_lightning.utils.strict_json import half_character

_SCHEMAS = (
    "expected instruction, input, output, answer, or GSM8K's question, answer ('... #### 42')"
)

_MAY_LACK = ("rationale",)
"""Fields of benchmarks that may be nothing; an answer too, in some splits."""


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
    rows = read_rows(source, task, purpose)
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


def _line_record(line: bytes, number: int, source: Source, task: Task, purpose: Purpose) -> Record:
    """A record of a streamed file."""
    where = f"{source.place}, record {number}"
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 text (byte {error.start} of its line). Save it in UTF-8."
        ) from error
    return _record(json_line(where, text), number, source, task, purpose)


def _record(row: Any, number: int, source: Source, task: Task, purpose: Purpose) -> Record:
    where = f"{source.place}, record {number}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {kind_of(row)}; expected an object with fields: {_SCHEMAS}.")
    context = ""
    asks_itself = task.convert is not None and task.name not in TASKS
    needed = task.fields[:-1] if purpose == "predict" else task.fields
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
        found = ", ".join(str(key)[:40] for key in list(row)[:20]) or "none"
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
    _check_values(row, task.fields, where)
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
        raise ValueError(f"{where}: field {field!r} is {kind_of(value)}; expected text.")
    _check_value(value, field, where)
    return value


def _check_values(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    """Check the fields that a task's own conversion puts into texts."""
    for field in fields:
        if field in row:
            for value in _leaves(row[field]):
                _check_value(value, field, where)


def _leaves(value: Any) -> Iterator[Any]:
    """The values in lists and objects within one another."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    else:
        yield value


def _check_value(value: Any, field: str, where: str) -> None:
    """Refuse what no text can say: half of a character, a number that is none, bytes."""
    if isinstance(value, str):
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
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, str | int | float):
        _check_value(value, "answer", where)
        return None if value is None else str(value).strip() or None
    raise ValueError(f"{where}: field 'answer' is {kind_of(value)}; expected text or a number.")


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
