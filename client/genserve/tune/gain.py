"""Gain of one configuration over another, from measurements in pairs, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TAIL = 1 / 32
"""Probability that chance alone puts the true gain below an interval, and the same above it."""
FEWEST_PAIRS = round(math.log2(1 / TAIL))
"""Pairs from which on there is an interval: fewer cannot reach such a probability."""
MOST_PAIRS = 16
"""Limit on the pairs: every subset of them is looked at."""


@dataclass(frozen=True)
class Gain:
    """Gain in speed: 0.25 is a quarter more images or documents per second, or a percentile 1.25 times as short.

    Attributes:
        pairs: Number of pairs of measurements.
        mean: The estimate.
        low: Lower end of the interval; None with fewer than `FEWEST_PAIRS` pairs, like the next one.
        high: Upper end of the interval.
    """

    pairs: int
    mean: float
    low: float | None = None
    high: float | None = None


def gain_of(pairs: Sequence[tuple[float, float]]) -> Gain:
    """Return the gain that pairs of speeds, the old and the new one, show.

    The interval is that of sign flips: the gains for which the signs of the differences of logarithms may be chance.
    Its ends are order statistics of the means of all subsets of the differences (J. A. Hartigan, Using subsample
    values as typical values, 1969). It holds for any distribution of the noise that is symmetric, as that of two
    measurements that are taken in both orders, and for any number of pairs.
    """
    differences = np.array([math.log(new / old) for old, new in pairs])
    count = len(differences)
    mean = math.expm1(float(differences.mean()))
    rank = math.floor(2**count * TAIL)
    if rank < 1:
        return Gain(count, mean)
    if count > MOST_PAIRS:
        raise ValueError(f"{count} pairs; allowed: at most {MOST_PAIRS}")
    subsets = (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
    means = np.sort(subsets @ differences / subsets.sum(axis=1))
    return Gain(count, mean, math.expm1(float(means[rank - 1])), math.expm1(float(means[-rank])))
