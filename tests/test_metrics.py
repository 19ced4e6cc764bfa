from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.metrics import TaskAccuracy

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
