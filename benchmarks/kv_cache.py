"""What an int8 KV cache gains in decode steps over long contexts, and what it changes in the demo model's predictions.

Run: python benchmarks/kv_cache.py [--layers 4] [--batch 16] [--context 8192] [--rounds 5]. Two engines with random
weights, the layers of Qwen3-0.6B and one with each cache, take turns at decode steps over `--batch` sequences of
`--context` tokens. The ratio is that of decode rates, the median over the rounds, with the lowest and the highest. KL
is the mean over positions of the demo model's own pages, in nats, bf16 cache against int8.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from make_model import DEFAULT_ROOT, SHAPES, Shape, make_model  # noqa: E402

from ascend_kit import AscendInferEngine, SamplingParams  # noqa: E402
from ascend_kit.demo.assets import ensure_model  # noqa: E402
from ascend_kit.demo.datasets import page_text, topics  # noqa: E402
from ascend_kit.device.ops import AttentionMeta, reference  # noqa: E402
from ascend_kit.engine.scheduler import Chunk, StepPlan  # noqa: E402
from ascend_kit.engine.sequence import Sequence  # noqa: E402

KINDS = ("auto", "int8")


def decode_plan(engine: AscendInferEngine, batch: int, context: int) -> StepPlan:
    """A decode step of sequences whose contexts are in the cache already, as numbers made up."""
    core, draw = engine.core, random.Random(0)
    needed, chunks = -(-context // core.block_size), []
    for number in range(batch):
        sequence = Sequence([draw.randrange(1000, 32000) for _ in range(context)], SamplingParams(), arrival_s=0.0)
        sequence.blocks = list(range(1 + number * needed, 1 + (number + 1) * needed))
        chunks.append(Chunk(sequence, context - 1, 1))
    for cache in (part for pair in core.runner.caches for part in pair):
        if cache.dtype == torch.int8:
            heads, size = engine.config.num_kv_heads, engine.config.head_dim
            codes, scales = reference._int8_parts(cache, heads, size)
            codes.random_(-127, 128), scales.fill_(0.01)
        else:
            cache.normal_()
    return StepPlan(chunks, batch)


def rates(layers: int, batch: int, context: int, rounds: int) -> dict[str, object]:
    name = f"kv-{layers}"
    SHAPES[name] = Shape("qwen3", layers, 1024, 16, 8, 128, 3072, 32000, True)
    folder = make_model(name, DEFAULT_ROOT / name)
    engines, plans, ratios = {}, {}, []
    for kind in KINDS:
        engines[kind] = AscendInferEngine(
            folder, device="cpu", max_seq_length=context, batch_size=batch, kv_cache_dtype=kind, kv_cache_gib=6.0
        ).load_model()
        plans[kind] = decode_plan(engines[kind], batch, context)
    for number in range(-1, rounds):  # the first round records the step
        seconds = {}
        for kind in KINDS if number % 2 else KINDS[::-1]:
            runner, start = engines[kind].core.runner, time.perf_counter()
            for _ in range(8):
                runner.read(runner.launch(plans[kind], ()))
            seconds[kind] = time.perf_counter() - start
        if number >= 0:
            ratios.append(seconds["auto"] / seconds["int8"])
    sizes = {kind: engines[kind].stats()["kv_block_bytes"] / engines[kind].stats()["block_size"] for kind in KINDS}
    return {
        "decode_rate_ratio": [round(value, 3) for value in (median(ratios), min(ratios), max(ratios))],
        "bf16_step_ms": round(seconds["auto"] / 8 * 1e3, 1),
        "kv_bytes_per_token": sizes,
    }


def mean_kl() -> float:
    """Mean KL divergence, over the positions of 16 pages, of the demo model with an int8 cache from that with bf16."""
    draw, logprobs = random.Random(1), {}
    pages = [page_text(topic, draw) for topic in topics()[:16]]
    for kind in KINDS:
        with AscendInferEngine(ensure_model(), device="cpu", max_seq_length=512, kv_cache_dtype=kind) as engine:
            runner, found = engine.core.runner, []
            for page in pages:
                ids = engine.tokenizer(page)["input_ids"][:500]
                places = torch.arange(len(ids), dtype=torch.int32)
                blocks = -(-len(ids) // runner.block_size)
                table = torch.arange(1, blocks + 1, dtype=torch.int32).unsqueeze(0)
                length = torch.tensor([len(ids)], dtype=torch.int32)
                meta = AttentionMeta(
                    places + runner.block_size, table, [len(ids)], [len(ids)], length, runner.block_size, False
                )
                with torch.inference_mode():
                    hidden = runner.decoder(torch.tensor(ids, dtype=torch.int32), places, meta, runner.caches)
                    found.append(runner.decoder.logits(hidden).float().log_softmax(-1))
            logprobs[kind] = torch.cat(found)
    return float((logprobs["auto"].exp() * (logprobs["auto"] - logprobs["int8"])).sum(-1).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps({"mean_kl_nats": mean_kl()}), flush=True)
    print(json.dumps(rates(given.layers, given.batch, given.context, given.rounds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
