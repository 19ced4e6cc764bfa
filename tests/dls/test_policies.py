import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_lightning.dls.policies import (
    layer_scores,
    normalize_scores,
    random_subset,
    resolve_indices,
    resolve_num_active,
    sample,
    select_layers,
    threshold,
    top_k,
)

score_lists = st.lists(st.one_of(st.just(0.0), st.floats(5e-324, 1e308)), min_size=1, max_size=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def scores_and_count(draw):
    values = draw(score_lists)
    return values, draw(st.integers(1, len(values)))


def subset_probabilities(weights, num_active):
    """Chances of every subset when layers are drawn one after another, by enumeration."""
    chances = Counter()
    for order in permutations(range(len(weights)), num_active):
        left, chance = sum(weights), 1.0
        for index in order:
            chance *= weights[index] / left
            left -= weights[index]
        chances[tuple(sorted(order))] += chance
    return chances


def chi_square(counts, chances, draws):
    assert set(counts) <= {subset for subset, chance in chances.items() if chance > 0}
    return sum((counts[s] - draws * p) ** 2 / (draws * p) for s, p in chances.items() if p > 0)


def test_score_is_the_norm_over_all_norm_gradients_of_a_layer():
    gradients = [[torch.randn(5, generator=generator(s)), torch.randn(3)] for s in range(4)]
    expected = [math.sqrt(sum(x * x for g in layer for x in g.tolist())) for layer in gradients]
    assert layer_scores(gradients).tolist() == pytest.approx(expected, rel=1e-14)


def test_missing_gradients_count_as_zero():
    assert layer_scores([[None, torch.ones(4)], [None], []]).tolist() == [2.0, 0.0, 0.0]


def test_sqrt_size_makes_scores_of_equal_gradients_equal():
    sizes = [4, 9, 100]
    scores = layer_scores([[torch.full((size,), 0.5)] for size in sizes]).tolist()
    seen = normalize_scores(scores, "sqrt_size", sizes, None)
    assert seen.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert normalize_scores(scores, "none", sizes, [3.0] * 3).tolist() == scores


def test_running_mean_divides_by_what_a_layer_is_used_to():
    seen = normalize_scores([6.0, 1.0, 0.0], "running_mean", [1] * 3, [3.0, 4.0, 0.0])
    assert seen.tolist() == [2.0, 0.25, 0.0]
    assert normalize_scores([6.0, 1.0], "running_mean", [1, 1], None).tolist() == [6.0, 1.0]


@given(scores_and_count())
def test_top_k_takes_the_highest_sorted_and_ties_by_index(case):
    values, count = case
    chosen = top_k(tensor(values), count)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == count
    for inside in chosen:
        for outside in set(range(len(values))) - set(chosen):
            assert (values[inside], -inside) > (values[outside], -outside)


@given(scores_and_count(), st.floats(1e-300, 1e300), st.integers(0, 2**31))
@settings(deadline=None)
def test_sample_gives_a_sorted_subset_of_the_asked_size(case, temperature, seed):
    values, count = case
    chosen = sample(tensor(values), count, temperature, generator(seed))
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == count
    positive = {index for index, value in enumerate(values) if value > 0}
    assert set(chosen) <= positive or positive <= set(chosen)


@pytest.mark.parametrize(
    ("values", "num_active", "temperature"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1, 1.0),
        ([1.0, 2.0, 3.0, 4.0], 2, 1.0),
        ([5.0, 0.5, 1.0, 2.0, 0.1], 3, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 2, 0.5),
        ([1e-300, 2e-300, 4e-300], 2, 1.0),
    ],
)
def test_sample_draws_subsets_as_often_as_enumeration_says(values, num_active, temperature):
    largest = max(values)
    weights = [(value / largest) ** (1 / temperature) for value in values]
    chances = subset_probabilities(weights, num_active)
    draws, source = 4000, generator(7)
    counts = Counter(sample(tensor(values), num_active, temperature, source) for _ in range(draws))
    freedom = len(chances) - 1
    # 0.999 quantile of chi-square, Wilson and Hilferty's approximation.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square(counts, chances, draws) < limit


def test_sample_draws_zero_scores_last_and_evenly():
    source, counts = generator(3), Counter()
    for _ in range(3000):
        chosen = sample(tensor([0.0, 1e-320, 0.0, 5.0, 0.0]), 3, 1.0, source)
        assert {1, 3} <= set(chosen)
        counts[chosen] += 1
    chances = {(0, 1, 3): 1 / 3, (1, 2, 3): 1 / 3, (1, 3, 4): 1 / 3}
    assert chi_square(counts, chances, 3000) < 13.8


