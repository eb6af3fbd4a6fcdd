"""Is one run less accurate than another on the same documents? Paired statistics over plain numbers.

Two runs of a benchmark share their documents, so most of the noise cancels: only documents that one run answers right
and the other wrong carry information. Questions on one passage are right or wrong together; then the passages, and not
the questions, are the independent observations (cluster-robust standard errors, arXiv 2411.00640). Knows no run folder
and no benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import cast

POWER = 0.8


@dataclass(frozen=True)
class Passages:
    """Sums of a value over the documents of each passage; a document without a passage is one of its own."""

    sizes: tuple[int, ...]
    sums: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], keys: Sequence[Hashable | None]) -> Passages | None:
        """None where no two documents share a key: then the documents are independent."""
        totals: dict[Hashable, tuple[int, float]] = {}
        for place, (value, key) in enumerate(zip(values, keys, strict=True)):
            name = (place,) if key is None else key
            size, total = totals.get(name, (0, 0.0))
            totals[name] = (size + 1, total + value)
        if len(totals) == len(values):
            return None
        return cls(tuple(size for size, _ in totals.values()), tuple(total for _, total in totals.values()))

    def mean_and_stderr(self) -> tuple[float, float]:
        """The mean over documents and its cluster-robust standard error, with the factor K / (K - 1) of its square."""
        n, count = sum(self.sizes), len(self.sizes)
        mean = sum(self.sums) / n
        squares = sum((total - size * mean) ** 2 for size, total in zip(self.sizes, self.sums, strict=True))
        return mean, math.sqrt(squares * count / max(1, count - 1)) / n

    def sign_test(self) -> float:
        """Two-sided exact probability of a sum so far from 0 if every passage's sign fell like a coin.

        Equals McNemar's exact test where every passage is one document.
        """
        import numpy

        sums = [abs(round(total)) for total in self.sums if total]
        chances = numpy.ones(1)  # chances[i]: the sum is i - (len - 1) / 2
        for size in sums:
            longer = numpy.zeros(len(chances) + 2 * size)
            longer[: len(chances)] += chances / 2
            longer[2 * size :] += chances / 2
            chances = longer
        middle, far = sum(sums), abs(round(sum(self.sums)))
        return min(1.0, 2 * float(chances[middle + far :].sum())) if far else 1.0


@dataclass(frozen=True)
class PairedCounts:
    """How two runs answered the same documents. Differences are candidate minus baseline, as fractions.

    `passages` holds the differences where documents share passages.
    """

    both_right: int
    only_baseline: int
    only_candidate: int
    both_wrong: int
    passages: Passages | None = field(default=None, compare=False)

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
        """Two-sided probability of so uneven a split if both were equally accurate: McNemar's exact test, over whole
        passages where documents share them.
        """
        from scipy.stats import binomtest

        if self.passages is not None:
            return self.passages.sign_test()
        return float(binomtest(self.only_candidate, self.discordant).pvalue) if self.discordant else 1.0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference: Tango's score interval (1998), which covers as often as it says from
        some five differing documents on, and more often below, where whole documents are too coarse for less.

        With passages it counts as many documents as would be as certain on their own: each by the design effect, the
        cluster-robust variance over that of independent documents, where that is above 1.
        """
        effect = self._design_effect()
        return score_interval(
            self.only_candidate / effect, self.only_baseline / effect, self.n / effect, _z(confidence)
        )

    def min_detectable(self, confidence: float = 0.95, power: float = POWER) -> float:
        """The smallest true difference that this many documents, disagreeing this often, reveal with `power`."""
        return (_z(confidence) + NormalDist().inv_cdf(power)) * math.sqrt(self._disagreement() / self.n)

    def documents_needed(self, margin: float, confidence: float = 0.95, power: float = POWER) -> int:
        """Documents to show with `power` that an equally accurate run loses less than `margin`."""
        spread = _z(confidence) + NormalDist().inv_cdf(power)
        return math.ceil(self._disagreement() * (spread / margin) ** 2)

    def _disagreement(self) -> float:
        """The variance of one document's difference as it counts in the mean."""
        return (self.discordant + 2) / (self.n + 2) * self._design_effect()

    def _design_effect(self) -> float:
        alone = (self.discordant / self.n - self.difference**2) / self.n
        if self.passages is None or not alone:
            return 1.0
        return max(1.0, self.passages.mean_and_stderr()[1] ** 2 / alone)


