"""How many examples of each source a run has trained on, on all ranks, stops included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Tally:
    """Counts examples by source.

    Args:
        names: The sources' names, which a batch's `source` indexes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._here = torch.zeros(len(self.names), dtype=torch.long)
        """On this rank, since the start or the resumption."""
        self._before = self._here.clone()
        """On all ranks, as a checkpoint says."""

    def add(self, source_B: Tensor) -> None:
        """Count a batch, by the sources of its examples, shape (B,)."""
        self._here += torch.bincount(source_B.cpu(), minlength=len(self.names))

    def start(self, before: Mapping[str, int] | None = None) -> None:
        """Begin anew, or from the examples that a checkpoint has counted."""
        counts = [(before or {}).get(name, 0) for name in self.names]
        self._here, self._before = torch.zeros_like(self._here), torch.tensor(counts)

    def examples(self, trainer: Trainer | None) -> dict[str, int]:
        """Examples of each source so far, on all ranks; every rank must call this."""
        here = self._here
        if trainer is not None and trainer.world_size > 1:
            strategy = trainer.strategy
            here = strategy.reduce(here.clone().to(strategy.root_device), reduce_op="sum").cpu()
        return dict(zip(self.names, (here + self._before).tolist(), strict=True))
