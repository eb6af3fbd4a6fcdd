"""Shapes of the models that are planned for: planned on a card, and counted against the published parameters."""

from __future__ import annotations

import math

import pytest

from ascend_kit.device.peaks import PEAKS
from ascend_kit.measure.forecast import Card, Deployment
from ascend_kit.measure.planner import plan
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes

# Layers, hidden, heads, KV heads, head size, feed-forward, vocabulary, tied; parameters as the model cards have them.
SHAPES = {
    "Qwen2-0.5B, Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 494_032_768),
    "Qwen2-1.5B, Qwen2.5-1.5B": ("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, 1_543_714_304),
    "Qwen2.5-3B": ("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, True, 3_085_938_688),
    "Qwen2-7B, Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B": (
        "qwen2",
        28,
        3584,
        28,
        4,
        128,
        18944,
        152064,
        False,
        7_615_616_512,
    ),
    "Qwen2.5-14B, DeepSeek-R1-Distill-Qwen-14B": ("qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, 14_770_033_664),
    "Qwen2.5-32B, DeepSeek-R1-Distill-Qwen-32B": ("qwen2", 64, 5120, 40, 8, 128, 27648, 152064, False, 32_763_876_352),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, True, 596_049_920),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 128, 6144, 151936, True, 1_720_574_976),
    "Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, True, 4_022_468_096),
    "Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, False, 8_190_735_360),
    "Qwen3-14B": ("qwen3", 40, 5120, 40, 8, 128, 17408, 151936, False, 14_768_307_200),
    "Qwen3-32B": ("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, False, 32_762_123_264),
    "DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, False, 1_777_088_000),
    "Llama-3.1-8B, DeepSeek-R1-Distill-Llama-8B": ("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 8_030_261_248),
    "Llama-3.1-70B, DeepSeek-R1-Distill-Llama-70B": (
        "llama",
        80,
        8192,
        64,
        8,
        128,
        28672,
        128256,
        False,
        70_553_706_496,
    ),
    "Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, 1_235_814_400),
    "Llama-3.2-3B": ("llama", 28, 3072, 24, 8, 128, 8192, 128256, True, 3_212_749_824),
}
KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_counted_and_planned_weights_equal_the_published_number(name: str):
    family, *values, published = SHAPES[name]
    raw = {"model_type": family, **dict(zip(KEYS, values, strict=True))}
    if family == "llama":
        raw["rope_scaling"] = LLAMA3

    config = ModelConfig.from_dict(raw)
    card = Card(PEAKS["910B3"])
    planned = plan(Deployment(config, card), 512, 256, 16, card_counts=(1, 8))

    assert sum(map(math.prod, expected_shapes(config).values())) == published
    layers, kv_heads, head_size = (raw[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    has_room = 2 * published + 2 * 2 * layers * kv_heads * head_size * (512 + 256) < 0.9 * 64 * 2**30
    for one in planned:
        assert one.weight_gib_per_card * 2**30 * one.tensor_parallel == pytest.approx(2 * published)
    assert (next(one for one in planned if one.cards == 1).reason is None) == has_room
    divides = kv_heads % 8 == 0 and raw["num_attention_heads"] % 8 == 0
    assert (next(one for one in planned if one.tensor_parallel == 8).reason is None) == divides


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_moe", "deepseek_v3"])
def test_other_families_are_refused_by_name_with_the_engine_that_measures_them(kind: str):
    with pytest.raises(ValueError, match=rf"model_type '{kind}' is not supported.*engine: openai"):
        ModelConfig.from_dict({"model_type": kind})
