"""Rows of the benchmarks' hub data sets as samples, worded to the letter as in LLM-Adapters.

One function a schema; its docstring shows a row.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """What a hub row asks, and its answer."""

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


def boolq(row: Mapping[str, Any]) -> Sample:
    """{"question": "is it so", "answer": true}; LLM-Adapters leaves the passage out."""
    answer = row["answer"]
    return Sample(
        "Please answer the following question with true or false, question: "
        f"{row['question']}?\n\nAnswer format: true/false",
        None if answer is None else str(answer).lower(),
    )


def piqa(row: Mapping[str, Any]) -> Sample:
    """{"goal": "Boil butter", "sol1": "On a plate", "sol2": "In a jar", "label": 1}; hidden: -1."""
    return Sample(
        f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n{_format('solution', 2)}",
        _chosen("solution", row["label"], first=0),
    )


def social_i_qa(row: Mapping[str, Any]) -> Sample:
    """{"context": "Al left.", "question": "Why?", "answerA": "late", ..., "label": "1"}."""
    question = f"{row['context']} {row['question']}"
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(question, texts, _chosen("answer", row["label"], first=1))


def hellaswag(row: Mapping[str, Any]) -> Sample:
    """{"activity_label": "Roofing", "ctx": "A man", "endings": ["sits", ...], "label": "3"}."""
    endings = _texts(row["endings"], "endings")
    if len(endings) < 2:
        raise ValueError(f"'endings' has {len(endings)} texts")
    return Sample(
        "Please choose the correct ending to complete the given sentence: "
        f"{row['activity_label']}: {row['ctx']}\n\n{_listed('Ending', endings)}\n\n"
        f"{_format('ending', len(endings))}",
        _chosen("ending", row["label"], first=0),
    )


def winogrande(row: Mapping[str, Any]) -> Sample:
    """{"sentence": "Ann beat Eve as _ ran.", "option1": "Ann", "option2": "Eve", "answer": "1"}."""
    return Sample(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\n{_listed('Option', [row['option1'], row['option2']])} "
        f"{_format('option', 2)}",
        _chosen("option", row["answer"], first=1),
    )


def arc(row: Mapping[str, Any]) -> Sample:
    """{"question": "", "choices": {"text": ["a", ...], "label": ["A", ...]}, "answerKey": "A"}."""
    return _keyed(row["question"], row)


def openbookqa(row: Mapping[str, Any]) -> Sample:
    """{"question_stem": "The sun", "choices": {...}, "answerKey": "D"}, as `arc`."""
    return _keyed(row["question_stem"], row)


def _keyed(question: str, row: Mapping[str, Any]) -> Sample:
    labels, key = _texts(row["choices"]["label"], "choices.label"), row["answerKey"]
    texts = _texts(row["choices"]["text"], "choices.text")
    if len(set(labels)) < len(labels):
        raise ValueError(f"'choices' has a label twice ({', '.join(map(str, labels))})")
    if len(labels) < 2 or len(labels) != len(texts):
        raise ValueError(f"'choices' has {len(texts)} texts, {len(labels)} labels")
    answer = f"answer{labels.index(key) + 1}" if key in labels else (key or None)
    return _question(question, texts, answer)


def _question(question: str, texts: Sequence[str], answer: str | None) -> Sample:
    return Sample(
        f"Please choose the correct answer to the question: {question}\n\n"
        f"{_listed('Answer', texts)}\n\n{_format('answer', len(texts))}",
        answer,
    )


def aqua(row: Mapping[str, Any]) -> Sample:
    """{"question": "2x = 42", "options": ["A)21", ...], "rationale": "Halve.", "correct": "A"}."""
    # LLM-Adapters took the wording from zero-shot CoT, which spaces every parenthesis so.
    options = (
        ("(" + "(".join(_texts(row["options"], "options"))).replace("(", " (").replace(")", ") ")
    )
    answer = row["correct"] or None
    question = f"{row['question'].strip()} Answer Choices:{options}"
    worked = (row["rationale"] or "").strip()
    solution = f"{worked}\nThe answer is ({answer})." if answer else None
    return Sample(question, answer, solution)


def svamp(row: Mapping[str, Any]) -> Sample:
    """{"Body": "He had 32 crackers.", "Question": "How many each?", "Answer": "8.0"}."""
    return Sample(f"{row['Body'].strip()} {row['Question'].strip()}", _number(row["Answer"]))


def multiarith(row: Mapping[str, Any]) -> Sample:
    """{"question": "How many are 3 and 4?", "final_ans": "7"}."""
    return Sample(row["question"], _number(row["final_ans"]))


def lila(row: Mapping[str, Any]) -> Sample:
    """{"input": "Ada had 3 . How many ?", "output_answer": "3"}: AddSub and SingleEq."""
    return Sample(row["input"], _number(row["output_answer"]))


def mawps(row: Mapping[str, Any]) -> Sample:
    """{"question": "How many?", "result_float": 8.0}; `result` would write thousands as 1_000."""
    return Sample(row["question"], _number(row["result_float"]))


def _number(value: Any) -> str | None:
    return None if value is None else str(value).strip() or None


def written(answer: str) -> str:
    """A gold answer as a response states it: 8 for 8.0."""
    return re.sub(r"\.0+\Z", "", answer)
