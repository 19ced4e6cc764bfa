"""Tasks of the user's own, defined in a configuration without code."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from string import Formatter
from typing import Any, get_args

from rosa_lightning.tasks.answers import AnswerFormat, extract
from rosa_lightning.tasks.converters import Sample
from rosa_lightning.tasks.records import find_task, plain_name
from rosa_lightning.tasks.registry import TASKS, Task

_KEYS = ("name", "format", "labels", "aliases", "response", "prompt", "answer")
_RESPONSES = {"label": "the correct answer is {answer}", "letter": "The answer is ({answer})."}


def with_own_tasks(definitions: Sequence[Mapping[str, Any]] | None) -> dict[str, Task]:
    """`TASKS` and the tasks that a configuration defines under `data.tasks`.

    `ReasoningDataModule` says what a definition holds. Raises ValueError that names the key.
    """
    tasks = dict(TASKS)
    for number, definition in enumerate(definitions or []):
        where = f"data.tasks[{number}]"
        task = _own_task(definition, where)
        for name in (task.name, *task.aliases):
            taken = find_task(name, tasks)
            if taken is not None or not plain_name(name):
                why = f"taken by task {taken}" if taken else "without a letter or digit"
                raise ValueError(f"{where}: the name {name!r} is {why}. Choose another name.")
        tasks[task.name] = task
    return tasks


def _own_task(definition: Any, where: str) -> Task:
    if not isinstance(definition, Mapping):
        raise ValueError(
            f"{where} is {definition!r}; expected a mapping such as "
            "{name: mytask, format: label, labels: [good, bad]}."
        )
    for key in definition:
        if key not in _KEYS:
            hint = nearest(str(key), _KEYS)
            raise ValueError(f"{where} has no key {key!r}{hint}. Its keys are {', '.join(_KEYS)}.")
    name: Any = definition.get("name")
    if not isinstance(name, str) or not name:
        raise _wrong(where, "name", name, "a name, which sources give as task")
    form: Any = definition.get("format")
    if form not in get_args(AnswerFormat):
        raise _wrong(where, "format", form, ", ".join(get_args(AnswerFormat)))
    labels = _own_labels(_texts(definition, "labels", where), form, where)
    response = definition.get("response", _RESPONSES.get(form, "{answer}"))
    return Task(
        name=name,
        format=form,
        labels=labels,
        aliases=_texts(definition, "aliases", where),
        response=_own_response(response, form, labels, where),
        **_own_rows(definition, labels, where),
    )


def _wrong(where: str, key: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{where}.{key} is {value!r}; expected {expected}.")


def _own_rows(definition: Mapping[str, Any], labels: tuple[str, ...], where: str) -> dict[str, Any]:
    """How the task's own rows are read: the fields, the answer's last, and what converts them."""
    prompt: Any = definition.get("prompt")
    answer = definition.get("answer")
    if prompt is None and answer is None:
        return {}
    try:
        parts = [part[1:] for part in Formatter().parse(prompt or "") if part[1] is not None]
    except (TypeError, ValueError):  # no text, or a brace without its other
        parts = []
    names = tuple(dict.fromkeys(str(name) for name, _, _ in parts))
    if not parts or not all(str(name).isidentifier() and not (a or b) for name, a, b in parts):
        example = "'Is this review good or bad? {text}'; {{ and }} write braces themselves"
        raise _wrong(where, "prompt", prompt, f"names of fields alone in braces: {example}")
    answer = "answer" if answer is None else answer
    if not isinstance(answer, str) or not answer or answer in names:
        raise _wrong(where, "answer", answer, "the name of a field that the prompt does not show")
    read = partial(_own_sample, prompt=prompt, fields=names, answer=answer, labels=labels)
    return {"fields": (*names, answer), "convert": read}


def _own_sample(
    row: Mapping[str, Any],
    *,
    prompt: str,
    fields: Sequence[str],
    answer: str,
    labels: Sequence[str],
) -> Sample:
    asked = prompt.format_map({name: row[name] for name in fields})
    gold = row.get(answer)
    if gold is None or gold == "":
        return Sample(asked, None)
    if isinstance(gold, bool):
        return Sample(asked, str(gold).lower())
    if not isinstance(gold, str | int | float):
        raise TypeError(f"{answer} is no text and no number")
    if isinstance(gold, int) and labels and str(gold) not in labels:  # as `datasets` has classes
        if not 0 <= gold < len(labels):
            raise ValueError(f"{answer} is {gold}, and labels are counted 0 to {len(labels) - 1}")
        return Sample(asked, labels[gold])
    return Sample(asked, str(gold).strip())


def _own_labels(labels: tuple[str, ...], form: AnswerFormat, where: str) -> tuple[str, ...]:
    shown = list(labels)
    if form in ("number", "text"):
        if labels:
            raise _wrong(where, "labels", shown, f"none for format {form}; format label has some")
        return ()
    if len({" ".join(label.casefold().split()) for label in labels}) < max(2, len(labels)):
        raise _wrong(where, "labels", shown, "two different answers at least: [good, bad]")
    if form == "letter" and not all(re.fullmatch("[A-Z]", label) for label in labels):
        raise _wrong(where, "labels", shown, "single capitals for format letter; label takes words")
    return labels


def _own_response(given: Any, form: AnswerFormat, labels: tuple[str, ...], where: str) -> str:
    if not isinstance(given, str) or given.count("{answer}") != 1:
        expected = "text with {answer} in it once, such as 'the correct answer is {answer}'"
        raise _wrong(where, "response", given, expected)
    for label in labels:
        read = extract(form, labels, given.replace("{answer}", label))
        if read != label:
            raise ValueError(
                f"{where}.response is {given!r}; with {label!r} in it, {read!r} would be read as "
                "the answer. Word it so that it states the answer: 'The answer is {answer}'."
            )
    return given


def _texts(definition: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = definition.get(key) or []
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise _wrong(where, key, values, "a list of texts")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{where}.{key} holds {value!r}, which is no text. Put it in quotes: YAML reads a "
                "bare yes or no as a truth value."
            )
    return tuple(values)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that `word` may be a slip of; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
