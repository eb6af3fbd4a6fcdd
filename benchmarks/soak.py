"""Thousands of mixed requests through one engine; what is left of them: memory, KV blocks, objects.

Run: python benchmarks/soak.py [--requests 10000] [--shape tiny] [--table fused] [--out FILE.json], or with --all for
every table and shape, each in a process of its own. The first requests (a tenth, at least 1,000) warm the engine up;
from then on resident memory must stay level. Exit code 1 when something is left over.
Requests are greedy, sampled, scored, cancelled midway and refused, some share a prefix; new ones arrive while
others run, and the small KV pool makes some of them give their blocks back.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make_model import SHAPES, make_model  # noqa: E402

from ascend_kit import AscendInferEngine, SamplingParams  # noqa: E402
from ascend_kit.device.ops import cpu_native  # noqa: E402
from ascend_kit.files import write_atomic  # noqa: E402

TABLES: dict[str, dict[str, Any]] = {
    "fused": {"graph_mode": True},
    "plain": {"graph_mode": False, "operator_fusion": False},
    "fp32": {"graph_mode": True, "precision": "fp32"},
    "fp16": {"graph_mode": False, "operator_fusion": False, "precision": "fp16"},
    "amx": {"graph_mode": True},
}
ALL = [(shape, table) for shape in ("tiny", "narrow") for table in TABLES]
IN_FLIGHT = 48
SLOTS = 16
MAX_SEQ_LENGTH = 256
GROWTH_BYTES = 16 << 20  # allocators keep some pages; a leak of 2 KB a request would be 18 MB over 9,000
OBJECTS = 2000


class Soak:
    """Keeps `IN_FLIGHT` requests in the engine until `total` have ended."""

    def __init__(self, engine: AscendInferEngine, vocab_size: int, seed: int):
        self.engine, self.vocab_size, self.rng = engine, vocab_size, random.Random(seed)
        self.prefixes = [self._tokens(64) for _ in range(4)]
        self.ended: Counter[str] = Counter()
        self.running: dict[int, int] = {}  # request -> tokens asked for

    def run(self, total: int) -> None:
        """Submit and finish `total` more requests."""
        started = 0
        while started < total or self.running:
            while started < total and len(self.running) < IN_FLIGHT:
                self._start()
                started += 1
            if self.rng.random() < 0.02:
                self._cancel()
            if self.rng.random() < 0.01:
                self._score()
            for output in self.engine.step():
                self._end(output)

    def _start(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.prefixes) if rng.random() < 0.3 else []
        prompt = prompt + self._tokens(rng.randint(1, 60))
        if rng.random() < 0.01:
            prompt = self._tokens(MAX_SEQ_LENGTH + 1)
        sampled = rng.random() < 0.5
        count = rng.randint(1, 16)
        sampling = SamplingParams(
            max_new_tokens=count,
            ignore_eos=True,
            temperature=0.8 if sampled else 0.0,
            top_p=0.9,
            seed=rng.randrange(1000),
            logprobs=3 if rng.random() < 0.1 else None,
        )
        self.running[self.engine.add_request(prompt, sampling)] = count

    def _cancel(self) -> None:
        if self.running:
            output = self.engine.cancel(self.rng.choice(list(self.running)))
            if output is not None:
                self._end(output)

    def _score(self) -> None:
        """Scoring steps the engine itself and keeps no outputs of others; so only when none are running."""
        if not self.running:
            prefix = self.rng.choice(self.prefixes)
            self.engine.score([(prefix + self._tokens(8), self._tokens(2)) for _ in range(4)])
            self.ended["scored"] += 4

    def _end(self, output: Any) -> None:
        asked = self.running.pop(output.index)
        if output.finish_reason == "length" and len(output.token_ids) != asked:
            raise RuntimeError(f"request {output.index}: {len(output.token_ids)} tokens, {asked} were asked for")
        self.ended[output.finish_reason] += 1

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(300, self.vocab_size) for _ in range(count)]


def resident_bytes() -> int:
    """Resident memory now, after Python's own garbage is gone."""
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def soak(shape: str, table: str, total: int, seed: int) -> dict[str, Any]:
    """Run all requests; the numbers before and after, and a list of what is wrong."""
    if table == "amx":  # whose processors leave prompts to torch: as on them, nothing is packed
        cpu_native.packs = lambda: False
    model, started, warm_up = make_model(shape), time.perf_counter(), max(1000, total // 10)
    with AscendInferEngine(
        model,
        device="cpu",
        max_seq_length=MAX_SEQ_LENGTH,
        batch_size=SLOTS,
        kv_cache_gib=_small_pool(shape),
        **TABLES[table],
    ) as engine:
        test = Soak(engine, SHAPES[shape].vocab_size, seed)
        test.run(warm_up)
        test._score()
        before = {"rss_bytes": resident_bytes(), "objects": len(gc.get_objects())}
        trace = [before["rss_bytes"]]
        for _ in range(9):
            test.run((total - warm_up) // 9)
            test._score()
            trace.append(resident_bytes())
        after = {"rss_bytes": resident_bytes(), "objects": len(gc.get_objects())}
        stats = engine.stats()
        problems = _problems(before, after, stats, engine)
    return {
        "shape": shape,
        "table": table,
        "requests": sum(test.ended.values()),
        "ended": dict(test.ended),
        "seconds": time.perf_counter() - started,
        "before": before,
        "after": after,
        "growth_bytes": after["rss_bytes"] - before["rss_bytes"],
        "rss_bytes_by_tenth": trace,
        "preemptions": stats["preemptions"],
        "cached_prompt_tokens": stats["cached_prompt_tokens"],
        "steps": stats["steps"],
        "kv_blocks": [stats["kv_blocks_free"], stats["kv_blocks_total"]],
        "problems": problems,
    }


def _small_pool(shape: str) -> float:
    """GiB for a quarter of what all slots could use, so that blocks run out now and then."""
    return SHAPES[shape].kv_bytes_per_token * SLOTS * MAX_SEQ_LENGTH / 4 / 2**30


def _problems(before: dict, after: dict, stats: dict, engine: AscendInferEngine) -> list[str]:
    found = []
    if after["rss_bytes"] - before["rss_bytes"] > GROWTH_BYTES:
        found.append(f"memory grew by {(after['rss_bytes'] - before['rss_bytes']) / 2**20:.1f} MiB")
    if after["objects"] - before["objects"] > OBJECTS:
        found.append(f"{after['objects'] - before['objects']} more Python objects")
    if stats["kv_blocks_free"] != stats["kv_blocks_total"]:
        found.append(f"{stats['kv_blocks_total'] - stats['kv_blocks_free']} KV blocks are still owned")
    if engine.has_unfinished or engine.core.sequences:
        found.append(f"{len(engine.core.sequences)} sequences are still known")
    return found


def _one(shape: str, table: str, arguments: argparse.Namespace) -> int:
    """One table and shape in a process of its own; prints its line of the table, returns its exit code."""
    command = [sys.executable, __file__, "--shape", shape, "--table", table]
    numbers = ["--requests", str(arguments.requests), "--seed", str(arguments.seed)]
    done = subprocess.run([*command, *numbers], stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        return 1
    found = json.loads(done.stdout)
    trace = [f"{value / 1e6:.0f}" for value in found["rss_bytes_by_tenth"][::3]]
    rate = found["requests"] / found["seconds"]
    print(
        f"| {shape} | {table} | {' '.join(trace)} | {rate:.0f} | {'; '.join(found['problems']) or 'level'} |",
        flush=True,
    )
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--table", choices=TABLES, default="fused")
    parser.add_argument("--all", action="store_true", help="every table and shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    if arguments.all:
        return max(_one(shape, table, arguments) for shape, table in ALL)
    result = soak(arguments.shape, arguments.table, arguments.requests, arguments.seed)
    text = json.dumps(result, indent=1)
    if arguments.out:
        write_atomic(arguments.out, text)
    print(text)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
