"""Layer-by-layer model, calibration, smoothing, sensitivity and the automatic mix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from ascend_kit.checkpoint.conversion import Conversion
from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.huggingface import companion_files, open_checkpoint
from ascend_kit.checkpoint.layerwise import LayerwiseModel, PackedTexts
from ascend_kit.checkpoint.recipe import (
    Recipe,
    collect_statistics,
    limit_tokens,
    plan_smoothing,
    smoothing_factors,
    tokenize_texts,
)
from ascend_kit.checkpoint.sensitivity import choose_mix, compare_variants, measure_sensitivity
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.quantize import dequantize_weight, quantize_weight
from ascend_kit.model.tensors import linear_names, weight_bytes

TEXTS = [
    "A number that was given first is printed last.",
    "Two and two is four, and four and four is eight.",
    "x",
    "The engine reads weights layer by layer.\nIt keeps hidden states only.",
]


def open_layerwise(folder: Path, **options) -> LayerwiseModel:
    return LayerwiseModel(open_checkpoint(folder), ModelConfig.from_folder(folder), **options)


@pytest.fixture
def calibration_file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def outlier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms blow up a few channels, as trained models do; weights shrink them again."""
    folder = make_model(tmp_path_factory.mktemp("outliers") / "m", "qwen3", seed=5)
    weights = load_file(folder / "model.safetensors")
    for layer in (0, 1):
        for norm, parts in (
            ("input_layernorm", ("self_attn.q", "self_attn.k", "self_attn.v")),
            ("post_attention_layernorm", ("mlp.gate", "mlp.up")),
        ):
            weights[f"model.layers.{layer}.{norm}.weight"][[3, 40]] *= 60
            for part in parts:
                weights[f"model.layers.{layer}.{part}_proj.weight"][:, [3, 40]] /= 60
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def token_lists(folder: Path) -> list[list[int]]:
    return tokenize_texts(TEXTS, folder)


def run_layerwise(model: LayerwiseModel, texts: list[list[int]]) -> torch.Tensor:
    packed = PackedTexts(texts, model)
    hidden = model.embed(packed.token_ids)
    for number in range(model.config.num_layers):
        hidden = packed.forward(model.build_layer(number, model.layer_weights(number)), hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_layerwise_logits_equal_those_of_transformers(tmp_path: Path, family: str, tied: bool):
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / family, family, tie_word_embeddings=tied)
    texts = token_lists(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    found = run_layerwise(open_layerwise(folder), texts).split([len(text) for text in texts])

    for text, logits in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0]
        assert torch.allclose(logits, expected, atol=2e-5 * expected.abs().max().item())


def test_texts_too_short_to_predict_anything_are_dropped_and_long_ones_cut(tiny_qwen3_dir: Path):
    ids = tokenize_texts(TEXTS, tiny_qwen3_dir, max_tokens=10)

    assert len(ids) == 3 and all(len(row) == 10 for row in ids)
    assert limit_tokens(ids, 25) == ids[:2] and limit_tokens(ids, 4) == [ids[0][:4]]


def test_statistics_are_those_of_forward_hooks_on_transformers(tiny_qwen3_dir: Path):
    from transformers import AutoModelForCausalLM

    texts = token_lists(tiny_qwen3_dir)[:1]
    seen: dict[str, torch.Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0][0])
        )
    with torch.no_grad():
        model(torch.tensor(texts))

    found = collect_statistics(open_layerwise(tiny_qwen3_dir), texts)

    for name, x in seen.items():
        assert torch.allclose(found.largest[f"model.layers.1.{name}"], x.abs().amax(0), rtol=1e-4, atol=1e-5)
        assert torch.allclose(found.mean_square[f"model.layers.1.{name}"], x.square().mean(0), rtol=1e-3, atol=1e-5)


def test_smoothing_factors_are_powers_of_two_that_shrink_outliers():
    inputs, weights = torch.tensor([1.0, 1.0, 64.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.25, 1.0])

    factors = smoothing_factors(inputs, weights, 0.5)

    assert factors.tolist() == [1.0, 1.0, 8.0, 2.0, 1.0]


