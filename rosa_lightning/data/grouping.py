"""Which records make a batch together: those of like length, or those that follow one another.

Everything is a function of the mixed order, the records' lengths and a seed. A step is one batch
on each rank: R ranks, N records.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from rosa_lightning.data.sampling import generator_for
from rosa_lightning.data.streamed import Streamed
from rosa_lightning.data.token_cache import TokenTable
from rosa_lightning.data.tokenization import Example

Batching = Literal["length", "random", "packed"]

_WINDOW = 128
"""Steps whose records are sorted together: more of them leave less padding, and mix less."""
_SEGMENT = 8
"""Steps of all lengths that follow one another, so that sources whose records are longer or
shorter than others' keep their share at any time."""
_SAMPLE = 1000


@dataclass(frozen=True, eq=False)
class Grouping:
    """How an epoch's records are made into batches.

    length: the mixed order is cut into windows of 128 steps; the records of a window are sorted
    by length and cut into steps, and the steps are shuffled. Steps of all lengths stand in each
    eighth of a window, so that sources keep their shares at any time. random: as the records
    follow one another. packed: likewise, and the records of a step are dealt to the ranks so
    that all have about as many tokens.

    In each step all ranks have equally many records, and so equally many batches in an epoch.
    """

    batching: Batching
    """What brings records together."""
    batch_size: int
    """Records a batch."""
    tokens_per_batch: int | None = None
    """In place of batch_size: the most tokens a batch may have on a rank, padding counted."""
    lengths: NDArray[np.int32] | None = None
    """Tokens of each record, by its position in the sources laid end to end; random batches of
    so many records need none."""

    def num_steps(self, num_records: int, ranks: int) -> int | None:
        """Steps of so many records; None where it depends on their lengths."""
        return None if self.tokens_per_batch else -(-num_records // (ranks * self.batch_size))

    def digest(self) -> str | None:
        """Tells lengths from others; None where there are none."""
        if self.lengths is None:
            return None
        return hashlib.blake2b(self.lengths.tobytes(), digest_size=8).hexdigest()

    def steps(
        self, order_N: NDArray[np.int64], ranks: int, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The records step by step, and where each step ends, shape (steps,).

        Rank r has every R-th record of a step, from r on. Each step has a multiple of R records,
        as `order_N` must have.
        """
        if self.batching != "length":
            sizes = self._cut(order_N, ranks)
            if self.batching == "packed" and ranks > 1:
                order_N = self._dealt(order_N, sizes, ranks)
            return order_N, np.cumsum(sizes)
        window = ranks * self._typical_rows() * _WINDOW
        parts, sizes_of_parts = [], []
        for number, start in enumerate(range(0, len(order_N), window)):
            generator = generator_for(seed, "steps", epoch, number)
            some = order_N[start : start + window]
            some = some[np.argsort(self._of(some), kind="stable")]
            sizes = self._cut(some, ranks)
            if not self.tokens_per_batch:  # else the last, short step would have the longest
                sizes = sizes[torch.randperm(len(sizes), generator=generator).numpy()]
            ends = np.cumsum(sizes)
            turns = _spread(len(sizes), generator)
            parts += [some[ends[turn] - sizes[turn] : ends[turn]] for turn in turns]
            sizes_of_parts.append(sizes[turns])
        return np.concatenate(parts), np.cumsum(np.concatenate(sizes_of_parts))

    def _of(self, records_N: NDArray[np.int64]) -> NDArray[np.int32]:
        assert self.lengths is not None, "these batches are made by length"
        return self.lengths[records_N]

    def _typical_rows(self) -> int:
        if not self.tokens_per_batch:
            return self.batch_size
        assert self.lengths is not None, "these batches are made by length"
        return max(1, int(self.tokens_per_batch / self.lengths.mean()))

    def _cut(self, records_N: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
        """Sizes of the steps that follow one another in these records."""
        if not self.tokens_per_batch:
            size = ranks * self.batch_size
            sizes = np.full(-(-len(records_N) // size), size)
            sizes[-1] = len(records_N) - size * (len(sizes) - 1)
            return sizes
        lengths_UR = self._of(records_N).reshape(-1, ranks)
        take = self._taken_packed if self.batching == "packed" else self._taken_padded
        rounds, start = [], 0
        while start < len(lengths_UR):
            rounds.append(take(lengths_UR[start:]))
            start += rounds[-1]
        return np.array(rounds) * ranks

    def _taken_padded(self, lengths_UR: NDArray[np.int32]) -> int:
        """How many rounds, a record to each rank, fit into a padded batch."""
        budget = self.tokens_per_batch or 0
        most = max(1, budget // int(lengths_UR[0].max()))
        longest_U = np.maximum.accumulate(lengths_UR[:most].max(1).astype(np.int64))
        tokens_U = longest_U * np.arange(1, len(longest_U) + 1)
        return max(1, int(np.searchsorted(tokens_U, budget, side="right")))

    def _taken_packed(self, lengths_UR: NDArray[np.int32]) -> int:
        """How many rounds fit into one row on each rank, dealt as `_dealt` does."""
        budget, ranks = self.tokens_per_batch or 0, lengths_UR.shape[1]
        tokens_U = lengths_UR[: budget + 1].sum(1, dtype=np.int64).cumsum()
        taken = int(np.searchsorted(tokens_U, budget * ranks, side="right"))
        while taken > 1:
            lengths_N = lengths_UR[:taken].ravel()
            if lengths_N[_deal(lengths_N, ranks)].reshape(-1, ranks).sum(0).max() <= budget:
                break
            taken -= 1
        return max(1, taken)

    def _dealt(
        self, order_N: NDArray[np.int64], sizes: NDArray[np.int64], ranks: int
    ) -> NDArray[np.int64]:
        steps = np.split(order_N, np.cumsum(sizes)[:-1])
        return np.concatenate([step[_deal(self._of(step), ranks)] for step in steps])


def _deal(lengths_N: NDArray[np.int32], ranks: int) -> NDArray[np.int64]:
    """An order in which every R-th record, from any on, makes about the same sum: there and back.

    The longest goes to the first rank, the next to the second, and after the last rank, whose
    turn comes twice, back.
    """
    turns_UR = np.argsort(-lengths_N, kind="stable").reshape(-1, ranks)
    turns_UR[1::2] = turns_UR[1::2, ::-1]
    return turns_UR.ravel()


def _spread(num_steps: int, generator: torch.Generator) -> NDArray[np.int64]:
    """Steps, given from short to long, in a random order whose every segment has all lengths."""
    segments = -(-num_steps // _SEGMENT)
    rounds = -(-num_steps // segments)
    # Each of so many neighbours in length goes to another segment.
    segment = torch.rand(rounds, segments, generator=generator).argsort(1).flatten()[:num_steps]
    turns = (segment + torch.rand(num_steps, generator=generator)).argsort()
    return turns.numpy()


# --- lengths --------------------------------------------------------------------------------


def token_lengths(sources: Sequence[Sequence[Example]], exact: bool) -> NDArray[np.int32]:
    """Tokens of each record, prompt and response, sources laid end to end.

    Records on disk are encoded when they are asked for, so their length is not known. `exact`
    encodes all of them once. Otherwise it is estimated from the size of a row on disk, by a line
    through a sample of records: the rows are read once, and batches of records on disk are a
    little less alike in length than those of records in memory. In both cases 4 bytes of memory
    a record are taken.
    """
    return np.concatenate([_lengths(examples, exact) for examples in sources])


def _lengths(examples: Sequence[Example], exact: bool) -> NDArray[np.int32]:
    if isinstance(examples, TokenTable):
        return examples.lengths.astype(np.int32)
    if exact or not isinstance(examples, Streamed):
        return np.fromiter((example.num_tokens for example in examples), np.int32, len(examples))
    sizes = examples.sizes()
    sample = np.linspace(0, len(examples) - 1, min(len(examples), _SAMPLE)).astype(np.int64)
    known = np.array([example.num_tokens for example in examples.select(sample)])
    if np.ptp(sizes[sample]) == 0:
        return np.full(len(examples), round(known.mean()), np.int32)
    slope, start = np.polyfit(sizes[sample], known, 1)
    # No record is longer than data.max_length, which the longest of a sample comes near.
    estimated: NDArray[np.int32] = np.clip(start + slope * sizes, 1, known.max()).astype(np.int32)
    return estimated
