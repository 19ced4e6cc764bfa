"""Which records train, and in which order: the held-out split and the mixture.

Everything is a function of the records, the weights and a seed; no global generator is read.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rosa_lightning.data.streamed import select
from rosa_lightning.tasks.records import Record

Stop = Literal["total", "first_exhausted", "oversample"]
"""Where an epoch ends: after as many records as there are in all, when the first source has given
as many as it has, or when every source has."""

_LONGEST_EPOCH = 2**31

# --- held-out split -------------------------------------------------------------------------


def normalised_prompt(record: Record) -> str:
    """What is asked, in lower case, every run of other than letters and digits one space."""
    asked = f"{record.instruction} {record.input}"
    return re.sub(r"[\W_]+", " ", asked.casefold()).strip() or asked


def hold_out(
    records: Sequence[Sequence[Record]], fraction: float, seed: int
) -> tuple[list[Sequence[Record]], list[Sequence[Record]]]:
    """Splits each source's records into those to train on and those held out.

    A prompt's hash with the seed decides, so the order in a file does not matter and equal
    prompts, in one source or in several, stand on one side. Each source with two or more
    different prompts gives `fraction` of its records, at least one, and keeps at least one.
    All records are read once; of each its hash stays, in 8 bytes.
    """
    keys = [
        np.fromiter((_split_key(record, seed) for record in source), np.uint64, len(source))
        for source in records
    ]
    held: NDArray[np.uint64] = np.empty(0, np.uint64)
    if fraction > 0:
        held = np.unique(np.concatenate([held, *(_chosen(each, fraction) for each in keys)]))
    for each in keys:
        if len(each) and _among(each, held).all():  # nothing would be left to train on
            held = held[held != each.max()]
    masks = [_among(each, held) for each in keys]
    pairs = list(zip(records, masks, strict=True))
    return (
        [select(source, ~mask) for source, mask in pairs],
        [select(source, mask) for source, mask in pairs],
    )


def _split_key(record: Record, seed: int) -> int:
    text = f"{seed}\0{normalised_prompt(record)}"
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big")


def _chosen(keys: NDArray[np.uint64], fraction: float) -> NDArray[np.uint64]:
    """Keys that hold out as nearly `fraction` of the records as whole groups allow."""
    groups, sizes = np.unique(keys, return_counts=True)
    if len(groups) < 2:
        return groups[:0]
    wanted = max(1, round(len(keys) * fraction))
    chosen = []
    for number in range(len(groups)):
        if sizes[number] <= wanted:
            chosen.append(number)
            wanted -= int(sizes[number])
        if not wanted:
            break
    return groups[chosen] if chosen else groups[[sizes.argmin()]]


def _among(keys: NDArray[np.uint64], some: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which keys are among some that are sorted; in less memory than np.isin takes."""
    if not len(some):
        return np.zeros(len(keys), dtype=np.bool_)
    places = np.searchsorted(some, keys)
    found: NDArray[np.bool_] = some[np.minimum(places, len(some) - 1, out=places)] == keys
    return found


# --- order ----------------------------------------------------------------------------------


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
                f"data.stop: oversample needs an epoch of {max(ends):.3g} records, for a source of "
                f"share {min(weights) / sum(weights):.3g}. Raise its weight in data.sources, or "
                "data.temperature."
            )
        return math.ceil(max(ends) * (1 - rounding) / ranks) * ranks
    rounds = math.floor(min(ends) * (1 + rounding) / ranks)
    if not rounds:
        raise ValueError(
            f"data.stop: first_exhausted leaves no record for some of {ranks} processes: the "
            f"sources have {', '.join(map(str, sizes))} records. Set data.stop: total."
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
