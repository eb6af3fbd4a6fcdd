"""Scales of an int8 KV cache that a checkpoint brings: the cache keeps the codes that they mean."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import quantized_writer as writer
import torch
from conftest import make_model
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.device.device import select_device
from ascend_kit.device.ops import select_ops
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.engine.loader import load_decoder
from ascend_kit.model.config import ModelConfig

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
PROMPT, ANSWER = [5, 17, 99, 250, 3, 44], [101, 7, 30]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("kv") / "qwen2", "qwen2", **SHAPE)


KV_LAYOUTS = {  # shapes of the scales of a layer with 2 KV heads of 32 numbers
    "msmodelslim, per channel": ((64,), True),
    "msmodelslim, per channel, symmetric": ((64,), False),
    "compressed-tensors, per tensor": ((1,), False),
    "compressed-tensors, per head": ((2, 1, 1), True),
}


def write_with_kv_scales(source: Path, folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """A checkpoint in `layout` with coarse scales of an int8 cache, so that a cache without them is seen; these."""
    shape, has_offset = KV_LAYOUTS[layout]
    is_msmodelslim = layout.startswith("msmodelslim")
    names = ("{}_proj.kv_cache_scale", "{}_proj.kv_cache_offset") if is_msmodelslim else ("{}_scale", "{}_zero_point")
    scheme = {"num_bits": 8, "type": "int", "symmetric": not has_offset, "strategy": "attn_head", "dynamic": False}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "kv_cache_scheme": scheme}
    writer.write(source, folder, writer.as_it_is, settings, description="FLOAT" if is_msmodelslim else None)
    found = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for letter in "kv":
            name = f"model.layers.{layer}.self_attn.{{}}"
            found[name.format(names[0].format(letter))] = 0.05 + torch.rand(shape) / 10
            if has_offset:
                found[name.format(names[1].format(letter))] = torch.randint(-20, 20, shape).float()
    writer.damage(folder, lambda tensors: tensors.update(found))
    return found


@pytest.mark.parametrize("options", [{}, {"operator_fusion": False, "graph_mode": False}])
@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_an_int8_cache_keeps_the_codes_of_the_checkpoints_scales(
    layout: str, options: dict, source: Path, tmp_path: Path
):
    torch.manual_seed(2)
    stored = write_with_kv_scales(source, tmp_path / "q", layout)

    def rounded_cache(module, query, key, value, mask, **more):
        pair = []
        for letter, x in (("k", key), ("v", value)):
            prefix = f"model.layers.{module.layer_idx}.self_attn.{letter}_"
            of_layer = {name: numbers for name, numbers in stored.items() if name.startswith(prefix)}
            scale, *offset = [
                numbers.reshape(1, 1 if numbers.numel() == 1 else 2, 1, -1)
                for _, numbers in sorted(of_layer.items(), key=lambda pair: "scale" not in pair[0])
            ]
            offset = offset[0] if offset else 0
            pair.append(((x / scale + offset).round().clamp(-128, 127) - offset) * scale)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *pair, mask, **more)

    AttentionInterface.register("rounded_cache", rounded_cache)
    AttentionMaskInterface.register("rounded_cache", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="rounded_cache"
    ).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT + ANSWER])).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]

    settings = dict(device="cpu", precision="fp32", max_seq_length=64, kv_cache_gib=0.01, **options)
    quiet = warnings.catch_warnings(action="error", category=UserWarning)  # such as: the scales are not used
    with quiet, AscendInferEngine(tmp_path / "q", kv_cache_dtype="int8", **settings) as engine:
        score = engine.score([(PROMPT, ANSWER)])[0].logprob
        greedy = engine.generate([PROMPT], SamplingParams(max_new_tokens=8))[0].token_ids  # decode steps, recorded ones
    assert score == pytest.approx(logprobs[range(len(ANSWER)), ANSWER].sum().item(), abs=1e-3)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, use_cache=False)[
        0, len(PROMPT) :
    ]
    assert greedy == expected.tolist()


def test_scales_of_an_int8_cache_that_do_not_fit_are_refused_by_name(source: Path, tmp_path: Path):
    stored = write_with_kv_scales(source, tmp_path / "q", "msmodelslim, per channel")
    name = "model.layers.1.self_attn.v_proj.kv_cache_scale"
    settings = dict(device="cpu", precision="fp32", max_seq_length=64, kv_cache_gib=0.01, kv_cache_dtype="int8")

    for value, complaint in (
        (torch.ones(63), r"layers\.1\.self_attn\.v_cache_scale has shape \[63\]"),
        (torch.full((64,), torch.nan), "finite"),
        (torch.zeros(64), "not positive"),
    ):
        writer.damage(tmp_path / "q", lambda tensors, value=value: tensors.update({name: value}))
        with pytest.raises(CheckpointError, match=complaint):
            AscendInferEngine(tmp_path / "q", **settings).load_model()
    writer.damage(tmp_path / "q", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_cache_scale"):
        AscendInferEngine(tmp_path / "q", **settings).load_model()
    assert len(stored) == 8
    result = convert(tmp_path / "q", tmp_path / "out")
    assert "7 scales of an int8 KV cache" in str(result)


def test_ranks_hold_the_scales_of_their_heads(source: Path, tmp_path: Path):
    stored = write_with_kv_scales(source, tmp_path / "q", "msmodelslim, per channel")
    config, device, ops = ModelConfig.from_folder(source), select_device("cpu"), select_ops("cpu", True)

    for rank in (0, 1):
        options = {"device": device, "ops": ops, "max_positions": 64, "parallel": TensorParallel(rank, 2)}
        decoder = load_decoder(tmp_path / "q", config, dtype=torch.float32, with_kv_scales=True, **options)
        found = decoder.layers[1].attention.kv_scales
        for at, letter in enumerate("kv"):
            name = f"model.layers.1.self_attn.{letter}_proj.kv_cache_"
            assert torch.equal(found.scales[at], stored[f"{name}scale"].view(2, 32)[rank : rank + 1])
            assert torch.equal(found.offsets[at], stored[f"{name}offset"].view(2, 32)[rank : rank + 1])
        assert found.of_query.shape == (2, 32)
