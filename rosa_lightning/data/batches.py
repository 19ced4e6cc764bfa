"""How the records of an epoch are made into batches, by their lengths.

A step is one batch on each rank: R ranks, N records.
"""

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Batching = Literal["length", "random", "packed", "best_fit"]

_WINDOW = 128
"""Steps whose records are sorted together: more of them leave less padding, and mix less."""
_SEGMENT = 8
"""Steps of all lengths that follow one another, so that sources whose records are longer or
shorter than others' keep their share at any time."""


def seeded(*parts: int | str) -> torch.Generator:
    """A generator whose seed these parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True, eq=False)
class BatchPlanner:
    """How an epoch's records are made into batches.

    length: windows of 128 steps of the mixed order are sorted by length and cut into steps, which
    are shuffled so that sources keep their shares at any time. random: as the records follow one
    another. packed: likewise, and a step is dealt to the ranks so that all have about as many
    tokens. In each step all ranks have equally many records. best_fit: windows of the order are put
    into packs of at most max_length tokens, and a batch has batch_size packs, in random order.
    """

    batching: Batching
    batch_size: int
    """Records a batch; with best_fit, packs."""
    tokens_per_batch: int | None = None
    """In place of batch_size: the most tokens a batch may have on a rank, padding counted."""
    max_length: int = 0
    """Tokens that a pack of best_fit holds, at least those of the longest record."""
    lengths: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """Tokens of each record, by its position in the sources laid end to end; random batches of
    so many records need none."""

    def num_steps(self, num_records: int, ranks: int) -> int | None:
        """Steps of so many records; None where it depends on their lengths."""
        by_tokens = self.tokens_per_batch or self.batching == "best_fit"
        return None if by_tokens else -(-num_records // (ranks * self.batch_size))

    def digest(self) -> str | None:
        """Tells lengths from others; None where there are none."""
        if not len(self.lengths):
            return None
        return hashlib.blake2b(self.lengths.tobytes(), digest_size=8).hexdigest()

    def steps(
        self, order_N: NDArray[np.int64], ranks: int, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The records step by step, and where each step ends, shape (steps,).

        Rank r has every R-th record of a step, from r on, those of -1 left out. Each step has a
        multiple of R records, as `order_N` must have, which may be changed.
        """
        if self.batching == "best_fit":
            return self._packed_steps(order_N, ranks, seed, epoch)
        if self.batching != "length":
            ends = np.cumsum(self._cut(order_N, ranks))
            if self.batching == "packed" and ranks > 1:
                for step in np.split(order_N, ends[:-1]):
                    step[:] = step[_deal(self.lengths[step], ranks)]
            return order_N, ends
        tokens, rows = self.tokens_per_batch, self.batch_size
        if tokens:
            rows = max(1, int(tokens / self.lengths.mean()))
        window = ranks * rows * _WINDOW
        sizes_of_parts = []
        for number, start in enumerate(range(0, len(order_N), window)):
            generator = seeded(seed, "steps", epoch, number)
            some = order_N[start : start + window]
            ranked = some[np.argsort(self.lengths[some], kind="stable")]
            sizes = self._cut(ranked, ranks)
            if not tokens:  # else the last, short step would have the longest
                sizes = sizes[torch.randperm(len(sizes), generator=generator).numpy()]
            steps = np.split(ranked, np.cumsum(sizes)[:-1])
            turns = _spread(len(sizes), generator)
            some[:] = np.concatenate([steps[turn] for turn in turns])
            sizes_of_parts.append(sizes[turns])
        return order_N, np.cumsum(np.concatenate(sizes_of_parts))

    def packs(self, order_N: NDArray[np.int64], seed: int, epoch: int) -> list[NDArray[np.int64]]:
        """The records of an epoch in packs of at most max_length tokens."""
        window = self._packs_a_batch * _WINDOW * self.max_length // int(self.lengths.mean())
        found = []
        for number, start in enumerate(range(0, len(order_N), window)):
            some = order_N[start : start + window]
            packs = best_fit(self.lengths[some].tolist(), self.max_length)
            turns = torch.randperm(len(packs), generator=seeded(seed, "packs", epoch, number))
            found += [some[packs[turn]] for turn in turns.tolist()]
        return found

    @property
    def _packs_a_batch(self) -> int:
        return (self.tokens_per_batch or 0) // self.max_length or self.batch_size

    def _packed_steps(
        self, order_N: NDArray[np.int64], ranks: int, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        packs = self.packs(order_N, seed, epoch)
        while len(packs) % ranks:  # each rank needs one, also at the end
            largest = max(range(len(packs)), key=lambda number: len(packs[number]))
            packs.append(packs[largest][:1])
            packs[largest] = packs[largest][1:]
        steps = []
        size = ranks * self._packs_a_batch
        for start in range(0, len(packs), size):
            # In turn, so that a short last step leaves no rank without a pack.
            mine = [packs[start + rank : start + size : ranks] for rank in range(ranks)]
            rows = [np.concatenate(some) for some in mine]
            step_UR = np.full((max(map(len, rows)), ranks), -1)
            for rank, row in enumerate(rows):
                step_UR[: len(row), rank] = row
            steps.append(step_UR.ravel())
        return np.concatenate(steps), np.cumsum([len(step) for step in steps])

    def _cut(self, records_N: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
        """Sizes of the steps that follow one another in these records."""
        if not self.tokens_per_batch:
            size = ranks * self.batch_size
            sizes = np.full(-(-len(records_N) // size), size)
            sizes[-1] = len(records_N) - size * (len(sizes) - 1)
            return sizes
        lengths_UR = self.lengths[records_N].reshape(-1, ranks)
        take = _taken_packed if self.batching == "packed" else _taken_padded
        rounds, start = [], 0
        while start < len(lengths_UR):
            rounds.append(take(lengths_UR[start:], self.tokens_per_batch))
            start += rounds[-1]
        return np.array(rounds) * ranks


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items in bins, the longest first, each into the bin that it fills most.

    Best-fit decreasing, as in Ding et al., arXiv:2404.10830, section 3.1.
    """
    bins: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # bins by the room left in them
    rooms: list[int] = []  # sorted, each once
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        bins[chosen].append(item)
        room -= length
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(chosen)
    return bins


def _taken_padded(lengths_UR: NDArray[np.int32], budget: int) -> int:
    """How many rounds, a record to each rank, fit into a padded batch."""
    most = max(1, budget // int(lengths_UR[0].max()))
    longest_U = np.maximum.accumulate(lengths_UR[:most].max(1).astype(np.int64))
    tokens_U = longest_U * np.arange(1, len(longest_U) + 1)
    return max(1, int(np.searchsorted(tokens_U, budget, side="right")))


def _taken_packed(lengths_UR: NDArray[np.int32], budget: int) -> int:
    """How many rounds fit into one row on each rank, dealt as `_deal` does."""
    ranks = lengths_UR.shape[1]
    tokens_U = lengths_UR[: budget + 1].sum(1, dtype=np.int64).cumsum()
    taken = int(np.searchsorted(tokens_U, budget * ranks, side="right"))
    while taken > 1:
        lengths_N = lengths_UR[:taken].ravel()
        if lengths_N[_deal(lengths_N, ranks)].reshape(-1, ranks).sum(0).max() <= budget:
            break
        taken -= 1
    return max(1, taken)


def _deal(lengths_N: NDArray[np.int32], ranks: int) -> NDArray[np.int64]:
    """An order in which every R-th record, from any on, makes about the same sum.

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
