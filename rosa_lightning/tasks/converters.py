"""The hub's rows of the benchmarks, in the words of LLM-Adapters.

One pure function a schema: a row with the data set's own fields to what is asked and the gold
answer. The wording is that of LLM-Adapters' files, to the letter, so that a model trained on those
reads hub data as it learnt to. Where a hub set has a solution of its own, the output is that.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Exercise(NamedTuple):
    """What a hub row holds."""

    instruction: str
    """What is asked."""
    answer: str | None
    """The gold answer; None where the split hides it."""
    output: str | None = None
    """The worked solution, where the data set has one."""


def _chosen(word: str, label: Any, first: int) -> str | None:
    """The answer that a choice's number means, counted from `first`; None for a hidden one."""
    text = "" if label is None else str(label).strip()
    if text in ("", "-1"):
        return None
    return f"{word}{int(text) - first + 1}" if text.isdecimal() else text


def _texts(value: Any, field: str) -> list[str]:
    """A field's list of texts; a text in its place would be taken for a list of letters."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise TypeError(f"{field!r} is no list of texts")
    return list(value)


def _listed(word: str, texts: Sequence[str]) -> str:
    return " ".join(f"{word}{number}: {text}" for number, text in enumerate(texts, start=1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def boolq(row: Mapping[str, Any]) -> Exercise:
    """`question`, `answer` (bool); LLM-Adapters leaves the passage out."""
    answer = row["answer"]
    return Exercise(
        "Please answer the following question with true or false, question: "
        f"{row['question']}?\n\nAnswer format: true/false",
        None if answer is None else str(answer).lower(),
    )


def piqa(row: Mapping[str, Any]) -> Exercise:
    """`goal`, `sol1`, `sol2`, `label` (0 or 1; -1 where hidden)."""
    return Exercise(
        f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n{_format('solution', 2)}",
        _chosen("solution", row["label"], first=0),
    )


def social_i_qa(row: Mapping[str, Any]) -> Exercise:
    """`context`, `question`, `answerA` to `answerC`, `label` ("1" to "3")."""
    question = f"{row['context']} {row['question']}"
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(question, texts, _chosen("answer", row["label"], first=1))


def hellaswag(row: Mapping[str, Any]) -> Exercise:
    """`activity_label`, `ctx`, `endings`, `label` ("0" to "3"; "" where hidden)."""
    endings = _texts(row["endings"], "endings")
    if len(endings) < 2:
        raise ValueError(f"'endings' has {len(endings)} texts")
    return Exercise(
        "Please choose the correct ending to complete the given sentence: "
        f"{row['activity_label']}: {row['ctx']}\n\n{_listed('Ending', endings)}\n\n"
        f"{_format('ending', len(endings))}",
        _chosen("ending", row["label"], first=0),
    )


def winogrande(row: Mapping[str, Any]) -> Exercise:
    """`sentence`, `option1`, `option2`, `answer` ("1" or "2"; "" where hidden)."""
    return Exercise(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\n{_listed('Option', [row['option1'], row['option2']])} "
        f"{_format('option', 2)}",
        _chosen("option", row["answer"], first=1),
    )


def arc(row: Mapping[str, Any]) -> Exercise:
    """`question`, `choices` (`text`, `label`: A to E or 1 to 5), `answerKey`."""
    return _keyed(row["question"], row)


def openbookqa(row: Mapping[str, Any]) -> Exercise:
    """`question_stem`, `choices` (`text`, `label`: A to D), `answerKey`."""
    return _keyed(row["question_stem"], row)


def _keyed(question: str, row: Mapping[str, Any]) -> Exercise:
    labels, key = _texts(row["choices"]["label"], "choices.label"), row["answerKey"]
    texts = _texts(row["choices"]["text"], "choices.text")
    if len(set(labels)) < len(labels):
        raise ValueError(f"'choices' has a label twice ({', '.join(map(str, labels))})")
    if len(labels) < 2 or len(labels) != len(texts):
        raise ValueError(f"'choices' has {len(texts)} texts, {len(labels)} labels")
    answer = f"answer{labels.index(key) + 1}" if key in labels else (key or None)
    return _question(question, texts, answer)


def _question(question: str, texts: Sequence[str], answer: str | None) -> Exercise:
    return Exercise(
        f"Please choose the correct answer to the question: {question}\n\n"
        f"{_listed('Answer', texts)}\n\n{_format('answer', len(texts))}",
        answer,
    )


def aqua(row: Mapping[str, Any]) -> Exercise:
    """`question`, `options` ("A)21"), `rationale`, `correct` (A to E)."""
    # LLM-Adapters took the wording from zero-shot CoT, which spaces every parenthesis so.
    options = (
        ("(" + "(".join(_texts(row["options"], "options"))).replace("(", " (").replace(")", ") ")
    )
    answer = row["correct"] or None
    question = f"{row['question'].strip()} Answer Choices:{options}"
    worked = (row["rationale"] or "").strip()
    solution = f"{worked}\nThe answer is ({answer})." if answer else None
    return Exercise(question, answer, solution)


def svamp(row: Mapping[str, Any]) -> Exercise:
    """`Body`, `Question`, `Answer`."""
    return Exercise(f"{row['Body'].strip()} {row['Question'].strip()}", _number(row["Answer"]))


def multiarith(row: Mapping[str, Any]) -> Exercise:
    """`question`, `final_ans`."""
    return Exercise(row["question"], _number(row["final_ans"]))


def lila(row: Mapping[str, Any]) -> Exercise:
    """`input`, `output_answer`: AddSub and SingleEq."""
    return Exercise(row["input"], _number(row["output_answer"]))


def mawps(row: Mapping[str, Any]) -> Exercise:
    """`question`, `result_float` (`result` writes thousands in Python's way, 1_000)."""
    return Exercise(row["question"], _number(row["result_float"]))


def _number(value: Any) -> str | None:
    return None if value is None else str(value).strip() or None


def written(answer: str) -> str:
    """A gold answer as a response states it: 8 for 8.0."""
    return re.sub(r"\.0+\Z", "", answer)
