"""The tests and intervals of a comparison, by hand and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from ascend_kit.evaluation.compare import PairedCounts, holm, paired_counts, score_interval
from ascend_kit.evaluation.perplexity import bootstrap_ratio_difference
from ascend_kit.evaluation.scores import accuracy_interval


def test_counts_of_a_small_example() -> None:
    counts = paired_counts([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 1], [None] * 6)

    assert counts == PairedCounts(both_right=2, only_baseline=1, only_candidate=2, both_wrong=1)
    assert (counts.n, counts.discordant) == (6, 3)
    assert counts.difference == pytest.approx(1 / 6)
    assert (counts.baseline_accuracy, counts.candidate_accuracy) == (pytest.approx(3 / 6), pytest.approx(4 / 6))


def test_mcnemar_by_hand() -> None:
    # One gain against five losses: 2 * (1 + 6) / 2**6.
    assert PairedCounts(50, 5, 1, 10).p_value == pytest.approx(14 / 64)
    # Three against three: every split is at least as likely, so the probability is capped at 1.
    assert PairedCounts(0, 3, 3, 0).p_value == 1.0
    assert PairedCounts(80, 0, 0, 20).p_value == 1.0


@pytest.mark.parametrize(("gains", "losses", "n"), [(9, 4, 98), (0, 3, 40), (1, 0, 30), (20, 60, 500)])
def test_the_interval_ends_where_the_likelihood_puts_it(gains: int, losses: int, n: int) -> None:
    """At each end what was seen is 1.96 standard errors away, with the share of losses that is likeliest there."""
    from scipy.optimize import minimize_scalar

    ends = PairedCounts(n - gains - losses, losses, gains, 0).interval()

    for end, distance in zip(ends, (1.959964, -1.959964), strict=True):

        def unlikely(lost: float, end=end) -> float:
            won, same = lost + end, 1 - 2 * lost - end
            parts = ((gains, won), (losses, lost), (n - gains - losses, same))
            return -sum(count * math.log(share) for count, share in parts if count)

        bounds = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        lost = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        error = math.sqrt((2 * lost + end - end**2) / n)
        assert ((gains - losses) / n - end) / error == pytest.approx(distance, abs=2e-3)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    from scipy.stats import multinomial

    for n, lost, won in ((60, 0.06, 0.06), (120, 0.10, 0.06), (400, 0.02, 0.0), (1000, 0.01, 0.01)):
        cells = [(b, c) for b in range(min(n, 60)) for c in range(min(n, 60)) if b + c <= n]
        covered = 0.0
        for b, c in cells:
            chance = multinomial.pmf([b, c, n - b - c], n, [lost, won, 1 - lost - won])
            if chance > 1e-6:
                low, high = PairedCounts(n - b - c, b, c, 0).interval()
                covered += chance * (low <= won - lost <= high)
        assert 0.93 < covered < 0.97


def test_no_discordant_document_still_leaves_doubt() -> None:
    low, high = PairedCounts(20, 0, 0, 10).interval()

    assert low == pytest.approx(-high) and high > 0.05


def test_the_detectable_difference_is_detected_with_the_stated_power() -> None:
    counts = PairedCounts(560, 60, 60, 320)  # 12 % of 1000 documents disagree
    difference = counts.min_detectable()
    rnd = random.Random(1)
    gain, loss = 0.06 - difference / 2, 0.06 + difference / 2
    found = 0
    for _ in range(400):
        draws = rnd.choices(range(4), weights=[0.56, loss, gain, 0.32], k=1000)
        found += PairedCounts(*(draws.count(cell) for cell in range(4))).p_value < 0.05

    assert difference == pytest.approx((1.95996 + 0.84162) * math.sqrt(122 / 1002 / 1000), rel=1e-4)
    assert 0.72 < found / 400 < 0.88  # 0.8; the exact test is a little conservative


def test_documents_needed_shrink_with_the_margin_squared() -> None:
    counts = PairedCounts(70, 10, 10, 10)

    assert counts.documents_needed(0.02) == math.ceil(22 / 102 * (2.801585 / 0.02) ** 2)
    assert counts.documents_needed(0.01) == pytest.approx(4 * counts.documents_needed(0.02), rel=1e-3)


def test_the_accuracy_interval_by_hand() -> None:
    # Wilson: 7 of 10 with z = 1.96: centre (0.7 + z^2/20) / (1 + z^2/10), half z/(1 + z^2/10) sqrt(.21/10 + z^2/400).
    z = 1.959964
    centre, scale = (0.7 + z * z / 20) / (1 + z * z / 10), z / (1 + z * z / 10)
    half = scale * math.sqrt(0.21 / 10 + z * z / 400)

    low, high = accuracy_interval([1] * 7 + [0] * 3, [None] * 10)

    assert (low, high) == (pytest.approx(centre - half, abs=1e-6), pytest.approx(centre + half, abs=1e-6))
    assert accuracy_interval([1] * 5, [None] * 5)[1] == 1.0


def test_the_interval_over_passages_by_hand() -> None:
    # Ten passages of two questions, two won whole, eight unchanged. Mean 0.2; sums 2 and 0, so squares
    # (2 - 0.4)^2 * 2 + 0.4^2 * 8 = 6.4; variance 6.4 * 10 / 9 / 400 over that of 20 single questions,
    # (0.2 - 0.04) / 20: an effect of 20 / 9.
    passages = [n // 2 for n in range(20)]
    counts = paired_counts([0] * 20, [1] * 4 + [0] * 16, passages)

    assert counts.interval() == pytest.approx(score_interval(4 * 9 / 20, 0, 9, 1.959964), abs=1e-6)
    assert counts.p_value == 0.5  # two passages changed: both heads or both tails


def test_the_exact_test_over_passages_by_hand() -> None:
    # Passages won by 2, 1 and 1 and none lost: all heads or all tails of three coins.
    counts = paired_counts([0, 0, 0, 0, 1], [1, 1, 1, 1, 1], ["a", "a", "b", "c", "d"])

    assert counts.p_value == pytest.approx(2 / 8)
    # Won by 2, lost by 1: |sum| of +-2 +-1 reaches 1 always.
    assert paired_counts([0, 0, 1, 1], [1, 1, 0, 1], ["a", "a", "b", "b"]).p_value == 1.0


def test_passages_of_one_document_are_the_independent_form() -> None:
    rnd = random.Random(3)
    ours, theirs = ([rnd.randrange(2) for _ in range(200)] for _ in range(2))
    alone, known = PairedCounts(*_cells(ours, theirs)), paired_counts(ours, theirs, list(range(200)))

    assert known == alone and known.passages is None
    assert (known.interval(), known.p_value) == (alone.interval(), alone.p_value)


def _cells(ours: list[int], theirs: list[int]) -> list[int]:
    pairs = list(zip(ours, theirs, strict=True))
    return [pairs.count(cell) for cell in ((1, 1), (1, 0), (0, 1), (0, 0))]


def test_intervals_cover_where_questions_share_passages() -> None:
    numpy = pytest.importorskip("numpy")
    rng = numpy.random.default_rng(0)
    passages = [passage for passage in range(45) for _ in range(6)]
    hits = {"difference": 0, "accuracy": 0}
    for _ in range(600):
        ours = rng.random(270) < numpy.repeat(rng.beta(3, 2, 45), 6)  # accuracy 0.6, passages easy or hard
        shift = numpy.repeat(rng.choice([0, 1, -1], 45, p=[0.9, 0.05, 0.05]), 6)
        theirs = numpy.where(shift == 0, ours, shift > 0)
        ours, theirs = ours.astype(int).tolist(), theirs.astype(int).tolist()
        low, high = paired_counts(ours, theirs, passages).interval()
        hits["difference"] += low <= 0.05 * (0.4 - 0.6) <= high
        low, high = accuracy_interval(ours, passages)
        hits["accuracy"] += low <= 0.6 <= high

    assert 0.93 <= hits["difference"] / 600 <= 0.985 and 0.93 <= hits["accuracy"] / 600 <= 0.97


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_single_page_says_nothing_of_how_others_differ() -> None:
    assert bootstrap_ratio_difference([1.0], [2.0], [4.0]) == (0.25, -math.inf, math.inf)


def test_bootstrap_of_a_ratio_agrees_with_the_normal_interval() -> None:
    rnd = random.Random(2)
    sizes = [rnd.randrange(200, 400) for _ in range(300)]
    base = [size * 1.0 for size in sizes]
    other = [size * rnd.gauss(1.02, 0.05) for size in sizes]

    change, low, high = bootstrap_ratio_difference(base, other, sizes)

    residuals = [b - a - change * size for a, b, size in zip(base, other, sizes, strict=True)]
    half = 1.96 * math.sqrt(sum(r * r for r in residuals)) / sum(sizes)
    assert change == pytest.approx(sum(other) / sum(sizes) - 1)
    assert (low, high) == (pytest.approx(change - half, abs=half / 5), pytest.approx(change + half, abs=half / 5))
    assert bootstrap_ratio_difference(base, other, sizes) == (change, low, high)  # seeded


def test_other_values_than_right_and_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 .wrong. or 1 .right."):
        paired_counts([0.5], [1], [None])
    with pytest.raises(ValueError, match="same documents"):
        paired_counts([1, 0], [1], [None] * 2)
