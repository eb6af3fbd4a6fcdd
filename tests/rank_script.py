"""What a user starts with torchrun or mpirun: the same script on every rank. Run by test_cluster_processes.py."""

import json
import os
import sys
from pathlib import Path

from ascend_kit import AscendInferEngine, SamplingParams

model, prompts_file, out, tensor_parallel = sys.argv[1:]
prompts = json.loads(Path(prompts_file).read_text())

with AscendInferEngine(
    model,
    tensor_parallel=int(tensor_parallel),
    precision="fp32",
    device="cpu",
    max_seq_length=256,
    batch_size=2,
    block_size=16,
    kv_cache_gib=0.02,
) as engine:
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=8))
    scores = engine.score([([1, 2, 3], [4]), ([1, 2, 3], [5, 6]), ([7], [8])])
    own = engine.stats()

rank = os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
Path(out, f"{rank}.json").write_text(
    json.dumps(
        {
            "tokens": [output.token_ids for output in outputs],
            "index": [output.index for output in outputs],
            "scores": [score.logprob for score in scores],
            "own_tokens": own["output_tokens"],
        }
    )
)
