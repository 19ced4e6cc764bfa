from __future__ import annotations

import json

import pytest
from rich.console import Console

from rosa_lightning.evaluation.metrics import wilson_interval
from rosa_lightning.evaluation.results import (
    Score,
    averages,
    results_table,
    scores_of,
    versions,
    write_results,
)


def score(task: str, group: str, right: int, n: int, protocol: str = "generate") -> Score:
    return Score(
        protocol=protocol,
        task=task,
        group=group,
        accuracy=right / n,
        interval=wilson_interval(right, n),
        format_failure_rate=0.1 if protocol == "generate" else None,
        n=n,
    )


SCORES = [
    score("boolq", "commonsense", 90, 100),
    score("piqa", "commonsense", 5, 10),
    score("gsm8k", "arithmetic", 1, 5),
    score("demo", "other", 3, 4),
    score("boolq", "commonsense", 80, 100, "likelihood"),
    score("piqa", "commonsense", 6, 10, "likelihood"),
]


def shown(*arguments) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table(*arguments))
    return capture.get()


def test_scores_come_in_the_order_of_the_benchmarks():
    counts = {"own": (5, 1, 0), "gsm8k": (7, 2, 1), "boolq": (3, 3, 0)}
    first, second, third = scores_of("generate", counts)
    assert (first.task, first.group, first.accuracy, first.n) == ("boolq", "commonsense", 1.0, 3)
    assert (second.accuracy, second.format_failure_rate) == (2 / 7, 1 / 7)
    assert second.interval == wilson_interval(2, 7)
    assert (third.task, third.group) == ("own", "other")
    assert [one.format_failure_rate for one in scores_of("likelihood", counts)] == [None] * 3


def test_macro_is_the_mean_of_tasks_and_micro_the_share_of_records():
    found = {(average.protocol, average.group): average for average in averages(SCORES)}
    both = found["generate", "commonsense"]
    assert both.macro_accuracy == pytest.approx((0.9 + 0.5) / 2)
    assert both.micro_accuracy == pytest.approx(95 / 110)
    assert (both.num_tasks, both.n) == (2, 110)
    everything = found["generate", "all"]
    assert everything.macro_accuracy == pytest.approx((0.9 + 0.5 + 0.2 + 0.75) / 4)
    assert everything.micro_accuracy == pytest.approx((90 + 5 + 1 + 3) / 119)
    assert ("generate", "other") not in found


def test_protocols_have_columns_of_their_own_and_partial_averages_are_left_out():
    text = shown("a model", SCORES, {}, ["below"])
    header = next(line for line in text.splitlines() if "Task" in line)
    assert "generate, %" in header
    assert "likelihood, %" in header
    rows = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert rows["boolq"][:4] == ["boolq", "100", "0", "90.0"]
    assert rows["gsm8k"][-1] == "-"
    assert rows["commonsense, macro"][-2:] == ["70.0", "70.0"]
    # likelihood knows two of four tasks only
    assert rows["all, micro"][-2:] == ["83.2", "-"]
    assert "arithmetic, macro" not in rows  # of one task
    assert text.rstrip().endswith("below")


def test_a_contaminated_benchmark_is_marked_and_an_unknown_one_is_no_zero():
    marked = shown("m", SCORES, {"piqa": 4}, [])
    assert "piqa*" in marked
    assert "boolq*" not in marked
    assert "* Questions of this benchmark are also in the training data" in marked
    unknown = shown("m", SCORES, None, [])
    assert "?" in next(line for line in unknown.splitlines() if "gsm8k" in line)
    assert "could not be read" in unknown


def test_the_results_file_says_what_was_measured_and_with_what(tmp_path):
    write_results(tmp_path / "r.json", SCORES, {"piqa": 4}, template="alpaca", wall_time_s=1.5)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["template"] == "alpaca"
    assert content["versions"] == versions()
    row = content["results"][1]
    assert row["task"] == "piqa"
    assert row["contaminated"] == 4
    assert row["accuracy"] == 0.5
    assert row["interval"] == pytest.approx(wilson_interval(5, 10))
    assert len(content["averages"]) == 5
