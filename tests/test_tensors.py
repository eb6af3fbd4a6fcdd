"""Names, shapes, bytes and kept linears of a decoder against transformers and numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes, is_kept, kept_linears, uniform_schemes, weight_bytes

QWEN3_8B = ModelConfig("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True)
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "qwen2", "tie_word_embeddings": False},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "tie_word_embeddings": False, "attention_bias": True},
        {"model_type": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ],
)
def test_names_and_shapes_are_those_of_transformers(keys, tmp_path):
    import transformers

    (tmp_path / "config.json").write_text(json.dumps({**TINY, **keys}))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
        )
    right = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}

    assert expected_shapes(ModelConfig.from_folder(tmp_path)) == right


def test_a_pattern_names_whole_parts_of_a_name():
    name = "model.layers.1.mlp.down_proj"

    assert all(is_kept(name, [p]) for p in (name, "down_proj", "layers.1", "model.layers.1", "mlp", r"re:.*down_proj"))
    assert not any(is_kept(name, [p]) for p in ("down", "layers.11", "1.mlp.down", "re:down_proj", "re:model"))
    assert not is_kept("model.layers.11.mlp.down_proj", ["model.layers.1"])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("layers.36", "names no linear"),
        ("down", "did you mean 'down_proj'"),
        ("re:(", "no regular expression"),
        ("k_proj", "only part of model.layers.0.qkv"),
    ],
)
def test_a_pattern_that_names_nothing_or_parts_a_product_is_refused(pattern, words):
    with pytest.raises(ValueError, match=words):
        kept_linears(QWEN3_8B, [pattern])


def test_bytes_of_qwen3_8b_with_one_layer_kept():
    schemes = uniform_schemes(QWEN3_8B, "w8a8", ["lm_head", "model.layers.1"])
    layer = (2 * 4096 + 2 * 1024) * 4096 + 3 * 4096 * 12288  # q and o, k and v; gate, up and down
    rows = 2 * 4096 + 2 * 1024 + 2 * 12288 + 4096
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    table = 151936 * 4096 * 2

    found = weight_bytes(QWEN3_8B, schemes, 2)

    assert found.per_step == 35 * (layer + 4 * rows) + 2 * layer + 2 * norms + table
    assert found.stored == found.per_step + table
