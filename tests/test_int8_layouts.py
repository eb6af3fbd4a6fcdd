"""Int8 layouts of compressed-tensors and msModelSlim in the common form, and what cannot be read in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import folder_with
from safetensors.torch import save_file

from ascend_kit.checkpoint.huggingface import open_checkpoint
from ascend_kit.checkpoint.quantized_tensors import pack_int8
from ascend_kit.checkpoint.tensor_file import CheckpointError


def int8_linear(rows: int = 6, columns: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    return codes, torch.rand(rows, generator=generator) + 0.5


def compressed_config(inputs: dict | None, *, kind: str = "int-quantized", weights: dict | None = None) -> dict:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", **(weights or {})}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": kind,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    }


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def assert_presents(folder: Path, codes: torch.Tensor, scale: torch.Tensor, scheme: str, layout: str) -> None:
    checkpoint = open_checkpoint(folder)
    info = checkpoint.quantization
    assert info.scheme("x") == scheme and info.layout == layout and info.summary == scheme
    assert torch.equal(checkpoint.read("x.weight"), codes)
    stored = checkpoint.read("x.weight_scale")
    assert stored.dtype == torch.float32 and torch.allclose(stored, scale, rtol=1e-6)
    assert torch.equal(checkpoint.read_slice("x.weight", 0, 2, 5), codes[2:5])
    assert torch.equal(checkpoint.read_slice("x.weight", 1, 3, 9), codes[:, 3:9])
    assert torch.allclose(checkpoint.read_slice("x.weight_scale", 0, 2, 5), scale[2:5], rtol=1e-6)


def test_compressed_tensors_w8a8_is_presented_as_codes_and_a_scale_per_row(tmp_path: Path):
    codes, scale = int8_linear()
    folder = folder_with(tmp_path / "m", compressed_config(DYNAMIC))
    save_file({"x.weight": codes, "x.weight_scale": scale[:, None]}, folder / "model.safetensors")

    assert_presents(folder, codes, scale, "w8a8", "compressed-tensors")


def test_packed_w8a16_of_a_width_not_divisible_by_four_is_unpacked(tmp_path: Path):
    codes, scale = int8_linear(columns=10)
    folder = folder_with(tmp_path / "m", compressed_config(None, kind="pack-quantized"))
    save_file(
        {
            "x.weight_packed": pack_int8(codes),
            "x.weight_scale": scale[:, None],
            "x.weight_shape": torch.tensor([6, 10]),
        },
        folder / "model.safetensors",
    )

    assert_presents(folder, codes, scale, "w8a16", "compressed-tensors")


def test_our_packing_equals_that_of_the_compressed_tensors_package():
    package = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers",
        reason="the package compressed-tensors is not installed",
    )
    for columns in (4, 10, 37, 64):
        codes, _ = int8_linear(columns=columns)

        assert torch.equal(pack_int8(codes), package.pack_to_int32(codes, 8))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (compressed_config(DYNAMIC, weights={"num_bits": 4}), "4-bit weights with 8-bit activations"),
        (compressed_config(DYNAMIC, weights={"type": "float"}), "type='float'; read are int8 weights"),
        (compressed_config(DYNAMIC, weights={"strategy": "group"}), "one scale per channel"),
        (compressed_config({**DYNAMIC, "dynamic": False}), "static per tensor"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method 'bitsandbytes' is not supported"),
    ],
)
def test_int8_layouts_that_cannot_be_computed_are_refused(tmp_path: Path, config: dict, complaint: str):
    codes, scale = int8_linear()
    folder = folder_with(tmp_path / "m", config)
    save_file({"x.weight": codes, "x.weight_scale": scale[:, None]}, folder / "model.safetensors")

    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(folder)


def test_msmodelslim_dynamic_w8a8_is_read(tmp_path: Path):
    codes, scale = int8_linear()
    folder = folder_with(tmp_path / "m")
    save_file(
        {
            "x.weight": codes,
            "x.weight_scale": scale[:, None],
            "x.weight_offset": torch.zeros(6, 1),
            "y.weight": torch.ones(2, 2),
        },
        folder / "quant_model_weight_w8a8_dynamic.safetensors",
    )
    described = {
        "model_quant_type": "W8A8_DYNAMIC",
        "x.weight": "W8A8_DYNAMIC",
        "x.weight_scale": "W8A8_DYNAMIC",
        "x.weight_offset": "W8A8_DYNAMIC",
        "y.weight": "FLOAT",
    }
    (folder / "quant_model_description.json").write_text(json.dumps(described))

    assert_presents(folder, codes, scale, "w8a8", "msmodelslim")
    assert set(open_checkpoint(folder).tensor_names()) == {"x.weight", "x.weight_scale", "y.weight"}


@pytest.mark.parametrize("as_int64", [False, True])
def test_msmodelslim_static_w8a8_gives_back_scale_and_bias(tmp_path: Path, as_int64: bool):
    codes, scale = int8_linear()
    bias = torch.linspace(-3, 3, 6)
    input_scale, input_offset = torch.tensor([0.02]), torch.tensor([-11.0])
    deq_scale = scale * input_scale
    quant_bias = torch.round(bias / deq_scale - input_offset * codes.sum(1, dtype=torch.int32)).to(torch.int32)
    stored = (deq_scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) if as_int64 else deq_scale
    folder = folder_with(tmp_path / "m")
    save_file(
        {
            "x.weight": codes,
            "x.deq_scale": stored,
            "x.quant_bias": quant_bias,
            "x.input_scale": input_scale,
            "x.input_offset": input_offset,
        },
        folder / "quant_model_weights.safetensors",
    )
    (folder / "quant_model_description.json").write_text(json.dumps({"x.weight": "W8A8"}))

    assert_presents(folder, codes, scale, "w8a8_static", "msmodelslim")
    found = open_checkpoint(folder).read("x.bias")
    assert torch.allclose(found, bias, atol=deq_scale.max().item() / 2 + 1e-6)  # quant_bias is a whole number


def test_asymmetric_msmodelslim_weights_are_refused(tmp_path: Path):
    codes, scale = int8_linear()
    folder = folder_with(tmp_path / "m")
    save_file(
        {"x.weight": codes, "x.weight_scale": scale[:, None], "x.weight_offset": torch.ones(6, 1)},
        folder / "quant_model_weights.safetensors",
    )
    (folder / "quant_model_description.json").write_text(json.dumps({"x.weight": "W8A16"}))

    with pytest.raises(CheckpointError, match=r"x\.weight_offset is not zero"):
        open_checkpoint(folder)
