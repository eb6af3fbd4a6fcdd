"""Size, speed and divergence of every precision of one model on this CPU: bf16, w8a8, w8a16, w4a16.

    python benchmarks/quantised_layouts.py MODEL PROMPTS --folder SCRATCH

MODEL is a float checkpoint, PROMPTS a file of texts. Each precision is converted, loaded and asked for greedy tokens,
one request at a time; the divergence of its next-token distributions from the float32 source is over the texts of
PROMPTS.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ascend_kit import AscendInferEngine, SamplingParams, convert
from ascend_kit.checkpoint.calibration import tokenize_texts
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.layerwise import LayerwiseModel
from ascend_kit.checkpoint.sensitivity import compare_variants
from ascend_kit.checkpoint.tensor_jobs import Quantizer
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.int4 import group_size_for
from ascend_kit.model.tensors import expected_shapes, uniform_schemes
from ascend_kit.prompts import read_prompts

SCHEMES = ("none", "w8a16", "w8a8", "w4a16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-texts", type=int, default=16)
    arguments = parser.parse_args()
    config = ModelConfig.from_folder(arguments.model)
    texts = tokenize_texts(read_prompts(arguments.prompts, "prompts")[: arguments.max_texts], arguments.model)
    variants = {scheme: uniform_schemes(config, scheme, ["lm_head"]) for scheme in SCHEMES[1:]}
    widths = {expected_shapes(config)[f"{name}.weight"][1] for name in variants["w8a8"]}
    quantizer = Quantizer(grid=torch.bfloat16, group_size=group_size_for(widths))
    model = LayerwiseModel(open_checkpoint(arguments.model), config, quantizer=quantizer)
    found = compare_variants(model, texts, variants)
    print(
        "| precision | size, MB | tokens/s, one stream | KL divergence, nats | same top token |\n" + "| --- " * 5 + "|"
    )
    for scheme in SCHEMES:
        folder = arguments.folder / scheme
        convert(arguments.model, folder, quantize=scheme, if_exists="reuse" if folder.exists() else "refuse")
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        divergence = found.get(scheme)
        figures = "0, up to bf16 | " if divergence is None else f"{divergence.kl:.5f} | {divergence.top1_agreement:.1%}"
        rate = tokens_per_s(folder, texts[0], arguments.new_tokens, arguments.repeats)
        print(f"| {scheme} | {size:.2f} | {rate:.1f} | {figures} |", flush=True)


def tokens_per_s(folder: Path, prompt: list[int], new_tokens: int, repeats: int) -> float:
    """The best of some greedy runs of one request, after one that is not counted."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    best = 0.0
    with AscendInferEngine(folder, device="cpu", max_seq_length=len(prompt) + new_tokens, kv_cache_gib=0.5) as engine:
        for _ in range(repeats + 1):
            started = time.perf_counter()
            engine.generate([prompt], sampling)
            best = max(best, new_tokens / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
