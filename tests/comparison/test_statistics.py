"""Tests and intervals against SciPy, closed testing, and by hand."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosa_lightning.comparison.statistics import (
    holm,
    mcnemar,
    paired_bootstrap,
    paired_t,
    spread,
    t_cdf,
    t_quantile,
)

stats = pytest.importorskip("scipy.stats")

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("t", [-3.0, -0.2, 0.0, 0.7, 4.3, 60.0])
def test_t_distribution(t, freedom):
    assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 5, 29])
def test_t_quantile(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


def test_paired_t():
    ours, theirs = [0.61, 0.64, 0.59, 0.66], [0.58, 0.60, 0.60, 0.61]
    ours_to_theirs = stats.ttest_rel(ours, theirs)
    found = paired_t(ours, theirs)
    interval = ours_to_theirs.confidence_interval(0.95)
    assert found.p == pytest.approx(ours_to_theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(0.0275)


def test_paired_t_without_spread():
    assert paired_t([2.0, 3.0], [1.0, 2.0]).p == 0.0
    assert paired_t([2.0, 3.0], [2.0, 3.0]).p == 1.0


@given(ANSWERS)
def test_mcnemar(answers):
    ours, theirs = zip(*answers, strict=True)
    better = sum(a and not b for a, b in answers)
    number = sum(a != b for a, b in answers)
    expected = stats.binomtest(better, number).pvalue if number else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(expected)


def test_paired_bootstrap():
    generator = np.random.default_rng(3)
    ours, theirs = generator.random(80) < 0.6, generator.random(80) < 0.45
    found = paired_bootstrap(ours, theirs, resamples=20_000)
    reference = stats.bootstrap(
        (ours.astype(float) - theirs,), np.mean, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    assert found.low == pytest.approx(reference.low, abs=0.013)  # a step is 1/80
    assert found.high == pytest.approx(reference.high, abs=0.013)
    assert found.p == pytest.approx(stats.ttest_rel(ours * 1.0, theirs * 1.0).pvalue, abs=0.04)


def test_weighted_paired_bootstrap():
    generator = np.random.default_rng(4)
    ours, theirs = generator.normal(2.0, 0.3, 60), generator.normal(2.1, 0.3, 60)
    tokens = generator.integers(1, 200, 60)

    def per_token(difference, weight, axis=-1):
        return (difference * weight).sum(axis) / weight.sum(axis)

    found = paired_bootstrap(ours, theirs, weights=tokens, resamples=20_000)
    reference = stats.bootstrap(
        *((ours - theirs, tokens), per_token),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    assert found.mean == pytest.approx(per_token(ours - theirs, tokens))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.005)


def test_paired_bootstrap_of_equal_and_of_clear_answers():
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]).p == 1.0
    assert paired_bootstrap([1.0] * 30, [0.0] * 30, resamples=999) == (1.0, 1.0, 1.0, 0.001)


@given(P_VALUES)
def test_holm_is_closed_testing_by_bonferroni(p_values):
    indices = range(len(p_values))
    subsets = [s for size in indices for s in combinations(indices, size + 1)]
    for index, corrected in enumerate(holm(p_values)):
        within = [[p_values[k] for k in subset] for subset in subsets if index in subset]
        expected = max(min(1.0, len(subset) * min(subset)) for subset in within)
        assert corrected == pytest.approx(expected)


def test_values_that_cannot_be_paired():
    for test in (paired_bootstrap, mcnemar, paired_t):
        with pytest.raises(ValueError, match="3 and 2 values cannot be paired"):
            test([1, 0, 1], [1, 0])


def test_spread():
    assert spread([0.5]) == 0.0
    assert spread([1.0, 3.0]) == pytest.approx(np.std([1.0, 3.0], ddof=1))
