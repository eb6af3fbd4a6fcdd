"""Is one run less accurate than another on the same documents? Paired statistics over plain numbers.

Two runs of a benchmark share their documents, so most of the noise cancels: only documents that one run
answers right and the other wrong carry information. Knows no run folder and no benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

POWER = 0.8


@dataclass(frozen=True)
class PairedCounts:
    """How two runs answered the same documents. Differences are candidate minus baseline, as fractions."""

    both_right: int
    only_baseline: int
    only_candidate: int
    both_wrong: int

    @property
    def n(self) -> int:
        return self.both_right + self.only_baseline + self.only_candidate + self.both_wrong

    @property
    def discordant(self) -> int:
        """Documents that exactly one run answers right."""
        return self.only_baseline + self.only_candidate

    @property
    def baseline_accuracy(self) -> float:
        return (self.both_right + self.only_baseline) / self.n

    @property
    def candidate_accuracy(self) -> float:
        return (self.both_right + self.only_candidate) / self.n

    @property
    def difference(self) -> float:
        return (self.only_candidate - self.only_baseline) / self.n

    @property
    def p_value(self) -> float:
        """McNemar's exact test: two-sided probability of so uneven a split if both were equally accurate."""
        return binomial_two_sided(self.only_candidate, self.discordant)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference.

        Bonett and Price (2012): a normal interval after adding one document to each discordant cell, which
        keeps its coverage where the plain one collapses to a point (no discordant document at all).
        """
        total = self.n + 2
        gain, loss = (self.only_candidate + 1) / total, (self.only_baseline + 1) / total
        half = _z(confidence) * math.sqrt((gain + loss - (gain - loss) ** 2) / total)
        return max(-1.0, gain - loss - half), min(1.0, gain - loss + half)

    def min_detectable(self, confidence: float = 0.95, power: float = POWER) -> float:
        """The smallest true difference that this many documents, disagreeing this often, reveal with
        `power`.
        """
        return (_z(confidence) + NormalDist().inv_cdf(power)) * math.sqrt(self._disagreement() / self.n)

    def documents_needed(self, margin: float, confidence: float = 0.95, power: float = POWER) -> int:
        """Documents to show with `power` that an equally accurate run loses less than `margin`."""
        spread = _z(confidence) + NormalDist().inv_cdf(power)
        return math.ceil(self._disagreement() * (spread / margin) ** 2)

    def _disagreement(self) -> float:
        return (self.discordant + 2) / (self.n + 2)


def paired_counts(baseline: Sequence[float], candidate: Sequence[float]) -> PairedCounts:
    """Counts from two equally long lists of 0 or 1 per document; ValueError for other values or no
    document.
    """
    if len(baseline) != len(candidate) or not len(baseline):
        raise ValueError(f"need the same documents in both runs, got {len(baseline)} and {len(candidate)}")
    pairs = list(zip(baseline, candidate, strict=True))
    if any(value not in (0, 1) for pair in pairs for value in pair):
        raise ValueError("a paired test of accuracy takes 0 (wrong) or 1 (right) per document")
    return PairedCounts(*(pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0))))


def binomial_two_sided(successes: int, trials: int) -> float:
    """Two-sided exact p-value of `successes` in `trials` fair coin tosses; 1.0 for no toss."""
    few = min(successes, trials - successes)
    tail = sum(math.comb(trials, k) for k in range(few + 1))
    return min(1.0, 2 * tail / 2**trials)


def wilson_interval(right: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of an accuracy of `right` out of `n`, inside 0..1 also near the ends (Wilson)."""
    z, share = _z(confidence), right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several sets at once (Holm's step-down), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted


def bootstrap_ratio_difference(
    baseline: Sequence[float],
    candidate: Sequence[float],
    sizes: Sequence[float],
    *,
    confidence: float = 0.95,
    repeats: int = 4000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(difference, low, high) of sum(totals) / sum(sizes), candidate minus baseline, documents drawn in
    pairs.

    For bits per byte: totals are negative log-likelihoods of a page in bits, sizes its bytes. Percentile
    interval.
    """
    import numpy

    sizes = numpy.asarray(sizes, dtype=float)
    change = numpy.asarray(candidate, dtype=float) - numpy.asarray(baseline, dtype=float)
    draws = numpy.random.default_rng(seed).integers(0, len(sizes), (repeats, len(sizes)))
    values = change[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    tail = 50 * (1 - confidence)
    low, high = numpy.percentile(values, [tail, 100 - tail])
    return float(change.sum() / sizes.sum()), float(low), float(high)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
