"""Two replicas against one, each pinned to a core of its own, in one run; and what Ray costs per request.

    python benchmarks/scaling.py MODEL_FOLDER [--requests 64] [--out scaling.json]

MODEL_FOLDER is any checkpoint the engine reads; small ones are enough, as long as a step takes a few milliseconds.
Part 1: the same prompts through cards=1 on Ray, then through cards=2, alternating `--repeats` times so that other load
on the machine meets both; replica i may run on core i alone. Reported is the ratio of output tokens per second.
Part 2: requests that need no computation at all (a replica answers at once), so that all of the time is encoding,
dispatch, Ray's transport and bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.engine import replicas
from ascend_kit.engine.ray_cluster import RaySession
from ascend_kit.engine.sequence import Sequence
from ascend_kit.engine.worker import Facts, Report, Worker


class OneThread(Worker):
    """A replica that computes with one thread, as it will have one core."""

    def load(self, *arguments: Any) -> Facts:
        import torch

        facts = super().load(*arguments)
        torch.set_num_threads(1)
        return facts


class Echo(Worker):
    """A replica that ends every request in the call that brings it, with one token."""

    def advance(self, requests: list[Sequence], cancelled: list[int]) -> Report:
        for sequence in requests:
            self._sent[sequence.id] = 0
            sequence.token_ids.append(1)
            sequence.timeline.token_times_s.append(time.perf_counter())
            sequence.finish_reason = "length"
        return Report([self._progress(sequence) for sequence in requests], self._stats())


def pin(engine: AscendInferEngine) -> None:
    """Let all threads of replica i run on core i only."""
    cores = sorted(os.sched_getaffinity(0))
    for row in engine.stats()["replicas"]:
        for pid in row["pids"]:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {cores[row["replica"] % len(cores)]})


def cpu_seconds(engine: AscendInferEngine) -> float:
    """CPU time of all replica processes so far."""
    ticks = 0
    for row in engine.stats()["replicas"]:
        for pid in row["pids"]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measured(engine: AscendInferEngine, prompts: list[list[int]], new: int) -> tuple[float, float]:
    """(output tokens per second, share of their cores that the replicas got): a low share is another's load."""
    start, before = time.perf_counter(), cpu_seconds(engine)
    speed = throughput(engine, prompts, new)
    return speed, (cpu_seconds(engine) - before) / (time.perf_counter() - start) / len(engine.stats()["replicas"])


def throughput(engine: AscendInferEngine, prompts: list[list[int]], new: int) -> float:
    """Output tokens per second."""
    start = time.perf_counter()
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start)


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Part 1."""
    settings = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=8, kv_cache_gib=0.1)
    replicas.Worker = OneThread
    draw = random.Random(0)
    prompts = [[draw.randrange(200) for _ in range(32)] for _ in range(options.requests)]
    with (
        AscendInferEngine(options.model, cards=1, ray_address="auto", **settings) as one,
        AscendInferEngine(options.model, cards=2, **settings) as two,
    ):
        for engine in (one, two):
            pin(engine)
            throughput(engine, prompts[:16], 4)
        pairs = [
            (measured(one, prompts, options.new), measured(two, prompts, options.new)) for _ in range(options.repeats)
        ]
    ratio = statistics.median(double / single for (single, _), (double, _) in pairs)
    # Per share of a core: what the ratio would be if every replica had its core to itself.
    alone = statistics.median(double / b / (single / a) for (single, a), (double, b) in pairs)
    return {
        "one_tokens_per_s": [round(one[0], 1) for one, _ in pairs],
        "one_core_share": [round(one[1], 2) for one, _ in pairs],
        "two_tokens_per_s": [round(two[0], 1) for _, two in pairs],
        "two_core_share": [round(two[1], 2) for _, two in pairs],
        "ratio_median": round(ratio, 3),
        "efficiency": round(ratio / 2, 3),
        "ratio_per_core_share": round(alone, 3),
    }


def ray_cost(options: argparse.Namespace) -> dict[str, Any]:
    """Part 2."""
    replicas.Worker = Echo
    settings = dict(precision="fp32", device="cpu", max_seq_length=512, batch_size=16, kv_cache_gib=0.02)
    prompts = [[number % 200] * 100 for number in range(2000)]
    with AscendInferEngine(options.model, cards=1, ray_address="auto", **settings) as engine:
        throughput(engine, prompts[:100], 1)
        costs = []
        for _ in range(options.repeats):
            start, cpu = time.perf_counter(), time.process_time()
            engine.generate(prompts, SamplingParams(max_new_tokens=1))
            count = len(prompts) / 1e3
            costs.append(((time.perf_counter() - start) / count, (time.process_time() - cpu) / count))
    return {
        "ms_per_request": [round(wall, 3) for wall, _ in costs],
        "driver_cpu_ms_per_request": [round(cpu, 3) for _, cpu in costs],
    }


def main() -> None:
    """Print both parts, and write them as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    session = RaySession("cpu", 4)
    session.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this script
    try:
        result = {"load_average_before": os.getloadavg(), **scaling(options), **ray_cost(options)}
    finally:
        session.close()
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
