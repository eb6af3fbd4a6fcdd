"""config.json: every key that changes the arithmetic is read as transformers reads it, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY, make_model

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.decoder import rotary_frequencies

QWEN3 = {**TINY, "model_type": "qwen3", "hidden_act": "silu"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_act": None}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"is_causal": False}, "is_causal"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"num_experts": 8}, "num_experts"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"a_key_of_next_year": 3}, "a_key_of_next_year"),
        ({"scaling_of_next_years_attention_scale": 0}, "scaling_of_next_years_attention_scale"),
        ({"use_rope": False}, "use_rope"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"swiglu": False}, "swiglu"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"torch_dtype": "auto"}, "torch_dtype"),
        ({"dtype": "torch.bfloat16"}, "dtype"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_type": "yarn"}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {**YARN, "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "factor"),
        ({"rope_scaling": {**YARN, "factor": 0.25}}, "factor"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": None}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"eos_token_id": "<eos>"}, "eos_token_id"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"quantization_config": "w8a8"}, "quantization_config"),
    ],
)
def test_a_key_that_is_not_understood_is_refused_by_name_and_file(changes, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, **changes}))

    with pytest.raises(ValueError, match=named) as refusal:
        ModelConfig.from_folder(tmp_path)

    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": False, "transformers_version": "4.51.0"},
        {"a_key_of_next_year": None, "use_mrope": False, "num_experts": 0, "new_list": []},
        {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
        {"layer_types": ["full_attention", "full_attention"]},
        {"partial_rotary_factor": 1.0, "logit_scale": 1.0, "is_causal": True, "residual_scale": 1.0, "use_rope": True},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
)
def test_harmless_and_neutral_keys_pass(changes):
    assert ModelConfig.from_dict({**QWEN3, **changes}).sliding_window is None


# Keys of published config.json files besides the shapes: SmolLM2, DeepSeek-R1-Distill-Qwen, copies of Unsloth and verl.
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        (
            "llama",
            {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "rope_scaling": None,
             "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        ),
        (
            "qwen2",
            {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": 1, "sliding_window": 64, "use_mrope": False,
             "use_sliding_window": False, "attention_dropout": 0.0, "use_cache": True},
        ),
        ("llama", {"architectures": ["FSDPLlamaForCausalLM"], "cache_implementation": "static", "bias": False}),
        ("qwen3", {"unsloth_fixed": True, "model_name": "unsloth/Qwen3-8B", "rope_parameters": {"rope_theta": 1e6}}),
    ],
)  # fmt: skip
def test_keys_of_published_models_pass(family, keys):
    assert ModelConfig.from_dict({**QWEN3, "model_type": family, **keys}).num_layers == 2


def test_head_dim_left_out_is_the_default_of_the_family():
    raw = {key: value for key, value in TINY.items() if key != "head_dim"}

    assert ModelConfig.from_dict({**raw, "model_type": "qwen3"}).head_dim == 128
    assert ModelConfig.from_dict({**raw, "model_type": "qwen2"}).head_dim == 16


def test_a_window_that_layers_use_bounds_the_length(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2")
    edit_config(folder, use_sliding_window=True, sliding_window=32, max_window_layers=1, layer_types=None)

    with pytest.raises(ValueError, match="max_seq_length to at most 32"):
        AscendInferEngine(folder, device="cpu", precision="fp32", max_seq_length=33).load_model()
    with AscendInferEngine(folder, device="cpu", precision="fp32", max_seq_length=32, kv_cache_gib=0.01) as engine:
        assert engine.generate([[1, 2, 3]])[0].error is None


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},  # Qwen2.5's model card
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},  # Qwen3's
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 1024, "attention_factor": 1.25},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_cosines_equal_those_of_transformers_at_any_position(scaling, family, tmp_path):
    import transformers

    raw = {**TINY, "head_dim": 128, "model_type": family, "rope_theta": 1e6, "rope_scaling": scaling}
    raw["max_position_embeddings"] = 40960
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding
    right = rotary(transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False))
    positions = torch.tensor([[0, 1, 1000, 32767, 40960, 131071]])
    cos, sin = right(torch.zeros(1), positions)

    frequencies, factor = rotary_frequencies(ModelConfig.from_folder(tmp_path))
    angles = torch.outer(positions[0].float(), frequencies)

    # One rounding of a float32 angle of 131071 is 0.008; frequencies equal to the last bit give equal angles.
    torch.testing.assert_close(angles.cos() * factor, cos[0, :, :64], atol=1e-4, rtol=0)
    torch.testing.assert_close(angles.sin() * factor, sin[0, :, :64], atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [48, 200])  # within and beyond the original 64
@pytest.mark.parametrize("scaling", [YARN, {"type": "linear", "factor": 4.0}])
def test_log_probabilities_under_scaling_equal_transformers(scaling, length, tmp_path, device):
    import transformers

    folder = make_model(tmp_path / "model", "qwen3", max_position_embeddings=64)
    edit_config(folder, rope_scaling=scaling, rope_theta=1e4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = [(i * 37) % 250 for i in range(length)]
    with torch.no_grad():
        right = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    sampling = SamplingParams(max_new_tokens=1, logprobs=50)

    with AscendInferEngine(folder, device=device, precision="fp32", max_seq_length=256, kv_cache_gib=0.05) as engine:
        found = engine.generate([prompt], sampling)[0].logprobs[0].top

    assert len(found) == 50
    for token, value in found:
        assert value == pytest.approx(right[token].item(), abs=1e-4)
