"""An engine over a tiny model, for tests of what it does with texts and tokens."""

from __future__ import annotations

import os
import random
import signal

from ascend_kit import AscendInferEngine

PROMPT = [7, 3, 9, 3, 200]
SETTINGS = dict(precision="fp32", device="cpu", max_seq_length=256, batch_size=8, block_size=16, kv_cache_gib=0.02)


def open_engine(folder, **changes):
    return AscendInferEngine(folder, **{**SETTINGS, **changes})


def prompts_of(count, seed=3):
    draw = random.Random(seed)
    return [[draw.randrange(255) for _ in range(draw.choice([2, 17, 60]))] for _ in range(count)]


def tokens(outputs):
    return [output.token_ids for output in outputs]


def generate_while_a_rank_dies(engine, prompts, sampling):
    """Answers undisturbed, answers while the second rank of the first replica is killed, and the replicas' rows."""
    quiet = tokens(engine.generate(prompts, sampling))
    pids = [engine.stats()["replicas"][0]["pids"][1]]

    def kill(done, total):
        if pids:
            os.kill(pids.pop(), signal.SIGKILL)

    disturbed = tokens(engine.generate(prompts, sampling, on_progress=kill))
    return quiet, disturbed, engine.stats()["replicas"]
