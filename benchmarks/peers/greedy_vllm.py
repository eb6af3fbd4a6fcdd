"""vLLM's greedy tokens: reads {model, prompts (token ids), new_tokens, threads} as JSON, writes the tokens."""

from __future__ import annotations

import json
import sys

from protocol import Job
from run_vllm import Vllm, preload


def main() -> None:
    asked = json.load(sys.stdin)
    longest = max(map(len, asked["prompts"])) + asked["new_tokens"]
    job = Job("vllm", asked["model"], "", (), "", 0, threads=asked["threads"], max_seq_length=longest)
    engine = Vllm(job).llm
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in asked["prompts"]], sampling, use_tqdm=False)
    print("\n" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    preload()
    main()
