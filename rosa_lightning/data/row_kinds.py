"""Rows to records: what kind a row is, told by its fields, and what it says.

Conversations, instructions (Alpaca, LLM-Adapters), prompts with a response, GSM8K's questions,
plain text, and the fields of the hub data set of the source's task. Errors name file, record and
field.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rosa_lightning.data.rows import kind_of
from rosa_lightning.data.sources import Purpose, Source
from rosa_lightning.tasks.converters import written
from rosa_lightning.tasks.records import TASKS, Record, Task, Turn, check_gold, reference
from rosa_lightning.utils import strict_json
from rosa_lightning.utils.strict_json import half_character

_KINDS = (
    "messages or conversations (a list of turns); instruction, input, output, answer; prompt, "
    "response (or completion), answer; question, answer ('... #### 42'); text"
)
_MAY_LACK = ("rationale",)
"""Fields of benchmarks that may be null; an answer too, in some splits."""
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""Names of roles in use, those of ShareGPT among them."""
_NOT_TEXT = ("tool_calls", "function_call", "weight")
"""Fields of a turn that would change what is trained on, and are not read."""


class _Said(NamedTuple):
    """What a row says."""

    asked: str
    output: str = ""
    answer: str | None = None
    context: str = ""
    turns: tuple[Turn, ...] = ()
    fields: tuple[str, str] = ("instruction", "output")
    """Its fields of what is asked and of the response, for messages."""
    is_made: bool = False
    """Whether the output is made of the answer."""


def to_record(
    row: Any, where: str, index: int, source: Source, task: Task, purpose: Purpose
) -> Record:
    """The record that a row of a source holds; ValueError for one that is no row of a known kind.

    To train, a record needs an output; to test, an answer or an output that states one, which the
    task's format can express; to predict and to audit, only what is asked.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {kind_of(row)}; expected an object with fields: {_KINDS}.")
    if source.columns is not None:
        row = _renamed(row, source.columns, where)
    said = _said(row, where, source, task, purpose)
    own = None if task.name in TASKS else task
    fields = (said.asked, said.context, said.output, said.answer, task.name, source.label, index)
    record = Record(*fields, own, said.turns)
    _check_use(record, said, row, where, purpose)
    # To train, a given response may be right in other words; one made of the answer may not.
    if purpose == "test" or (purpose == "train" and said.is_made):
        try:
            check_gold(record)
        except ValueError as error:
            raise ValueError(
                f"{where} (task {task.name}): {error}. Correct the record, or give the source "
                "another task."
            ) from error
    return record


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with the fields that its columns stand for."""
    if missing := [column for column in columns.values() if column not in row]:
        raise ValueError(
            f"{where} has no column {missing[0]!r}, which the source's columns name. It has "
            f"{_names(row)}."
        )
    return {field: row[column] for field, column in columns.items()}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(row)[:20]) or "none"


def _said(
    row: Mapping[str, Any], where: str, source: Source, task: Task, purpose: Purpose
) -> _Said:
    is_own = task.name not in TASKS and task.convert is not None
    needed = task.fields[:-1] if purpose == "predict" else task.fields
    converts = task.convert is not None and all(field in row for field in needed)
    if is_own and converts:
        return _converted(row, task, source, where, purpose)
    if not is_own:
        turns = next((name for name in ("messages", "conversations") if name in row), None)
        if turns is not None:
            return _conversation(row, turns, where, purpose)
        if "instruction" in row:
            return _exchange(row, ("instruction", "output"), where)
        if converts:
            return _converted(row, task, source, where, purpose)
        if "prompt" in row:
            response = "completion" if "completion" in row else "response"
            return _exchange(row, ("prompt", response), where)
        if "question" in row:
            solution, answer = _gsm8k_solution(row, where, purpose)
            asked = _text(row, "question", where)
            return _Said(asked, solution, answer, fields=("question", "answer"), is_made=True)
        if "text" in row:
            return _plain_text(row, where, purpose)
    fields = f"{task.name}'s {', '.join(needed)}" if task.convert else ""
    wanted = fields if is_own else f"{_KINDS}{fields and f'; or {fields}'}"
    hint = "" if is_own else " Name others in the source: columns: {prompt: ..., response: ...}."
    raise ValueError(f"{where} has the fields {_names(row)}; expected {wanted}.{hint}")


def _exchange(row: Mapping[str, Any], fields: tuple[str, str], where: str) -> _Said:
    """A question and its response."""
    asked, output = (_text(row, field, where) for field in fields)
    context, system = _text(row, "input", where), _text(row, "system", where)
    turns: tuple[Turn, ...] = ()
    if system:
        whole = f"{asked}\n{context}" if context else asked
        turns = (Turn("system", system), Turn("user", whole))
    return _Said(asked, output, _answer(row, where), context, turns, fields)


