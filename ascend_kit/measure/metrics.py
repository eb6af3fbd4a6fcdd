"""Latency, throughput and utilisation of finished requests, from their raw timestamps, and how sure a number is.

Knows nothing of models or devices: a `RequestRecord` comes in, numbers with units come out. All clocks are
`time.perf_counter` seconds. The raw samples stay in the records, and every percentile is taken from pooled
samples; percentiles are never averaged.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

PERCENTILES = (50, 90, 95, 99)
COMPLETE = ("stop", "length")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RequestRecord:
    """What is known of one request once it has ended, whichever engine served it."""

    index: int
    num_prompt_tokens: int
    num_output_tokens: int
    arrival_s: float
    token_times_s: tuple[float, ...]
    finish_reason: str
    error: str | None = None
    scheduled_s: float | None = None
    finished_s: float | None = None
    num_asked_tokens: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    sent_s: float | None = None  # by a client; `arrival_s` is when it should have been
    chunks: tuple[Any, ...] = ()  # of a stream: (time_s, kind, num_tokens, num_bytes) each, as it came
    num_retries: int = 0
    tokens_counted_by: str | None = None

    @property
    def is_complete(self) -> bool:
        """True when the request ended as asked, with at least one token."""
        return self.finish_reason in COMPLETE and len(self.token_times_s) > 0

    @property
    def end_s(self) -> float:
        """When the request left: its last token, or its failure."""
        if self.token_times_s and self.is_complete:
            return self.token_times_s[-1]
        return self.finished_s if self.finished_s is not None else self.arrival_s

    def to_row(self) -> dict[str, Any]:
        """The record as plain JSON values, for `requests.jsonl`."""
        return {**asdict(self), "token_times_s": list(self.token_times_s)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> RequestRecord:
        """Read back what `to_row` wrote; other columns of the row are ignored."""
        fields = {name: _none_if_nan(row[name]) for name in cls.__dataclass_fields__ if name in row}
        chunks = tuple(tuple(chunk) for chunk in row.get("chunks") or ())
        return cls(**{**fields, "token_times_s": tuple(row["token_times_s"]), "chunks": chunks})


@dataclass(frozen=True)
class Limits:
    """What a request must meet to count for goodput; None means no limit. `itl_ms` bounds its longest gap."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None
    e2e_ms: float | None = None

    def are_met(self, record: RequestRecord) -> bool:
        """A failed request never passes; a one-token request has no TPOT and no gap and passes those limits."""
        if not record.is_complete:
            return False
        longest_s = {"ttft_ms": ttft_s(record), "tpot_ms": tpot_s(record), "itl_ms": max(itl_s(record), default=None),
                     "e2e_ms": e2e_s(record)}  # fmt: skip
        return all(limit is None or (longest_s[name] or 0.0) * 1e3 <= limit for name, limit in asdict(self).items())


def record_from_output(output: Any, *, num_asked_tokens: int | None = None) -> RequestRecord:
    """The record of one engine `RequestOutput` (only its public fields are read)."""
    line = output.timeline
    return RequestRecord(
        index=output.index,
        num_prompt_tokens=len(output.prompt_token_ids),
        num_output_tokens=len(output.token_ids),
        arrival_s=line.arrival_s,
        token_times_s=tuple(line.token_times_s),
        finish_reason=output.finish_reason,
        error=output.error,
        scheduled_s=line.scheduled_s,
        finished_s=line.finished_s,
        num_asked_tokens=num_asked_tokens,
        num_cached_tokens=output.num_cached_tokens,
        num_preemptions=output.num_preemptions,
    )


def ttft_s(record: RequestRecord) -> float | None:
    """Arrival to first output token, queueing included; None for a request that did not complete."""
    return record.token_times_s[0] - record.arrival_s if record.is_complete else None


def e2e_s(record: RequestRecord) -> float | None:
    """Arrival to last output token; None for a request that did not complete."""
    return record.token_times_s[-1] - record.arrival_s if record.is_complete else None


def tpot_s(record: RequestRecord) -> float | None:
    """(End-to-end - TTFT) / (output tokens - 1); None for one token or a failure."""
    if not record.is_complete or len(record.token_times_s) < 2:
        return None
    return (record.token_times_s[-1] - record.token_times_s[0]) / (len(record.token_times_s) - 1)


def itl_s(record: RequestRecord) -> list[float]:
    """Every gap between neighbouring output tokens; empty for one token or a failure."""
    if not record.is_complete:
        return []
    times = record.token_times_s
    return [after - before for before, after in itertools.pairwise(times)]


def queue_s(record: RequestRecord) -> float | None:
    """Arrival to the first step that computes it; None for a failure, and for engines that do not tell."""
    if not record.is_complete or record.scheduled_s is None:
        return None
    return record.scheduled_s - record.arrival_s


