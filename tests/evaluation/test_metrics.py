from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.evaluation.metrics import TaskCounts, wilson_interval
from tests import ranks

ROWS = st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans())


@given(st.lists(ROWS, min_size=1, max_size=30), st.integers(1, 7))
def test_counts_do_not_depend_on_the_batches(rows, size):
    metric = TaskCounts(["c", "b", "a"])
    for start in range(0, len(rows), size):
        tasks, correct, failed = zip(*rows[start : start + size], strict=True)
        metric.update(tasks, torch.tensor(correct), torch.tensor(failed))
    total = Counter(task for task, _, _ in rows)
    correct = Counter(task for task, right, _ in rows if right)
    failed = Counter(task for task, _, wrong in rows if wrong)
    assert metric.compute() == {task: (total[task], correct[task], failed[task]) for task in total}


def test_an_unknown_task_is_named():
    flags = torch.tensor([True])
    with pytest.raises(ValueError, match="task 'z' is none of"):
        TaskCounts(["a"]).update(["z"], flags, flags)


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
def test_both_bounds_of_an_interval_solve_its_definition(total, data):
    """|share - p| = z sqrt(p (1 - p) / n)."""
    hits = data.draw(st.integers(0, total))
    share = hits / total
    low, high = wilson_interval(hits, total)
    assert 0 <= low <= share <= high <= 1
    for p in {low, high} - {0.0, 1.0}:
        assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / total), rel=1e-3)


def of_two_ranks(folder) -> dict:
    torch.distributed.init_process_group("gloo", rank=ranks.rank(), world_size=ranks.WORLD)
    metric = TaskCounts(["a", "b"])
    for task, correct in {0: [("a", 1), ("a", 0), ("a", 1)], 1: [("b", 0)]}[ranks.rank()]:
        flag = torch.tensor([bool(correct)])
        metric.update([task], flag, ~flag)
    values = metric.compute()
    torch.distributed.destroy_process_group()
    return values


@pytest.mark.slow
def test_ranks_count_together_what_each_saw(tmp_path):
    both = ranks.launch(of_two_ranks, tmp_path)
    assert both == [{"a": (3, 2, 1), "b": (1, 0, 1)}] * 2
