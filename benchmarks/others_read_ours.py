"""Whether others load what `convert` writes, and write the same greedy text: transformers here, vLLM in its own Python.

    python benchmarks/others_read_ours.py MODEL PROMPTS --folder SCRATCH --vllm VENV/bin/python

MODEL is a float checkpoint, PROMPTS a file of texts. Prints for how many prompts each reader writes our engine's
tokens up to the end of the answer, and where the first difference is. `benchmarks/peers/setup.sh vllm` makes vLLM's
environment; its CPU build has no kernel for 8-bit weight-only (W8A16).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Collection
from pathlib import Path

from ascend_kit import AscendInferEngine, SamplingParams, convert
from ascend_kit.checkpoint.recipe import tokenize_texts
from ascend_kit.model.config import end_ids_in
from ascend_kit.prompts import read_prompts

Tokens = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vLLM; left out: transformers only")
    parser.add_argument("--schemes", default="none,w8a8,w8a16,w4a16")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prompts = tokenize_texts(read_prompts(arguments.prompts, "prompts"), arguments.model)
    print(
        "| precision | reader | prompts with our tokens | first difference: prompt, token |\n| --- | --- | --- | --- |"
    )
    for scheme in arguments.schemes.split(","):
        folder = arguments.folder / scheme
        convert(arguments.model, folder, quantize=scheme, if_exists="reuse" if folder.exists() else "refuse")
        ends = end_ids_in(folder / "generation_config.json")
        ours = of_our_engine(folder, prompts, arguments.new_tokens)
        readers = {"transformers": of_transformers(folder, prompts, arguments.new_tokens)}
        if arguments.vllm and scheme != "w8a16":
            readers["vLLM"] = of_vllm(arguments.vllm, folder, prompts, arguments.new_tokens, arguments.threads)
        for name, theirs in readers.items():
            differ = [(at, first_difference(*pair, ends)) for at, pair in enumerate(zip(ours, theirs, strict=True))]
            differ = [(at, token) for at, token in differ if token is not None]
            print(
                f"| {scheme} | {name} | {len(ours) - len(differ)} of {len(ours)} | {differ[0] if differ else ''} |",
                flush=True,
            )


def of_our_engine(folder: Path, prompts: Tokens, new_tokens: int) -> Tokens:
    longest = max(map(len, prompts)) + new_tokens
    with AscendInferEngine(folder, device="cpu", max_seq_length=longest, kv_cache_gib=0.5) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    return [output.token_ids for output in outputs]


def of_transformers(folder: Path, prompts: Tokens, new_tokens: int) -> Tokens:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # as `ignore_eos`
    answers = [model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new_tokens) for prompt in prompts]
    return [answer[0, len(prompt) :].tolist() for prompt, answer in zip(prompts, answers, strict=True)]


def of_vllm(python: Path, folder: Path, prompts: Tokens, new_tokens: int, threads: int) -> Tokens:
    asked = {"model": str(folder), "prompts": prompts, "new_tokens": new_tokens, "threads": threads}
    script = Path(__file__).parent / "peers" / "greedy_vllm.py"
    done = subprocess.run(
        [str(python), str(script)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"vLLM could not run {folder}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def first_difference(ours: list[int], theirs: list[int], ends: Collection[int]) -> int | None:
    """The first token that differs up to the end of our answer, None where none does."""
    for at, (token, other) in enumerate(zip(ours, theirs, strict=True)):
        if token != other:
            return at
        if token in ends:
            return None
    return None


if __name__ == "__main__":
    main()
