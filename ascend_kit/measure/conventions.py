"""Recorded streams through the definitions of other tools, and a point in the form of vLLM's benchmark.

Every rule below was read from the tools' sources (vLLM vllm/benchmarks/serve.py, guidellm schemas/request_stats.py,
AISBench models/output.py, evalscope perf/utils/benchmark_util.py, all autumn 2026). They differ in what ends a TTFT, in
what a gap is, in what one-token answers do to a mean, and in whether a stream that broke is a success.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ascend_kit.files import to_json, write_atomic
from ascend_kit.measure import metrics
from ascend_kit.measure.metrics import RequestRecord, in_ms
from ascend_kit.results import RunFolder

CHOICES = ("role", "text", "empty", "finish")  # chunks whose `choices` are not empty
DATA = (*CHOICES, "usage", "error")  # everything but [DONE]


class Tool(NamedTuple):
    """One tool's definitions: chunk kinds that end a TTFT, an end-to-end time, and that make gaps."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    gaps: tuple[str, ...]
    window: tuple[str, ...]  # the last of these over all requests ends the measured time
    counts_single: bool = False  # an answer of one token is a TPOT of 0 in the mean, else left out
    breaks_count: bool = True  # a stream that broke counts as a success
    counts_text: bool = True  # without usage, chunks with text are counted (retokenised)
    by_token: bool = False  # guidellm: TPOT includes the TTFT, means are weighted by tokens


TOOLS = {
    "vllm": Tool(CHOICES, CHOICES, CHOICES, (*DATA, "done")),
    "guidellm": Tool(("text",), ("done",), ("text",), DATA, breaks_count=False, by_token=True),
    "evalscope": Tool(CHOICES, DATA, CHOICES, DATA, counts_single=True),
    "aisbench": Tool(DATA, DATA, DATA, DATA, counts_single=True, counts_text=False),
}


def by_tool(records: Sequence[RequestRecord]) -> dict[str, dict[str, float | None]]:
    """Tool -> `num_ok`, mean `ttft_ms`, `e2e_ms`, `tpot_ms`, `itl_ms`, `output_tokens_per_s`, `requests_per_s`."""
    streams = [record for record in records if record.chunks]
    return {name: _numbers(tool, streams) for name, tool in TOOLS.items()} if streams else {}


def _numbers(tool: Tool, records: Sequence[RequestRecord]) -> dict[str, float | None]:
    ok = [record for record in records if tool.breaks_count or record.error is None]
    start = min(_sent(record) for record in records)
    seconds = max(_times(record, tool.window)[-1] for record in records) - start
    first = [_times(record, tool.first)[0] - _sent(record) for record in ok]
    last = [_times(record, tool.last)[-1] - _sent(record) for record in ok]
    counts = [_count(record, tool) for record in ok]
    gaps = [after - before for r in ok for before, after in itertools.pairwise(_times(r, tool.gaps))]
    per_token = [
        (end - begin) / (n - 1) if n > 1 else 0.0
        for begin, end, n in zip(first, last, counts, strict=True)
        if n > 1 or tool.counts_single
    ]
    if tool.by_token:
        spans = [(_times(r, ("text",))[0] - _sent(r), _times(r, ("text",))[-1] - _sent(r)) for r in ok]
        tpot = sum(end for _, end in spans) / sum(counts) if sum(counts) else None
        steps = sum(max(n - 1, 0) for n in counts)
        itl = sum(end - begin for begin, end in spans) / steps if steps else None
    else:
        tpot, itl = _mean(per_token), _mean(gaps)
    return {
        "num_ok": len(ok), "ttft_ms": in_ms(_mean(first)), "e2e_ms": in_ms(_mean(last)), "tpot_ms": in_ms(tpot),
        "itl_ms": in_ms(itl), "output_tokens_per_s": sum(counts) / seconds, "requests_per_s": len(ok) / seconds,
    }  # fmt: skip


def _times(record: RequestRecord, kinds: tuple[str, ...]) -> list[float]:
    """Times of chunks of these kinds; a stream without any has its end."""
    return [chunk[0] for chunk in record.chunks if chunk[1] in kinds] or [record.chunks[-1][0]]


def _count(record: RequestRecord, tool: Tool) -> int:
    if record.tokens_counted_by == "usage" or (tool.counts_text and record.num_output_tokens):
        return record.num_output_tokens
    return sum(chunk[1] == "text" for chunk in record.chunks) if tool.counts_text else 0


def _sent(record: RequestRecord) -> float:
    return record.arrival_s if record.sent_s is None else record.sent_s


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# --- export -----------------------------------------------------------------------------------------------------------


def vllm_bench(records: Sequence[RequestRecord], row: dict[str, Any]) -> dict[str, Any]:
    """A point in the layout of `vllm bench serve --save-result --save-detailed`: our numbers under its names, times of
    requests in seconds, summaries in ms. TTFT starts at the planned arrival, as everywhere here."""
    done = [record for record in records if record.is_complete]
    columns, samples = metrics.latency_columns(done), metrics.samples_s(done)
    kinds = {"mean": "mean", "median": "p50", **{f"p{q}": f"p{q}" for q in metrics.PERCENTILES}}
    summary: dict[str, Any] = {}
    for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
        summary |= {f"{kind}_{theirs}_ms": columns[f"{ours}_{own}_ms"] for kind, own in kinds.items()}
        summary[f"std_{theirs}_ms"] = in_ms(statistics.pstdev(samples[ours])) if samples[ours] else None
    start = min((r.arrival_s for r in records), default=0.0)
    return {
        "duration": row["wall_s"], "completed": row["num_completed"], "failed": len(records) - len(done),
        "total_input_tokens": row["input_tokens"], "total_output_tokens": row["output_tokens"],
        "request_throughput": row["requests_per_s"], "request_goodput": row.get("goodput_requests_per_s"),
        "output_throughput": row["output_tokens_per_s"], "total_token_throughput": row["total_tokens_per_s"],
        "max_concurrency": row["concurrency"], "request_rate": row.get("rate") or "inf", **summary,
        "input_lens": [r.num_prompt_tokens for r in records], "output_lens": [r.num_output_tokens for r in records],
        "ttfts": [metrics.ttft_s(r) or 0.0 for r in records], "itls": [metrics.itl_s(r) for r in records],
        "start_times": [r.arrival_s - start for r in records], "errors": [r.error or "" for r in records],
        "backend": row["backend"], "model_id": row.get("model"),
    }  # fmt: skip


def export(folder: RunFolder, target: Path) -> list[Path]:
    """A sweep as `sweep.csv` and one vLLM benchmark JSON a point below `target`; the files written."""
    import pandas

    from ascend_kit.measure.rows import asked_rows

    rows = asked_rows(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "sweep.csv", pandas.DataFrame(rows).to_csv(index=False))
    requests: dict[str, list[RequestRecord]] = {}
    for row in folder.rows("requests"):
        requests.setdefault(row["point_id"], []).append(RequestRecord.from_row(row))
    paths = [target / "sweep.csv"]
    for row in rows:
        if row["status"] == "ok":
            paths.append(target / f"{row['backend']}-{row['point_id']}.json")
            write_atomic(paths[-1], to_json(vllm_bench(requests[row["point_id"]], row), indent=1) + "\n")
    return paths
