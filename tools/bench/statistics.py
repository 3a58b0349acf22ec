"""Medians, their spread, and ratios of medians.

A sample is one number for each round: the median of the iterations that a backend ran in it. Rounds are paired: in
each, every backend ran, one after the other, so that what disturbs the machine for longer than a round disturbs all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def spread(sample: Sequence[float]) -> Interval:
    """The median and the quartiles. Raises ValueError for an empty sample."""
    if not len(sample):
        raise ValueError("the median of nothing")
    low, value, high = np.quantile(sample, [0.25, 0.5, 0.75])
    return Interval(float(value), float(low), float(high))


def paired_ratio(sample: Sequence[float], baseline: Sequence[float]) -> Interval:
    """median(sample) / median(baseline), and its 95 % bootstrap interval: rounds are drawn again, with replacement,
    the same ones for both (Efron 1979, percentile method). The same numbers give the same interval."""
    both = np.array([sample, baseline])
    drawn = _draws(both.shape[1])
    return _interval(both[0], both[1], np.median(both[0][drawn], 1), np.median(both[1][drawn], 1))


def ratio(sample: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The same for samples of different runs, whose rounds have nothing to do with each other."""
    a, b = np.array(sample), np.array(baseline)
    return _interval(a, b, np.median(a[_draws(len(a), 1)], 1), np.median(b[_draws(len(b), 2)], 1))


def _draws(rounds: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))


def _interval(a: np.ndarray, b: np.ndarray, a_medians: np.ndarray, b_medians: np.ndarray) -> Interval:
    low, high = np.quantile(a_medians / b_medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))


class Growth(NamedTuple):
    """How a time depends on a size x.

    Attributes:
        exponent: b of the least-squares fit log t = a + b log x. A part that does not depend on x lowers it.
        fixed, slope: of the fit t = fixed + slope x, which weighs relative errors.
        deviation: the largest |fit / t - 1|: small where the cost is linear.
    """

    exponent: float
    fixed: float
    slope: float
    deviation: float


def growth(sizes: Sequence[float], times: Sequence[float]) -> Growth:
    """Fit both. Raises ValueError for less than two different sizes."""
    x, t = np.array(sizes, float), np.array(times, float)
    if len(set(sizes)) < 2:
        raise ValueError("a curve needs two different sizes")
    exponent = float(np.polyfit(np.log(x), np.log(t), 1)[0])
    slope, fixed = np.polyfit(x, t, 1, w=1 / t)
    return Growth(exponent, float(fixed), float(slope), float(np.abs((fixed + slope * x) / t - 1).max()))
