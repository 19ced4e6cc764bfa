"""How many tokens per second a training runs at."""

from __future__ import annotations

import time

from torch import Tensor


class TokenRate:
    """Tokens per second over the last so many batches.

    Counts stay on the device until a rate is due, to spare a synchronisation a step.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        """The last rate; None until the first is due."""
        self._restart()

    def _restart(self) -> None:
        self._tokens: Tensor | int = 0
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

    def add(self, tokens: Tensor, every: int) -> float | None:
        """Count a batch.

        Args:
            tokens: How many it had; a scalar.
            every: Batches from one rate to the next; 0 for none.

        Returns:
            The last rate, tokens per second.
        """
        self._tokens = self._tokens + tokens
        self._batches += 1
        if every and self._batches >= every:
            self.value = float(self._tokens) / (time.perf_counter() - self._since)
            self._restart()
        return self.value
