"""Tasks of the user's own, defined in a configuration without code."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from string import Formatter
from typing import Any, get_args

from rosa_lightning.tasks.answers import AnswerFormat, extract
from rosa_lightning.tasks.converters import Sample
from rosa_lightning.tasks.records import find_task, plain_name
from rosa_lightning.tasks.registry import TASKS, Task

_KEYS = ("name", "format", "labels", "aliases", "response", "prompt", "answer")


def with_own_tasks(definitions: Sequence[Mapping[str, Any]] | None) -> dict[str, Task]:
    """`TASKS` and the tasks that a configuration defines under `data.tasks`.

    A definition is a mapping: `name`; `format`, one of label, letter, number, text; for the first
    two `labels`, the answers that there are; `aliases`, other names; `response`, the wording of a
    response with `{answer}` in it, by default the benchmarks' own; `prompt`, what is asked with the
    rows' fields in braces, and `answer`, the field of the gold answer. Without a `prompt` rows have
    the fields that `sources.py` knows.

    Raises TypeError or ValueError that names the key.
    """
    tasks = dict(TASKS)
    for number, definition in enumerate(definitions or []):
        task = _own_task(definition, f"data.tasks[{number}]")
        for name in (task.name, *task.aliases):
            taken = find_task(name, tasks)
            if taken is not None or not plain_name(name):
                why = f"taken by task {taken}" if taken else "without a letter or digit"
                raise ValueError(
                    f"data.tasks[{number}]: the name {name!r} is {why}. Choose another name."
                )
        tasks[task.name] = task
    return tasks


def _own_task(definition: Any, where: str) -> Task:
    if not isinstance(definition, Mapping):
        raise TypeError(
            f"{where} is {definition!r}; expected a mapping such as "
            "{name: mytask, format: label, labels: [good, bad]}."
        )
    for key in definition:
        if key not in _KEYS:
            raise TypeError(
                f"{where} has no key {key!r}{nearest(str(key), _KEYS)}. "
                f"Its keys are {', '.join(_KEYS)}."
            )
    name: Any = definition.get("name")
    form: Any = definition.get("format")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}.name is {name!r}; expected a name, which sources give as task.")
    if form not in get_args(AnswerFormat):
        hint = nearest(str(form), get_args(AnswerFormat))
        raise ValueError(
            f"{where}.format is {form!r}{hint}; expected {', '.join(get_args(AnswerFormat))}."
        )
    labels = _own_labels(definition, form, where)
    aliases = _texts(definition, "aliases", where)
    response = _own_response(definition, form, labels, where)
    fields, convert = _own_rows(definition, labels, where)
    return Task(
        name=name,
        format=form,
        labels=labels,
        aliases=aliases,
        response=response,
        fields=fields,
        convert=convert,
    )


def _own_rows(
    definition: Mapping[str, Any], labels: tuple[str, ...], where: str
) -> tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Sample] | None]:
    """The fields that the rows must have, the answer's last, and how to read them."""
    prompt, answer = definition.get("prompt"), definition.get("answer")
    if prompt is None:
        if answer is not None:
            raise ValueError(f"{where}.answer is given without a prompt. Give both, or neither.")
        return (), None
    answer = "answer" if answer is None else answer
    try:
        parts = list(Formatter().parse(prompt))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}.prompt is {prompt!r} ({error}); expected text with fields in braces, such as "
            "'Is this review good or bad? {text}'."
        ) from error
    fields = [name for _, name, spec, how in parts if name is not None and not spec and not how]
    braces = sum(name is not None for _, name, _, _ in parts)
    if not fields or len(fields) < braces or not all(map(str.isidentifier, fields)):
        raise ValueError(
            f"{where}.prompt is {prompt!r}; expected names of fields alone in braces, one at "
            "least, such as {text}. Write {{ and }} for braces themselves."
        )
    if not isinstance(answer, str) or not answer:
        raise TypeError(f"{where}.answer is {answer!r}; expected the name of a field.")
    names = tuple(dict.fromkeys(name for name in fields if name != answer))
    read = partial(_own_sample, prompt=prompt, fields=names, answer=answer, labels=labels)
    if len(names) < len(set(fields)):
        raise ValueError(f"{where}.prompt shows {{{answer}}}, the field of the answer.")
    return (*names, answer), read


def _own_sample(
    row: Mapping[str, Any],
    *,
    prompt: str,
    fields: Sequence[str],
    answer: str,
    labels: Sequence[str],
) -> Sample:
    """What a row asks, by the task's definition.

    Raises ValueError for a number that counts no label.
    """
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


def _own_labels(definition: Mapping[str, Any], form: AnswerFormat, where: str) -> tuple[str, ...]:
    labels = _texts(definition, "labels", where)
    if form in ("number", "text"):
        if labels:
            raise ValueError(
                f"{where}.labels is given, but answers of format {form} are not listed. Leave it "
                "out, or set format: label."
            )
        return ()
    if len(labels) < 2:
        raise ValueError(
            f"{where}.labels is {list(labels)}; format {form} needs the answers that there are, "
            "two at least: labels: [good, bad]."
        )
    plain = [" ".join(label.casefold().split()) for label in labels]
    for label, key in zip(labels, plain, strict=True):
        if plain.count(key) > 1:
            raise ValueError(f"{where}.labels names {label!r} twice. Answers must differ.")
        if form == "letter" and not re.fullmatch("[A-Z]", label):
            raise ValueError(
                f"{where}.labels has {label!r}; format letter takes single capitals. Set format: "
                "label for words."
            )
    return labels


def _own_response(
    definition: Mapping[str, Any], form: AnswerFormat, labels: tuple[str, ...], where: str
) -> str:
    default = {"label": "the correct answer is {answer}", "letter": "The answer is ({answer})."}
    given = definition.get("response", default.get(form, "{answer}"))
    if not isinstance(given, str) or given.count("{answer}") != 1:
        raise ValueError(
            f"{where}.response is {given!r}; expected text with {{answer}} in it once, such as "
            "'the correct answer is {answer}'."
        )
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
        raise TypeError(f"{where}.{key} is {values!r}; expected a list of texts.")
    # YAML reads an unquoted yes or no as a truth value, and 1 as a number.
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise TypeError(
                f"{where}.{key} holds {value!r}, which is no text. Put it in quotes: YAML reads a "
                "bare yes or no as a truth value."
            )
    return tuple(values)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that `word` may be a slip of; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
