"""Writes workloads.json: the lengths of the five workloads, and the seed of their tokens.

Run: python benchmarks/make_workloads.py. The tokens themselves are drawn when a workload runs
(peers/protocol.py): new ones for every round and repeat, so that no prefix cache can answer from an earlier
pass; the same for every engine.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 6
PATH = Path(__file__).with_name("workloads.json")


def lengths(rng: random.Random, count: int, low: int, high: int, total: int) -> list[int]:
    """`count` whole numbers in low..high, uniform but for small corrections that make their sum `total`."""
    values = [rng.randint(low, high) for _ in range(count)]
    while sum(values) != total:
        place, step = rng.randrange(count), 1 if sum(values) < total else -1
        if low <= values[place] + step <= high:
            values[place] += step
    return values


def workloads() -> dict:
    """All as plain values; lengths in tokens."""
    rng = random.Random(SEED)
    return {
        "seed": SEED,
        "first_token_id": 300,  # below lie bytes and special tokens
        "W1": {"about": "one stream", "prompt_lens": [128], "output_lens": [128]},
        "W2": {
            "about": "32 requests at once",
            "prompt_lens": lengths(rng, 32, 32, 512, 7361),
            "output_lens": lengths(rng, 32, 16, 128, 2080),
        },
        "W3": {"about": "prefill", "prompt_lens": [1024] * 4, "output_lens": [1] * 4},
        "W4": {"about": "scoring behind a shared prefix", "num_requests": 40, "shared_len": 512, "own_len": 64},
        "W4U": {"about": "scoring, nothing shared", "num_requests": 16, "shared_len": 0, "own_len": 576},
        "W5": {"about": "long context", "prompt_lens": [8000], "output_lens": [64]},
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(workloads(), indent=1) + "\n")
