"""Requests that arrive while others decode: how even their tokens come, and how long the first one takes.

Run: python benchmarks/mixed_load.py [--shape qwen3-0.6b] [--requests 60] [--rate 0.5] [--out FILE.json]. Arrivals are
random with `--rate` a second on average; a tenth of the prompts is long (1,024 to 2,048 tokens), the others have 16
to 256. Reported are the gaps between the tokens of a request (ITL), the time to its first token, and how many requests
ran at once. The gaps of a batch call (`generate`), which computes prompts as fast as it can, are a different matter:
compare.py's W2 shows them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from make_model import SHAPES, make_model  # noqa: E402

from ascend_kit import AscendInferEngine, SamplingParams  # noqa: E402
from ascend_kit.files import write_atomic  # noqa: E402
from ascend_kit.measure.metrics import percentile  # noqa: E402

SLOTS = 16
MAX_SEQ_LENGTH = 4096


def arrivals(vocab_size: int, count: int, rate: float, seed: int) -> list[tuple[float, list[int], SamplingParams]]:
    """Second, prompt and sampling of each request, earliest first."""
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        length = rng.randint(1024, 2048) if rng.random() < 0.1 else rng.randint(16, 256)
        prompt = [rng.randrange(300, vocab_size) for _ in range(length)]
        found.append((at, prompt, SamplingParams(max_new_tokens=rng.randint(16, 96), ignore_eos=True)))
    return found


def run(engine: AscendInferEngine, requests: list[tuple[float, list[int], SamplingParams]]) -> dict[str, Any]:
    """Send every request at its second; what their tokens' times say."""
    left, outputs, running, crowd = list(reversed(requests)), [], 0, []
    start = time.perf_counter()
    while left or running:
        now = time.perf_counter() - start
        while left and left[-1][0] <= now:
            _, prompt, sampling = left.pop()
            engine.add_request(prompt, sampling)
            running += 1
        if not running:
            time.sleep(min(0.01, left[-1][0] - now))
            continue
        crowd.append(running)
        ended = engine.step()
        outputs += ended
        running -= len(ended)
    gaps = [
        later - earlier for output in outputs for earlier, later in itertools.pairwise(output.timeline.token_times_s)
    ]
    firsts = [output.timeline.token_times_s[0] - output.timeline.arrival_s for output in outputs]
    seconds = {
        f"{name}_p{q}_s": percentile(values, q) for name, values in (("itl", gaps), ("ttft", firsts)) for q in (50, 99)
    }
    return {
        "requests": len(outputs),
        "seconds": time.perf_counter() - start,
        "prompt_tokens": sum(len(prompt) for _, prompt, _ in requests),
        "output_tokens": len(gaps) + len(firsts),
        "at_once_mean": sum(crowd) / len(crowd),
        "at_once_most": max(crowd),
        **seconds,
        "itl_p99_over_p50": seconds["itl_p99_s"] / seconds["itl_p50_s"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=0.5, help="arrivals per second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    vocab_size = SHAPES[arguments.shape].vocab_size
    with AscendInferEngine(
        make_model(arguments.shape), device="cpu", max_seq_length=MAX_SEQ_LENGTH, batch_size=SLOTS, graph_mode=True
    ) as engine:
        run(engine, arrivals(vocab_size, 6, 2.0, arguments.seed + 1))  # memory is touched, sizes are compiled
        result = run(engine, arrivals(vocab_size, arguments.requests, arguments.rate, arguments.seed))
    text = json.dumps(result, indent=1)
    if arguments.out:
        write_atomic(arguments.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
