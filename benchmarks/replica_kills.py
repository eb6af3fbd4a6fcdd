"""10,000 requests on two replicas, one killed every 500: is every request answered exactly once, and rightly?

Run: python benchmarks/replica_kills.py [--requests 10000] [--every 500] [--shape tiny]. Requests are greedy with
lengths of their own; the prompts repeat, so that every answer is compared with that of one card. Signal 9 goes to the
replicas in turn, wherever they are in their work, also while the other one is still starting again. Exit code 1 when
an answer is missing, comes twice, differs or is an error, or when memory, descriptors or threads grow.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make_model import SHAPES, make_model  # noqa: E402
from soak import resident_bytes  # noqa: E402

from ascend_kit import AscendInferEngine, SamplingParams  # noqa: E402

KINDS = 50  # of requests; each comes many times
IN_FLIGHT = 64
SETTINGS: dict[str, Any] = dict(device="cpu", precision="fp32", max_seq_length=256, batch_size=16, kv_cache_gib=0.05)


def kinds_of(shape: str) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with the number of tokens that each is answered with."""
    draw = random.Random(1)
    return [
        (
            [draw.randrange(300, SHAPES[shape].vocab_size) for _ in range(draw.randint(1, 60))],
            SamplingParams(max_new_tokens=draw.randint(1, 24), ignore_eos=True),
        )
        for _ in range(KINDS)
    ]


def held() -> dict[str, int]:
    """What the driver holds."""
    return {
        "rss_bytes": resident_bytes(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


class Kills:
    """Keeps requests in the engine, and kills a replica after every `every` answers."""

    def __init__(self, engine: AscendInferEngine, kinds: list[tuple[list[int], SamplingParams]], every: int):
        self.engine, self.kinds, self.every = engine, kinds, every
        self.kind_of: dict[int, int] = {}
        self.answers: dict[int, list[list[int]]] = {}
        self.ended: Counter[str] = Counter()
        self.kills = 0

    def run(self, total: int) -> None:
        """Ask `total` requests and take all answers."""
        end = len(self.kind_of) + total
        while len(self.kind_of) < end or self.engine.has_unfinished:
            while len(self.kind_of) < end and len(self.kind_of) - sum(self.ended.values()) < IN_FLIGHT:
                kind = len(self.kind_of) % KINDS
                self.kind_of[self.engine.add_request(*self.kinds[kind])] = kind
            for output in self.engine.step():
                self.answers.setdefault(output.index, []).append(output.token_ids)
                self.ended[output.finish_reason or "none"] += 1
            if sum(self.ended.values()) // self.every > self.kills:
                self._kill()

    def _kill(self) -> None:
        rows = self.engine.stats()["replicas"]
        ready = [row for row in rows if row["state"] == "ready"]
        victim = ready[self.kills % len(ready)] if ready else None
        if victim is not None:
            os.kill(victim["pids"][0], signal.SIGKILL)
            self.kills += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500, help="answers from one kill to the next")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    arguments = parser.parse_args()
    model, kinds = make_model(arguments.shape), kinds_of(arguments.shape)
    with AscendInferEngine(model, **SETTINGS) as engine:
        expected = [engine.generate([prompt], sampling)[0].token_ids for prompt, sampling in kinds]
    with AscendInferEngine(model, cards=2, **SETTINGS) as engine:
        test = Kills(engine, kinds, arguments.every)
        test.run(min(arguments.requests // 10, 1000))
        before, started = held(), time.monotonic()
        test.run(arguments.requests - len(test.kind_of))
        seconds, after, restarts = time.monotonic() - started, held(), engine.stats()["restarts"]
    counts = Counter(len(answers) for answers in test.answers.values())
    wrong = sum(answers[0] != expected[test.kind_of[index]] for index, answers in test.answers.items())
    found = {
        "requests": len(test.kind_of),
        "answered": {f"{times} times": count for times, count in counts.items()},
        "ended": dict(test.ended),
        "differ from one card": wrong,
        "kills": test.kills,
        "restarts": restarts,
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
    }
    print(json.dumps(found, indent=1))
    is_once = counts == {1: arguments.requests} and set(test.ended) == {"length"} and not wrong
    grown = {name: after[name] - before[name] for name in before}
    is_level = grown["rss_bytes"] < 32 << 20 and grown["descriptors"] <= 4 and grown["threads"] <= 2
    return 0 if is_once and is_level else 1


if __name__ == "__main__":
    sys.exit(main())