def steady_columns(records: Sequence[RequestRecord]) -> dict[str, float | None]:
    """Output tokens per second from the first to the last moment with the most requests in flight, which leaves out
    ramp-up and drain, and the seconds between; None where these are less than a tenth of the whole."""
    unknown: dict[str, float | None] = dict.fromkeys(("steady_output_tokens_per_s", "steady_s"))
    if not records:
        return unknown
    moments = sorted([(r.arrival_s, 1) for r in records] + [(r.end_s, -1) for r in records])
    counts = list(itertools.accumulate(change for _, change in moments))
    most = max(counts)
    full = [place for place, count in enumerate(counts) if count == most]
    start, end = moments[full[0]][0], moments[min(full[-1] + 1, len(moments) - 1)][0]
    if end - start < 0.1 * wall_s(records):
        return unknown
    inside = sum(start < moment <= end for record in records for moment in record.token_times_s)
    return {"steady_output_tokens_per_s": _rate(inside, end - start), "steady_s": end - start}


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile, linear between neighbours as numpy's default; None for no values."""
    import numpy

    return float(numpy.percentile(values, q)) if values else None


def wall_s(records: Sequence[RequestRecord]) -> float:
    """First arrival to the end of the last request, failures included."""
    if not records:
        return 0.0
    return max(record.end_s for record in records) - min(record.arrival_s for record in records)


def samples_s(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Every `ttft`, `tpot`, `itl`, `e2e` and `queue` of the completed requests, in seconds."""

    def known(values: Iterable[float | None]) -> list[float]:
        return [value for value in values if value is not None]

    return {
        "ttft": known(map(ttft_s, records)),
        "tpot": known(map(tpot_s, records)),
        "itl": [gap for record in records for gap in itl_s(record)],
        "e2e": known(map(e2e_s, records)),
        "queue": known(map(queue_s, records)),
    }


def latency_columns(records: Sequence[RequestRecord]) -> dict[str, float | None]:
    """`<ttft|tpot|itl|e2e|queue>_<mean|p50|p90|p95|p99>_ms` over the completed requests."""
    columns: dict[str, float | None] = {}
    for name, values in samples_s(records).items():
        columns[f"{name}_mean_ms"] = in_ms(sum(values) / len(values) if values else None)
        for q in PERCENTILES:
            columns[f"{name}_p{q}_ms"] = in_ms(percentile(values, q))
    return columns


def summarize(
    records: Sequence[RequestRecord], *, limits: Limits = Limits(), wall: float | None = None
) -> dict[str, float | int | None]:
    """One row of metrics, units in the names.

    Throughput counts the tokens of completed requests only, over `wall` seconds (default: `wall_s`). Goodput
    is None when no limit was stated, since it would then be the request rate under another name. `prefix_hit_rate` is
    the share of all prompt tokens that were found in the prefix cache, 0..1.
    """
    done = [record for record in records if record.is_complete]
    seconds = wall_s(records) if wall is None else wall
    output = sum(record.num_output_tokens for record in done)
    given = sum(record.num_prompt_tokens for record in done)
    asked = sum(record.num_asked_tokens or record.num_output_tokens for record in done)
    prompt = sum(record.num_prompt_tokens for record in records)
    are_stated, good = limits != Limits(), sum(limits.are_met(record) for record in done)
    return {
        "num_requests": len(records),
        "num_completed": len(done),
        "wall_s": seconds,
        "output_tokens": output,
        "input_tokens": given,
        "output_tokens_per_s": _rate(output, seconds),
        "input_tokens_per_s": _rate(given, seconds),
        "total_tokens_per_s": _rate(output + given, seconds),
        "requests_per_s": _rate(len(done), seconds),
        "goodput_requests_per_s": _rate(good, seconds) if are_stated else None,
        "good_request_share": good / len(records) if are_stated and records else None,
        **{f"{name.removesuffix('_ms')}_limit_ms": value for name, value in asdict(limits).items()},
        **steady_columns(done),
        "output_length_ratio": output / asked if asked else None,
        **latency_columns(done),
        "num_preemptions": sum(record.num_preemptions for record in records),
        "prefix_hit_rate": sum(record.num_cached_tokens for record in records) / prompt if prompt else None,
    }


def utilisation(work: float, seconds: float, peak_per_s: float | None) -> float | None:
    """Share of the peak that was reached, 0..1: of FLOPs (MFU), or of bytes of weights and KV that decoding reads
    (MBU); None when the peak is unknown or no time passed."""
    return None if peak_per_s is None or seconds <= 0 else work / seconds / peak_per_s


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def in_ms(seconds: float | None) -> float | None:
    """Milliseconds; None stays unknown."""
    return None if seconds is None else seconds * 1e3


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# --- how sure a number is --------------------------------------------------------------------------------------------


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
