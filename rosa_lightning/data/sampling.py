"""Which records train, in which order: mixtures, samplers, and the loader that resumes.

Everything is a function of the sources' sizes and weights, the records' lengths and a seed; no
global generator is read. A step is one batch on each rank: R ranks, N records.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rosa_lightning.data.batches import BatchPlanner, seeded
from rosa_lightning.data.encoding import Example
from rosa_lightning.data.tokenization import Examples
from rosa_lightning.tasks.records import reference

Stop = Literal["total", "first_exhausted", "oversample"]

_LONGEST_EPOCH = 2**31
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
            generator = seeded(seed, "times", name, epoch)
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
        torch.randperm(size, generator=seeded(seed, "records", name, number))
        for number in range(first, last + 1)
    ]
    joined = rounds[0] if len(rounds) == 1 else torch.cat(rounds)
    return joined[start - first * size :][:count]


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
        self._made: tuple[int, tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None

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
            batch = order[start + self.rank : end : self.num_replicas]
            yield batch[batch >= 0].tolist()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The records of an epoch on all ranks, before they are made into batches."""
        return epoch_order(self.sizes, self.counts, self.names, self.seed, epoch)

    def _steps(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The steps of an epoch; those of the last one asked for are kept."""
        if self._made is None or self._made[0] != epoch:
            order = self.order(epoch)
            self._made = epoch, self.planner.steps(order, self.num_replicas, self.seed, epoch)
        return self._made[1]


def report_packs(sampler: MixtureSampler, trainer: Trainer | None) -> None:
    """Say how full the packs of the first epoch are, and log it."""
    order, planner = sampler.order(0), sampler.planner
    packs = len(planner.packs(order, sampler.seed, 0))
    fill = planner.lengths[order].sum(dtype=np.int64) / (packs * planner.max_length)
    rank_zero_info(
        f"{len(order)} records in {packs} packs of {planner.max_length} tokens, which are "
        f"{fill:.1%} full"
    )
    if trainer is not None:
        for logger in trainer.loggers:
            logger.log_metrics({"train/pack_fill": float(fill)}, step=trainer.global_step)


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
    wording may be right there. Of a conversation the last reply is written.
    """
    examples = Mixture(sources)
    ends = np.cumsum([0, *map(len, sources)]).tolist()
    spans = zip(tasks, ends, ends[1:], strict=False)
    positions = [position for task, *span in spans if task != "text" for position in range(*span)]
    numbers = np.linspace(0, len(positions) - 1, min(most, len(positions)))
    chosen = [positions[round(number)] for number in numbers]
    known = dict(zip(chosen, examples[chosen], strict=True))
    kept = [
        position
        for position in chosen
        if not (record := known[position].record).is_text and reference(record) is not None
    ]
    return sorted(kept, key=lambda position: -len(known[position].asked))
