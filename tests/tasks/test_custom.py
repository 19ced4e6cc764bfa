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


@pytest.mark.parametrize(
    ("definition", "text", "answer"),
    [
        ({"format": "number"}, "It is 1,200 in all.", "1200"),
        ({"format": "letter", "labels": ["A", "B"]}, "The answer is (B).", "B"),
        ({"format": "text"}, " as it is\n", "as it is"),
        ({"format": "label", "labels": ["c++", "c"]}, "answer: c++", "c++"),
    ],
)
def test_every_format_serves_own_tasks(definition, text, answer):
    task = with_own_tasks([{"name": "mine", **definition}])["mine"]
    assert extract_answer(task, text) == answer


@pytest.mark.parametrize(
    ("definition", "error", "words"),
    [
        ("mood", TypeError, "data.tasks[0] is 'mood'; expected a mapping"),
        ({**MOOD, "label": ["a"]}, TypeError, "no key 'label' (did you mean labels?)"),
        ({"format": "number"}, ValueError, "data.tasks[0].name is None"),
        (
            {**MOOD, "format": "lable"},
            ValueError,
            "data.tasks[0].format is 'lable' (did you mean l",
        ),
        ({"name": "mood"}, ValueError, "data.tasks[0].format is None; expected label, letter"),
        (
            {"name": "mood", "format": "label"},
            ValueError,
            "data.tasks[0].labels is []; format label",
        ),
        ({**MOOD, "labels": ["good"]}, ValueError, "two at least"),
        ({**MOOD, "labels": ["good", "Good"]}, ValueError, "labels names 'good' twice"),
        (
            {**MOOD, "labels": "good bad"},
            TypeError,
            "data.tasks[0].labels is 'good bad'; expected a",
        ),
        (
            {**MOOD, "labels": [True, False]},
            TypeError,
            "labels holds True, which is no text. Put it in quotes",
        ),
        ({**MOOD, "format": "letter"}, ValueError, "format letter takes single capitals"),
        ({**MOOD, "format": "number"}, ValueError, "answers of format number are not listed"),
        ({**MOOD, "name": "ARC-Easy"}, ValueError, "the name 'ARC-Easy' is taken by task arc_easy"),
        ({**MOOD, "aliases": ["gsm8k"]}, ValueError, "the name 'gsm8k' is taken by task gsm8k"),
        ({**MOOD, "name": "!"}, ValueError, "is without a letter or digit"),
        ({**MOOD, "response": "it is so"}, ValueError, "with {answer} in it once"),
        (
            {
                "name": "pick",
                "format": "letter",
                "labels": ["A", "B"],
                "response": "I take {answer}",
            },
            ValueError,
            "with 'A' in it, None would be read as the answer",
        ),
        ({**MOOD, "response": "{answer}, not good"}, ValueError, "'not good' would be read"),
    ],
)
def test_definitions_that_make_no_sense_are_named(definition, error, words):
    with pytest.raises(error) as caught:
        with_own_tasks([definition])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": "How?", "output": "I feel: good", "answer": "good"}]
    path.write_text("".join(json.dumps(row) for row in rows))
    return {"path": str(path)}


def test_a_source_names_an_own_task_and_its_records_know_it(source):
    tasks = with_own_tasks([{**MOOD, "response": "I {feel}: {answer}"}])
    (named,) = source_list("sources", [{**source, "task": "Temper"}], "train", tasks)
    (record,) = load_records(named, "test", tasks)
    assert named.benchmark == record.task == "mood"
    assert candidates(record) == ("I {feel}: good", "I {feel}: not good")
    assert reference(record) == "good"


def test_a_source_that_is_named_as_an_own_task_is_of_it(source):
    tasks = with_own_tasks([{**MOOD, "name": "rows"}])
    (named,) = source_list("sources", [source], "train", tasks)
    assert named.benchmark == "rows"


def test_gold_answers_are_checked_against_own_labels(source):
    tasks = with_own_tasks([{**MOOD, "labels": ["bad", "worse"]}])
    with pytest.raises(ValueError, match=r"record 1 \(task mood\): the gold answer is 'good'"):
        load_records(Source(**source, task="mood"), "test", tasks)


REVIEW = {
    "name": "mood",
    "format": "label",
    "labels": ["bad", "good"],
    "prompt": "Good or bad? {text} ({{by}} {author})",
    "answer": "label",
}


def written_rows(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path), task="mood")


def test_rows_with_fields_of_their_own_are_asked_as_the_task_says(tmp_path):
    tasks = with_own_tasks([REVIEW])
    fine = {"text": "Fine.", "author": "Ann", "instruction": "not read"}
    source = written_rows(
        tmp_path, {**fine, "label": 1}, {**fine, "label": "bad"}, {**fine, "label": "0"}
    )
    *read, last = load_records(source, "audit", tasks)
    assert [record.instruction for record in read] == ["Good or bad? Fine. ({by} Ann)"] * 2
    assert [record.answer for record in read] == ["good", "bad"]
    assert read[0].output == "the correct answer is good"
    assert last.answer == "0"
    with pytest.raises(ValueError, match=r"record 3 \(task mood\): the gold answer is '0'"):
        load_records(source, "test", tasks)
    asked = load_records(written_rows(tmp_path, fine), "predict", tasks)
    assert asked[0].instruction.startswith("Good or bad? Fine.")


def test_an_own_task_may_count_what_is_true_or_be_a_number(tmp_path):
    sum_ = {"name": "mood", "format": "number", "prompt": "{a} + {b}", "answer": "sum"}
    (record,) = load_records(
        written_rows(tmp_path, {"a": 1, "b": 2, "sum": 3}), "test", with_own_tasks([sum_])
    )
    assert (record.instruction, record.answer) == ("1 + 2", "3")
    true = {**REVIEW, "labels": ["true", "false"], "prompt": "{text}"}
    (record,) = load_records(
        written_rows(tmp_path, {"text": "x", "label": False}), "test", with_own_tasks([true])
    )
    assert record.answer == "false"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x", "label": 1}, "has the fields text, label; expected mood's text, author"),
        ({"question": "x", "answer": "#### 1"}, "expected mood's text, author, label"),
        ({"text": "x", "author": "y", "label": 2}, "label is 2, and labels are counted 0 to 1"),
        ({"text": "x", "author": "y", "label": None}, "label is None, as in splits that hide"),
    ],
)
def test_rows_that_do_not_fit_an_own_prompt_are_named(tmp_path, row, words):
    with pytest.raises(ValueError, match="record 1") as caught:
        load_records(written_rows(tmp_path, row), "test", with_own_tasks([REVIEW]))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "answer is given without a prompt"),
        ({"prompt": "Good?"}, "expected names of fields alone"),
        ({"prompt": "{text.__class__}"}, "expected names of fields alone"),
        ({"prompt": "{text!r}"}, "expected names of fields alone"),
        ({"prompt": "{text:>9}"}, "expected names of fields alone"),
        ({"prompt": "{}"}, "expected names of fields alone"),
        ({"prompt": "{text"}, "expected text with fields in braces"),
        ({"prompt": 3}, "expected text with fields in braces"),
        ({"prompt": "{text} {label}"}, "shows {label}, the field of the answer"),
        ({"answer": ["a"]}, "expected the name of a field"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(change, words):
    with pytest.raises((TypeError, ValueError), match=r"data\.tasks\[0\]") as caught:
        with_own_tasks([{**REVIEW, **change}])
    assert words in str(caught.value)
