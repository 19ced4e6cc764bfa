"""The fifteen reasoning benchmarks: record to prompt and response, text to answer.

One table (`TASKS`) and pure functions; nothing here loads a file or a model. Task names are
those of the LLM-Adapters suite. Two more rows serve data outside it: `demo`, the embedded
demonstration set (answers are numbers), and `text`, any instruction data (the answer is the
whole response).
"""

import re
from dataclasses import dataclass
from typing import Literal

Template = Literal["alpaca", "plain"]
AnswerFormat = Literal["label", "letter", "number", "text"]
Rules = Literal["strict", "paper"]
"""How answers are read out of a text: the last stated one, or as LLM-Adapters does."""

NUMBER_TOLERANCE = 1e-3
"""Two numeric answers at most this far apart are the same."""


@dataclass(frozen=True, slots=True)
class Record:
    """One exercise: what is asked, what is taught, and the gold answer."""

    instruction: str
    """What is asked."""
    input: str
    """Further context, mostly empty."""
    output: str
    """The response to train on; empty where there is none."""
    answer: str | None
    """The gold answer alone, None where the data has none."""
    task: str
    """A key of `TASKS`."""
    source: str
    """Name of the source that the record came from."""
    index: int
    """Number of the record in its source, counted from 1."""


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table."""

    group: str
    """`commonsense`, `arithmetic` or `other`."""
    format: AnswerFormat
    """What an answer looks like."""
    labels: tuple[str, ...] = ()
    """The answers that there are, for the formats `label` and `letter`."""
    aliases: tuple[str, ...] = ()
    """Other names in use, compared without case and punctuation."""


def _numbered(word: str, last: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, last + 1))


TASKS: dict[str, Task] = {
    "boolq": Task("commonsense", "label", ("true", "false")),
    "piqa": Task("commonsense", "label", _numbered("solution", 2)),
    "social_i_qa": Task("commonsense", "label", _numbered("answer", 3), ("siqa", "socialiqa")),
    "hellaswag": Task("commonsense", "label", _numbered("ending", 4)),
    "winogrande": Task("commonsense", "label", _numbered("option", 2)),
    "arc_easy": Task("commonsense", "label", _numbered("answer", 5), ("arce",)),
    "arc_challenge": Task("commonsense", "label", _numbered("answer", 5), ("arcc",)),
    "openbookqa": Task("commonsense", "label", _numbered("answer", 4), ("obqa",)),
    "multiarith": Task("arithmetic", "number"),
    "gsm8k": Task("arithmetic", "number"),
    "addsub": Task("arithmetic", "number"),
    "aqua": Task("arithmetic", "letter", tuple("ABCDE"), ("aquarat",)),
    "singleeq": Task("arithmetic", "number"),
    "svamp": Task("arithmetic", "number"),
    "mawps": Task("arithmetic", "number"),
    "demo": Task("other", "number"),
    "text": Task("other", "text"),
}


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


_BY_PLAIN_NAME = {
    _plain_name(alias): name for name, task in TASKS.items() for alias in (name, *task.aliases)
}


def find_task(name: str) -> str | None:
    """The key of `TASKS` that `name` means (`ARC-Easy` means `arc_easy`), or None."""
    return _BY_PLAIN_NAME.get(_plain_name(name))


# The wording of LLM-Adapters' generate_prompt, itself Alpaca's, without its indentation.
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def prompt(record: Record, template: Template = "alpaca") -> str:
    """The text that stands before the response, ending in a line break.

    Raises ValueError for a template that does not exist.
    """
    if template == "plain":
        context = f"\n{record.input}" if record.input else ""
        return f"{record.instruction}{context}\n"
    if template == "alpaca":
        # str.format leaves braces inside the values alone.
        wording = _ALPACA_WITH_INPUT if record.input else _ALPACA
        return wording.format(instruction=record.instruction, input=record.input)
    raise ValueError(
        f"data.template is {template!r}; there are alpaca and plain. Set one of these."
    )


def response(record: Record) -> str:
    """The text to train on, exactly as the source gives it (a leading line break stays)."""
    return record.output


def reference(record: Record) -> str | None:
    """The gold answer: the record's own, else the one that its output states, else None."""
    return record.answer or extract_answer(record.task, record.output)


