"""Accuracy per task, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskAccuracy(Metric):
    """Share of right answers, over all records and for each task.

    Right under distributed evaluation: counts are summed over ranks, and each rank holds a row for
    every task, whether or not it saw a record of it.

    Args:
        tasks: Names of the tasks, the same on every rank.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        zeros = torch.zeros(len(self.tasks), dtype=torch.long)
        self.add_state("correct", zeros, dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")

    def update(self, tasks: Sequence[str], correct: Tensor) -> None:
        """Count a batch.

        Args:
            tasks: Task of each record.
            correct: Whether each record is answered right, bool, shape (B,).

        Raises:
            ValueError: A task that was not named at construction.
        """
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is none of {list(self.tasks)}.")
        rows = torch.tensor([self.tasks.index(task) for task in tasks], device=self.total.device)
        self.total.index_add_(0, rows, torch.ones_like(rows))
        self.correct.index_add_(0, rows, correct.to(self.correct))

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` over all records and ``accuracy/<task>`` for each task that has any."""
        if not int(self.total.sum()):
            return {}
        result = {"accuracy": self.correct.sum() / self.total.sum()}
        for row, task in enumerate(self.tasks):
            if int(self.total[row]):
                result[f"accuracy/{task}"] = self.correct[row] / self.total[row]
        return result
