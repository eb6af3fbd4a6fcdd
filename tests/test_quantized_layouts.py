"""Checkpoints of GPTQ, AWQ, compressed-tensors and msModelSlim compute what the tool that wrote them meant."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import quantized_writer as writer
import torch
from conftest import make_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from ascend_kit import AscendInferEngine, SamplingParams
from ascend_kit.checkpoint.check import check_tensors
from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.device.device import select_device
from ascend_kit.device.ops import select_ops
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.engine.loader import load_decoder
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.quantized_layers import Int4WeightLinear, Int8StaticLinear
from ascend_kit.model.tensors import HEAD

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
PROMPT, ANSWER = [5, 17, 99, 250, 3, 44], [101, 7, 30]
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases on q, k and v."""
    return make_model(tmp_path_factory.mktemp("quantised") / "qwen2", "qwen2", **SHAPE)


def engine_for(folder: Path, device: str, precision: str = "fp32") -> AscendInferEngine:
    return AscendInferEngine(
        folder, device=device, precision=precision, graph_mode=False, max_seq_length=64, kv_cache_gib=0.01
    )


def meant_model(source: Path, meant: dict, round_inputs: dict | None = None) -> torch.nn.Module:
    """transformers with the weights that a layout means, and inputs rounded where activations are static."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.load_state_dict({**model.state_dict(), **meant})
    for name, (scale, offset) in (round_inputs or {}).items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, s=scale, o=offset: (((x[0] / s + o).round().clamp(-128, 127) - o) * s,)
        )
    return model


def assert_computes(folder: Path, model: torch.nn.Module, device: str, kind: type) -> None:
    """Within 1e-3 nats a token."""
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT + ANSWER])).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]
    with engine_for(folder, device) as engine:
        modules = list(engine.core.decoder.modules()) if hasattr(engine, "core") else []
        score = engine.score([(PROMPT, ANSWER)])[0].logprob
    expected = logprobs[range(len(ANSWER)), ANSWER].sum().item()
    assert score == pytest.approx(expected, abs=1e-3 * len(ANSWER))
    assert not modules or any(isinstance(module, kind) for module in modules)


FOUR_BITS = {
    "gptq 32": (lambda n, w, b: writer.gptq(n, w, 32, True, False, 1), GPTQ | {"group_size": 32}),
    "gptq 64, asymmetric, v2": (
        lambda n, w, b: writer.gptq(n, w, 64, False, False, 2),
        GPTQ | {"group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
    ),
    "gptq 128, act-order": (
        lambda n, w, b: writer.gptq(n, w, 128, False, True, 1),
        GPTQ | {"group_size": 128, "desc_act": True, "sym": False},
    ),
    "awq 64": (lambda n, w, b: writer.awq(n, w, 64), AWQ | {"group_size": 64}),
    "compressed-tensors 128": (
        lambda n, w, b: writer.compressed(n, w, 128, True),
        writer.group_settings(
            {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}, None, "pack-quantized"
        ),
    ),
    "compressed-tensors 32, asymmetric, act-order": (
        lambda n, w, b: writer.compressed(n, w, 32, False, True),
        writer.group_settings(
            {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False, "actorder": "group"},
            None,
            "pack-quantized",
        ),
    ),
    "msmodelslim, per channel": (lambda n, w, b: writer.modelslim_w4a16(n, w, None), "W4A16"),
    "msmodelslim, groups of 64": (lambda n, w, b: writer.modelslim_w4a16(n, w, 64), "W4A16"),
}


@pytest.mark.parametrize("layout", FOUR_BITS)
def test_4_bit_layouts_compute_what_they_mean(layout: str, source: Path, tmp_path: Path, device: str):
    torch.manual_seed(1)
    make, settings = FOUR_BITS[layout]
    description = settings if isinstance(settings, str) else None
    meant = writer.write(source, tmp_path / "q", make, settings, description=description)

    checkpoint = open_checkpoint(tmp_path / "q")
    for name, tensor in meant.items():
        if name.endswith("_proj.weight"):
            found = checkpoint.dequantized(name)
            torch.testing.assert_close(found.read(), tensor, rtol=1e-6, atol=1e-6, msg=name)
            torch.testing.assert_close(found.read_slice(1, 5, 21), tensor[:, 5:21], rtol=1e-6, atol=1e-6, msg=name)
            assert torch.equal(checkpoint.read_slice(name, 0, 3, 19), checkpoint.read(name)[3:19])
    assert checkpoint.quantization.summary == "w4a16"
    assert_computes(tmp_path / "q", meant_model(source, meant), device, Int4WeightLinear)


@pytest.mark.parametrize("layout", ["msmodelslim", "compressed-tensors", "compressed-tensors, asymmetric"])
def test_static_activations_are_rounded_as_calibrated(layout: str, source: Path, tmp_path: Path, device: str):
    rounding = {}

    def make(name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        scale = 0.05 if "q_proj" in name else 0.04  # q beside k and v: inputs of unlike form
        offset = 0.0 if layout == "compressed-tensors" else -7.0
        rounding[name] = (scale, offset)
        if layout == "msmodelslim":
            return writer.modelslim_static(name, weight, bias, scale, offset)
        return writer.compressed_static(name, weight, scale, offset if offset else None)

    inputs = {"num_bits": 8, "type": "int", "symmetric": "asym" not in layout, "strategy": "tensor", "dynamic": False}
    settings = writer.group_settings({"num_bits": 8, "strategy": "channel", "symmetric": True}, inputs, "int-quantized")
    description = "W8A8" if layout == "msmodelslim" else None
    meant = writer.write(source, tmp_path / "q", make, settings, description=description)

    assert open_checkpoint(tmp_path / "q").quantization.summary == "w8a8_static"
    model = meant_model(source, meant, rounding)
    assert_computes(tmp_path / "q", model, device, Int8StaticLinear)


@pytest.mark.parametrize("layout", ["gptq 32", "gptq 128, act-order", "compressed-tensors 32, asymmetric, act-order"])
def test_two_ranks_add_up_to_one(layout: str, source: Path, tmp_path: Path):
    make, settings = FOUR_BITS[layout]
    writer.write(source, tmp_path / "q", make, settings)
    config, device = ModelConfig.from_folder(tmp_path / "q"), select_device("cpu")

    def load(parallel: TensorParallel) -> nn.Module:
        ops = select_ops("cpu", True)
        options = {"dtype": torch.float32, "device": device, "ops": ops, "max_positions": 64, "parallel": parallel}
        return load_decoder(tmp_path / "q", config, **options).layers[0]

    whole, ranks = load(TensorParallel()), [load(TensorParallel(rank, 2)) for rank in (0, 1)]
    x, halves = torch.randn(5, 128), torch.randn(5, 256)
    parts = [rank.mlp.down(half.contiguous()) for rank, half in zip(ranks, halves.chunk(2, 1), strict=True)]
    torch.testing.assert_close(sum(parts), whole.mlp.down(halves), rtol=1e-4, atol=1e-4)
    for at, q_or_k_or_v in enumerate(whole.attention._project(x)):
        both = torch.cat([rank.attention._project(x)[at] for rank in ranks], 1)
        torch.testing.assert_close(both, q_or_k_or_v, rtol=1e-4, atol=1e-4)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "layout,change,complaint",
    [
        ("gptq 32", lambda t: t.pop(f"{Q}.scales"), r"q_proj\.scales is missing beside"),
        (
            "gptq 32",
            lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:2]}),
            r"q_proj\.qzeros is torch\.int32 \[2, .*expected torch\.int32 \[4, ",
        ),
        ("gptq 32", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), r"q_proj\.qweight is "),
        ("gptq 128, act-order", lambda t: t["model.layers.0.mlp.down_proj.g_idx"].fill_(1), "groups of one size"),
        ("gptq 32", lambda t: t[f"{Q}.g_idx"].fill_(99), "groups of one size"),
        ("gptq 32", lambda t: t[f"{Q}.scales"].fill_(torch.nan), "holds NaN"),
        ("awq 64", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:64]}), r"1 groups? over|2 groups over"),
        (
            "compressed-tensors 128",
            lambda t: t.update({f"{Q}.weight_shape": torch.tensor([1 << 40, 1 << 40])}),
            r"weight_shape is \[",
        ),
        ("compressed-tensors 128", lambda t: t.pop(f"{Q}.weight_packed"), r"weight_packed is missing"),
        (
            "msmodelslim, per channel",
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :7]}),
            r"q_proj\.weight is .*expected torch\.int8 or",
        ),
    ],
)
def test_damaged_and_mixed_up_4_bit_files_are_refused_by_name(
    layout: str, change, complaint: str, source: Path, tmp_path: Path
):
    make, settings = FOUR_BITS[layout]
    description = settings if isinstance(settings, str) else None
    writer.write(source, tmp_path / "q", make, settings, description=description)
    writer.damage(tmp_path / "q", change)

    with pytest.raises(CheckpointError, match=complaint):
        convert(tmp_path / "q", tmp_path / "out")


@pytest.mark.parametrize("layout", FOUR_BITS)
def test_a_truncated_a_mixed_up_and_a_damaged_file_of_each_layout_are_refused_by_name(
    layout: str, source: Path, tmp_path: Path
):
    make, settings = FOUR_BITS[layout]
    description = settings if isinstance(settings, str) else None
    writer.write(source, tmp_path / "q", make, settings, description=description)
    path, config = tmp_path / "q" / "model.safetensors", tmp_path / "q" / "config.json"
    whole, described = path.read_bytes(), json.loads(config.read_text())

    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path / "q")

    path.write_bytes(whole)
    table = tmp_path / "q" / "quant_model_description.json"
    types = table.read_text() if table.exists() else None
    table.unlink(missing_ok=True)
    other = GPTQ | {"group_size": 128} if layout.startswith("awq") else AWQ | {"group_size": 128}
    config.write_text(json.dumps(described | {"quantization_config": other}))
    with pytest.raises(CheckpointError, match=r"hold no \.qweight|\.qzeros|g_idx|groups? over"):
        check_tensors(open_checkpoint(tmp_path / "q"), ModelConfig.from_folder(tmp_path / "q"))

    config.write_text(json.dumps(described))
    if types is not None:
        table.write_text(types)
    header, chance, refused = int.from_bytes(whole[:8], "little"), random.Random(0), 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[chance.randrange(8, 8 + header)] = chance.randrange(256)
        path.write_bytes(data)
        try:
            check_tensors(open_checkpoint(tmp_path / "q"), ModelConfig.from_folder(tmp_path / "q"))
        except CheckpointError as error:
            refused += str(tmp_path / "q") in str(error)
    assert refused == 60


@pytest.mark.parametrize(
    "settings,complaint",
    [
        (GPTQ | {"bits": 3}, "bits=3; only 4 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        (GPTQ | {"dynamic": {"re:x": {}}}, "dynamic="),
        (GPTQ | {"group_size": 16}, "group_size is 16"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (AWQ | {"odd": 1}, "odd=1 is not supported"),
        (
            writer.group_settings({"num_bits": 4}, {"num_bits": 8, "dynamic": True}, "int-quantized"),
            "4-bit weights with 8-bit activations",
        ),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(
    settings: dict, complaint: str, source: Path, tmp_path: Path
):
    layout = "awq 64" if settings["quant_method"] == "awq" else "gptq 32"
    make, right = FOUR_BITS[layout]
    writer.write(source, tmp_path / "q", make, {**right, **settings} if "bits" in settings else settings)

    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(tmp_path / "q")


def test_w4a8_of_msmodelslim_is_refused_with_what_is_missing(source: Path, tmp_path: Path):
    make, _ = FOUR_BITS["msmodelslim, per channel"]
    writer.write(source, tmp_path / "q", make, {}, description="W4A8_DYNAMIC")

    with pytest.raises(CheckpointError, match=r"stored as W4A8_DYNAMIC: 4-bit weights with 8-bit activations.*w4a16"):
        open_checkpoint(tmp_path / "q")


def test_gptq_settings_may_lie_in_a_file_of_their_own(source: Path, tmp_path: Path):
    make, settings = FOUR_BITS["gptq 32"]
    writer.write(source, tmp_path / "q", make, settings)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    described = config.pop("quantization_config")
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps(described))

    assert open_checkpoint(tmp_path / "q").quantization.layout == "gptq"


def rounded_per_token(_: nn.Module, x: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    step = x[0].abs().amax(-1, keepdim=True) / 127
    return ((x[0] / step).round() * step,)


@pytest.mark.parametrize("vocabulary", [260, 320])  # 320 outputs fill whole panels of the packed kernel
@pytest.mark.parametrize("fused", [True, False])
def test_an_int8_head_and_its_tied_embedding_compute_what_their_codes_mean(
    vocabulary: int, fused: bool, tmp_path: Path
):
    source = make_model(tmp_path / "m", "qwen3", tie_word_embeddings=True, vocab_size=vocabulary)
    weight = load_file(source / "model.safetensors")["model.embed_tokens.weight"].float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).where(weight.any(1, keepdim=True), torch.ones(1))
    model = meant_model(
        source, {name: (weight / scale).round() * scale for name in ("model.embed_tokens.weight", HEAD)}
    )
    model.lm_head.register_forward_pre_hook(rounded_per_token)
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT + ANSWER])).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]

    settings = dict(device="cpu", precision="fp32", max_seq_length=64, kv_cache_gib=0.01, operator_fusion=fused)
    with AscendInferEngine(source, head_dtype="int8", **settings) as engine:
        score = engine.score([(PROMPT, ANSWER)])[0].logprob
        greedy = engine.generate([PROMPT], SamplingParams(max_new_tokens=6))[0].token_ids
        size = engine.stats()["weight_bytes"]
    with AscendInferEngine(source, **settings) as engine:
        saved = engine.stats()["weight_bytes"] - size

    assert score == pytest.approx(logprobs[range(len(ANSWER)), ANSWER].sum().item(), abs=1e-3)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)[0, len(PROMPT) :]
    assert greedy == expected.tolist()
    assert saved == 3 * weight.numel() - 4 * vocabulary


def test_an_int8_head_is_refused_where_the_head_is_a_matrix_of_its_own(source: Path):
    with pytest.raises(ValueError, match=r"head_dtype: int8 is for a head that is tied.*quantize_keep: \[\]"):
        AscendInferEngine(source, device="cpu", max_seq_length=64, head_dtype="int8").load_model()
