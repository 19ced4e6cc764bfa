"""Methods against a reference, paired by seed and by question."""

import json

import pytest

from rosa_lightning.comparison.paired import (
    compare_answers,
    compare_texts,
    forgetting,
    paired_tests,
    read_answers,
)
from rosa_lightning.comparison.statistics import mcnemar, paired_bootstrap, paired_t


def answers(right, protocol="generate", task="gsm8k"):
    return {(protocol, "s", task, index, None): value for index, value in enumerate(right)}


def test_by_task_and_over_all_questions():
    ours = answers([1, 1, 1, 0]) | answers([1, 1, 0], task="svamp")
    theirs = answers([0, 1, 0, 0]) | answers([1, 0, 0], task="svamp")
    rows = {row["metric"]: row for row in compare_answers([ours], [theirs])}
    assert rows.keys() == {"generate/gsm8k", "generate/svamp", "generate/all"}
    every = rows["generate/all"]
    expected = paired_bootstrap([1, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 1, 0, 0])
    assert (every["n"], every["mean"], every["p"]) == (7, expected.mean, expected.p)
    assert every["p_mcnemar"] == mcnemar([1, 1, 1], [0, 0, 0])


def test_sources_of_no_task_go_by_their_names():
    (row, _) = compare_answers([answers([1, 0], task="text")], [answers([0, 0], task="text")])
    assert row["metric"] == "generate/s"


def test_a_question_counts_once_whatever_the_number_of_seeds():
    ours, theirs = [answers([1, 0]), answers([1, 1])], [answers([0, 0]), answers([1, 0])]
    rows = {row["metric"]: row for row in compare_answers(ours, theirs)}
    expected = paired_bootstrap([1.0, 0.5], [0.5, 0.0])
    assert rows["generate/gsm8k"]["n"] == 2
    assert rows["generate/gsm8k"]["mean"] == expected.mean
    assert "p_mcnemar" not in rows["generate/gsm8k"]


def test_different_questions_are_refused():
    with pytest.raises(ValueError, match="different questions: 1 were"):
        compare_answers([answers([1, 0])], [answers([1])])


@pytest.fixture
def rows(tmp_path):
    """Two methods with two seeds, and one that failed with the second."""

    def run(method, seed, loss, right):
        folder = tmp_path / f"{method}-{seed}"
        folder.mkdir()
        lines = [
            {"protocol": "generate", "source": "s", "task": "t", "index": i, "correct": value}
            for i, value in enumerate(right)
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        status = "failed" if loss is None else "finished"
        result = {"seed": seed, "status": status, "val_loss": loss, "folder": folder.name}
        return {**result, "tasks": []}

    return {
        "A": {"runs": [run("A", 0, 0.9, [True, False]), run("A", 1, 1.0, [True, True])]},
        "B": {"runs": [run("B", 0, 1.1, [False, False]), run("B", 1, 1.3, [True, False])]},
        "C": {"runs": [run("C", 0, 1.0, [False, True]), run("C", 1, None, [])]},
    }


def test_every_method_against_the_reference(rows, tmp_path):
    found = {(row["method"], row["metric"]): row for row in paired_tests(rows, "B", tmp_path)}
    assert {name for name, _ in found} == {"A", "C"}
    loss = found["A", "val_loss"]
    assert loss["p"] == paired_t([0.9, 1.0], [1.1, 1.3]).p
    assert loss["mean"] == pytest.approx(-0.25)
    assert ("C", "val_loss") not in found  # one seed alone has both
    assert found["C", "generate/t"]["seeds"] == [0]
    assert found["A", "generate/t"]["p_holm"] >= found["A", "generate/t"]["p"]


def test_texts_count_for_their_tokens_and_once_whatever_the_number_of_seeds():
    ours, theirs = [[(30.0, 10), (4.0, 2)], [(10.0, 10), (2.0, 2)]], [[(10.0, 10), (6.0, 2)]] * 2
    found = compare_texts(ours, theirs)
    expected = paired_bootstrap([2.0, 1.5], [1.0, 3.0], weights=[10, 2])
    assert found == {"n": 2, **expected._asdict()}
    assert found["mean"] == pytest.approx((20 + 3 - 10 - 6) / 12)


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="different texts"):
        compare_texts([[(30.0, 10)]], [[(30.0, 9)]])


def test_what_was_forgotten_of_texts_and_of_tasks_not_trained_on(tmp_path):
    def result(name, right, losses):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {"protocol": "generate", "source": task, "task": task, "index": i, "correct": value}
            for task, values in right.items()
            for i, value in enumerate(values)
        ]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "text_loss.json").write_text(json.dumps({"by_text": losses}))
        text = {"loss": sum(s for s, _ in losses) / sum(n for _, n in losses)}
        about = {"seed": 0, "status": "finished", "folder": name}
        return {**about, "tasks": [], "text_loss": text}

    base = result("base", {"gsm8k": [False] * 4, "svamp": [True, True]}, [(8.0, 4), (3.0, 2)])
    run = result("A", {"gsm8k": [True] * 4, "svamp": [True, False]}, [(12.0, 4), (3.0, 2)])
    rows = {"A": {"runs": [run]}, "failed": {"runs": []}}
    found = forgetting(rows, base, tmp_path, ["gsm8k"])
    assert found.keys() == {"A"}
    assert found["A"].keys() == {"text_loss", "untrained/generate"}
    text, tasks = found["A"]["text_loss"], found["A"]["untrained/generate"]
    assert (text["base"], text["mean"]) == pytest.approx((11 / 6, 4 / 6))
    assert (tasks["base"], tasks["mean"], tasks["n"]) == (1.0, -0.5, 2)
    everything = forgetting(rows, base, tmp_path, [])["A"]["untrained/generate"]
    assert everything["n"] == 6
    assert "untrained/generate" not in forgetting(rows, base, tmp_path, ["gsm8k", "svamp"])["A"]


def test_answers_are_read(rows, tmp_path):
    assert read_answers(tmp_path / "A-0" / "predictions.jsonl") == answers([True, False], task="t")
