"""Conversion: what is written, what it is equal to, and what is left behind when something goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.huggingface import Checkpoint, open_checkpoint
from ascend_kit.checkpoint.manifest import MANIFEST_NAME, verify
from ascend_kit.checkpoint.tensor_file import CheckpointError
from ascend_kit.model.quantize import dequantize_weight
from ascend_kit.params import Experiment


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint: Checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensor_names()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_bf16_round_trip_is_bit_exact(tiny_model_dir: Path, tmp_path: Path):
    first = convert(tiny_model_dir, tmp_path / "bf16").folder
    again = convert(first, tmp_path / "again").folder

    assert_same(read_all(first), read_all(again))
    expected = {name: tensor.bfloat16() for name, tensor in read_all(tiny_model_dir).items()}
    assert_same(read_all(first), expected)


def test_an_experiment_that_says_demo_converts_the_checkpoint_the_word_stands_for(tiny_model_dir: Path, tmp_path: Path):
    written = Experiment(output_root=str(tmp_path / "outputs"), precision="fp32", device="cpu")

    result = convert(written.standing_for({"input_model": str(tiny_model_dir)}))

    assert_same(read_all(tiny_model_dir), read_all(result.folder))


def test_fp32_keeps_every_bit_and_fp16_rounds_to_nearest(tiny_model_dir: Path, tmp_path: Path):
    source = read_all(tiny_model_dir)

    assert_same(read_all(convert(tiny_model_dir, tmp_path / "a", precision="fp32").folder), source)
    assert_same(
        read_all(convert(tiny_model_dir, tmp_path / "b", precision="fp16").folder),
        {name: tensor.half() for name, tensor in source.items()},
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_tied_sources_convert(tmp_path: Path, family: str, tied: bool):
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source", family, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")

    result = convert(tmp_path / "sharded", tmp_path / "result", precision="fp32", max_shard_bytes=150_000)

    assert len(list(result.folder.glob("model-*-of-*.safetensors"))) > 1
    assert_same(read_all(result.folder), read_all(source))
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("zip_format", [True, False])
def test_bin_source_converts_to_the_same_weights(tiny_qwen3_dir: Path, tmp_path: Path, zip_format: bool):
    weights, source = load_file(tiny_qwen3_dir / "model.safetensors"), tmp_path / "bin"
    shutil.copytree(tiny_qwen3_dir, source)
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=zip_format)

    assert_same(read_all(convert(source, tmp_path / "result", precision="fp32").folder), weights)


def test_tied_model_with_a_stored_copy_of_the_head_writes_it_once(tmp_path: Path):
    source = make_model(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    result = convert(source, tmp_path / "result")

    assert "lm_head.weight" not in read_all(result.folder)


def test_tied_model_with_another_head_is_refused(tmp_path: Path):
    source = make_model(tmp_path / "source", "qwen2", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        convert(source, tmp_path / "result")
    assert not (tmp_path / "result").exists()


def test_result_has_tokenizer_settings_and_a_manifest_that_verifies(tiny_qwen3_dir: Path, tmp_path: Path):
    (tmp_path / "source").mkdir()
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source" / "m")
    (source / "modeling_custom.py").write_text("raise SystemExit")

    result = convert(source, tmp_path / "result")

    names = {path.name for path in result.folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", MANIFEST_NAME} <= names
    assert "modeling_custom.py" not in names
    config = json.loads((result.folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "qwen3"
    manifest = json.loads((result.folder / MANIFEST_NAME).read_text())
    assert manifest["settings"]["precision"] == "bf16" and manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["source"]["files"][0]["hash"]) == 32
    assert verify(result.folder, full=True)
    assert not verify(tiny_qwen3_dir)
    assert leftovers(tmp_path) == []


def test_tokenizer_path_replaces_the_tokenizer_files_only(tiny_qwen3_dir: Path, tmp_path: Path):
    other = tmp_path / "tokenizer"
    shutil.copytree(tiny_qwen3_dir, other)
    (other / "tokenizer_config.json").write_text('{"other": true}')
    (other / "config.json").write_text("{}")

    result = convert(tiny_qwen3_dir, tmp_path / "result", tokenizer_path=other)

    assert json.loads((result.folder / "tokenizer_config.json").read_text()) == {"other": True}
    assert json.loads((result.folder / "config.json").read_text())["model_type"] == "qwen3"


def test_progress_counts_bytes_up_to_the_total(tiny_qwen3_dir: Path, tmp_path: Path):
    calls: list[tuple[int, int]] = []

    convert(tiny_qwen3_dir, tmp_path / "result", on_progress=lambda done, total, _: calls.append((done, total)))

    done = [call[0] for call in calls]
    assert done == sorted(done) and done[-1] == calls[0][1] == calls[-1][1] > 0


# ---- int8
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_int8_result_is_within_half_a_step_and_keeps_the_rest(tiny_model_dir: Path, tmp_path: Path, scheme: str):
    source = read_all(tiny_model_dir)

    folder = convert(tiny_model_dir, tmp_path / scheme, quantize=scheme).folder

    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization.summary == scheme and len(checkpoint.quantization.schemes) == 14
    for linear in checkpoint.quantization.schemes:
        codes, scale = checkpoint.read(f"{linear}.weight"), checkpoint.read(f"{linear}.weight_scale")
        error = (dequantize_weight(codes, scale) - source[f"{linear}.weight"]).abs()
        assert bool((error <= scale[:, None] * 0.5001).all())
        assert torch.equal(scale.bfloat16().float(), scale)  # what a bf16 reader computes with
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(checkpoint.read(name), source[name].bfloat16())


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16"])
def test_transformers_loads_the_int8_result_and_computes_the_same(tiny_model_dir: Path, tmp_path: Path, scheme: str):
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    folder = convert(
        tiny_model_dir, tmp_path / scheme, precision="fp32", quantize=scheme, quantize_keep=["lm_head", "down_proj"]
    ).folder

    checkpoint = open_checkpoint(folder)
    ours = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for linear, kind in checkpoint.quantization.schemes.items():
        assert kind == scheme and not linear.endswith("down_proj")
        weight = checkpoint.dequantized(f"{linear}.weight").read()
        ours.get_submodule(linear).weight.data = weight
        if scheme == "w8a8":
            ours.get_submodule(linear).register_forward_pre_hook(_round_inputs)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = ours(ids).logits, theirs(ids).logits
    assert torch.allclose(found, expected, atol=1e-3 * expected.abs().max().item())  # ties in activation rounding


def _round_inputs(_, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    # compressed-tensors spreads a token over 255 steps (largest value / 127.5), kernels and our engine over
    # 254.
    scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
    return (torch.round(inputs[0] / scale).clamp(-128, 127) * scale,)


def test_4_bit_result_is_no_further_from_the_source_than_plain_rounding_and_half_as_large(
    tiny_qwen3_dir: Path, tmp_path: Path
):
    source = read_all(tiny_qwen3_dir)

    folder = convert(tiny_qwen3_dir, tmp_path / "w4a16", quantize="w4a16").folder

    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization.summary == "w4a16" and len(checkpoint.quantization.schemes) == 14
    for linear in checkpoint.quantization.schemes:
        weight = source[f"{linear}.weight"].float()
        groups = checkpoint.shape(f"{linear}.weight_scale")[1]
        grouped = weight.reshape(len(weight), groups, -1)
        assert grouped.shape[2] in (32, 64)  # whichever divides all widths
        step = grouped.abs().amax(-1, keepdim=True) / 7
        plain = (torch.round(grouped / step) * step).reshape(weight.shape)
        found = checkpoint.dequantized(f"{linear}.weight").read()
        assert (found - weight).square().sum() <= 1.02 * (plain - weight).square().sum()  # scales are bf16 numbers
    again = convert(folder, tmp_path / "float", precision="fp32").folder
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(read_all(again)[f"{name}.weight"], checkpoint.dequantized(f"{name}.weight").read())


def test_int8_result_converts_back_to_float_and_again_to_the_same_codes(tiny_qwen3_dir: Path, tmp_path: Path):
    first = convert(tiny_qwen3_dir, tmp_path / "int8", precision="fp32", quantize="w8a8").folder

    repacked = convert(first, tmp_path / "w8a16", precision="fp32", quantize="w8a16").folder
    floating = convert(first, tmp_path / "float", precision="fp32").folder

    assert_same(read_all(first), read_all(repacked))
    codes, scale = (
        read_all(first)["model.layers.0.mlp.up_proj.weight"],
        read_all(first)["model.layers.0.mlp.up_proj.weight_scale"],
    )
    assert torch.equal(read_all(floating)["model.layers.0.mlp.up_proj.weight"], dequantize_weight(codes, scale))
    assert "quantization_config" not in json.loads((floating / "config.json").read_text())


def test_odd_shapes_stay_aligned_for_readers_that_view_bytes_in_place(tmp_path: Path):
    source = make_model(
        tmp_path / "source",
        "qwen2",
        hidden_size=66,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=22,
        intermediate_size=107,
        vocab_size=301,
    )

    folder = convert(source, tmp_path / "result", quantize="w8a8").folder

    found, read = load_file(folder / "model.safetensors"), read_all(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    assert found[name].shape == (66, 107) and torch.equal(found[name], read[name])
    assert torch.equal(found[name + "_scale"].reshape(-1), read[name + "_scale"])


@pytest.mark.parametrize(
    ("keep", "complaint"),
    [(["dwon_proj"], "did you mean 'down_proj'"), (["q_proj"], "keeps only part of model.layers.0.qkv")],
)
def test_impossible_keep_list_is_refused(tiny_qwen3_dir: Path, tmp_path: Path, keep: list[str], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        convert(tiny_qwen3_dir, tmp_path / "result", quantize="w8a8", quantize_keep=keep)


def test_keep_list_takes_full_names_parts_and_expressions(tiny_qwen3_dir: Path, tmp_path: Path):
    keep = ["lm_head", "down_proj", "model.layers.0.self_attn.o_proj", r"re:.*layers\.1\.mlp\.(gate|up)_proj"]

    folder = convert(tiny_qwen3_dir, tmp_path / "result", quantize="w8a8", quantize_keep=keep).folder

    left = set(open_checkpoint(folder).quantization.schemes)
    assert left == {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"} | {
        f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkv"
    }
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.gate_proj" in ignored and "lm_head" in ignored


# ---- existing destinations
# ----------------------------------------------------------------------------------


def test_existing_destination_is_refused_unless_asked(tiny_qwen3_dir: Path, tmp_path: Path):
    convert(tiny_qwen3_dir, tmp_path / "result")

    with pytest.raises(CheckpointError, match="exists; choose another folder"):
        convert(tiny_qwen3_dir, tmp_path / "result")


def test_reuse_takes_an_equal_result_and_refuses_other_settings(tiny_qwen3_dir: Path, tmp_path: Path):
    convert(tiny_qwen3_dir, tmp_path / "result")

    assert convert(tiny_qwen3_dir, tmp_path / "result", if_exists="reuse").reused
    with pytest.raises(CheckpointError, match="precision=bf16, now precision=fp16"):
        convert(tiny_qwen3_dir, tmp_path / "result", precision="fp16", if_exists="reuse")


def test_reuse_notices_that_the_source_was_trained_further(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    convert(source, tmp_path / "result")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] += 1  # same sizes, same header, other values
    save_file(weights, source / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match=r"another version of .*model\.safetensors"):
        convert(source, tmp_path / "result", if_exists="reuse")


def test_reuse_accepts_a_copied_source_with_another_time_stamp(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    convert(source, tmp_path / "result")
    (source / "model.safetensors").touch()

    assert convert(source, tmp_path / "result", if_exists="reuse").reused


def test_overwrite_replaces_our_own_result_and_nothing_else(tiny_qwen3_dir: Path, tmp_path: Path):
    convert(tiny_qwen3_dir, tmp_path / "result")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")

    result = convert(tiny_qwen3_dir, tmp_path / "result", precision="fp16", if_exists="overwrite")

    assert result.manifest["settings"]["precision"] == "fp16" and verify(result.folder, full=True)
    with pytest.raises(CheckpointError, match="not made by convert"):
        convert(tiny_qwen3_dir, foreign, if_exists="overwrite")
    assert (foreign / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("if_exists", ["refuse", "reuse", "overwrite"])
def test_destination_that_is_the_source_is_always_refused(tiny_qwen3_dir: Path, tmp_path: Path, if_exists: str):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = read_all(source)

    for destination in (source, tmp_path / "link", source / "." / "..", source / "inside"):
        with pytest.raises(CheckpointError, match=r"is the source itself|inside each other"):
            convert(source, destination, if_exists=if_exists)
    assert_same(read_all(source), before)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"precision": "int4"}, "precision: .*allowed: bf16, bfloat16, fp16, .*fp32.*, got 'int4'"),
        ({"quantize": "w4a4"}, "quantize: .*'none', 'w8a8', 'w8a16', 'w4a16' or 'auto'.*, got 'w4a4'"),
        ({"framework": "onnx"}, "framework: allowed: auto, .*huggingface, .*megatron, .*mindspore.*, got 'onnx'"),
        ({"if_exists": "maybe"}, "if_exists='maybe': allowed are refuse, reuse, overwrite"),
        ({"smoooth": 0.5}, "convert: unknown parameter 'smoooth'; did you mean 'smooth'"),
        ({"temperature": 0.5}, "convert: unknown parameter 'temperature'"),
        ({"tokenizer_path": "/nowhere/at/all"}, "no folder at /nowhere"),
    ],
)
def test_impossible_argument_is_refused_and_leaves_no_destination(
    tiny_qwen3_dir: Path, tmp_path: Path, arguments: dict, complaint: str
):
    with pytest.raises(ValueError, match=complaint):
        convert(tiny_qwen3_dir, tmp_path / "result", **arguments)
    assert not (tmp_path / "result").exists()


def test_end_ids_that_are_no_ids_are_refused_before_anything_is_written(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": "<|im_end|>"}')

    with pytest.raises(ValueError, match=r"source/generation_config\.json: eos_token_id"):
        convert(source, tmp_path / "result")

    assert leftovers(tmp_path) == [] and not (tmp_path / "result").exists()


def test_missing_source_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint folder at"):
        convert(tmp_path / "nothing", tmp_path / "result")


def test_refusal_before_publishing_keeps_the_destination_absent_and_the_shards(tiny_qwen3_dir: Path, tmp_path: Path):
    def refuse(folder: Path) -> None:
        assert verify(folder, full=True)
        raise RuntimeError("parity is red")

    with pytest.raises(RuntimeError, match="parity is red"):
        convert(tiny_qwen3_dir, tmp_path / "result", before_publish=refuse)

    assert not (tmp_path / "result").exists()
    assert convert(tiny_qwen3_dir, tmp_path / "result").resumed_shards == ("model.safetensors",)
