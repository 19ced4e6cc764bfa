"""Which records train, and in which order: the held-out split, the mixture, the resumable loader.

Everything is a function of the records, the weights and a seed; no global generator is read.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from rosa_lightning.tasks import Record

# --- held-out split -------------------------------------------------------------------------


def normalised_prompt(record: Record) -> str:
    """What is asked, in lower case, every run of other than letters and digits one space."""
    asked = f"{record.instruction} {record.input}"
    return re.sub(r"[\W_]+", " ", asked.casefold()).strip() or asked


def hold_out(
    records: Sequence[Sequence[Record]], fraction: float, seed: int
) -> tuple[list[list[Record]], list[list[Record]]]:
    """Splits each source's records into those to train on and those held out.

    A prompt's hash with the seed decides, so the order in a file does not matter and equal
    prompts, in one source or in several, stand on one side. Each source with two or more
    different prompts gives `fraction` of its records, at least one, and keeps at least one.
    """
    keyed = [[(_split_key(record, seed), record) for record in source] for source in records]
    held: set[bytes] = set()
    if fraction > 0:
        held = held.union(*(_chosen([key for key, _ in source], fraction) for source in keyed))
    for source in keyed:
        keys = {key for key, _ in source}
        if keys and keys <= held:  # nothing would be left to train on: it gets one back
            held.discard(max(keys))
    return (
        [[record for key, record in source if key not in held] for source in keyed],
        [[record for key, record in source if key in held] for source in keyed],
    )


def _split_key(record: Record, seed: int) -> bytes:
    text = f"{seed}\0{normalised_prompt(record)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _chosen(keys: Sequence[bytes], fraction: float) -> set[bytes]:
    """Keys that hold out as nearly `fraction` of the records as whole groups allow."""
    sizes: dict[bytes, int] = {}
    for key in sorted(keys):
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) < 2:
        return set()
    wanted = max(1, round(len(keys) * fraction))
    chosen: set[bytes] = set()
    for key, size in sizes.items():
        if size <= wanted:
            chosen.add(key)
            wanted -= size
    return chosen or {min(sizes, key=lambda key: (sizes[key], key))}


# --- order ----------------------------------------------------------------------------------


def epoch_counts(weights: Sequence[float], total: int) -> list[int]:
    """`total` records shared out by weight, by largest remainder: each within 1 of its share."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _generator(*parts: int | str) -> torch.Generator:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _within_source(size: int, start: int, count: int, seed: int, name: str) -> Tensor:
    """Records `start` to `start + count` of an endless row of permutations of `size` records."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    first, last = start // size, (start + count - 1) // size
    rounds = [
        torch.randperm(size, generator=_generator(seed, "records", name, number))
        for number in range(first, last + 1)
    ]
    return torch.cat(rounds)[start - first * size :][:count]


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
        generator = _generator(seed, "times", name, epoch)
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        times.append((torch.arange(count, dtype=torch.float64) + jitter) / max(count, 1))
        positions.append(offset + _within_source(size, epoch * count, count, seed, name))
        offset += size
    return torch.cat(positions)[torch.argsort(torch.cat(times), stable=True)]


class LongestFirst(DistributedSampler[int]):
    """This rank's share of prompts, the longest first: batches hold prompts of like length.

    So little is padded, and what does not fit into memory shows at once. No prompt is repeated to
    give ranks equal numbers, as that one would count twice. Lightning puts a sampler of its own,
    which repeats, around any but a `DistributedSampler`, which this is.
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
        """Positions of this rank's prompts."""
        return iter(self._mine)

    def __len__(self) -> int:
        """How many prompts this rank has."""
        return len(self._mine)


class MixtureSampler(DistributedSampler[int]):
    """This rank's share of `epoch_order`: every `num_replicas`-th record, from `rank` on.

    An epoch is rounded up to a multiple of the ranks, with the next records of the mixture, so
    that all ranks have the same number of batches. Lightning puts a sampler of its own around
    any sampler but a `DistributedSampler`, which this is.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        names: Sequence[str],
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            range(sum(sizes)),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=False,
            seed=seed,
        )
        self.sizes, self.names = tuple(sizes), tuple(names)
        self.counts = epoch_counts(weights, self.total_size)
        self._start = 0

    def seek(self, epoch: int, start: int) -> None:
        """The next pass begins at this rank's record `start` of `epoch`."""
        self.epoch, self._start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: when resuming, Lightning calls it after the iterator was made."""

    def __iter__(self) -> Iterator[int]:
        """Positions in the sources laid end to end."""
        order = epoch_order(self.sizes, self.counts, self.names, self.seed, self.epoch)
        mine: list[int] = order[self.rank :: self.num_replicas][self._start :].tolist()
        return iter(mine)


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `MixtureSampler` that saves its place and goes on from there.

    A pass has `len(loader)` batches. It begins where the last one ended, so that passes which
    the trainer cuts short (`limit_train_batches`) still go through all records.
    """

    _epoch = 0
    _batch = 0

    def seek(self, batch: int) -> None:
        """The next pass begins at this batch, counted from the beginning of the training."""
        self._epoch, self._batch = divmod(batch, len(self))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches; those that workers have prepared ahead do not count as seen."""
        if not isinstance(self.sampler, MixtureSampler):
            # Trainer(overfit_batches=...) has put in a sequential sampler.
            yield from super().__iter__()
            return
        remaining = len(self)
        while remaining:
            self._epoch += self._batch // len(self)
            self._batch %= len(self)
            self.sampler.seek(self._epoch, self._batch * (self.batch_size or 1))
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