def _plain_text(row: Mapping[str, Any], where: str, purpose: Purpose) -> _Said:
    if purpose in ("test", "predict"):
        raise ValueError(
            f"{where} is plain text (field 'text'), which asks nothing. Name it in "
            f"data.sources, or give rows with other fields: {_KINDS}."
        )
    return _Said("", _text(row, "text", where), fields=("text", "text"))


# --- conversations --------------------------------------------------------------------------


def _conversation(row: Mapping[str, Any], field: str, where: str, purpose: Purpose) -> _Said:
    """A conversation: the turns to its last reply, or those that await one."""
    turns, answer = _turns(row, field, where), _answer(row, where)
    replies = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    waits = purpose == "predict" or (answer is not None and purpose != "train")
    end = len(turns) if not replies or (waits and turns[-1].role != "assistant") else replies[-1]
    asked, output = turns[:end], turns[end].content if end < len(turns) else ""
    users = [turn.content for turn in asked if turn.role == "user"]
    if not users:
        raise ValueError(
            f"{where}: field {field!r} has no user's turn before a reply. Take the record out."
        )
    is_pair = len(asked) == 1
    return _Said(users[-1], output, answer, "", () if is_pair else tuple(asked), (field, field))


def _turns(row: Mapping[str, Any], field: str, where: str) -> list[Turn]:
    value = row[field]
    if isinstance(value, str):  # as CSV has it
        try:
            value = strict_json.parse(value)
        except strict_json.JSONError as error:
            raise ValueError(f"{where}: {field!r} {error}. Expected a list of turns.") from error
    lists = list(value.values()) if isinstance(value, Mapping) else []
    if lists and all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        # As `datasets` has a sequence of objects.
        value = [dict(zip(value, one, strict=True)) for one in zip(*lists, strict=True)]
    if not isinstance(value, Sequence) or not value:
        raise ValueError(
            f"{where}: field {field!r} is {kind_of(value) if value else 'empty'}; expected a list "
            "of turns: [{role: user, content: ...}, {role: assistant, content: ...}]."
        )
    turns = [_turn(one, f"{where}, turn {number}") for number, one in enumerate(value, start=1)]
    system = _text(row, "system", where)
    return [Turn("system", system), *turns] if system else turns


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {kind_of(value)}; expected role and content.")
    keys = ("from", "value") if "from" in value else ("role", "content")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(
            f"{where} has no {missing[0]!r} but {_names(value)}; expected role and content, or "
            "from and value."
        )
    role, content = (value[key] for key in keys)
    if role not in _ROLES:
        raise ValueError(f"{where} is of {str(role)[:40]!r}; expected one of {', '.join(_ROLES)}.")
    for key in _NOT_TEXT:
        if value.get(key) not in (None, [], "", 1):
            raise ValueError(
                f"{where} has {key!r}, which is not read. Write calls of tools as text in "
                f"{keys[1]}, and take the field out."
            )
    if isinstance(content, list) and all(isinstance(p, Mapping) and "text" in p for p in content):
        content = "".join(_text(part, "text", where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: {keys[1]} is {kind_of(content)}; expected text.")
    _check_value(content, keys[1], where)
    return Turn(_ROLES[role], content)


# --- fields ---------------------------------------------------------------------------------


def _converted(
    row: Mapping[str, Any], task: Task, source: Source, where: str, purpose: Purpose
) -> _Said:
    """A row with the fields of the task's hub data set."""
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
    return _Said(instruction, output or "", answer, is_made=True)


def _check_use(
    record: Record, said: _Said, row: Mapping[str, Any], where: str, purpose: Purpose
) -> None:
    asked, responds = said.fields
    if not (record.instruction.strip() or asked == "text"):
        raise ValueError(f"{where}: field {asked!r} is empty; expected what is asked.")
    if purpose == "train" and not record.output.strip():
        how = "has no reply" if asked == responds != "text" else "is empty"
        raise ValueError(
            f"{where}: field {responds!r} {how if responds in row else 'is missing'}; training "
            "needs a response. Fill it in, or take the record out."
        )
    if purpose == "test" and reference(record) is None:
        raise ValueError(
            f"{where}: field 'answer' is missing or empty, and {responds!r} states none; a test "
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
            "ending in '#### 42'. To train on other answers, name the columns in the source: "
            "columns: {prompt: question, response: answer}."
        )
    _check_value(value, "answer", where)
    return value, value.rsplit("####", 1)[1].strip() or None
