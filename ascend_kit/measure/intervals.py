"""How sure a number is: intervals of means over repeats, and of percentiles within one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval; the bounds are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    num_repeats: int

    @property
    def share(self) -> float | None:
        """Half the width over the mean."""
        return None if self.high is None or not self.mean else (self.high - self.mean) / self.mean


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of independent repeats of a rate or a time: no bound is below 0."""
    from scipy import stats

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, max(0.0, mean - half), mean + half, count)


def ratio_interval(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Quotient of two means, by the delta method on their logarithms with the smaller sample's degrees of freedom."""
    from scipy import stats

    above, below = statistics.fmean(values), statistics.fmean(base)
    ratio, count = above / below, min(len(values), len(base))
    if count < 2:
        return Interval(ratio, None, None, count)
    spread = math.hypot(
        statistics.stdev(values) / math.sqrt(len(values)) / above, statistics.stdev(base) / math.sqrt(len(base)) / below
    )
    factor = math.exp(float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread)
    return Interval(ratio, ratio / factor, ratio * factor, count)


def percentile_interval(values: Sequence[float], q: float) -> tuple[float | None, float | None]:
    """Distribution-free 95 % bounds of a percentile from its order statistics; None where the sample is too small to
    bound that side: the p99 of 64 requests has no upper bound."""
    from scipy import stats

    ordered, count = sorted(values), len(values)
    low = int(stats.binom.ppf((1 - CONFIDENCE) / 2, count, q / 100))
    high = int(stats.binom.ppf((1 + CONFIDENCE) / 2, count, q / 100)) + 1
    return (ordered[low - 1] if 1 <= low <= count else None), (ordered[high - 1] if high <= count else None)
