"""Tasks that a configuration defines."""

from __future__ import annotations

import json

import pytest

from rosa_lightning.data.records import load_records
from rosa_lightning.data.sources import Source, source_list
from rosa_lightning.tasks.custom import with_own_tasks
from rosa_lightning.tasks.records import (
    TASKS,
    candidates,
    extract_answer,
    find_task,
    reference,
    same_answer,
)

MOOD = {"name": "mood", "format": "label", "labels": ["good", "not good"], "aliases": ["temper"]}


def test_own_tasks_stand_beside_the_benchmarks():
    before = dict(TASKS)
    tasks = with_own_tasks([MOOD, {"name": "sums", "format": "number"}])
    assert set(tasks) - set(TASKS) == {"mood", "sums"}
    assert find_task("Temper", tasks) == find_task("MOOD", tasks) == "mood"
    assert before == TASKS
    assert with_own_tasks(None) == with_own_tasks([]) == TASKS


def test_own_labels_are_found_compared_and_listed():
    task = with_own_tasks([MOOD])["mood"]
    assert extract_answer(task, "The answer is NOT GOOD.") == "not good"
    assert extract_answer(task, "good, or not good?", "paper") == "good"
    assert same_answer(task, "Good", "good")


REVIEW = {
    "name": "mood",
    "format": "label",
    "labels": ["bad", "good"],
    "prompt": "Good or bad? {text} ({{by}} {author})",
    "answer": "label",
}
PICK = {"name": "pick", "format": "letter", "labels": ["A", "B"]}


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        ("mood", " is 'mood'; expected a mapping"),
        ({**MOOD, "label": ["a"]}, "no key 'label' (did you mean labels?)"),
        ({"format": "number"}, ".name is None"),
        ({**MOOD, "format": "lable"}, ".format is 'lable'; expected label, letter"),
        ({**MOOD, "labels": ["good"]}, ".labels is ['good']; expected two different"),
        (
            {**MOOD, "labels": ["good", "Good"]},
            ".labels is ['good', 'Good']; expected",
        ),
        ({**MOOD, "labels": "good bad"}, ".labels is 'good bad'; expected a list"),
        (
            {**MOOD, "labels": [True, False]},
            ".labels holds True, which is no text. Put it",
        ),
        ({**MOOD, "format": "letter"}, "expected single capitals"),
        ({**MOOD, "format": "number"}, "expected none for format number"),
        ({**MOOD, "name": "ARC-Easy"}, "the name 'ARC-Easy' is taken by task arc_easy"),
        ({**MOOD, "aliases": ["gsm8k"]}, "the name 'gsm8k' is taken by task gsm8k"),
        ({**MOOD, "name": "!"}, "is without a letter or digit"),
        ({**MOOD, "response": "it is so"}, "with {answer} in it once"),
        ({**PICK, "response": "I take {answer}"}, "with 'A' in it, None would be read"),
        ({**MOOD, "response": "{answer}, not good"}, "'not good' would be read"),
        ({**REVIEW, "prompt": None}, ".prompt is None"),
        ({**REVIEW, "prompt": "Good?"}, "expected names of fields alone"),
        ({**REVIEW, "prompt": "{text.__class__}"}, "expected names of fields alone"),
        ({**REVIEW, "prompt": "{text!r}"}, "expected names of fields alone"),
        ({**REVIEW, "prompt": "{text:>9}"}, "expected names of fields alone"),
        ({**REVIEW, "prompt": "{}"}, "expected names of fields alone"),
        ({**REVIEW, "prompt": "{text"}, "expected names of fields alone"),
        (
            {**REVIEW, "prompt": "{text} {label}"},
            ".answer is 'label'; expected the name",
        ),
        ({**REVIEW, "answer": ["a"]}, ".answer is ['a']; expected the name of a field"),
    ],
)
def test_definitions_that_make_no_sense_are_named(definition, words):
    with pytest.raises(ValueError, match=r"data\.tasks\[0\]") as caught:
        with_own_tasks([definition])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def rows_file(tmp_path, *rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path), **fields)


@pytest.mark.parametrize(("name", "task"), [("mood", "Temper"), ("rows", None)])
def test_a_source_is_of_the_own_task_that_it_names_or_is_named_as(name, task, tmp_path):
    tasks = with_own_tasks([{**MOOD, "name": name, "response": "I {feel}: {answer}"}])
    row = {"instruction": "How?", "output": "I feel: good", "answer": "good"}
    source = rows_file(tmp_path, row, task=task)
    (named,) = source_list("sources", [source], tasks)
    (record,) = load_records(named, "test", tasks)
    assert named.benchmark == record.task == name
    assert candidates(record) == ("I {feel}: good", "I {feel}: not good")
    assert reference(record) == "good"


def test_rows_with_fields_of_their_own_are_asked_as_the_task_says(tmp_path):
    tasks = with_own_tasks([REVIEW])
    fine = {"text": "Fine.", "author": "Ann", "instruction": "not read"}
    rows = ({**fine, "label": label} for label in (1, "bad", "0"))
    source = rows_file(tmp_path, *rows, task="mood")
    *read, last = load_records(source, "audit", tasks)
    assert [record.instruction for record in read] == ["Good or bad? Fine. ({by} Ann)"] * 2
    assert [record.answer for record in read] == ["good", "bad"]
    assert read[0].output == "the correct answer is good"
    assert last.answer == "0"
    with pytest.raises(ValueError, match=r"record 3 \(task mood\): the gold answer is '0'"):
        load_records(source, "test", tasks)
    asked = load_records(rows_file(tmp_path, fine, task="mood"), "predict", tasks)
    assert asked[0].instruction.startswith("Good or bad? Fine.")


@pytest.mark.parametrize(
    ("changes", "row", "asked", "answer"),
    [
        (
            {"format": "number", "labels": None, "prompt": "{a} + {b}", "answer": "sum"},
            {"a": 1, "b": 2, "sum": 3},
            "1 + 2",
            "3",
        ),
        (
            {"labels": ["true", "false"], "prompt": "{text}"},
            {"text": "x", "label": False},
            "x",
            "false",
        ),
    ],
)
def test_an_own_task_may_count_what_is_true_or_be_a_number(changes, row, asked, answer, tmp_path):
    tasks = with_own_tasks([{**REVIEW, **changes}])
    (record,) = load_records(rows_file(tmp_path, row, task="mood"), "test", tasks)
    assert (record.instruction, record.answer) == (asked, answer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x", "label": 1}, "has the fields text, label; expected mood's text, author"),
        ({"text": "x", "author": "y", "label": 2}, "label is 2, and labels are counted 0 to 1"),
        ({"text": "x", "author": "y", "label": None}, "label is None, as in splits that hide"),
    ],
)
def test_rows_that_do_not_fit_an_own_prompt_are_named(tmp_path, row, words):
    with pytest.raises(ValueError, match="record 1") as caught:
        load_records(rows_file(tmp_path, row, task="mood"), "test", with_own_tasks([REVIEW]))
    assert words in str(caught.value)