# A digit run with thousands separators or without, decimals, exponent. A sign counts only where
# no operand stands before it: in "17-9" the minus is an operator.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = rf"(?:(?<![\w)\].])[-+\u2212])?\$?(?<!\w)(?:{_DIGITS})(?:[eE]-?\d+)?"
_STATED = r"\banswer\s+is\s*:?\s*"
_WORKING = r"(?:[\d\s.,+*/()$\u2212-]*=\s*)?"
"""The left side of "the answer is 58 + 94 = 152"."""


def _patterns(task: Task) -> tuple[re.Pattern[str], ...]:
    """Patterns whose group 1 is an answer, the most explicit statement first."""
    if task.format == "number":
        openers = (r"####\s*", r"\\boxed\{\s*", _STATED + _WORKING, "")
        return tuple(re.compile(f"(?i:{opener})({_NUMBER})") for opener in openers)
    if task.format == "letter":
        # A lone capital in running text is no answer ("A bag holds ..."), so one must be stated.
        letter = f"([{''.join(task.labels)}])"
        return (
            re.compile(rf"(?i:(?:{_STATED}|####\s*))\(?{letter}(?![A-Za-z0-9])"),
            re.compile(rf"\A\W*{letter}\W*\Z"),
        )
    label = rf"({'|'.join(task.labels)})\b"
    return (
        re.compile(rf"{_STATED}\W*{label}", re.IGNORECASE),
        re.compile(rf"\b{label}", re.IGNORECASE),
    )


_PATTERNS = {name: _patterns(task) for name, task in TASKS.items() if task.format != "text"}


def _find_answer(task: str, text: str) -> tuple[int, int] | None:
    """Start and end of the last stated answer in `text`."""
    for pattern in _PATTERNS[task]:
        spans = [match.span(1) for match in pattern.finditer(text)]
        if spans:
            return spans[-1]
    return None


def candidates(record: Record) -> tuple[str, ...]:
    """The responses that `likelihood` chooses among, in label order; () where there are none.

    Of the task's labels those that the instruction offers ("Answer format: answer1/answer2").
    """
    task = TASKS.get(record.task)
    if task is None or not task.labels:
        return ()
    if task.format == "letter":
        return tuple(f"The answer is ({label})." for label in task.labels)
    offered = re.findall(r"Answer format: (\S+)", record.instruction)
    names = set(offered[-1].split("/")) if offered else set(task.labels)
    return tuple(f"the correct answer is {label}" for label in task.labels if label in names)


def extract_answer(task: str, text: str, rules: Rules = "strict") -> str | None:
    """The last answer that `text` states in the task's format, or None.

    `paper` reads as LLM-Adapters does: the first label, first capital of A to E, or last number.

    Labels come in lower case, letters as capitals, numbers without currency sign and thousands
    separators; `text` and tasks not in the table give the text without outer white space.
    """
    if task not in _PATTERNS:
        return text.strip() or None
    if rules == "paper":
        return _paper_answer(TASKS[task], text)
    span = _find_answer(task, text)
    if span is None:
        return None
    answer = text[slice(*span)]
    if TASKS[task].format == "number":
        return re.sub(r"[,$+]", "", answer).replace("\u2212", "-")
    return answer.lower() if TASKS[task].format == "label" else answer


def _paper_answer(task: Task, text: str) -> str | None:
    if task.format == "number":
        numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        return numbers[-1] if numbers else None
    labels = re.findall("|".join(task.labels), text)
    return labels[0] if labels else None


def same_answer(task: str, first: str | None, second: str | None) -> bool:
    """Whether two answers agree: numbers within 1e-3, others but for case and white space.

    None, for no answer found, agrees with nothing.
    """
    if first is None or second is None:
        return False
    if task in TASKS and TASKS[task].format == "number":
        numbers = extract_answer(task, first), extract_answer(task, second)
        if None in numbers:
            return False
        one, other = (float(number) for number in numbers if number is not None)
        return abs(one - other) <= NUMBER_TOLERANCE
    return " ".join(first.casefold().split()) == " ".join(second.casefold().split())


def answer_start(task: str, text: str, answer: str | None) -> int | None:
    """Index of the answer's first character, if `text` ends with `answer`, else None.

    Closing punctuation may follow, and the answer may be spelt differently ("15." for 15.0).
    """
    if not answer:
        return None
    ending = text.rstrip(" \t\r\n.)")
    start = len(ending) - len(answer)
    if ending.endswith(answer) and not (start and (ending[start - 1] + answer[0]).isalnum()):
        return start
    span = _find_answer(task, text) if task in _PATTERNS else None
    if span is None or any(character.isalnum() for character in text[span[1] :]):
        return None
    return span[0] if same_answer(task, text[slice(*span)], answer) else None
