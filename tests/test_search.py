"""The search against a machine whose limit is known, repeats against scipy, percentile bounds against binomials."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ascend_kit.measure.metrics import mean_interval, percentile_interval, ratio_interval
from ascend_kit.measure.search import breaches, find_highest


@pytest.mark.parametrize("limit", [0.03, 0.9, 1.0, 7.3, 250.0])
def test_the_bracket_holds_the_limit_and_is_narrow(limit):
    tried = []

    found = find_highest(lambda value: tried.append(value) or value <= limit, 1.0, 0.1)

    assert found.met <= limit < found.missed <= found.met * 1.1
    assert found.num_runs == len(tried) == len(set(tried)) <= 14  # nothing twice


@pytest.mark.parametrize(("limit", "expected"), [(37, (37, 38)), (1, (1, 2)), (0, (None, 1))])
def test_whole_numbers_end_at_neighbours(limit, expected):
    found = find_highest(lambda value: value <= limit, 8, 0.001, whole=True)

    assert (found.met, found.missed) == expected


def test_a_search_without_an_end_says_so():
    found = find_highest(lambda value: True, 1.0, 0.1, max_runs=5)

    assert (found.met, found.missed, found.num_runs) == (16.0, None, 5)


def test_limits_of_summaries_and_of_every_request_are_both_met_or_missed():
    row = {"status": "ok", "ttft_p99_ms": 900.0, "tpot_p99_ms": 51.0, "good_request_share": 0.94}

    assert breaches(row, {"ttft_p99_ms": 1000}) == []
    assert breaches(row, {"ttft_p99_ms": 1000, "tpot_p99_ms": 50}) == ["tpot_p99_ms 51.0 > 50"]
    assert breaches(row, {"ttft_ms": 1000}) == ["94% of the requests met the limits, 95% must"]
    assert breaches({"status": "failed", "error": "no memory"}, {"ttft_p99_ms": 1}) == ["no memory"]


def test_intervals_are_those_of_student():
    values = [10.0, 11.0, 12.5, 9.5]
    right = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))

    found = mean_interval(values)

    assert (found.low, found.high) == pytest.approx(right)
    assert found.share == pytest.approx((right[1] - np.mean(values)) / np.mean(values))
    assert mean_interval([3.0]) == (3.0, None, None, 1) and mean_interval([3.0]).share is None
    assert mean_interval([1.0, 9.0]).low == 0.0  # a rate is never negative; the formula alone says -45.8


def test_a_ratio_of_means_is_covered_in_19_of_20_experiments():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(600):
        found = ratio_interval(rng.normal(20, 1, 5), rng.normal(10, 0.5, 5))
        hits += found.low <= 2.0 <= found.high

    assert hits / 600 == pytest.approx(0.96, abs=0.025)  # a little wide: the smaller sample's degrees of freedom


def test_bounds_of_a_percentile_cover_it_and_a_small_sample_has_no_upper_one():
    rng = np.random.default_rng(5)
    right, hits = stats.expon.ppf(0.9), 0
    for _ in range(400):
        low, high = percentile_interval(list(rng.exponential(size=200)), 90)
        hits += low <= right <= high

    assert hits / 400 == pytest.approx(0.96, abs=0.025)
    assert percentile_interval(list(range(64)), 99)[1] is None
