"""Writes quantised checkpoints as GPTQ, AWQ, compressed-tensors and msModelSlim do, for tests, with what they mean.

Built from descriptions of the formats alone, number by number, and shares nothing with the readers. `meant` is the
float32 weight that a layout stands for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output held by each nibble
State = dict[str, torch.Tensor]


def rounded(weight: torch.Tensor, group: int, symmetric: bool, group_of: torch.Tensor | None = None):
    """(codes 0..15 [N, K], scale [N, G] on the fp16 grid, zero 0..15 [N, G], meant [N, K])."""
    rows, width = weight.shape
    at = torch.arange(width) // group if group_of is None else group_of
    groups = int(at.max()) + 1
    low, high = torch.zeros(rows, groups), torch.zeros(rows, groups)
    for number in range(groups):
        part = weight[:, at == number]
        low[:, number], high[:, number] = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    if symmetric:
        largest = torch.maximum(-low, high)
        scale, zero = (largest / 7).half().float(), torch.full((rows, groups), 8)
    else:
        scale = ((high - low) / 15).half().float()
        zero = torch.round(-low / scale).clamp(1, 15).to(torch.int64)
    codes = (torch.round(weight / scale[:, at]) + zero[:, at]).clamp(0, 15).to(torch.int64)
    return codes, scale, zero, (codes - zero[:, at]) * scale[:, at]


def words(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """Eight numbers of 0..15 along `dim` in one int32, the first lowest."""
    numbers = numbers.movedim(dim, -1)
    packed = sum(numbers[..., at::8] << (4 * at) for at in range(8))
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


def gptq(name: str, weight: torch.Tensor, group: int, symmetric: bool, act_order: bool, version: int):
    width = weight.shape[1]
    group_of = torch.arange(width) // group
    if act_order:
        group_of = group_of[torch.randperm(width)]
    codes, scale, zero, meant = rounded(weight, group, symmetric, group_of)
    state = {
        f"{name}.qweight": words(codes.t(), 0),
        f"{name}.qzeros": words(zero.t() - (1 if version == 1 else 0), 1),
        f"{name}.scales": scale.t().contiguous().half(),
        f"{name}.g_idx": group_of.to(torch.int32),
    }
    return state, meant


def awq(name: str, weight: torch.Tensor, group: int):
    codes, scale, zero, meant = rounded(weight, group, False)
    order = torch.tensor([8 * block + place for block in range(weight.shape[0] // 8) for place in AWQ_ORDER])
    return {
        f"{name}.qweight": words(codes.t()[:, order], 1),
        f"{name}.qzeros": words(zero.t()[:, order], 1),
        f"{name}.scales": scale.t().contiguous().half(),
    }, meant


def compressed(name: str, weight: torch.Tensor, group: int, symmetric: bool, act_order: bool = False):
    group_of = (torch.arange(weight.shape[1]) // group)[torch.randperm(weight.shape[1])] if act_order else None
    codes, scale, zero, meant = rounded(weight, group, symmetric, group_of)
    state = {
        f"{name}.weight_packed": words(codes, 1),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        state[f"{name}.weight_zero_point"] = words(zero, 0)
    if group_of is not None:
        state[f"{name}.weight_g_idx"] = group_of.to(torch.int32)
    return state, meant


def modelslim_w4a16(name: str, weight: torch.Tensor, group: int | None):
    """Two nibbles a byte: along the inputs with a scale a row, along the outputs with groups."""
    codes, scale, zero, meant = rounded(weight, group or weight.shape[1], False)
    signed = codes - 8
    even, odd = (signed[:, 0::2], signed[:, 1::2]) if group is None else (signed[0::2], signed[1::2])
    packed = ((even & 15) | (odd & 15) << 4).to(torch.uint8).view(torch.int8)
    return {
        f"{name}.weight": packed.contiguous(),
        f"{name}.weight_scale": scale,
        f"{name}.weight_offset": (zero - 8).float(),
    }, meant


def as_it_is(name: str, weight: torch.Tensor, bias: torch.Tensor | None):
    return {f"{name}.weight": weight}, weight


def int8(weight: torch.Tensor):
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    return codes, scale


def modelslim_static(name: str, weight: torch.Tensor, bias: torch.Tensor | None, scale_in: float, offset: float):
    codes, scale = int8(weight)
    deq = scale * scale_in
    total = (torch.zeros(len(scale)) if bias is None else bias) / deq - offset * codes.sum(1, dtype=torch.int32)
    return {
        f"{name}.weight": codes,
        f"{name}.deq_scale": deq,
        f"{name}.quant_bias": torch.round(total).to(torch.int32),
        f"{name}.input_scale": torch.tensor([scale_in]),
        f"{name}.input_offset": torch.tensor([offset]),
    }, codes * scale[:, None]


def compressed_static(name: str, weight: torch.Tensor, scale_in: float, offset: float | None):
    codes, scale = int8(weight)
    state = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale[:, None],
        f"{name}.input_scale": torch.tensor([scale_in]),
    }
    if offset is not None:
        state[f"{name}.input_zero_point"] = torch.tensor([offset]).to(torch.int8)
    return state, codes * scale[:, None]


def write(source: Path, folder: Path, make, settings: dict, *, description: str | None = None) -> State:
    """A copy of `source` whose layers' linears are stored by `make(name, weight, bias)`; what they mean, by name."""
    shutil.copytree(source, folder)
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    meant, stored = dict(weights), dict(weights)
    types = {}
    for name in weights:
        linear = name.removesuffix(".weight")
        if not linear.endswith("_proj"):
            continue
        state, meant[name] = make(linear, weights[name], weights.get(f"{linear}.bias"))
        del stored[name]
        stored |= state
        types[name] = description
        if f"{linear}.quant_bias" in state:
            stored.pop(f"{linear}.bias", None)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    if description is not None:
        (folder / "quant_model_description.json").write_text(json.dumps(types))
        return meant
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return meant


def damage(folder: Path, change) -> None:
    """Let `change` alter the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def group_settings(weights: dict, inputs: dict | None, kind: str) -> dict:
    weights = {"type": "int", **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": kind}
    return {
        "quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }  # fmt: skip
