"""Accuracy and format failures of each task, counted by one torchmetrics metric."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskCounts(Metric):
    """Records, right answers and format failures of each task, summed over all ranks.

    Args:
        tasks: Names of the tasks, the same on every rank.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        zeros = torch.zeros(len(self.tasks), 3, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, tasks: Sequence[str], correct: Tensor, failed: Tensor) -> None:
        """Count a batch: tasks, which answers are right, and which responses state none; (B,)."""
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown:
            raise ValueError(f"task {unknown[0]!r} is none of {list(self.tasks)}.")
        index = [self.tasks.index(task) for task in tasks]
        rows = torch.tensor(index, dtype=torch.long, device=self.counts.device)
        found_B3 = torch.stack([torch.ones_like(correct), correct, failed], 1)
        self.counts.index_add_(0, rows, found_B3.to(self.counts))

    def compute(self) -> dict[str, tuple[int, int, int]]:
        """Records, right answers and format failures of each task that has any record."""
        rows = zip(self.tasks, self.counts.tolist(), strict=True)
        return {task: (row[0], row[1], row[2]) for task, row in rows if row[0]}


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): sound for few records and for shares near 0 or 1."""
    z = NormalDist().inv_cdf(0.975)
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Rounding may put a bound a last digit on the wrong side of the share itself.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