def score_interval(gains: float, losses: float, n: float, z: float) -> tuple[float, float]:
    """Interval of (gains - losses) / n of paired answers: every difference within z standard errors of what was seen,
    the error being that under this difference (Tango, Statistics in Medicine 17:891, 1998).
    """
    from scipy.optimize import brentq

    def distance(difference: float) -> float:
        linear = (2 * n - gains + losses) * difference - gains - losses
        root = math.sqrt(max(0.0, linear**2 + 8 * n * losses * difference * (1 - difference)))
        variance = n * ((root - linear) / (2 * n) + difference * (1 - difference))
        return (gains - losses - n * difference) / math.sqrt(max(variance, 1e-12))

    def crossing(level: float, low: float, high: float) -> float:
        return cast(float, brentq(lambda value: distance(value) - level, low, high))

    seen, end = (gains - losses) / n, 1 - 1e-9
    low = crossing(z, -end, seen) if distance(-end) > z else -1.0
    high = crossing(-z, seen, end) if distance(end) < -z else 1.0
    return low, high


def paired_counts(
    baseline: Sequence[float], candidate: Sequence[float], passages: Sequence[Hashable | None]
) -> PairedCounts:
    """Counts from two equally long lists of 0 or 1 per document; ValueError for other values or no document.

    `passages` names the passage of each document, None for a document of its own.
    """
    if len(baseline) != len(candidate) or not len(baseline):
        raise ValueError(f"need the same documents in both runs, got {len(baseline)} and {len(candidate)}")
    pairs = list(zip(baseline, candidate, strict=True))
    if any(value not in (0, 1) for pair in pairs for value in pair):
        raise ValueError("a paired test of accuracy takes 0 (wrong) or 1 (right) per document")
    both, lost, won, neither = (pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0)))
    differences = [theirs - ours for ours, theirs in pairs]
    return PairedCounts(both, lost, won, neither, passages=Passages.of(differences, passages))


def accuracy_interval(
    right: Sequence[float], passages: Sequence[Hashable | None], confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of an accuracy from 0 or 1 per document: Wilson's, cluster-robust where passages are shared.

    The latter is Student's with a degree of freedom less than passages; one right and one wrong answer are added, which
    keeps its coverage near the ends.
    """
    from scipy.stats import binomtest, t

    clusters = Passages.of(right, passages)
    if clusters is None:
        found = binomtest(round(sum(right)), len(right)).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)
    wider = Passages((*clusters.sizes, 1, 1), (*clusters.sums, 1, 0))
    mean, stderr = wider.mean_and_stderr()
    half = float(t.ppf(0.5 + confidence / 2, max(1, len(clusters.sizes) - 1))) * stderr
    return max(0.0, mean - half), min(1.0, mean + half)


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
    """(difference, low, high) of sum(totals) / sum(sizes), candidate minus baseline, documents drawn in pairs.

    For bits per byte: totals are negative log-likelihoods of a page in bits, sizes its bytes. Percentile interval.
    """
    import numpy

    weights = numpy.asarray(sizes, dtype=float)
    change = numpy.asarray(candidate, dtype=float) - numpy.asarray(baseline, dtype=float)
    mean = float(change.sum() / weights.sum())
    if len(weights) < 2:  # one page says nothing of how others differ
        return mean, -math.inf, math.inf
    random, tail = numpy.random.default_rng(seed), 50 * (1 - confidence)
    # Drawn in turns: all at once would be a table of repeats x documents.
    draws = (random.integers(0, len(weights), len(weights)) for _ in range(repeats))
    values = [change[drawn].sum() / weights[drawn].sum() for drawn in draws]
    low, high = numpy.percentile(values, [tail, 100 - tail])
    return mean, float(low), float(high)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
