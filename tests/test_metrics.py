"""Every figure against a timeline worked out by hand in the test."""

from types import SimpleNamespace

import numpy as np
import pytest

from ascend_kit.measure import metrics
from ascend_kit.measure.metrics import Limits, RequestRecord


def request(times, arrival=0.0, prompt=10, index=0, reason="length", **more):
    return RequestRecord(index, prompt, len(times), arrival, tuple(times), reason, **more)


def test_latencies_of_one_request_follow_their_definitions():
    # arrives at 1.0; tokens at 1.5, 1.6, 1.9, 2.1
    record = request([1.5, 1.6, 1.9, 2.1], arrival=1.0)

    assert metrics.ttft_s(record) == pytest.approx(0.5)
    assert metrics.e2e_s(record) == pytest.approx(1.1)
    assert metrics.tpot_s(record) == pytest.approx((1.1 - 0.5) / 3)
    assert metrics.itl_s(record) == pytest.approx([0.1, 0.3, 0.2])


def test_one_token_has_ttft_and_end_to_end_but_no_tpot_and_no_itl():
    record = request([0.25])

    assert metrics.ttft_s(record) == metrics.e2e_s(record) == 0.25
    assert metrics.tpot_s(record) is None
    assert metrics.itl_s(record) == []


def test_failed_request_has_no_latencies_even_when_it_gave_tokens():
    record = request([0.1, 0.2], reason="error", error="KV pool too small", finished_s=0.3)

    assert metrics.ttft_s(record) is None
    assert metrics.e2e_s(record) is None
    assert metrics.tpot_s(record) is None
    assert metrics.itl_s(record) == []
    assert record.end_s == 0.3


def test_mean_tpot_averages_requests_and_mean_itl_pools_gaps():
    # gaps 0.1 x 4 and 0.5 x 1: per request 0.1 and 0.5, pooled 0.9 / 5
    slow, quick = request([1.0, 1.5]), request([1.0, 1.1, 1.2, 1.3, 1.4], index=1)

    row = metrics.summarize([slow, quick])

    assert row["tpot_mean_ms"] == pytest.approx((500 + 100) / 2)
    assert row["itl_mean_ms"] == pytest.approx(900 / 5)


def test_percentiles_interpolate_as_numpy_does():
    values = [5.0, 1.0, 4.0, 2.0]

    for q in (0, 10, 50, 90, 99, 100):
        assert metrics.percentile(values, q) == pytest.approx(np.percentile(values, q))
    assert metrics.percentile([7.0], 99) == 7.0
    assert metrics.percentile([], 50) is None


def test_throughput_counts_completed_tokens_over_the_whole_wall_time():
    # first arrival 10.0, last end 14.0 (a failure): 4 s. Completed: 3 + 1 output tokens, 8 + 12 input tokens.
    records = [
        request([11.0, 11.5, 12.0], arrival=10.0, prompt=8),
        request([13.0], arrival=12.0, prompt=12, index=1),
        request([13.5], arrival=12.0, prompt=99, index=2, reason="error", error="boom", finished_s=14.0),
    ]

    row = metrics.summarize(records)

    assert row["wall_s"] == 4.0
    assert row["output_tokens_per_s"] == 1.0
    assert row["input_tokens_per_s"] == 5.0
    assert row["total_tokens_per_s"] == 6.0
    assert row["requests_per_s"] == 0.5
    assert (row["num_requests"], row["num_completed"]) == (3, 2)


def test_goodput_needs_every_stated_limit_and_one_token_passes_tpot():
    records = [
        request([0.1, 0.2]),  # TTFT 100 ms, TPOT 100 ms: passes both
        request([0.1, 0.4], index=1),  # TPOT 300 ms: fails
        request([0.3, 0.35], index=2),  # TTFT 300 ms: fails
        request([0.15], index=3),  # one token: no TPOT, passes
        request([], index=4, reason="error", error="boom", finished_s=0.2),  # failure: never passes
    ]

    row = metrics.summarize(records, limits=Limits(ttft_ms=200, tpot_ms=200), wall=2.0)

    assert row["goodput_requests_per_s"] == 2 / 2.0
    assert (row["ttft_limit_ms"], row["tpot_limit_ms"]) == (200, 200)


def test_goodput_without_limits_is_unknown_and_not_the_request_rate():
    assert metrics.summarize([request([0.1])])["goodput_requests_per_s"] is None


def test_summary_of_nothing_completed_has_no_latency_and_no_rate_of_infinity():
    row = metrics.summarize([request([], reason="error", error="boom", finished_s=0.0)])

    assert row["ttft_p50_ms"] is None
    assert row["itl_p99_ms"] is None
    assert row["output_tokens_per_s"] is None  # no time passed
    assert metrics.summarize([])["num_requests"] == 0


def test_prefix_hit_rate_is_cached_over_prompt_tokens():
    records = [request([0.1], prompt=30, num_cached_tokens=12), request([0.1], prompt=10, index=1)]

    assert metrics.summarize(records)["prefix_hit_rate"] == 12 / 40
    assert metrics.summarize([])["prefix_hit_rate"] is None


def test_utilisation_is_work_over_time_and_peak_and_unknown_without_a_peak():
    assert metrics.utilisation(work=6e12, seconds=2.0, peak_per_s=10e12) == pytest.approx(0.3)
    assert metrics.utilisation(6e12, 2.0, None) is None
    assert metrics.utilisation(8e9, 0.0, 1.6e12) is None


def test_record_survives_the_way_through_a_row():
    record = request([0.1, 0.2], arrival=0.05, num_asked_tokens=2, num_preemptions=1)

    assert RequestRecord.from_row({**record.to_row(), "point_id": "x"}) == record


def test_record_reads_the_public_fields_of_an_engine_output():
    timeline = SimpleNamespace(arrival_s=1.0, scheduled_s=1.1, token_times_s=[1.2, 1.3], finished_s=1.31)
    output = SimpleNamespace(
        index=3,
        prompt_token_ids=[1, 2, 3],
        token_ids=[4, 5],
        finish_reason="length",
        error=None,
        timeline=timeline,
        num_cached_tokens=2,
        num_preemptions=1,
    )

    record = metrics.record_from_output(output, num_asked_tokens=2)

    assert record == RequestRecord(3, 3, 2, 1.0, (1.2, 1.3), "length", None, 1.1, 1.31, 2, 2, 1)
