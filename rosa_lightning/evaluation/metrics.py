"""Accuracy and format failures of each task, counted by one torchmetrics metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

Z_95 = 1.959963984540054
"""Half the width of the middle 95 % of the normal distribution, in standard deviations."""


class TaskCounts(Metric):
    """Records, right answers and format failures of each task, summed over all ranks.

    Args:
        tasks: Names of the tasks, the same on every rank.
    """

    full_state_update = False
    total: Tensor
    correct: Tensor
    failed: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        for name in ("total", "correct", "failed"):
            zeros = torch.zeros(len(self.tasks), dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, tasks: Sequence[str], correct: Tensor, failed: Tensor) -> None:
        """Count a batch.

        Args:
            tasks: Task of each record.
            correct: Which answers are right, bool, shape (B,).
            failed: Which responses state no answer, bool, shape (B,).
        """
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is none of {list(self.tasks)}.")
        index = [self.tasks.index(task) for task in tasks]
        rows = torch.tensor(index, dtype=torch.long, device=self.total.device)
        self.total.index_add_(0, rows, torch.ones_like(rows))
        self.correct.index_add_(0, rows, correct.to(self.total))
        self.failed.index_add_(0, rows, failed.to(self.total))

    def compute(self) -> dict[str, tuple[int, int, int]]:
        """Records, right answers and format failures of each task that has any record."""
        counts = torch.stack([self.total, self.correct, self.failed], 1).tolist()
        return {
            task: (total, correct, failed)
            for task, (total, correct, failed) in zip(self.tasks, counts, strict=True)
            if total
        }


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927): sound for few records and for shares near 0 or 1.

    Args:
        hits: Number of successes.
        total: Number of trials, at least 1.
        z: Standard deviations; 95 % by default.
    """
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Rounding may put a bound a last digit on the wrong side of the share itself.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
