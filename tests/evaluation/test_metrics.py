from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from rosa_lightning.evaluation.metrics import (
    AccuracyInterval,
    FormatFailures,
    TaskAccuracy,
    TaskCount,
    wilson_interval,
)
from tests import ranks

answers = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=30)


@given(answers, st.integers(1, 7))
def test_accuracies_equal_counting_whatever_the_batches(rows, size):
    metric = TaskAccuracy(["a", "b", "c"])
    for start in range(0, len(rows), size):
        tasks, correct = zip(*rows[start : start + size], strict=True)
        metric.update(tasks, torch.tensor(correct))
    wanted = {"accuracy": sum(right for _, right in rows) / len(rows)}
    for task in {task for task, _ in rows}:
        own = [right for name, right in rows if name == task]
        wanted[f"accuracy/{task}"] = sum(own) / len(own)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(wanted)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_seen_gives_no_accuracy():
    assert TaskAccuracy(["a"]).compute() == {}


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task 'z' is none of"):
        TaskAccuracy(["a"]).update(["z"], torch.tensor([True]))


def test_what_states_no_answer_is_a_format_failure():
    metric = FormatFailures(["a", "b"])
    metric.update(["a", "a", "b", "a"], torch.tensor([True, False, True, True]))
    values = {name: float(value) for name, value in metric.compute().items()}
    wanted = {"format_failures": 1 / 4, "format_failures/a": 1 / 3, "format_failures/b": 0}
    assert values == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Wilson's interval without continuity correction, as in Newcombe (1998), table I, method 3,
    # and Brown, Cai and DasGupta (2001), whose first row is 0 of n: z^2 / (n + z^2).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(hits, total, low, high):
    assert wilson_interval(hits, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000), st.data())
def test_an_interval_holds_the_shares_that_the_count_is_no_surprise_for(total, data):
    """Both bounds solve |share - p| = z sqrt(p (1 - p) / n), the definition."""
    hits = data.draw(st.integers(0, total))
    share = hits / total
    low, high = wilson_interval(hits, total)
    assert 0 <= low <= share <= high <= 1
    for p in {low, high} - {0.0, 1.0}:
        assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / total), rel=1e-3)


def collection() -> MetricCollection:
    kinds = (TaskAccuracy, AccuracyInterval, TaskCount, FormatFailures)
    return MetricCollection({kind.name: kind(["a", "b"]) for kind in kinds})


@pytest.mark.parametrize("first", [True, False])
def test_all_metrics_go_together_in_a_collection(first):
    metrics = collection()
    # Where the first is wrong, accuracy and failures begin alike.
    for correct in (first, not first, False):
        metrics.update(tasks=["b"], correct=torch.tensor([correct]), stated=torch.tensor([True]))
    values = metrics.compute()
    assert float(values["accuracy/b"]) == pytest.approx(1 / 3)
    assert int(values["n"]) == 3
    assert values["interval/b"].tolist() == pytest.approx(wilson_interval(1, 3))
    assert float(values["format_failures"]) == 0
    assert "accuracy/a" not in values


def of_two_ranks(folder) -> dict:
    torch.distributed.init_process_group("gloo", rank=ranks.rank(), world_size=ranks.WORLD)
    metrics = collection()
    own = {0: [("a", True), ("a", False), ("a", True)], 1: [("b", False)]}[ranks.rank()]
    for task, correct in own:
        flag = torch.tensor([correct])
        metrics.update(tasks=[task], correct=flag, stated=flag)
    values = {name: value.tolist() for name, value in metrics.compute().items()}
    torch.distributed.destroy_process_group()
    return values


@pytest.mark.slow
def test_ranks_count_together_what_each_saw(tmp_path):
    whole = collection()
    flags = torch.tensor([True, False, True, False])
    whole.update(tasks=["a", "a", "a", "b"], correct=flags, stated=flags)
    wanted = {name: pytest.approx(value.tolist()) for name, value in whole.compute().items()}
    assert ranks.launch("tests.evaluation.test_metrics:of_two_ranks", tmp_path) == [wanted, wanted]
