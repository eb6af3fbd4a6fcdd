"""What a server says of itself: its models, and its Prometheus metrics under the names of vLLM, SGLang and MindIE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

# Column -> names without their prefix (vllm:, sglang:, ascend_kit:, none in MindIE); sources in the servers' docs.
GAUGES = {
    "server_kv_use": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "token_usage"),
    "server_running": ("num_requests_running", "num_running_reqs"),
    "server_queue": ("num_requests_waiting", "num_queue_reqs"),
}
COUNTERS = {
    "server_preemptions": ("num_preemptions_total", "num_preemptions", "num_retracted_reqs"),
    "server_prefix_hits": ("prefix_cache_hits_total", "prefix_cache_hits", "gpu_prefix_cache_hits_total"),
    "server_prefix_queries": ("prefix_cache_queries_total", "prefix_cache_queries", "gpu_prefix_cache_queries_total"),
}


def read_metrics(text: str) -> dict[str, float]:
    """Column -> value, summed over labels; columns the server does not have are missing."""
    found: dict[str, float] = {}
    wanted = {name: column for names in (GAUGES, COUNTERS) for column, alike in names.items() for name in alike}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            column = wanted.get(sample.name.rpartition(":")[2])
            if column is not None:
                found[column] = found.get(column, 0.0) + sample.value
    return found


def observed(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Columns of a row from the metrics read before, during and after a run: highest gauges, growth of counters."""
    if not samples:
        return {}
    columns: dict[str, Any] = {}
    for name in GAUGES:
        values = [sample[name] for sample in samples if name in sample]
        if values:
            columns[f"{name}_max"] = max(values)
    for name in COUNTERS:
        if name in samples[0] and name in samples[-1]:
            columns[name] = samples[-1][name] - samples[0][name]
    hits, queries = columns.pop("server_prefix_hits", None), columns.pop("server_prefix_queries", None)
    if hits is not None and queries:
        columns["server_prefix_hit_rate"] = hits / queries
    return columns
