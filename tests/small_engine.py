"""An engine over a tiny model, for tests of what it does with texts and tokens."""

from __future__ import annotations

from ascend_kit import AscendInferEngine

PROMPT = [7, 3, 9, 3, 200]
SETTINGS = dict(precision="fp32", device="cpu", max_seq_length=256, batch_size=8, block_size=16, kv_cache_gib=0.02)


def open_engine(folder, **changes):
    return AscendInferEngine(folder, **{**SETTINGS, **changes})
