"""Ranks, shares and resuming, for any mixture and any way of making batches."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.data.batches import BatchPlanner
from rosa_lightning.data.sampling import (
    MixtureSampler,
    ResumableLoader,
    epoch_counts,
    epoch_length,
    epoch_order,
)
from tests.data.test_sampling import MIXTURES, STOPS

LONGEST = 30


@st.composite
def planners(draw):
    """Any way of making batches; the lengths are those of as many records as there may be."""
    seed = draw(st.integers(0, 5))
    lengths = np.random.default_rng(seed).integers(1, LONGEST + 1, 300).astype(np.int32)
    tokens = draw(st.none() | st.integers(LONGEST, 200))
    batching = draw(st.sampled_from(["length", "random", "packed", "best_fit"]))
    return BatchPlanner(batching, draw(st.integers(1, 7)), tokens, LONGEST, lengths)


def names_of(sizes):
    return [f"s{number}" for number in range(len(sizes))]


def source_of(position, sizes):
    return next(i for i in range(len(sizes)) if position < sum(sizes[: i + 1]))


def too_short(mixture, ranks, stop):
    sizes, weights = mixture
    length = math.floor(min(s * sum(weights) / w for s, w in zip(sizes, weights, strict=True)))
    return stop == "first_exhausted" and length < ranks


def samplers(mixture, planner, ranks=1, stop="total", seed=0):
    sizes, weights = mixture
    return [
        MixtureSampler(sizes, weights, names_of(sizes), seed, planner, ranks, rank, stop)
        for rank in range(ranks)
    ]


class Positions:
    """Gives the positions that it is asked for."""

    def __getitem__(self, positions):
        return positions


def loader(sampler):
    return ResumableLoader(Positions(), sampler, collate_fn=list, generator=torch.Generator())


def epoch_of(every, epoch):
    for one in every:
        one.seek(epoch, 0)
    return [list(one) for one in every]


@given(
    mixture=MIXTURES,
    planner=planners(),
    ranks=st.integers(1, 4),
    stop=STOPS,
    epoch=st.integers(0, 3),
)
def test_ranks_share_the_records_of_an_epoch_without_overlap_or_loss(
    mixture, planner, ranks, stop, epoch
):
    if too_short(mixture, ranks, stop):
        return
    sizes, weights = mixture
    every = samplers(mixture, planner, ranks, stop)
    parts = epoch_of(every, epoch)
    # Equally many batches on all ranks, of equally many records where none is packed to the brim.
    if planner.batching != "best_fit":
        assert len({tuple(map(len, part)) for part in parts}) == 1
    assert all(batch for part in parts for batch in part)
    assert {len(part) for part in parts} == {one.num_batches(epoch) for one in every}
    total = epoch_length(sizes, weights, stop, ranks)
    counts = epoch_counts(weights, total)
    whole = epoch_order(sizes, counts, names_of(sizes), 0, epoch).tolist()
    joint = [position for part in parts for batch in part for position in batch]
    assert Counter(joint) == Counter(whole)
    # Shares are exact, to the record that cannot be cut.
    seen = Counter(source_of(position, sizes) for position in joint)
    for number, weight in enumerate(weights):
        assert abs(seen[number] - Fraction(total * weight, sum(weights))) < 1
    if stop == "total" and epoch == 0:
        by_size = epoch_of(samplers((sizes, sizes), planner), 0)[0]
        assert sorted(p for batch in by_size for p in batch) == list(range(sum(sizes)))


@given(mixture=MIXTURES, ranks=st.integers(1, 4), batch_size=st.integers(1, 7), stop=STOPS)
def test_random_batches_are_the_order_itself(mixture, ranks, batch_size, stop):
    if too_short(mixture, ranks, stop):
        return
    sizes, weights = mixture
    parts = epoch_of(samplers(mixture, BatchPlanner("random", batch_size), ranks, stop), 1)
    counts = epoch_counts(weights, epoch_length(sizes, weights, stop, ranks))
    order = epoch_order(sizes, counts, names_of(sizes), 0, 1).tolist()
    for rank, part in enumerate(parts):
        mine = order[rank::ranks]
        assert part == [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


@given(mixture=MIXTURES, planner=planners(), ranks=st.integers(1, 4))
def test_batches_keep_to_their_size_or_their_tokens(mixture, planner, ranks):
    for part in epoch_of(samplers(mixture, planner, ranks), 2):
        sizes = [len(batch) for batch in part]
        if planner.batching == "best_fit":
            budget = planner.tokens_per_batch or planner.batch_size * LONGEST
            assert all(planner.lengths[batch].sum() <= budget for batch in part)
            continue
        if planner.tokens_per_batch is None:
            # One step may be short, as the epoch is no multiple.
            assert sorted(sizes)[1:] == [planner.batch_size] * (len(sizes) - 1)
            assert max(sizes) <= planner.batch_size
            continue
        for batch in part:
            lengths = planner.lengths[batch]
            packed = planner.batching == "packed"
            tokens = lengths.sum() if packed else lengths.max() * len(batch)
            assert tokens <= planner.tokens_per_batch


@settings(deadline=None, max_examples=40)
@given(
    mixture=MIXTURES,
    planner=planners(),
    ranks=st.integers(1, 3),
    stop=st.sampled_from(["total", "oversample"]),
    batch=st.integers(0, 40),
)
def test_resumed_at_any_batch_every_rank_sees_the_records_that_follow(
    mixture, planner, ranks, stop, batch
):
    for rank in {0, ranks - 1}:
        straight, stopped, resumed, asking = (
            loader(samplers(mixture, planner, ranks, stop)[rank]) for _ in range(4)
        )
        done = batch % (2 * len(straight))
        stream = [some for _ in range(3) for some in straight]
        passes = (some for _ in range(3) for some in stopped)
        assert [next(passes) for _ in range(done)] == stream[:done]
        resumed.load_state_dict(stopped.state_dict())
        assert list(resumed) == stream[done : done + len(straight)]
        asking.position = lambda done=done: done
        assert list(asking) == stream[done : done + len(straight)]


@settings(deadline=None, max_examples=40)
@given(mixture=MIXTURES, planner=planners())
def test_passes_follow_one_another_through_whole_epochs(mixture, planner):
    one = samplers(mixture, planner)[0]
    epochs = [batch for epoch in range(6) for batch in epoch_of([one], epoch)[0]]
    fresh = loader(samplers(mixture, planner)[0])
    found = [some for _ in range(3) for some in fresh]
    assert len(found) == 3 * len(fresh)
    assert found == epochs[: len(found)]


@pytest.mark.parametrize("tokens", [None, 64])
def test_ranks_have_like_lengths_in_a_step(tokens):
    lengths = np.random.default_rng(0).integers(1, 33, 4000).astype(np.int32)
    mixture = [4000], [1]

    def spread(batching):
        planner = BatchPlanner(batching, 8, tokens, 32, lengths)
        parts = epoch_of(samplers(mixture, planner, 4), 0)
        steps = zip(*([lengths[batch].sum() for batch in part] for part in parts), strict=True)
        return np.mean([np.ptp(step) / np.mean(step) for step in steps])

    assert spread("random") > 0.4
    assert spread("length") < 0.05
    assert spread("packed") < 0.2
    assert spread("best_fit") < 0.1