def test_smoothing_changes_the_weights_but_not_the_function(outlier_dir: Path):
    model = open_layerwise(outlier_dir)
    texts = token_lists(outlier_dir)
    schemes = dict.fromkeys(linear_names(model.config), "w8a8")

    changes, _ = plan_smoothing(model, collect_statistics(model, texts), schemes, 0.5)

    assert {name.split(".", 3)[3] for name in changes} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    before, after = (run_layerwise(model, texts), run_layerwise(open_layerwise(outlier_dir, changes=changes), texts))
    assert torch.allclose(before, after, atol=1e-5 * before.abs().max().item())  # float32 sums in another order


def test_smoothing_lowers_the_divergence_of_a_model_with_outliers(outlier_dir: Path):
    model, texts = open_layerwise(outlier_dir), token_lists(outlier_dir)
    schemes = {name: "w8a8" for name in linear_names(model.config) if name != "lm_head"}
    changes, _ = plan_smoothing(model, collect_statistics(model, texts), schemes, 0.5)

    plain = compare_variants(model, texts, {"all": schemes})["all"]
    smoothed = compare_variants(open_layerwise(outlier_dir, changes=changes), texts, {"all": schemes})["all"]

    assert smoothed.kl < 0.3 * plain.kl


def test_smoothed_bf16_conversion_stores_the_same_function(outlier_dir: Path, tmp_path: Path, calibration_file: Path):
    # The whole way through files: powers of two leave every bf16 mantissa as it was, so folding costs
    # nothing.
    plain = convert(outlier_dir, tmp_path / "plain", quantize="w8a16").folder
    smoothed = convert(
        outlier_dir, tmp_path / "smooth", quantize="w8a8", smooth=0.5, calibration_file=calibration_file
    ).folder

    one, two = open_checkpoint(plain), open_checkpoint(smoothed)
    norm = "model.layers.0.input_layernorm.weight"
    ratio = one.read(norm).float() / two.read(norm).float()
    assert torch.equal(torch.exp2(torch.log2(ratio).round()), ratio) and ratio.max() > 1
    q = "model.layers.0.self_attn.q_proj"
    weight = load_file(outlier_dir / "model.safetensors")[q + ".weight"]
    restored = dequantize_weight(two.read(q + ".weight"), two.read(q + ".weight_scale")) / ratio
    assert (restored - weight).abs().max() < 0.02 * weight.abs().max() * ratio.max()


def test_variant_divergence_equals_a_direct_computation(tiny_qwen3_dir: Path):
    from transformers import AutoModelForCausalLM

    texts, linear = token_lists(tiny_qwen3_dir)[:1], "model.layers.0.mlp.down_proj"
    source = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    changed = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    module = changed.get_submodule(linear)
    module.weight.data = dequantize_weight(*quantize_weight(module.weight.data))
    with torch.no_grad():
        left, right = (m(torch.tensor(texts)).logits[0, :-1].double().log_softmax(-1) for m in (source, changed))
    expected = (left.exp() * (left - right)).sum(-1)

    found = compare_variants(open_layerwise(tiny_qwen3_dir), texts, {"v": {linear: "w8a16"}})["v"]

    assert found.kl == pytest.approx(expected.mean().item(), rel=0.02)
    assert found.max_kl == pytest.approx(expected.max().item(), rel=0.02)
    assert found.top1_agreement == pytest.approx((left.argmax(-1) == right.argmax(-1)).float().mean().item())


def test_variant_equal_to_the_source_diverges_by_nothing(tiny_qwen3_dir: Path):
    found = compare_variants(open_layerwise(tiny_qwen3_dir), token_lists(tiny_qwen3_dir), {"same": {}})["same"]

    assert found.kl == 0 and found.top1_agreement == 1 and found.accuracy_loss == 0


def test_sensitivity_has_a_row_per_linear_and_finds_the_spoilt_one(outlier_dir: Path):
    rows = measure_sensitivity(open_layerwise(outlier_dir), token_lists(outlier_dir))

    assert len(rows) == 14 and {row["layer"] for row in rows} == {0, 1}
    by_part = {part: sum(row["kl"] for row in rows if row["part"] == part) for part in ("gate_proj", "down_proj")}
    assert by_part["gate_proj"] > by_part["down_proj"]  # its input has the outliers


