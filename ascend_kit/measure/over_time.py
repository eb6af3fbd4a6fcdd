"""What an engine holds while it serves: KV in use, requests running and waiting, memory; looked at as a run goes on.

A server tells it in its Prometheus metrics, under the names of vLLM, SGLang and MindIE.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from prometheus_client.parser import text_string_to_metric_families

# Under these names for every engine: share of the KV blocks (0..1), requests, requests. Ours has `memory_bytes` of all
# cards, too; in rows the device's own peak stands for it.
GAUGES = ("kv_use", "running", "waiting")
EVERY_S = 0.1
MOST = 512  # samples of one run; then every other is dropped, and looks become half as frequent

Sample = dict[str, float]
Look = TypeVar("Look")


class Observed(NamedTuple):
    """What was noticed during a run: columns of its row, and samples with their `time_s` (perf_counter)."""

    columns: Mapping[str, object]
    samples: Sequence[Sample] = ()


class Recorder(Generic[Look]):
    """Keeps what was seen as (perf_counter seconds, it), and says when the next look is due."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.taken: list[tuple[float, Look]] = []
        self._every_s, self._next_s = every_s, 0.0

    @property
    def is_due(self) -> bool:
        return time.perf_counter() >= self._next_s

    def add(self, seen: Look) -> None:
        """One look, at this moment."""
        now_s = time.perf_counter()
        self.taken.append((now_s, seen))
        if len(self.taken) > MOST:
            del self.taken[1::2]
            self._every_s *= 2
        self._next_s = now_s + self._every_s


def columns_of(samples: Sequence[Sample]) -> dict[str, object]:
    """`<gauge>_max` and `<gauge>_mean` of those that were told."""
    found: dict[str, object] = {}
    for name in GAUGES:
        values = [sample[name] for sample in samples if name in sample]
        if values:
            found |= {f"{name}_max": max(values), f"{name}_mean": sum(values) / len(values)}
    return found


# --- what a server says of itself -------------------------------------------------------------------------------------

# Ours -> names without their prefix (vllm:, sglang:, ascend_kit:, none in MindIE); sources in the servers' docs.
NAMES = {
    "kv_use": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "token_usage"),
    "running": ("num_requests_running", "num_running_reqs"),
    "waiting": ("num_requests_waiting", "num_queue_reqs"),
    "preemptions": ("num_preemptions_total", "num_preemptions", "num_retracted_reqs"),
    "hits": ("prefix_cache_hits_total", "prefix_cache_hits", "gpu_prefix_cache_hits_total"),
    "queries": ("prefix_cache_queries_total", "prefix_cache_queries", "gpu_prefix_cache_queries_total"),
    "drafts": ("spec_decode_num_drafts_total", "spec_decode_num_drafts"),
    "accepted": ("spec_decode_num_accepted_tokens_total", "spec_decode_num_accepted_tokens"),
}


def read_metrics(text: str) -> Sample:
    """Name -> value, summed over labels, shares averaged; of several names of one thing the first; what the server does
    not have is missing; {} for another text."""
    values: dict[str, list[float]] = {}
    with contextlib.suppress(ValueError):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    values.setdefault(sample.name.rpartition(":")[2], []).append(sample.value)
    found: Sample = {}
    for name, theirs in NAMES.items():
        own = next((values[other] for other in theirs if other in values), None)
        if own is not None:  # engines that share a load each tell their use of their own cache
            found[name] = sum(own) / (len(own) if name == "kv_use" else 1)
    return found


def observed(samples: Sequence[Sample]) -> dict[str, object]:
    """Columns of a row from what was read before, during and after a run, under the names that our engine has."""
    if not samples:
        return {}
    first, last = samples[0], samples[-1]
    grown = {name: last[name] - first[name] for name in NAMES if name in first and name in last}
    found = columns_of(samples)
    if "preemptions" in grown:
        found["num_preemptions"] = grown["preemptions"]
    if grown.get("queries"):
        found["prefix_hit_rate"] = grown["hits"] / grown["queries"]
    if grown.get("drafts"):
        found["tokens_per_step"] = 1 + grown["accepted"] / grown["drafts"]
    return found
