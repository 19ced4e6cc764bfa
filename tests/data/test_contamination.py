from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.data.contamination import (
    Contamination,
    compare,
    question_key,
    trained_questions,
)
from rosa_lightning.tasks.records import Record


def matches(train: Iterable[Record], test: Sequence[Record]) -> Contamination:
    return compare(train, [test])[0]


def ask(instruction: str, input: str = "", index: int = 1) -> Record:
    return Record(instruction, input, "The answer is 4.", "4", "gsm8k", "source", index)


def test_case_punctuation_and_white_space_do_not_tell_questions_apart_but_the_input_does():
    assert question_key(ask(" How many\n apples?")) == question_key(ask("how many: Apples"))
    assert question_key(ask("How many", "apples?")) == question_key(ask("How many apples?"))
    assert question_key(ask("How many?", "2 apples")) != question_key(ask("How many?", "3 apples"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("小明有3个苹果?", "小红有3个梨?"),
        ("Сколько 3 + 4?", "Почему 3, 4?"),
        ("7 + 5 =", "7 - 5 ="),
    ],
)
def test_questions_of_which_normalising_leaves_too_little_stay_apart(one, other):
    assert not matches([ask(one)], [ask(other)]).exact
    assert matches([ask(one)], [ask(f" {one.upper()}\n")]).exact == {0: (0,)}


# Near matches against brute force.

WORDS = ["a", "b", "c", "d", "7", "8"]
QUESTION = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14)
QUESTIONS = st.lists(QUESTION, max_size=8) | st.lists(QUESTION, min_size=11, max_size=14)


def near_by_brute_force(train: list[str], test: list[str]) -> dict[int, tuple[int, ...]]:
    """Every training question against every test question."""

    def pairs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        if len(words) == 1:
            return {tuple(words)}
        return {(words[i], words[i + 1]) for i in range(len(words) - 1)}

    shares = {}
    for pair in set().union(*map(pairs, test)):
        shares[pair] = sum(pair in pairs(question) for question in test)
    frame = {pair for pair, n in shares.items() if n > 10 and n > len(test) / 10}
    found: dict[int, list[int]] = {}
    for (i, tested), (j, trained) in product(enumerate(test), enumerate(train)):
        a, b = pairs(tested) - frame, pairs(trained) - frame
        same_numbers = set(re.findall(r"\d+", tested)) == set(re.findall(r"\d+", trained))
        if tested not in train and a and same_numbers and 10 * len(a & b) >= 7 * len(a | b):
            found.setdefault(i, []).append(j)
    return {i: tuple(places) for i, places in found.items()}


@given(QUESTIONS, QUESTIONS, st.sampled_from(["", "choose the best one "]))
def test_near_matches_are_all_those_of_a_comparison_of_every_pair(train, test, frame):
    # Letters come first, so that normalising leaves enough.
    trained = [f"q {frame}{' '.join(words)}" for words in train]
    tested = [f"q {frame}{' '.join(words)}" for words in test]
    found = matches(map(ask, trained), list(map(ask, tested)))
    exact = {
        i: tuple(j for j, other in enumerate(trained) if other == question)
        for i, question in enumerate(tested)
        if question in trained
    }
    assert found.exact == exact
    assert found.near == near_by_brute_force(trained, tested)


STORY = "Ada has 3 apples and Ben gives her 4 more, so how many apples has she now"


def test_a_reworded_question_is_near_and_one_with_other_numbers_is_another():
    reworded = STORY.replace("and Ben gives", "and then Ben gives")
    assert matches([ask(reworded)], [ask(STORY)]).near == {0: (0,)}
    assert not matches([ask(STORY.replace("4", "5"))], [ask(STORY)]).near
    assert not matches([ask("Bea has 3 pears and buys 4 plums. How many?")], [ask(STORY)]).near


FRAME = "Please choose the correct answer to the question, true or false, and give a reason"


@pytest.mark.parametrize(("count", "near"), [(10, 10), (11, 0), (200, 0)])
def test_what_most_questions_of_a_benchmark_share_does_not_make_them_alike(count, near):
    tested = [ask(f"{FRAME}: is {'x' * n}a so?") for n in range(count)]
    assert len(matches([ask(f"{FRAME}: was z so?")], tested).near) == near


def test_the_frame_is_each_benchmarks_own():
    many = [ask(f"{FRAME}: is {'x' * n}a so?") for n in range(11)]
    few = [ask(f"{FRAME}: was y so?")]
    first, second = compare([ask(f"{FRAME}: was z so?")], [many, few])
    assert not first.near
    assert second.near == {0: (0,)}


def test_a_question_that_lacks_the_rarest_words_of_another_is_found():
    # 7 of 10 word pairs, which is just enough; the first three in the alphabet are missing.
    assert matches([ask("d e f g h i j k")], [ask("a b c d e f g h i j k")]).near == {0: (0,)}
    assert not matches([ask("e f g h i j k")], [ask("a b c d e f g h i j k")]).near


# The published data.

CONTAMINATED = {
    "aqua": (152, 152),
    "addsub": (237, 237),
    "multiarith": (360, 360),
    "svamp": (600, 600),
    "singleeq": (304, 304),
    "gsm8k": (791, 791),
    "mawps": (75, 142),
    "piqa": (0, 1102),
}


def read(path) -> list[Record]:
    rows = json.loads(path.read_text())
    return [ask(row["instruction"], row["input"], index) for index, row in enumerate(rows, 1)]


def test_the_contamination_of_math_data_is_found(real_data):
    train = read(real_data / "train" / "math_data.json")
    tests = [read(real_data / "test" / f"{name}.json") for name in CONTAMINATED]
    found = compare(train, tests)
    sizes = [(len(one.exact), len(test)) for one, test in zip(found, tests, strict=True)]
    assert dict(zip(CONTAMINATED, sizes, strict=True)) == CONTAMINATED
    assert {name: len(one.near) for name, one in zip(CONTAMINATED, found, strict=True)} == {
        **dict.fromkeys(CONTAMINATED, 0),
        "mawps": 2,
    }


@pytest.mark.parametrize(
    ("name", "exact", "near", "size"),
    [
        ("arc_easy", 2, 5, 1425),
        ("boolq", 1, 38, 1962),
        ("openbookqa", 0, 4, 300),
        ("arc_challenge", 0, 1, 703),
    ],
)
def test_the_contamination_of_a_benchmark_from_its_own_training_file_are_found(
    name, exact, near, size, real_data
):
    test = read(real_data / "test" / f"{name}.json")
    found = matches(read(real_data / "train" / f"{name}.json"), test)
    assert (len(found.exact), len(found.near), len(test)) == (exact, near, size)


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_is_out_of_reach_is_told_at_once(offline, monkeypatch):
    asked = []

    def refuse(self, data_set, *, timeout):
        asked.append((data_set, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: offline)
    monkeypatch.setattr("rosa_lightning.data.contamination.load_records", lambda *_: [])
    trainings = [{"sources": [{"hub": "some/set"}], "seed": 0, "left_out": []}]
    if offline:  # what is cached is read, without a request
        assert trained_questions(trainings, [], {}) == ([], ["hub data set some/set"])
    else:
        with pytest.raises(OSError, match=r"some/set cannot be reached \(no route\)"):
            trained_questions(trainings, [], {})
    assert len(asked) == (not offline)
