"""Counts per task as torchmetrics metrics: accuracy, its interval, and format failures.

Each stands alone, and several make a `MetricCollection`: `update` takes its arguments by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

Z_95 = 1.959963984540054
"""Half the width of the middle 95 % of the normal distribution, in standard deviations."""


class TaskShare(Metric):
    """Share of the records of which something is true, over all of them and for each task.

    Right under distributed evaluation: counts are summed over ranks, and each rank holds a row for
    every task, whether or not it saw a record of it.

    Args:
        tasks: Names of the tasks, the same on every rank.
    """

    full_state_update = False
    name = "share"
    """What the results are called: ``<name>`` for all records and ``<name>/<task>``."""
    total: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        zeros = torch.zeros(len(self.tasks), dtype=torch.long)
        # A collection makes one of metrics whose states have the same names and begin alike, though
        # they count different things. So each kind has a name of its own.
        self._hits = f"{self.name}_hits"
        self.add_state(self._hits, zeros, dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")

    @property
    def hits(self) -> Tensor:
        """Of how many records of each task it is true."""
        hits: Tensor = getattr(self, self._hits)
        return hits

    def update(self, tasks: Sequence[str], hits: Tensor) -> None:
        """Count a batch.

        Args:
            tasks: Task of each record.
            hits: Of which records it is true, bool, shape (B,).

        Raises:
            ValueError: A task that was not named at construction.
        """
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is none of {list(self.tasks)}.")
        places = [self.tasks.index(task) for task in tasks]
        rows = torch.tensor(places, dtype=torch.long, device=self.total.device)
        self.total.index_add_(0, rows, torch.ones_like(rows))
        self.hits.index_add_(0, rows, hits.to(self.hits))

    def compute(self) -> dict[str, Tensor]:
        """The share of all records, and of each task that has any; nothing where there are none."""
        if not int(self.total.sum()):
            return {}
        result = {self.name: self._value(self.hits.sum(), self.total.sum())}
        for row, task in enumerate(self.tasks):
            if int(self.total[row]):
                result[f"{self.name}/{task}"] = self._value(self.hits[row], self.total[row])
        return result

    def _value(self, hits: Tensor, total: Tensor) -> Tensor:
        """What is said of a count, here its share."""
        return hits / total


class TaskAccuracy(TaskShare):
    """Share of right answers: ``accuracy`` and ``accuracy/<task>``."""

    name = "accuracy"

    def update(self, tasks: Sequence[str], correct: Tensor) -> None:
        """Count a batch; ``correct`` says which answers are right, bool, shape (B,)."""
        super().update(tasks, correct)


class AnswerTokens(TaskAccuracy):
    """Share of records whose answer's tokens are right with the reference text before them given.

    No accuracy: a rationale often states the number that is asked for.
    """

    name = "answer_tokens_given_rationale"


class AccuracyInterval(TaskAccuracy):
    """95 % interval of the accuracy, shape (2,): ``interval`` and ``interval/<task>``."""

    name = "interval"

    def _value(self, hits: Tensor, total: Tensor) -> Tensor:
        return torch.tensor(wilson_interval(int(hits), int(total)), device=hits.device)


class TaskCount(TaskAccuracy):
    """Number of records: ``n`` and ``n/<task>``."""

    name = "n"

    def _value(self, hits: Tensor, total: Tensor) -> Tensor:
        return total


class FormatFailures(TaskShare):
    """Share of texts that state no answer: ``format_failures`` and ``format_failures/<task>``."""

    name = "format_failures"

    def update(self, tasks: Sequence[str], stated: Tensor) -> None:
        """Count a batch; ``stated`` says which texts state an answer, bool, shape (B,)."""
        super().update(tasks, ~stated)


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): sound for few records and for shares near 0 or 1.

    Args:
        hits: How often it was true.
        total: Out of so many, at least 1.
        z: Standard deviations; 95 % by default.
    """
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Rounding may put a bound a last digit on the wrong side of the share itself.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
