"""How many tokens and examples per second a training runs at."""

from __future__ import annotations

import time

from torch import Tensor


class Throughput:
    """What was counted, per second, over the last so many batches.

    Counts stay on the device until a rate is due, to spare a synchronisation a step.
    """

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        """The last rates by what was counted; empty until the first are due."""
        self._restart()

    def _restart(self) -> None:
        self._counts: dict[str, Tensor | int] = {}
        self._batches = 0
        self._since = time.perf_counter()
        self._paused_at: float | None = None

    def pause(self) -> None:
        """Stop the clock, for a validation."""
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Let the clock run on."""
        if self._paused_at is not None:
            self._since += time.perf_counter() - self._paused_at
            self._paused_at = None

    def add(self, every: int, **counts: Tensor | int) -> dict[str, float]:
        """Count a batch.

        Args:
            every: Batches from one rate to the next; 0 for none.
            **counts: How many tokens, examples or the like it had; whole numbers or scalars.

        Returns:
            The last rates, per second, under the names of the counts.
        """
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        self._batches += 1
        if every and self._batches >= every:
            seconds = time.perf_counter() - self._since
            self.rates = {name: float(count) / seconds for name, count in self._counts.items()}
            self._restart()
        return self.rates
