"""The same counts for transformers' own decode step, as the baseline."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ascend_kit.measure.forecast import kv_bytes_per_token
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import weight_bytes
from npu_sim.counting import StepCost, shapes_only
from npu_sim.counts import Counts
from npu_sim.simulator import Simulator


def count_transformers_step(sim: Simulator, config: ModelConfig, *, batch: int = 1, context: int = 1024) -> StepCost:
    """One bf16 forward of transformers behind a cache of `context` - 1 tokens, and the choice of a token."""
    counts = _forward(sim, config, batch, context)
    shallow = _forward(sim, replace(config, num_layers=1), batch, context)
    needed = weight_bytes(config, {}, 2).per_step + batch * context * kv_bytes_per_token(config)
    per_layer = (counts.num_launches - shallow.num_launches) / (config.num_layers - 1)
    return StepCost(
        counts.num_launches,
        per_layer,
        counts.num_launches,
        syncs_per_token(sim, config.family),
        counts.uploads,
        0,
        0,
        counts.bytes / needed,
    )


def _forward(sim: Simulator, config: ModelConfig, batch: int, context: int) -> Counts:
    with shapes_only(sim), torch.inference_mode():
        with torch.device("meta"):
            model = _model(config, torch.bfloat16)
        model = model.to_empty(device="npu")
        prompt = torch.ones(batch, context - 1, dtype=torch.int64).to("npu")
        past = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        token = torch.ones(batch, 1, dtype=torch.int64).to("npu")
        sim.reset()
        model(token, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        counts = sim.counts
        sim.reset()
    return counts


@cache
def syncs_per_token(sim: Simulator, family: str) -> float:
    """Host synchronisations of generate() per token, from two runs of different length of a tiny model."""
    tiny = ModelConfig(family, 2, 64, 4, 2, 16, 128, 320, qk_norm=family == "qwen3")
    model = _model(tiny, torch.float32).to("npu")
    prompt = torch.ones(1, 5, dtype=torch.int64).to("npu")

    def run(new: int) -> int:
        sim.reset()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return sim.counts.num_syncs

    run(2)
    return (run(12) - run(4)) / 8


def _model(config: ModelConfig, dtype: torch.dtype) -> Any:
    import transformers

    kinds = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    config_type, model_type = kinds[config.family]
    settings = config_type(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=32768,
    )
    return model_type(settings).to(dtype).eval()