def smallest_sets(values, share, held):
    """All smallest sets with the held layers that hold the share, by enumeration."""
    exact = [Fraction(value) for value in values]
    wanted = Fraction(str(share)) * sum(exact)
    others = [index for index in range(len(values)) if index not in held]
    for size in range(len(others) + 1):
        sets = [{*held, *more} for more in combinations(others, size)]
        enough = [s for s in sets if s and sum(exact[index] for index in s) >= wanted]
        if enough:
            return enough
    raise AssertionError("all layers together hold every share")


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(5e-324, 1e308)), min_size=1, max_size=7),
    st.one_of(st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.floats(1e-3, 1.0)),
    st.data(),
)
@settings(deadline=None)
def test_threshold_takes_a_smallest_set_that_holds_the_share(values, share, data):
    held = data.draw(st.sets(st.integers(0, len(values) - 1)))
    chosen = threshold(tensor(values), share, tuple(held))
    assert list(chosen) == sorted(set(chosen))
    smallest = smallest_sets(values, share, held)
    assert set(chosen) in smallest
    # Of sets as small, the one of the highest scores; of equal scores, of the lowest indices.
    best = max(
        sorted(((values[index], -index) for index in other - held), reverse=True)
        for other in smallest
    )
    assert sorted(((values[i], -i) for i in set(chosen) - held), reverse=True) == best


def test_a_share_means_the_number_that_was_written():
    # In binary 0.9 is a little more than nine tenths, and ten times 0.1 is not 1.
    assert threshold(tensor([0.1] * 10), 0.9) == tuple(range(9))
    assert threshold(tensor([1.0, 1e-300]), 1.0) == (0, 1)
    assert threshold(tensor([0.0, 0.0]), 1.0) == (0,)


def test_random_subset_is_uniform():
    source = generator(5)
    counts = Counter(random_subset(4, 2, source) for _ in range(3000))
    chances = dict.fromkeys(combinations(range(4), 2), 1 / 6)
    assert chi_square(counts, chances, 3000) < 20.5


def choose(policy, num_active=2, scores=(4.0, 1.0, 3.0, 2.0), **kwargs):
    return select_layers(policy, tensor(scores), num_active, generator=generator(), **kwargs)


def test_each_policy_gives_its_layers():
    assert choose("top_k") == (0, 2)
    assert choose("all") == (0, 1, 2, 3)
    assert choose("fixed", fixed_layers=(3, 1)) == (1, 3)
    assert choose("random") == random_subset(4, 2, generator())
    assert choose("threshold", score_share=0.4) == (0,)
    assert choose("threshold", score_share=0.5) == (0, 2)
    drawn = sample(tensor([4.0, 1.0, 3.0, 2.0]), 2, 2.0, generator())
    assert choose("sample", temperature=2.0) == drawn


@given(st.data(), st.sampled_from(["top_k", "sample", "threshold", "random", "all"]))
def test_no_policy_takes_a_layer_below_the_floor_but_those_always_active(data, policy):
    scores = data.draw(st.lists(st.floats(0, 10), min_size=1, max_size=8))
    indices = st.integers(0, len(scores) - 1)
    floor, always = data.draw(indices), data.draw(st.sets(indices))
    count = data.draw(st.integers(max(1, len(always)), len(scores)))
    chosen = choose(policy, count, scores, always_active=tuple(always), floor=floor)
    above = set(range(floor, len(scores)))
    assert always <= set(chosen) <= above | always
    if policy == "all":
        assert set(chosen) == above | always
    elif policy != "threshold":
        assert len(chosen) == min(count, len(above | always))


@pytest.mark.parametrize(
    ("given", "layers", "expected"),
    [(1, 4, 1), (9, None, 9), (4, 4, 4), (0.5, 5, 3), (0.01, 12, 1), (1.0, 7, 7), (0.3, 10, 3)],
)
def test_num_active_is_a_count_or_a_fraction(given, layers, expected):
    assert resolve_num_active(given, layers) == expected


@pytest.mark.parametrize("given", [0, 0.0, 1.5, math.nan, math.inf, True, "2", None, 9])
def test_impossible_num_active_is_refused_with_the_mend(given):
    with pytest.raises(ValueError, match=r"num_active=.*fraction in \(0, 1\]"):
        resolve_num_active(given, 8)


def test_indices_of_layers_give_indices_of_candidates():
    assert resolve_indices("fixed_layers", [-1, 2], (0, 2, 4)) == (1, 2)
    with pytest.raises(ValueError, match=r"fixed_layers=\[1\].*any of \[0, 2, 4\]"):
        resolve_indices("fixed_layers", [1], (0, 2, 4))
