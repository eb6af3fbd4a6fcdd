"""Latency, throughput and utilisation of finished requests, from their raw timestamps.

Knows nothing of models or devices: a `RequestRecord` comes in, numbers with units come out. All clocks are
`time.perf_counter` seconds. The raw samples stay in the records, and every percentile is taken from pooled
samples; percentiles are never averaged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PERCENTILES = (50, 90, 99)
COMPLETE = ("stop", "length")


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
    """What a request must meet to count for goodput; None means no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def are_met(self, record: RequestRecord) -> bool:
        """A failed request never passes; a one-token request has no TPOT and passes that limit."""
        ttft, tpot = ttft_s(record), tpot_s(record)
        if ttft is None:
            return False
        ttft_ok = self.ttft_ms is None or ttft * 1e3 <= self.ttft_ms
        return ttft_ok and (self.tpot_ms is None or tpot is None or tpot * 1e3 <= self.tpot_ms)


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


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile, linear between neighbours as numpy's default; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def wall_s(records: Sequence[RequestRecord]) -> float:
    """First arrival to the end of the last request, failures included."""
    if not records:
        return 0.0
    return max(record.end_s for record in records) - min(record.arrival_s for record in records)


def latency_columns(records: Iterable[RequestRecord]) -> dict[str, float | None]:
    """`<ttft|tpot|itl|e2e>_<mean|p50|p90|p99>_ms` over the completed requests."""
    records = list(records)
    samples = {
        "ttft": _defined(ttft_s(record) for record in records),
        "tpot": _defined(tpot_s(record) for record in records),
        "itl": [gap for record in records for gap in itl_s(record)],
        "e2e": _defined(e2e_s(record) for record in records),
    }
    columns: dict[str, float | None] = {}
    for name, values in samples.items():
        columns[f"{name}_mean_ms"] = _ms(sum(values) / len(values) if values else None)
        for q in PERCENTILES:
            columns[f"{name}_p{q}_ms"] = _ms(percentile(values, q))
    return columns


def summarize(
    records: Sequence[RequestRecord], *, limits: Limits = Limits(), wall: float | None = None
) -> dict[str, float | int | None]:
    """One row of metrics, units in the names.

    Throughput counts the tokens of completed requests only, over `wall` seconds (default: `wall_s`). Goodput
    is None when no limit was stated, since it would then be the request rate under another name.
    """
    done = [record for record in records if record.is_complete]
    seconds = wall_s(records) if wall is None else wall
    output = sum(record.num_output_tokens for record in done)
    given = sum(record.num_prompt_tokens for record in done)
    has_limits = limits.ttft_ms is not None or limits.tpot_ms is not None
    good = sum(limits.are_met(record) for record in done)
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
        "goodput_requests_per_s": _rate(good, seconds) if has_limits else None,
        "ttft_limit_ms": limits.ttft_ms,
        "tpot_limit_ms": limits.tpot_ms,
        **latency_columns(done),
        "num_preemptions": sum(record.num_preemptions for record in records),
        "prefix_hit_rate": prefix_hit_rate(records),
    }


def prefix_hit_rate(records: Iterable[RequestRecord]) -> float | None:
    """Share of prompt tokens that were found in the prefix cache, 0..1; None without prompts."""
    records = list(records)
    prompt_tokens = sum(record.num_prompt_tokens for record in records)
    if prompt_tokens == 0:
        return None
    return sum(record.num_cached_tokens for record in records) / prompt_tokens


def utilisation(work: float, seconds: float, peak_per_s: float | None) -> float | None:
    """Share of the peak that was reached, 0..1: of FLOPs (MFU), or of bytes of weights and KV that decoding reads
    (MBU); None when the peak is unknown or no time passed."""
    return None if peak_per_s is None or seconds <= 0 else work / seconds / peak_per_s


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
