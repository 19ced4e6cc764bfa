"""Prompts, responses, and answers found in text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.tasks.records import (
    TASKS,
    Record,
    answer_start,
    candidates,
    extract_answer,
    find_task,
    needs_end,
    reference,
)

LABEL_TASKS = [name for name, task in TASKS.items() if task.format == "label"]


def record(instruction="What is 2 + 2?", context="", output="4", answer="4", task="gsm8k"):
    return Record(instruction, context, output, answer, task, "source", 1)


def test_names_of_tasks_are_found_however_they_are_spelt():
    names = {"ARC-Easy": "arc_easy", "ARC-c": "arc_challenge", "OBQA": "openbookqa"}
    names |= {"SIQA": "social_i_qa", "WinoGrande": "winogrande", "AQuA-RAT": "aqua"}
    assert {name: find_task(name) for name in names} == names
    assert find_task("my notes") is None


@pytest.mark.parametrize(
    ("task", "text", "answer", "rest"),
    [
        ("boolq", "the correct answer is true\n", "true", "true\n"),
        ("gsm8k", "5 + 3 = 8\n#### 8", "8", "8"),
        ("multiarith", "30 - 15. The answer is 15.", "15.0", "15."),
        ("aqua", "The answer is (D).", "D", "D)."),
        ("text", "it is so", "so", "so"),
        ("gsm8k", "The answer is 15", "5", None),
        ("gsm8k", "The answer is 16 hours.", "16", None),
        ("gsm8k", "The answer is 7.", "8", None),
        ("text", "it is so", None, None),
    ],
)
def test_start_of_an_answer_that_ends_the_text(task, text, answer, rest):
    start = answer_start(task, text, answer)
    assert (None if start is None else text[start:]) == rest


def test_reference_is_the_answer_or_what_the_output_states():
    assert reference(record(answer="9.0")) == "9.0"
    assert reference(record(answer=None, output="The answer is 4.")) == "4"
    assert reference(record(answer=None, output="")) is None


def asked(instruction, task="arc_easy", **fields):
    return Record(instruction, "", "", None, task, "source", 1, **fields)


def test_candidates_are_the_responses_that_the_prompt_offers():
    says = "the correct answer is {}".format
    three = asked("Which?\n\nAnswer format: answer1/answer2/answer3")
    assert candidates(three) == tuple(says(f"answer{number}") for number in (1, 2, 3))
    assert candidates(asked("Is it?", "boolq")) == (says("true"), says("false"))
    letters = "What? Answer Choices: (A) 5 (B) (A) and more (C) 7"
    assert candidates(asked(letters, "aqua")) == tuple(f"The answer is ({x})." for x in "ABC")
    assert candidates(asked("How many?", "gsm8k")) == candidates(asked("Say", "text")) == ()


def test_a_prompt_that_offers_an_answer_twice_has_no_candidates():
    with pytest.raises(ValueError, match="offers 'answer2' twice"):
        candidates(asked("Which?\n\nAnswer format: answer1/answer2/answer2"))


@pytest.mark.parametrize(
    ("choices", "letter"),
    [
        ("(A) 5 (A) 6", "A"),
        ("(A) 5 (A) 6 (C) 7 (D) 8 (E) 9", "A"),
        ("(A) 5 (B) 6 (C) 7 (D) 8 (A) 9", "A"),
        ("(A) 5 (B) 6 (C) 7 (D) 8 (D) 9", "D"),
    ],
)
def test_choices_that_use_a_letter_twice_are_refused(choices, letter):
    with pytest.raises(ValueError, match=f"offers '{letter}' twice"):
        candidates(asked(f"What? Answer Choices: {choices}", "aqua"))


@given(st.lists(st.text("ab", max_size=4)))
def test_an_end_is_needed_as_comparing_all_pairs_says(texts):
    pairs = [one != other and other.startswith(one) for one in texts for other in texts]
    assert needs_end(texts) is any(pairs)


def test_a_task_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="task 'mine' is none of boolq"):
        extract_answer("mine", "5")


def test_responses_state_the_answer_that_they_are_made_of():
    for name, task in TASKS.items():
        for answer in task.labels or ("12.5",):
            assert extract_answer(name, task.response.replace("{answer}", answer)) == answer


def test_each_of_the_fifteen_benchmarks_says_where_it_comes_from():
    groups = [task.group for task in TASKS.values()]
    assert (groups.count("commonsense"), groups.count("arithmetic")) == (8, 7)
    for task in TASKS.values():
        assert all((task.hub, task.split, task.fields)) is (task.group != "other")


class TestOnRealData:
    @pytest.fixture
    def rows(self, real_data):
        return lambda task: json.loads((real_data / "test" / f"{task}.json").read_text("utf-8"))

    @pytest.mark.parametrize("task", ["addsub", "gsm8k", "multiarith", "singleeq", "svamp"])
    def test_number_that_follows_the_answer_is_returned(self, rows, task):
        plain = 0
        for row in rows(task):
            head, _, tail = row["output"].rpartition("The answer is ")
            words = tail.split()
            if head and len(words) == 1 and words[0].rstrip(".").replace(".", "").isdigit():
                plain += 1
                assert float(extract_answer(task, row["output"])) == float(words[0].rstrip("."))
        assert plain > 100

    @pytest.mark.parametrize("task", [name for name in LABEL_TASKS if name != "hellaswag"])
    def test_one_candidate_is_the_reference_response(self, rows, task):
        for row in rows(task):
            offered = candidates(asked(row["instruction"], task))
            assert offered.count(row["output"]) == 1
            assert len(offered) == row["instruction"].rpartition("format:")[2].count("/") + 1

    @pytest.mark.parametrize("file", ["test/aqua.json", "train/math_data.json"])
    def test_every_list_of_choices_offers_five_letters(self, real_data, file):
        rows = json.loads((real_data / file).read_text("utf-8"))
        asks = [row["instruction"] for row in rows if "Answer Choices:" in row["instruction"]]
        assert len(asks) > 150
        for instruction in asks:
            assert len(candidates(asked(instruction, "aqua"))) == 5
