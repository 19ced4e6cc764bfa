"""Shares and the length of an epoch, for any mixture."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.data.sampling import epoch_counts, epoch_length, shares_by_size

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)
# Tenths, so that the shares are exact fractions.
MIXTURES = SIZES.flatmap(
    lambda sizes: st.tuples(
        st.just(sizes), st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes))
    )
)
STOPS = st.sampled_from(["total", "first_exhausted", "oversample"])


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
        with pytest.raises(ValueError, match=r"first_exhausted leaves no record"):
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
