"""Linears of msModelSlim, int8 and 4-bit, in the common form of quantized_tensors.

Of 4 bits: two's complement nibbles in bytes, along inputs (per channel) or outputs (per group), or one a byte. Of
static W8A8 the weight scale and the bias are recovered from the folded `deq_scale` and `quant_bias`. Facts:
Ascend/msmodelslim, https://www.hiascend.com/document/detail/zh/mindie/230/mindiellm/llmdev/mindie_llm0288.html (tensor
names, dtypes and shapes of W8A8).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ascend_kit.checkpoint.quantized_tensors import (
    MSMODELSLIM,
    W4A8,
    Part,
    add_static,
    present,
    present_int8,
    present_kv_scales,
)
from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.tensors import expected_shapes

SCHEMES = {"W8A8": "w8a8_static", "W8A8_DYNAMIC": "w8a8", "W8A8_MIX": "w8a8", "W8A16": "w8a16",
           "W4A16": "w4a16", "FLOAT": "none"}  # fmt: skip


def _dequantization(deq_scale: TensorSource, start: int, stop: int) -> torch.Tensor:
    """deq_scale as float32; int64 storage carries the float's bit pattern in its low half."""
    raw = deq_scale.read_slice(0, start, stop).reshape(-1)
    return (raw & 0xFFFFFFFF).to(torch.int32).view(torch.float32) if raw.dtype == torch.int64 else raw.float()


def _recovered_scale(deq_scale: TensorSource, input_scale: TensorSource) -> ByRows:
    """Weight scale of a static W8A8 linear: deq_scale / input_scale, float32 [out]."""

    def rows(start: int, stop: int) -> torch.Tensor:
        return _dequantization(deq_scale, start, stop) / input_scale.read().reshape(-1).float()

    return ByRows(rows, torch.float32, (deq_scale.shape[0],), deq_scale.origin)


def _recovered_bias(
    quant_bias: TensorSource, input_offset: TensorSource, weight: TensorSource, deq_scale: TensorSource
) -> ByRows:
    """Float bias of a static W8A8 linear, float32 [out].

    Stored is quant_bias = bias / deq_scale - input_offset * (row sum of the int8 weight).
    """

    def rows(start: int, stop: int) -> torch.Tensor:
        row_sums = weight.read_slice(0, start, stop).sum(dim=1, dtype=torch.int64)
        offset = int(input_offset.read().float().round().item())
        total = quant_bias.read_slice(0, start, stop).reshape(-1).to(torch.int64) + offset * row_sums
        return (total.double() * _dequantization(deq_scale, start, stop).double()).float()

    return ByRows(rows, torch.float32, (quant_bias.shape[0],), quant_bias.origin)


def present_msmodelslim(
    path: Path, described: dict[str, Any], config: dict[str, Any], sources: dict[str, TensorSource]
) -> dict[str, str]:
    """Replace msModelSlim's tensors by the common form; linear -> scheme."""
    schemes: dict[str, str] = {}
    present_kv_scales(MSMODELSLIM, sources)
    for name, kind in described.items():
        if not name.endswith(".weight") or name not in sources or kind == "FLOAT":
            continue
        if not isinstance(kind, str) or kind not in SCHEMES:
            why = f": {W4A8}" if str(kind).startswith("W4A8") else f"; readable: {', '.join(SCHEMES)}"
            raise CheckpointError(f"{path}: {name} is stored as {kind}{why}")
        linear = name.removesuffix(".weight")
        schemes[linear] = SCHEMES[kind]
        if kind != "W4A16":
            _present_linear(path, linear, kind, sources)
            continue
        shape = expected_shapes(ModelConfig.from_dict(config, where=f"{path.parent}/config.json")).get(name)
        if shape is None or f"{linear}.weight_scale" not in sources:
            raise CheckpointError(f"{path}: {name} is stored as W4A16 and has no weight_scale, or fits no linear")
        _present_bytes(linear, sources, (shape[0], shape[1]))
    return schemes


def _present_linear(path: Path, linear: str, kind: str, result: dict[str, TensorSource]) -> None:
    present_int8(path.parent, linear, result)
    offset = result.pop(f"{linear}.weight_offset", None)
    if offset is not None and bool(offset.read().ne(0).any()):
        raise CheckpointError(
            f"{offset.origin}: {linear}.weight_offset is not zero; only symmetric weights are read. "
            "Quantise again with w_sym=True"
        )
    scale, deq = result.get(f"{linear}.weight_scale"), result.pop(f"{linear}.deq_scale", None)
    input_scale, input_offset, quant_bias = (
        result.pop(f"{linear}.{key}", None) for key in ("input_scale", "input_offset", "quant_bias")
    )
    if scale is not None and kind != "W8A8":  # W8A8_MIX holds both
        return
    if deq is None or input_scale is None or input_offset is None or quant_bias is None:
        raise CheckpointError(
            f"{path}: {linear} needs weight_scale, or deq_scale with input_scale, input_offset and quant_bias"
        )
    rows = result[f"{linear}.weight"].shape[0]
    for part, count in ((deq, rows), (quant_bias, rows), (input_scale, 1), (input_offset, 1)):
        if torch.Size(part.shape).numel() != count:
            raise CheckpointError(
                f"{part.origin}: a part of static {linear} has shape {list(part.shape)}, expected {count} numbers"
            )
    result[f"{linear}.weight_scale"] = _recovered_scale(deq, input_scale)
    result[f"{linear}.bias"] = _recovered_bias(quant_bias, input_offset, result[f"{linear}.weight"], deq)
    if kind == "W8A8":
        add_static(linear, input_scale, input_offset, result)


def _present_bytes(linear: str, sources: dict[str, TensorSource], shape: tuple[int, int]) -> None:
    """Replace one W4A16 linear (two nibbles a byte, or one) by the common form."""
    (rows, width), scale = shape, sources[f"{linear}.weight_scale"]
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if width % groups:
        raise CheckpointError(f"{scale.origin}: {linear}.weight_scale has {groups} groups over {width} inputs")
    packed_dims: dict[tuple[int, ...], int | None] = {shape: None, (rows, width // 2): 1, (rows // 2, width): 0}
    dim = packed_dims.get(sources[f"{linear}.weight"].shape)

    def signed(block: torch.Tensor) -> torch.Tensor:
        if dim is None:
            return block
        low, high = (block.view(torch.int8) << 4) >> 4, block.view(torch.int8) >> 4
        return torch.stack([low, high], dim + 1).flatten(dim, dim + 1)

    form, table = {"dtype": torch.int8, "rows_in_one": 2 if dim == 0 else 1}, (rows, groups)
    parts = {
        "weight": Part("weight", list(packed_dims), shape, signed, [torch.int8, torch.uint8], **form),
        "weight_scale": Part("weight_scale", [table], table),
        "weight_zero_point": Part("weight_offset", [table], table),
    }
    present(linear, sources, parts)