def test_mix_stays_within_the_limit_and_is_the_smallest_that_does(outlier_dir: Path):
    model, texts = open_layerwise(outlier_dir), token_lists(outlier_dir)
    everything = choose_mix(model, texts, kept={"lm_head"}, max_kl=1e9)
    limit = everything.chosen.divergence.kl * 0.5

    choice = choose_mix(model, texts, kept={"lm_head"}, max_kl=limit, bandwidth_bytes_per_s=1e9)

    assert everything.chosen.name == "w8a8"
    assert choice.chosen.divergence.kl <= limit and choice.chosen.name != "w8a8"
    within = [c for c in choice.candidates if c.divergence.kl <= limit]
    assert choice.chosen.weight_bytes == min(c.weight_bytes for c in within)
    assert choice.chosen.predicted_step_s == pytest.approx(choice.chosen.weight_bytes / 1e9)
    assert choose_mix(model, texts, kept={"lm_head"}, max_kl=0.0).chosen.name == "float"


def test_decode_bytes_count_every_weight_once(tiny_qwen3_dir: Path):
    config = ModelConfig.from_folder(tiny_qwen3_dir)
    weights = load_file(tiny_qwen3_dir / "model.safetensors")
    expected = sum(t.numel() * 2 for name, t in weights.items() if name != "model.embed_tokens.weight")

    assert weight_bytes(config, {}, 2).per_step == expected
    linear = "model.layers.0.mlp.down_proj"
    saved = weight_bytes(config, {}, 2).per_step - weight_bytes(config, {linear: "w8a8"}, 2).per_step
    assert saved == 64 * 128 - 4 * 64  # one byte less per weight, four more per scale


def test_auto_conversion_writes_the_mix_and_its_table(outlier_dir: Path, tmp_path: Path, calibration_file: Path):
    stages: list[str] = []

    result = convert(
        outlier_dir,
        tmp_path / "auto",
        quantize="auto",
        max_kl=0.002,
        smooth=0.5,
        clip_search=True,
        calibration_file=calibration_file,
        on_progress=lambda _done, _total, text: stages.append(text),
    )

    described = result.manifest["quantization"]
    assert described["linears"] == dict(open_checkpoint(result.folder).quantization.schemes)
    chosen = next(row for row in described["candidates"] if row["candidate"] == described["chosen"])
    assert chosen["kl"] <= 0.002 and len(described["sensitivity"]) == 14
    assert set(stages) == {
        "layers of the calibration run",
        "layers, each linear alone",
        "layers, candidate mixes",
        "bytes written",
    }


def test_mixed_result_loads_in_transformers(outlier_dir: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    source, model = open_checkpoint(outlier_dir), ModelConfig.from_folder(outlier_dir)
    schemes = {
        name: "w8a16" if ".0." in name or name.endswith("down_proj") else "w8a8"
        for name in linear_names(model)
        if name != "lm_head" and "o_proj" not in name
    }
    companions = companion_files(outlier_dir, None)
    result = Conversion(source, Recipe(torch.float32, schemes), {}, tmp_path / "mixed", companions).run(None)

    assert result.scheme == "mixed"
    checkpoint = open_checkpoint(result.folder)
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    with torch.no_grad():
        model(torch.arange(8)[None])
    for linear in checkpoint.quantization.schemes:
        expected = dequantize_weight(checkpoint.read(f"{linear}.weight"), checkpoint.read(f"{linear}.weight_scale"))
        assert torch.allclose(model.get_submodule(linear).weight, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"quantize": "auto"}, "needs a limit"),
        ({"quantize": "auto", "max_kl": 0.1}, "need calibration_file"),
        ({"quantize": "w8a8", "smooth": 0.5}, "need calibration_file"),
        ({"quantize": "w8a8", "max_kl": 0.1}, "need quantize: auto"),
        ({"quantize": "w8a8", "smooth": 2.0, "calibration_file": "x"}, "smooth: .* less than or equal to 1, got 2.0"),
        ({"clip_search": True}, "set quantize"),
        ({"quantize": "auto", "max_kl": -1.0, "calibration_file": "x"}, "max_kl: .* greater than 0, got -1.0"),
        (
            {"quantize": "w8a8", "smooth": 0.5, "calibration_file": "/no/file"},
            "calibration_file /no/file cannot be read",
        ),
    ],
)
def test_contradicting_int8_options_are_refused(tiny_qwen3_dir: Path, tmp_path: Path, arguments: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        convert(tiny_qwen3_dir, tmp_path / "result", **arguments)
