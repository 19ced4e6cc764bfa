"""Samplers that give each rank its records, and the loader that resumes where it stopped."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from rosa_lightning.data.sampling import (
    BatchPlanner,
    Stop,
    epoch_counts,
    epoch_length,
    epoch_order,
)
from rosa_lightning.data.tokenization import Example, Examples
from rosa_lightning.tasks.records import reference


class LengthSortedSampler(DistributedSampler[int]):
    """This rank's share of prompts, the longest first, so that little is padded.

    No prompt is repeated to give ranks equal numbers, as that one would count twice. Lightning puts
    a sampler of its own, which repeats, around any but a `DistributedSampler`, which this is.
    """

    def __init__(self, lengths: Sequence[int], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(
            range(len(lengths)),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=False,
        )
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
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
        super().__init__(
            range(sum(sizes)),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=False,
            seed=seed,
        )
        self.sizes, self.names = tuple(sizes), tuple(names)
        self.planner = planner
        self.total_size = epoch_length(sizes, weights, stop, num_replicas)
        self.num_samples = self.total_size // num_replicas
        self.counts = epoch_counts(weights, self.total_size)
        self._start = 0
        self._known: dict[int, int] = {}  # batches of epochs

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
        if epoch not in self._known:
            self._known[epoch] = len(self._steps(epoch)[1])
        return self._known[epoch]

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
        order = epoch_order(self.sizes, self.counts, self.names, self.seed, epoch).numpy()
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
    """A `DataLoader` over a `MixtureSampler` that saves its place and goes on from there.

    A pass has `len(loader)` batches, which is what the first epoch has, so that a trainer knows
    the length of its run. It begins where the last one ended, so that passes which the trainer
    cuts short (`limit_train_batches`) still go through all records, and epochs with more or fewer
    batches than the first are gone through whole.

    A trainer knows how many batches it has trained on, and may restore that after the loader was
    made. `position` asks it, each time a pass hands out its first batch; what `seek` or
    `load_state_dict` said then no longer counts.

    Raises TypeError for any other sampler.
    """

    sampler: MixtureSampler

    def __init__(
        self,
        dataset: Any,
        sampler: MixtureSampler,
        position: Callable[[], int] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(sampler, MixtureSampler):
            raise TypeError(
                f"A ResumableLoader takes a MixtureSampler, not a {type(sampler).__name__}."
            )
        super().__init__(dataset, sampler=sampler, batch_size=None, **options)
        self.position = position
        self._epoch = self._batch = 0

    def seek(self, batch: int) -> None:
        """The next pass begins at this batch, counted from the beginning of the training."""
        self._epoch, self._batch = 0, batch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches; those that workers have prepared ahead do not count as seen."""
        if self.position is not None:
            self.seek(self.position())
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
        """Go on from a saved place."""
        self._epoch, self._batch = state_dict["epoch"], state_dict["batch"]


def answered_first(sources: Sequence[Examples], tasks: Sequence[str], most: int) -> list[int]:
    """Places of the records whose answers a validation writes, the longest prompt first.

    They are spread evenly over the sources, laid end to end, but for those of free text: any
    wording may be right there.
    """
    examples = Mixture(sources)
    ends = np.cumsum([0, *map(len, sources)]).tolist()
    spans = zip(tasks, ends, ends[1:], strict=False)
    places = [place for task, *span in spans if task != "text" for place in range(*span)]
    numbers = np.linspace(0, len(places) - 1, min(most, len(places)))
    chosen = [places[round(number)] for number in numbers]
    known = dict(zip(chosen, examples[chosen], strict=True))
    kept = [place for place in chosen if reference(known[place].record) is not None]
    return sorted(kept, key=lambda place: -len(known[place].prompt))
