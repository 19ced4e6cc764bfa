"""Paired tests and intervals for comparisons of methods; pure functions of numbers.

Two methods are compared on the same questions, or with the same seeds, so all tests are paired.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A mean difference of two methods, with its interval and p-value."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    p: float
    """Two-sided p-value."""


def _differences(ours: Sequence[float], theirs: Sequence[float], least: int) -> np.ndarray:
    if len(ours) != len(theirs) or len(ours) < least:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} values cannot be paired: give both the same number, "
            f"{least} or more."
        )
    return np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Mean difference over questions; interval and p-value from resampled questions.

    The interval is the percentile interval of the resampled means. The p-value is that of the
    resampled means around zero, as if the true difference were none; at least 1 / (resamples + 1).

    Args:
        ours: A value for each question, such as 1.0 for a right answer.
        theirs: Of the other method, for the same questions in the same order.
        weights: What a question counts for in the mean, such as the tokens of a text; by default
            all the same. They are drawn with the questions.
        resamples: Number of resamples.
        seed: Of the random generator.
    """
    differences_Q = _differences(ours, theirs, 1)
    weights_Q = np.ones(len(differences_Q)) if weights is None else np.asarray(weights, np.float64)
    mean = float(np.average(differences_Q, weights=weights_Q))
    generator = np.random.default_rng(seed)
    size = len(differences_Q)
    means = np.empty(resamples)
    rows = max(1, 2**22 // size)  # resamples at a time, some 32 MB
    for start in range(0, resamples, rows):
        number = min(rows, resamples - start)
        chosen = generator.integers(size, size=(number, size))
        sums = (differences_Q * weights_Q)[chosen].sum(axis=1)
        means[start : start + number] = sums / weights_Q[chosen].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    # Up to rounding of the sums, which depends on the order of the questions.
    as_far = np.abs(means - mean) >= abs(mean) * (1 - 1e-9)
    p = (1 + int(as_far.sum())) / (resamples + 1)
    return Difference(mean, float(low), float(high), p)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test: do two methods answer equally many right?

    Only questions that one of the two answers right count; under the null hypothesis either one
    does with probability 1/2.
    """
    differences = _differences([*map(float, ours)], [*map(float, theirs)], 1)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    number = better + worse
    tail = sum(math.comb(number, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**number)) if number else 1.0


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean difference over seeds, by Student's paired t-test; two seeds or more.

    Without any spread the p-value is 0 where the means differ, and 1 where they do not.
    """
    differences_S = _differences(ours, theirs, 2)
    size = len(differences_S)
    mean = float(differences_S.mean())
    error = float(differences_S.std(ddof=1)) / math.sqrt(size)
    if error == 0.0:
        return Difference(mean, mean, mean, float(mean == 0.0))
    reach = t_quantile(0.975, size - 1) * error
    p = 2 * (1 - t_cdf(abs(mean) / error, size - 1))
    return Difference(mean, mean - reach, mean + reach, min(1.0, p))


def t_cdf(t: float, freedom: int) -> float:
    """Cumulative distribution of Student's t for whole degrees of freedom, a finite sum.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for k in range(freedom % 2 + 1, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    within = (2 / math.pi) * (theta + sine * total) if freedom % 2 else sine * total
    return (1 + within) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t stays below with a probability of 1/2 or more, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, as Holm (1979): the chance of any false one stays p."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    most = 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = most
    return corrected


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def difference(test: Mapping[str, Any], metric: str, unit: str = "") -> str:
    """A mean difference and its 95 % interval: in nats for losses, else in percentage points."""
    form, scale = (".4f", 1) if metric.endswith("_loss") else (".1f", 100)
    value, low, high = (f"{scale * test[key]:+{form}}" for key in ("mean", "low", "high"))
    return f"{value}{unit} ({low} to {high})"
