"""An engine on two cards that says when it runs and then works until it is interrupted or killed."""

import sys

from ascend_kit import AscendInferEngine, SamplingParams

with AscendInferEngine(
    sys.argv[1],
    cards=2,
    precision="fp32",
    device="cpu",
    max_seq_length=4096,
    batch_size=2,
    block_size=16,
    kv_cache_gib=0.02,
) as engine:
    print("running", flush=True)
    engine.generate([[1, 2, 3]] * 64, SamplingParams(max_new_tokens=4000, ignore_eos=True))
