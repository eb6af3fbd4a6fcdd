"""How much of its speed an engine on a CPU loses to other processes, and what of that a cautious eye must see.

Run: python benchmarks/busy_machine.py [--repeats 60] [--rows FILE]. The demo model serves the same requests again and
again on all cores, for about a second each, beside a neighbour that computes for a share of the time drawn anew. Others
that run meanwhile are counted with it. Told are the quiet repeats' rate and how far they lie apart, and the loss of the
others by the share of the cores that was taken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from ascend_kit import AscendInferEngine  # noqa: E402
from ascend_kit.demo.assets import ensure_model  # noqa: E402
from ascend_kit.device.meters import ProcessorMeter  # noqa: E402
from ascend_kit.engine.sequence import SamplingParams  # noqa: E402
from ascend_kit.measure.metrics import percentile  # noqa: E402

EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the cores
DUTIES = (0.0, 0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of a core
SLICE_S = 0.02


def start_neighbour(duty: multiprocessing.Value) -> None:
    """Compute in a process of another session that init adopts: children of this one would count as its own."""
    ours = os.getpid()
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork() == 0:
        compute(duty, ours)
    os._exit(0)


def compute(duty: multiprocessing.Value, ours: int) -> None:
    """Be busy for that share of the time, until it is negative or the process `ours` is gone."""
    while duty.value >= 0 and os.path.exists(f"/proc/{ours}"):
        start_s = time.monotonic()
        while time.monotonic() - start_s < SLICE_S * duty.value:
            pass
        time.sleep(max(0.0, SLICE_S * (1 - duty.value)))


def measure(engine: AscendInferEngine, prompts: list[list[int]]) -> dict[str, float]:
    """Output tokens per second of one repeat, and the cores that others took in it."""
    with ProcessorMeter() as meter:
        start_s = time.perf_counter()
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=64, ignore_eos=True))
        seconds = time.perf_counter() - start_s
    return {"tokens_per_s": sum(len(one.token_ids) for one in outputs) / seconds, "s": seconds, **meter.columns()}


def table(rows: list[dict[str, float]]) -> str:
    """Loss by the share of the cores that others took; the quiet repeats are those of the first line."""
    rows = [row for row in rows if row["other_cpu_cores"] is not None]
    quiet = [row["tokens_per_s"] for row in rows if row["other_cpu_cores"] < EDGES[1] * row["cpu_cores"]]
    if len(quiet) < 4:
        return f"{len(rows)} repeats, {len(quiet)} of them quiet: no comparison"
    usual = median(quiet)
    lines = [f"{len(quiet)} quiet repeats: {usual:.0f} tokens/s, 95 % of them from {percentile(quiet, 2.5):.0f} to "
             f"{percentile(quiet, 97.5):.0f}"]  # fmt: skip
    for low, high in itertools.pairwise(EDGES[1:]):
        found = [row["tokens_per_s"] for row in rows if low <= row["other_cpu_cores"] / row["cpu_cores"] < high]
        if found:
            losses = [f"{1 - rate / usual:.0%}" for rate in (median(found), max(found), min(found))]
            lines.append(
                f"others {low:.0%} to {high:.0%} of the cores: loss {losses[0]} ({losses[1]} to {losses[2]}), "
                f"{len(found)} repeats"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--rows", type=Path)
    given = parser.parse_args()
    draw, duty = random.Random(0), multiprocessing.Value("d", 0.0)
    start_neighbour(duty)
    rows = []
    with AscendInferEngine(str(ensure_model()), device="cpu", kv_cache_gib=0.2, max_seq_length=256) as engine:
        prompts = [[draw.randrange(300, 500) for _ in range(64)] for _ in range(96)]
        measure(engine, prompts)
        for number in range(given.repeats):
            duty.value = draw.choice(DUTIES)
            time.sleep(2 * SLICE_S)
            rows.append({"duty": duty.value, **measure(engine, prompts)})
            print(f"{number + 1}/{given.repeats} {json.dumps(rows[-1])}", flush=True)
            if given.rows:
                with open(given.rows, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + os.linesep)
    duty.value = -1.0
    print(table(rows))


if __name__ == "__main__":
    main()
