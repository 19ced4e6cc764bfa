"""Which records train, in which order and batches: samplers, and the loader that resumes.

Everything is a function of the sources' sizes and weights, the records' lengths and a seed; no
global generator is read. A step is one batch on each rank: R ranks, N records.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rosa_lightning.data.tokenization import Example, Examples
from rosa_lightning.tasks.records import reference

Batching = Literal["length", "random", "packed"]
Stop = Literal["total", "first_exhausted", "oversample"]

_LONGEST_EPOCH = 2**31
_WINDOW = 128
"""Steps whose records are sorted together: more of them leave less padding, and mix less."""
_SEGMENT = 8
"""Steps of all lengths that follow one another, so that sources whose records are longer or
shorter than others' keep their share at any time."""

# --- mixture --------------------------------------------------------------------------------


def shares_by_size(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares in proportion to size**(1 / temperature); they sum to 1.

    Temperature-scaled mixing (Raffel et al., JMLR 21(140), section 3.5.2).
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


def epoch_order(
    sizes: Sequence[int], counts: Sequence[int], names: Sequence[str], seed: int, epoch: int
) -> NDArray[np.int64]:
    """The order of one epoch, as positions in the sources laid end to end.

    Record j of a source with `count` records in the epoch stands at time (j + u) / count with u
    drawn from [0, 1): at any time each source is within one record of its share, so every prefix
    of the order is mixed as the whole is. Epoch e takes each source's records from where epoch
    e - 1 left off, and no record comes again before all of its source have come.
    """
    times, positions = [], []
    offset = 0
    for size, count, name in zip(sizes, counts, names, strict=True):
        positions.append(_within_source(size, epoch * count, count, seed, name).add_(offset))
        offset += size
        if len(sizes) > 1:
            generator = _generator(seed, "times", name, epoch)
            jitter = torch.rand(count, generator=generator, dtype=torch.float64)
            # In place: with millions of records each temporary copy counts.
            times.append(jitter.add_(torch.arange(count)).div_(max(count, 1)))
    if len(sizes) == 1:
        return positions[0].numpy()
    turns = torch.argsort(torch.cat(times), stable=True)
    return torch.cat(positions)[turns].numpy()


def _within_source(size: int, start: int, count: int, seed: int, name: str) -> Tensor:
    """Records `start` to `start + count` of an endless row of permutations of `size` records."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    first, last = start // size, (start + count - 1) // size
    rounds = [
        torch.randperm(size, generator=_generator(seed, "records", name, number))
        for number in range(first, last + 1)
    ]
    joined = rounds[0] if len(rounds) == 1 else torch.cat(rounds)
    return joined[start - first * size :][:count]


def _generator(*parts: int | str) -> torch.Generator:
    """A generator whose seed these parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


# --- batches --------------------------------------------------------------------------------


def _no_lengths() -> NDArray[np.int32]:
    return np.empty(0, np.int32)


@dataclass(frozen=True, eq=False)
class BatchPlanner:
    """How an epoch's records are made into batches.

    length: windows of 128 steps of the mixed order are sorted by length and cut into steps, which
    are shuffled so that sources keep their shares at any time. random: as the records follow one
    another. packed: likewise, and a step is dealt to the ranks so that all have about as many
    tokens. In each step all ranks have equally many records.
    """

    batching: Batching
    batch_size: int
    """Records a batch."""
    tokens_per_batch: int | None = None
    """In place of batch_size: the most tokens a batch may have on a rank, padding counted."""
    lengths: NDArray[np.int32] = field(default_factory=_no_lengths)
    """Tokens of each record, by its position in the sources laid end to end; random batches of
    so many records need none."""

    def num_steps(self, num_records: int, ranks: int) -> int | None:
        """Steps of so many records; None where it depends on their lengths."""
        return None if self.tokens_per_batch else -(-num_records // (ranks * self.batch_size))

    def digest(self) -> str | None:
        """Tells lengths from others; None where there are none."""
        if not len(self.lengths):
            return None
        return hashlib.blake2b(self.lengths.tobytes(), digest_size=8).hexdigest()

    def steps(
        self, order_N: NDArray[np.int64], ranks: int, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The records step by step, in `order_N` itself, and where each step ends, shape (steps,).

        Rank r has every R-th record of a step, from r on. Each step has a multiple of R records,
        as `order_N` must have.
        """
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
            generator = _generator(seed, "steps", epoch, number)
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


# --- samplers and the loader ----------------------------------------------------------------


class LengthSortedSampler(DistributedSampler[int]):
    """This rank's share of prompts, the longest first, so that little is padded.

    No prompt is repeated to give ranks equal numbers, as that one would count twice. Lightning puts
    a sampler of its own, which repeats, around any but a `DistributedSampler`, which this is.
    """

    def __init__(self, lengths: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(lengths, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
        self._mine = order[rank::num_replicas]

    def __iter__(self) -> Iterator[int]:
        """Positions of the prompts."""
        return iter(self._mine)

    def __len__(self) -> int:
        """How many prompts this rank has."""
        return len(self._mine)


class MixtureSampler(DistributedSampler[list[int]]):
    """This rank's batches of `epoch_order`, as `planner` makes them.

    It yields whole batches and so belongs in a loader without a batch size. Lightning puts a
    sampler of its own around any loader whose sampler is not a `DistributedSampler`, as this is;
    that of a loader with a batch sampler never is.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        names: Sequence[str],
        seed: int,
        planner: BatchPlanner,
        num_replicas: int = 1,
        rank: int = 0,
        stop: Stop = "total",
    ) -> None:
        super().__init__(sizes, num_replicas, rank, shuffle=False, seed=seed)  # type: ignore[arg-type]
        self.sizes, self.names, self.planner = tuple(sizes), tuple(names), planner
        self.total_size = epoch_length(sizes, weights, stop, num_replicas)
        self.counts = epoch_counts(weights, self.total_size)
        self._start = 0
        self._num_batches: dict[int, int] = {}

    def seek(self, epoch: int, batch: int) -> None:
        """The next pass begins at this batch of `epoch`."""
        self.epoch, self._start = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: when resuming, Lightning calls it after the iterator was made."""

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch; where they are made by tokens, no two epochs need have as many."""
        number = self.planner.num_steps(self.total_size, self.num_replicas)
        if number is not None:
            return number
        if epoch not in self._num_batches:
            self._num_batches[epoch] = len(self._steps(epoch)[1])
        return self._num_batches[epoch]

    def __len__(self) -> int:
        """Batches of the first epoch."""
        return self.num_batches(0)

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of positions in the sources laid end to end."""
        order, ends = self._steps(self.epoch)
        starts = np.concatenate([[0], ends[:-1]])[self._start :]
        for start, end in zip(starts, ends[self._start :], strict=True):
            yield order[start + self.rank : end : self.num_replicas].tolist()

    def _steps(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = epoch_order(self.sizes, self.counts, self.names, self.seed, epoch)
        return self.planner.steps(order, self.num_replicas, self.seed, epoch)


class Mixture(Dataset[Any]):
    """Sources laid end to end, of which many records are asked for at once."""

    def __init__(self, sources: Sequence[Examples]) -> None:
        self.sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        return self[positions]

    def __getitem__(self, positions: Sequence[int]) -> list[Example]:
        """The records at these positions, read source by source."""
        wanted = np.asarray(positions)
        numbers = np.searchsorted(self._ends, wanted, side="right")
        found = dict[int, Example]()
        for number in np.unique(numbers):
            some = wanted[numbers == number]
            start = self._ends[number] - len(self.sources[number])
            found.update(zip(some.tolist(), self.sources[number].take(some - start), strict=True))
        return [found[position] for position in wanted.tolist()]


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `MixtureSampler` that saves its position and goes on from there.

    A pass has `len(loader)` batches, which is what the first epoch has, so that a trainer knows
    the length of its run. It begins where the last one ended, so that passes which the trainer
    cuts short (`limit_train_batches`) still go through all records, and epochs with more or fewer
    batches than the first are gone through whole.

    A trainer knows how many batches it has trained on, and may restore that after the loader was
    made: `position` asks it when a pass hands out its first batch, in place of `load_state_dict`.
    """

    sampler: MixtureSampler

    def __init__(
        self,
        dataset: Any,
        sampler: MixtureSampler,
        position: Callable[[], int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, sampler=sampler, batch_size=None, **options)
        self.position = position
        self._epoch = self._batch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches; those that workers have prepared ahead do not count as seen."""
        if self.position is not None:
            self._epoch, self._batch = 0, self.position()
        remaining = len(self)
        while remaining:
            while self._batch >= (number := self.sampler.num_batches(self._epoch)):
                self._epoch, self._batch = self._epoch + 1, self._batch - number
            self.sampler.seek(self._epoch, self._batch)
            for batch in super().__iter__():
                # Counted before it is handed out: a checkpoint saved after its step has it done.
                self._batch += 1
                remaining -= 1
                yield batch
                if not remaining:
                    break

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a saved position."""
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]


def answered_first(sources: Sequence[Examples], tasks: Sequence[str], most: int) -> list[int]:
    """Positions of the records whose answers a validation writes, the longest prompt first.

    They are spread evenly over the sources, laid end to end, but for those of free text: any
    wording may be right there.
    """
    examples = Mixture(sources)
    ends = np.cumsum([0, *map(len, sources)]).tolist()
    spans = zip(tasks, ends, ends[1:], strict=False)
    positions = [position for task, *span in spans if task != "text" for position in range(*span)]
    numbers = np.linspace(0, len(positions) - 1, min(most, len(positions)))
    chosen = [positions[round(number)] for number in numbers]
    known = dict(zip(chosen, examples[chosen], strict=True))
    kept = [position for position in chosen if reference(known[position].record) is not None]
    return sorted(kept, key=lambda position: -len(known[position].prompt))
