"""Which records train, in which order and in which batches.

Everything is a function of the sources' sizes and weights, the records' lengths and a seed; no
global generator is read. A step is one batch on each rank: R ranks, N records.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batching = Literal["length", "random", "packed"]
Stop = Literal["total", "first_exhausted", "oversample"]
"""Where an epoch ends: after as many records as there are in all, when the first source has given
as many as it has, or when every source has."""

_LONGEST_EPOCH = 2**31
_WINDOW = 128
"""Steps whose records are sorted together: more of them leave less padding, and mix less."""
_SEGMENT = 8
"""Steps of all lengths that follow one another, so that sources whose records are longer or
shorter than others' keep their share at any time."""

# --- mixture --------------------------------------------------------------------------------


def shares_by_size(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares in proportion to size**(1 / temperature); they sum to 1.

    Temperature-scaled mixing (Raffel et al., JMLR 21(140), section 3.5.2): 1 mixes in proportion
    to the sizes, more draws the shares together, less apart.
    """
    largest = max(sizes)
    # Powers of quotients: a power of the size itself overflows at low temperatures.
    powers = [(size / largest) ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def epoch_counts(weights: Sequence[float], total: int) -> list[int]:
    """`total` records shared out by weight, by largest remainder: each within 1 of its share."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def epoch_length(
    sizes: Sequence[int], weights: Sequence[float], stop: Stop = "total", ranks: int = 1
) -> int:
    """Records of an epoch, a multiple of the ranks.

    total: as many as there are in all. first_exhausted: the most that can be mixed by weight
    with no source giving more records than it has. oversample: the fewest with each giving as
    many as it has. The latter two are first_exhausted and all_exhausted of
    `datasets.interleave_datasets`, with exact shares. Raises ValueError where first_exhausted
    leaves nothing, or oversample would not end.
    """
    if stop == "total":
        return math.ceil(sum(sizes) / ranks) * ranks
    # Where the weights' share of each source is all of it; never, for a share of zero.
    ends = [
        size * sum(weights) / weight if weight else math.inf
        for size, weight in zip(sizes, weights, strict=True)
    ]
    rounding = 1e-12  # 10 / 0.1 is not to become 99 records, nor 101
    if stop == "oversample":
        if max(ends) > _LONGEST_EPOCH:
            raise ValueError(
                f"data.loading.stop: oversample needs an epoch of {max(ends):.3g} records, for a "
                f"source of share {min(weights) / sum(weights):.3g}. Raise its weight in "
                "data.sources, or data.loading.temperature."
            )
        return math.ceil(max(ends) * (1 - rounding) / ranks) * ranks
    rounds = math.floor(min(ends) * (1 + rounding) / ranks)
    if not rounds:
        raise ValueError(
            f"data.loading.stop: first_exhausted leaves no record for some of {ranks} processes: "
            f"the sources have {', '.join(map(str, sizes))} records. Set data.loading.stop: total."
        )
    return rounds * ranks


def generator_for(*parts: int | str) -> torch.Generator:
    """A generator whose seed these parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _within_source(size: int, start: int, count: int, seed: int, name: str) -> Tensor:
    """Records `start` to `start + count` of an endless row of permutations of `size` records."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    first, last = start // size, (start + count - 1) // size
    rounds = [
        torch.randperm(size, generator=generator_for(seed, "records", name, number))
        for number in range(first, last + 1)
    ]
    joined = rounds[0] if len(rounds) == 1 else torch.cat(rounds)
    return joined[start - first * size :][:count]


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], names: Sequence[str], seed: int, epoch: int
) -> Tensor:
    """The order of one epoch, as positions in the sources laid end to end.

    Record j of a source with `count` records in the epoch stands at time (j + u) / count with u
    drawn from [0, 1): at any time each source is within one record of its share, so every prefix
    of the order is mixed as the whole is. Epoch e takes each source's records from where epoch
    e - 1 left off, and no record comes again before all of its source have come. Nothing but the
    arguments decides; no global generator is read.
    """
    times, positions = [], []
    offset = 0
    for size, count, name in zip(sizes, counts, names, strict=True):
        generator = generator_for(seed, "times", name, epoch)
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        # In place: with millions of records each temporary copy counts.
        times.append(jitter.add_(torch.arange(count)).div_(max(count, 1)))
        positions.append(_within_source(size, epoch * count, count, seed, name).add_(offset))
        offset += size
    if len(times) == 1:
        return positions[0]
    turns = torch.argsort(torch.cat(times), stable=True)
    return torch.cat(positions)[turns]


# --- batches --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BatchPlanner:
    """How an epoch's records are made into batches.

    length: windows of 128 steps of the mixed order are sorted by length and cut into steps, which
    are shuffled so that sources keep their shares at any time. random: as the records follow one
    another. packed: likewise, and a step is dealt to the ranks so that all have about as many
    tokens.

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
