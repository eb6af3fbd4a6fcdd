"""What asynchronous scheduling costs or gains: two engines, with and without, take turns on the same requests.

Run: python benchmarks/async_scheduling.py [--model FOLDER] [--device cpu] [--batch 1 16] [--rounds 20]. A ratio is the
median over the rounds of synchronous time over asynchronous time, with the quartiles; answers must be equal. `idle_us`
is the host's work a step during which the device has nothing queued: from tokens that were read to the next launch. On
a CPU, which computes while it launches, a ratio of 1 is what can be had.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.demo.assets import ensure_model
from ascend_kit.engine.core import EngineCore


class Idle:
    """Seconds in which a core has no step queued, between the first and the last launch."""

    def __init__(self, core: EngineCore) -> None:
        self.seconds, self.queued, self.since_s = 0.0, 0, 0.0
        self._launch, self._read = core.runner.launch, core.runner.read
        core.runner.launch, core.runner.read = self.launch, self.read  # type: ignore[method-assign]

    def launch(self, *args):
        if not self.queued and self.since_s:
            self.seconds += time.perf_counter() - self.since_s
        self.queued += 1
        return self._launch(*args)

    def read(self, *args):
        tokens = self._read(*args)
        self.queued -= 1
        self.since_s = time.perf_counter()
        return tokens


def turn(engine: AscendInferEngine, idle: Idle, prompts: list[list[int]], new: int) -> tuple[list, float, float]:
    """Tokens, seconds, and idle seconds a step."""
    idle.seconds = idle.since_s = 0.0
    steps, start = engine.stats()["steps"], time.perf_counter()
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=new, ignore_eos=True))
    took_s = time.perf_counter() - start
    return [o.token_ids for o in outputs], took_s, idle.seconds / (engine.stats()["steps"] - steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--new", type=int, default=96)
    given = parser.parse_args()
    settings = dict(device=given.device, max_seq_length=1024, batch_size=max(given.batch), kv_cache_gib=0.5)
    folder = given.model or ensure_model()
    with (
        AscendInferEngine(folder, **settings, async_scheduling=False) as plain,
        AscendInferEngine(folder, **settings, async_scheduling=True) as ahead,
    ):
        assert isinstance(plain.core, EngineCore) and isinstance(ahead.core, EngineCore)
        idles = {plain: Idle(plain.core), ahead: Idle(ahead.core)}
        for batch in given.batch:
            ratios, idle_us = [], {plain: 0.0, ahead: 0.0}
            for number in range(-3, given.rounds):  # the first ones warm up
                draw = random.Random(1000 * number + batch)
                prompts = [[draw.randrange(plain.config.vocab_size) for _ in range(64)] for _ in range(batch)]
                order = (plain, ahead) if number % 2 else (ahead, plain)
                found = {engine: turn(engine, idles[engine], prompts, given.new) for engine in order}
                if found[plain][0] != found[ahead][0]:
                    print(f"batch {batch}: answers differ", file=sys.stderr)
                    return 1
                if number >= 0:
                    ratios.append(found[plain][1] / found[ahead][1])
                    for engine in order:
                        idle_us[engine] += found[engine][2] * 1e6 / given.rounds
            low, middle, high = (round(ratio, 3) for ratio in quantiles(ratios))
            row = {"batch": batch, "ratio": middle, "quartiles": [low, high],
                   "idle_us": round(idle_us[plain], 1), "idle_us_async": round(idle_us[ahead], 1)}  # fmt: skip
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
