"""What guessing tokens by prompt lookup gains where a text repeats its prompt, and costs where nothing repeats.

Run: python benchmarks/speculation.py [--model FOLDER] [--speculate 4] [--batch 1 8] [--rounds 20]. Two engines, with
and without guesses, take turns on the same requests. `summarise` asks for a summary of a page in the prompt (the
demo model has learnt such pages; with a model of your own give --prompts, a file as `prompts_file`); `random` samples
at a temperature so high that nothing is said twice. A ratio is the median over the rounds of plain time over guessing
time, with the quartiles; answers must be equal. On a CPU the time is that of the process, so that other programs do not
count.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.demo.assets import ensure_model
from ascend_kit.demo.datasets import page_text, topics
from ascend_kit.measure.points import tokens_per_step
from ascend_kit.prompts import read_prompts

Requests = tuple[list[str] | list[list[int]], list[SamplingParams]]


def requests_of(kind: str, prompts: list[str], vocab_size: int, batch: int, new: int, number: int) -> Requests:
    """Requests that no earlier round had."""
    draw = random.Random(1000 * number + batch)
    if kind == "summarise":
        return draw.sample(prompts, batch), [SamplingParams(max_new_tokens=new, ignore_eos=True)] * batch
    texts = [[draw.randrange(vocab_size) for _ in range(200)] for _ in range(batch)]
    return texts, [
        SamplingParams(max_new_tokens=new, temperature=5.0, seed=number * batch + n, ignore_eos=True)
        for n in range(batch)
    ]


def turn(engine: AscendInferEngine, requests: Requests) -> tuple[list[list[int]], float, float | None]:
    """Tokens, seconds and tokens per decode step of one pass."""
    clock = time.process_time if engine.device and engine.device.kind == "cpu" else time.perf_counter
    before, start = engine.stats(), clock()
    outputs = engine.generate(*requests)
    return [o.token_ids for o in outputs], clock() - start, tokens_per_step(before, engine.stats())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--speculate", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--new", type=int, default=96)
    given = parser.parse_args()
    draw = random.Random(0)
    pages = [f"{page_text(topic, draw)}\nTell me about {topic.title}." for topic in topics()]
    prompts = [p.text for p in read_prompts(given.prompts)] if given.prompts else pages
    settings = dict(device=given.device, max_seq_length=1024, batch_size=max(given.batch), kv_cache_gib=1.0)
    folder = given.model or ensure_model()
    with (
        AscendInferEngine(folder, **settings) as plain,
        AscendInferEngine(folder, **settings, speculate=given.speculate) as guessing,
    ):
        for kind in ("summarise", "random"):
            for batch in given.batch:
                ratios, per_step = [], []
                for number in range(
                    -4, given.rounds
                ):  # the first ones warm up: sizes of steps are recorded when they come
                    requests = requests_of(kind, prompts, plain.config.vocab_size, batch, given.new, number + 4)
                    order = (plain, guessing) if number % 2 else (guessing, plain)
                    found = {engine: turn(engine, requests) for engine in order}
                    if found[plain][0] != found[guessing][0]:
                        print(f"{kind}, batch {batch}: answers differ", file=sys.stderr)
                        return 1
                    if number >= 0:
                        ratios.append(found[plain][1] / found[guessing][1])
                        per_step.append(found[guessing][2])
                low, middle, high = (round(ratio, 3) for ratio in quantiles(ratios))
                steps = round(median(per_step), 2)
                row = {
                    "workload": kind,
                    "batch": batch,
                    "tokens_per_step": steps,
                    "ratio": middle,
                    "quartiles": [low, high],
                }
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
