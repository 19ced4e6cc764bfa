"""A record: what is asked, the response to train on, the candidates and the gold answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from rosa_lightning.tasks import answers
from rosa_lightning.tasks.answers import NUMBER_TOLERANCE as NUMBER_TOLERANCE
from rosa_lightning.tasks.answers import Rules as Rules
from rosa_lightning.tasks.registry import TASKS as TASKS
from rosa_lightning.tasks.registry import Task as Task


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str
    """system, user, assistant or tool."""
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """One exercise: what is asked, what is taught, and the gold answer.

    Of a conversation the last reply is the output, and the user's turn before it the instruction. A
    text without an instruction is all output.
    """

    instruction: str
    """What is asked; empty for plain text."""
    input: str
    """Further context, mostly empty."""
    output: str
    """The response to train on; empty where there is none."""
    answer: str | None
    """The gold answer alone, None where the data has none."""
    task: str
    """Name of the task: a key of `TASKS`, or one of the user's own."""
    source: str
    """Name of the source that the record came from."""
    index: int
    """Number of the record in its source, counted from 1."""
    own_task: Task | None = None
    """The task itself, where it is the user's own; None for those in `TASKS`."""
    turns: tuple[Turn, ...] = ()
    """All turns before the output; () where that is one question alone."""

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, without a question."""
        return not self.instruction and not self.turns


def scored_as(task: str, source: str) -> str:
    """What a score goes by: its task, or its source where that is of no task."""
    return source if task == "text" and source not in TASKS else task


def plain_name(name: str) -> str:
    """A task's name without case and punctuation, as names are compared."""
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def find_task(name: str, tasks: Mapping[str, Task] = TASKS) -> str | None:
    """The key of `tasks` that `name` means (`ARC-Easy` means `arc_easy`), or None."""
    known = {
        plain_name(alias): key for key, task in tasks.items() for alias in (key, *task.aliases)
    }
    return known.get(plain_name(name))


def task_of(record: Record) -> Task:
    """The task that a record belongs to."""
    return record.own_task or _task(record.task)


def _task(task: str | Task) -> Task:
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(
            f"task {task!r} is none of {', '.join(TASKS)}. Give a task of your own as a Task."
        )
    return TASKS[task]


def reference(record: Record) -> str | None:
    """The gold answer: the record's own, else the one that its output states, else None."""
    return record.answer or extract_answer(task_of(record), record.output)


def candidates(record: Record) -> tuple[str, ...]:
    """The responses that `likelihood` scores, one an answer that the record's prompt offers.

    In the order of the task's labels and in the wording of its responses; () for tasks whose
    answers cannot be listed. Raises ValueError where the prompt offers an answer twice.
    """
    task = task_of(record)
    return tuple(task.response.replace("{answer}", label) for label in _offered(task, record))


def needs_end(texts: Sequence[str]) -> bool:
    """Whether one text is a proper beginning of another ("good" of "good enough").

    The longer text can then never be the likelier, unless both are scored with the end token.
    """
    # Sorted, all texts that begin with one follow it at once.
    ordered = sorted(set(texts))
    return any(longer.startswith(text) for text, longer in pairwise(ordered))


def _offered(task: Task, record: Record) -> tuple[str, ...]:
    """The labels that the prompt names as its answer format or choices; else all."""
    if task.format == "letter":
        _, listed, choices = record.instruction.rpartition("Answer Choices:")
        named = re.findall(r"\(([A-Z])\) ", choices)
        twice = _listed_twice(task.labels, choices) if listed else None
    else:
        named = record.instruction.rpartition("Answer format:")[2].strip().split("/")
        twice = next((label for label in task.labels if named.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"the prompt offers {twice!r} twice as an answer")
    offered = tuple(label for label in task.labels if label in named)
    return offered if len(offered) > 1 else task.labels


# "both (A) and (B)": a letter joined to others stands in a choice's text and begins none.
_JOINED = re.compile(
    r"\b(?:and|or|nor|both|either|neither|than|as|of) \([A-Z]\)|\([A-Z]\) (?=(?:and|or|nor)\b)",
    re.IGNORECASE,
)


def _listed_twice(labels: Sequence[str], choices: str) -> str | None:
    """The letter that begins two of the choices "(A) 5 (B) 6 (A) 7", or None.

    The text of a choice may name another's letter: the list then goes on after it in order.
    """
    named: list[str] = re.findall(r"\(([A-Z])\) ", _JOINED.sub("", choices))
    letters = [letter for letter in named if letter in labels]
    listed: list[str] = []
    for position, letter in enumerate(letters):
        if letter not in listed:
            listed.append(letter)
            continue
        following = labels[labels.index(listed[-1]) + 1 :][:1]
        if letter == listed[-1] or not set(following) & set(letters[position:]):
            return letter
    return None


def check_gold(record: Record) -> None:
    """Raise ValueError unless the gold answer is one that task and prompt allow."""
    task, gold = task_of(record), reference(record)
    offered = _offered(task, record)
    if gold is None or answers.expresses(task.format, offered, gold):
        return
    wanted = f"one of {', '.join(offered)}" if offered else f"a {task.format}"
    raise ValueError(f"the gold answer is {gold[:40]!r}; its prompt asks for {wanted}")


def extract_answer(task: str | Task, text: str, rules: Rules = "strict") -> str | None:
    """The answer that `text` gives by the rules, in the format of a task or key of `TASKS`."""
    task = _task(task)
    return answers.extract(task.format, task.labels, text, rules)


def same_answer(task: str | Task, first: str | None, second: str | None) -> bool:
    """Whether two answers agree, as `answers.same` has it."""
    return answers.same(_task(task).format, first, second)


def answer_start(task: str | Task, text: str, answer: str | None) -> int | None:
    """Index of the answer's first character, if `text` ends with `answer`, else None.

    Closing punctuation may follow, and the answer may be spelt differently ("15." for 15.0).
    """
    if not answer:
        return None
    task = _task(task)
    ending = text.rstrip(" \t\r\n.)")
    start = len(ending) - len(answer)
    if ending.endswith(answer) and not (start and (ending[start - 1] + answer[0]).isalnum()):
        return start
    span = answers.find(task.format, task.labels, text)
    if span is None or any(character.isalnum() for character in text[span[1] :]):
        return None
    return span[0] if answers.same(task.format, text[slice(*span)], answer) else None
