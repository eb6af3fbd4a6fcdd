"""Conversion of damaged and contradicting sources, and damage of a result."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascend_kit.checkpoint.convert import convert
from ascend_kit.checkpoint.manifest import verify
from ascend_kit.checkpoint.tensor_file import CheckpointError

# ---- damaged and contradicting sources


SHARD_BYTES = 120_000  # cuts the tiny model into several shards


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantize", ["none", "w8a8"])
def test_nan_and_infinity_are_named_with_tensor_file_and_row(
    tiny_qwen3_dir: Path, tmp_path: Path, value: float, quantize: str
):
    source, name = shutil.copytree(tiny_qwen3_dir, tmp_path / "source"), "model.layers.1.mlp.up_proj.weight"
    change_weights(source, lambda weights: weights[name].__setitem__((17, 3), value))

    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj.*row 17"):
        convert(source, tmp_path / "result", quantize=quantize)
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("quantize", ["none", "w8a8", "w8a16"])
def test_a_scale_of_codes_that_are_taken_over_is_named_when_it_is_no_number(
    tiny_qwen3_dir: Path, tmp_path: Path, quantize: str
):
    convert(tiny_qwen3_dir, tmp_path / "int8", quantize="w8a8")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    change_weights(tmp_path / "int8", lambda weights: weights[name].__setitem__((17, 0), float("nan")))

    with pytest.raises(CheckpointError, match=r"\.safetensors: .*layers\.1\.mlp\.up_proj\.weight_scale holds .*NaN"):
        convert(tmp_path / "int8", tmp_path / "result", quantize=quantize)
    assert not (tmp_path / "result").exists()


def test_value_beyond_fp16_is_named_with_the_way_out(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    change_weights(source, lambda weights: weights["model.norm.weight"].__setitem__(0, 1e5))

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight reaches 1e\+05.*choose precision bf16 or fp32"):
        convert(source, tmp_path / "result", precision="fp16")
    assert convert(source, tmp_path / "result", precision="bf16").bytes_written


def test_large_but_finite_weights_are_not_mistaken_for_infinite_ones(tiny_qwen3_dir: Path, tmp_path: Path):
    source, name = shutil.copytree(tiny_qwen3_dir, tmp_path / "source"), "model.layers.0.mlp.up_proj.weight"
    change_weights(source, lambda weights: weights[name].fill_(3e38))  # their sum overflows, they do not

    assert convert(source, tmp_path / "result", precision="fp32").bytes_written


def test_missing_tensor_is_named_with_the_closest_one(tiny_qwen3_dir: Path, tmp_path: Path):
    source, name = shutil.copytree(tiny_qwen3_dir, tmp_path / "source"), "model.layers.1.self_attn.k_norm.weight"
    change_weights(source, lambda weights: weights.pop(name))

    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.self_attn\.k_norm\.weight is missing"):
        convert(source, tmp_path / "result")


def test_extra_tensor_is_named(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    change_weights(source, lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)}))

    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight does not belong.*2 layers"):
        convert(source, tmp_path / "result")


def test_shape_that_contradicts_the_config_is_named(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))

    with pytest.raises(
        CheckpointError, match=r"gate_proj\.weight has shape \[128, 64\], config.json implies \[96, 64\]"
    ):
        convert(source, tmp_path / "result")


def test_unknown_model_family_is_refused(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "mamba"}')

    with pytest.raises(ValueError, match="'mamba' is not supported; allowed: qwen2, qwen3, llama"):
        convert(source, tmp_path / "result")


def test_file_that_shrinks_during_the_conversion_is_an_error(tiny_qwen3_dir: Path, tmp_path: Path):
    source = shutil.copytree(tiny_qwen3_dir, tmp_path / "source")

    def shrink(*_: object) -> None:
        os.truncate(source / "model.safetensors", 60_000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        convert(source, tmp_path / "result", max_shard_bytes=50_000, on_progress=shrink)
    assert not (tmp_path / "result").exists()


# ---- integrity at load


@pytest.fixture
def converted(tiny_qwen3_dir: Path, tmp_path: Path) -> Path:
    return convert(tiny_qwen3_dir, tmp_path / "result", max_shard_bytes=SHARD_BYTES).folder


def test_flipped_byte_in_the_weights_is_found_by_the_full_check(converted: Path):
    path = sorted(converted.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert verify(converted)  # the quick check looks at sizes and headers only
    with pytest.raises(CheckpointError, match=path.name):
        verify(converted, full=True)


@pytest.mark.parametrize("damage", ["header", "size", "missing", "added", "config"])
def test_quick_check_names_the_file_that_changed(converted: Path, damage: str):
    path = sorted(converted.glob("*.safetensors"))[0]
    if damage == "header":
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    elif damage == "size":
        os.truncate(path, path.stat().st_size - 2)
    elif damage == "missing":
        path.unlink()
    elif damage == "added":
        path = shutil.copy(path, converted / "model-extra.safetensors")
    else:
        path = converted / "config.json"
        path.write_text(path.read_text().replace('"qwen3"', '"qwen2"', 1))

    with pytest.raises(CheckpointError, match=Path(path).name):
        verify(converted)


def test_damaged_manifest_is_refused(converted: Path):
    (converted / "ascend_manifest.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"ascend_manifest\.json is damaged"):
        verify(converted)
