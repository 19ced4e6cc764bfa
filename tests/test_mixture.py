"""Shares, the length of an epoch, ranks and resuming, for any mixture."""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.mixture import (
    MixtureSampler,
    ResumableLoader,
    epoch_counts,
    epoch_length,
    epoch_order,
    shares_by_size,
)

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)
# Tenths, so that the shares are exact fractions.
MIXTURES = SIZES.flatmap(
    lambda sizes: st.tuples(
        st.just(sizes), st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))
    )
)
STOPS = st.sampled_from(["total", "first_exhausted", "oversample"])


def names_of(sizes):
    return [f"s{number}" for number in range(len(sizes))]


def source_of(position, sizes):
    return next(i for i in range(len(sizes)) if position < sum(sizes[: i + 1]))


# Temperature.


@given(sizes=SIZES, temperature=st.floats(0.2, 20))
def test_shares_by_temperature_are_powers_of_the_sizes(sizes, temperature):
    powers = [size ** (1 / temperature) for size in sizes]
    expected = [power / math.fsum(powers) for power in powers]
    assert shares_by_size(sizes, temperature) == pytest.approx(expected)


def test_shares_at_the_ends_of_the_temperature():
    sizes = [1, 10, 1_000_000]
    assert shares_by_size(sizes, 1) == pytest.approx([size / sum(sizes) for size in sizes])
    assert shares_by_size(sizes, math.inf) == pytest.approx([1 / 3] * 3)
    assert shares_by_size(sizes, 1e-3) == [0, 0, 1]


# Length of an epoch.


@given(mixture=MIXTURES, ranks=st.integers(1, 5), unit=st.sampled_from([1, 0.1, 1 / 3]))
def test_epoch_ends_at_the_first_or_the_last_source_to_give_all_of_its_own(mixture, ranks, unit):
    sizes, parts = mixture
    weights = [part * unit for part in parts]
    shares = [Fraction(part, sum(parts)) for part in parts]
    ends = [size / share for size, share in zip(sizes, shares, strict=True)]
    assert epoch_length(sizes, weights, "total", ranks) == math.ceil(sum(sizes) / ranks) * ranks
    longest = epoch_length(sizes, weights, "oversample", ranks)
    assert longest == math.ceil(max(ends) / ranks) * ranks
    counts = epoch_counts(weights, longest)
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    shortest = math.floor(min(ends) / ranks) * ranks
    if not shortest:
        with pytest.raises(ValueError, match=r"data\.stop: first_exhausted leaves no record"):
            epoch_length(sizes, weights, "first_exhausted", ranks)
        return
    assert epoch_length(sizes, weights, "first_exhausted", ranks) == shortest
    counts = epoch_counts(weights, shortest)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))


def test_tenths_give_round_epochs():
    assert epoch_length([10, 90], [0.1, 0.9], "first_exhausted") == 100
    assert epoch_length([10, 90], [0.1, 0.9], "oversample") == 100
    assert epoch_length([10, 30], [0.5, 0.5], "first_exhausted") == 20
    assert epoch_length([10, 30], [0.5, 0.5], "oversample") == 60


def test_source_without_a_share_ends_no_epoch_and_forbids_oversampling():
    assert epoch_length([5, 100], [0.0, 1.0], "first_exhausted") == 100
    with pytest.raises(ValueError, match="oversample needs an epoch of inf records"):
        epoch_length([5, 100], [0.0, 1.0], "oversample")


# Ranks and resuming.


def samplers(sizes, weights, ranks, stop, seed=0):
    names = names_of(sizes)
    return [MixtureSampler(sizes, weights, names, seed, ranks, rank, stop) for rank in range(ranks)]


@given(mixture=MIXTURES, ranks=st.integers(1, 4), stop=STOPS, epoch=st.integers(0, 3))
def test_ranks_share_an_epoch_without_overlap_or_loss(mixture, ranks, stop, epoch):
    sizes, weights = mixture
    length = math.floor(min(s * sum(weights) / w for s, w in zip(sizes, weights, strict=True)))
    if stop == "first_exhausted" and length < ranks:
        return
    every = samplers(sizes, weights, ranks, stop)
    for one in every:
        one.seek(epoch, 0)
    parts = [list(one) for one in every]
    assert {len(part) for part in parts} == {len(one) for one in every}
    total = epoch_length(sizes, weights, stop, ranks)
    counts = epoch_counts(weights, total)
    whole = epoch_order(sizes, counts, names_of(sizes), 0, epoch).tolist()
    joint = [position for turn in zip(*parts, strict=True) for position in turn]
    assert joint == whole
    # Shares are exact, to the record that cannot be cut.
    seen = Counter(source_of(position, sizes) for position in joint)
    for number, weight in enumerate(weights):
        assert abs(seen[number] - Fraction(total * weight, sum(weights))) < 1
    if epoch == 0:
        times = Counter(joint)
        for position in range(sum(sizes)):
            number = source_of(position, sizes)
            rounds = counts[number] / sizes[number]
            assert math.floor(rounds) <= times[position] <= math.ceil(rounds)


@given(
    mixture=MIXTURES,
    ranks=st.integers(1, 3),
    stop=st.sampled_from(["total", "oversample"]),
    batch_size=st.integers(1, 7),
    batch=st.integers(0, 40),
)
def test_resumed_at_any_batch_every_rank_sees_the_records_that_follow(
    mixture, ranks, stop, batch_size, batch
):
    sizes, weights = mixture

    def loader(sampler):
        return ResumableLoader(
            range(sum(sizes)),  # type: ignore[arg-type]
            sampler=sampler,
            batch_size=batch_size,
            collate_fn=list,
            generator=torch.Generator(),
        )

    for rank in range(ranks):
        straight = loader(samplers(sizes, weights, ranks, stop)[rank])
        done = batch % (2 * len(straight))
        stream = [some for _ in range(3) for some in straight]
        stopped = loader(samplers(sizes, weights, ranks, stop)[rank])
        passes = (some for _ in range(3) for some in stopped)
        assert [next(passes) for _ in range(done)] == stream[:done]
        resumed = loader(samplers(sizes, weights, ranks, stop)[rank])
        resumed.load_state_dict(stopped.state_dict())
        assert list(resumed) == stream[done : done + len(straight)]


@given(mixture=MIXTURES, start=st.integers(0, 400))
def test_sampler_resumes_at_any_record(mixture, start):
    sizes, weights = mixture
    (straight,) = samplers(sizes, weights, 1, "total")
    (resumed,) = samplers(sizes, weights, 1, "total")
    resumed.seek(0, start)
    assert list(resumed) == list(straight)[start:]
