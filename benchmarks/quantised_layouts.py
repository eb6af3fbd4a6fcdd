"""Size, speed and divergence of every precision of one model on this CPU: bf16, w8a8, w8a16, w4a16.

    python benchmarks/quantised_layouts.py MODEL --prompts PROMPTS --folder SCRATCH
    python benchmarks/quantised_layouts.py MODEL --folder SCRATCH       # random weights: sizes and speeds alone

MODEL is a float checkpoint, PROMPTS a file of texts. Each precision is converted and loaded; then all of them write
greedy tokens for one request in turns, so that a machine's moods meet all alike. `w8a8 + int8 head` has the tied head
in W8A8, too. The divergence of next-token distributions from the float32 source is over the texts of PROMPTS.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ascend_kit import AscendInferEngine, SamplingParams, convert
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.layerwise import LayerwiseModel
from ascend_kit.checkpoint.recipe import tokenize_texts
from ascend_kit.checkpoint.sensitivity import Divergence, compare_variants
from ascend_kit.checkpoint.tensor_jobs import Quantizer
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.quantize import group_size_for
from ascend_kit.model.tensors import expected_shapes, uniform_schemes
from ascend_kit.prompts import read_prompts

SCHEMES = ("none", "w8a16", "w8a8", "w4a16")
INT8_HEAD = "w8a8 + int8 head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--max-texts", type=int, default=16)
    arguments = parser.parse_args()
    config = ModelConfig.from_folder(arguments.model)
    sizes, found = {}, {}
    for scheme in SCHEMES:
        folder = arguments.folder / scheme
        convert(arguments.model, folder, quantize=scheme, if_exists="reuse" if folder.exists() else "refuse")
        sizes[scheme] = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    if arguments.prompts:
        texts = tokenize_texts(read_prompts(arguments.prompts, "prompts")[: arguments.max_texts], arguments.model)
        found = divergences(arguments.model, config, texts)
    rates = tokens_per_s(arguments.folder, config.tie_embeddings, arguments.new_tokens, arguments.rounds)
    print("| precision | size, MB | tokens/s: best (median) | KL, nats | same top token |\n" + "| --- " * 5 + "|")
    for name, measured in rates.items():
        size = f"{sizes[name]:.2f}" if name in sizes else "as w8a8"
        figures = f"{found[name].kl:.5f} | {found[name].top1_agreement:.1%}" if name in found else " | "
        print(f"| {name} | {size} | {max(measured):.1f} ({statistics.median(measured):.1f}) | {figures} |")


def divergences(folder: Path, config: ModelConfig, texts: list[list[int]]) -> Mapping[str, Divergence]:
    """Of each scheme from the float32 source."""
    variants = {scheme: uniform_schemes(config, scheme, ["lm_head"]) for scheme in SCHEMES[1:]}
    widths = {expected_shapes(config)[f"{name}.weight"][1] for name in variants["w8a8"]}
    quantizer = Quantizer(grid=torch.bfloat16, group_size=group_size_for(widths))
    return compare_variants(LayerwiseModel(open_checkpoint(folder), config, quantizer=quantizer), texts, variants)


def tokens_per_s(folder: Path, is_tied: bool, new_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Greedy runs of one request of 32 tokens, every engine in turn, after a run of each that is not counted."""
    prompt, sampling = list(range(5, 37)), SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    settings = {"device": "cpu", "max_seq_length": len(prompt) + new_tokens, "kv_cache_gib": 0.25}
    kinds = {scheme: (scheme, "auto") for scheme in SCHEMES} | ({INT8_HEAD: ("w8a8", "int8")} if is_tied else {})
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with contextlib.ExitStack() as stack:
        engines = {
            name: stack.enter_context(AscendInferEngine(folder / scheme, head_dtype=head, **settings))
            for name, (scheme, head) in kinds.items()
        }
        for number in range(rounds + 1):
            for name, engine in engines.items():
                started = time.perf_counter()
                engine.generate([prompt], sampling)
                if number:
                    rates[name].append(new_tokens / (time.perf_counter() - started))
    return rates


if __name__ == "__main__":
    main()
