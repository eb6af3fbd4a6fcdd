"""CPU kernels of torch_npu's quantising operators and products over quantised weights; see kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import impl

from npu_sim.kernels import rms_norm
from npu_sim.limits import HALF, LIBRARY, check_contiguous, check_dtype, require
from npu_sim.traits import checks


@checks("npu::npu_dynamic_quant")
def _check_dynamic_quant(input: Tensor, **options: Any) -> None:
    check_dtype("npu_dynamic_quant", HALF, input=input)
    require(input.dim() > 1, "npu_dynamic_quant", f"x of {tuple(input.shape)} needs two dimensions")


@impl(LIBRARY, "npu_dynamic_quant")
def dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Any = None,
    dst_type: Any = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_dynamic_quant(input)
    require(group_index is None and quant_mode == "pertoken", "npu_dynamic_quant", "only per token is simulated")
    return _codes(input.float() * (1.0 if smooth_scales is None else smooth_scales.float()))


def _codes(wide: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales of rows."""
    scale = wide.abs().amax(-1) / 127.0
    codes = torch.round(wide / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).clamp(-128, 127)
    return codes.to(torch.int8), scale


@checks("npu::npu_add_rms_norm_dynamic_quant")
def _check_add_rms_norm_dynamic_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6, **other: Any
) -> None:
    name = "npu_add_rms_norm_dynamic_quant"
    check_dtype(name, HALF, x1=x1)
    check_dtype(name, (x1.dtype,), x2=x2, gamma=gamma)
    check_contiguous(name, x1=x1, x2=x2, gamma=gamma)
    require(x1.shape == x2.shape, name, f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ")
    require(x1.dim() > 1 and x1.numel() > 0, name, f"x1 of {tuple(x1.shape)}: two dimensions, none of them 0")
    require(gamma.shape == x1.shape[-1:], name, f"gamma {tuple(gamma.shape)} does not fit x1")


@impl(LIBRARY, "npu_add_rms_norm_dynamic_quant")
def add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: Any = None,
    y_dtype: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The norm goes to the codes in float32; the second pair of results has no meaning without a second scale."""
    _check_add_rms_norm_dynamic_quant(x1, x2, gamma)
    plain = smooth_scale1 is None and smooth_scale2 is None and beta is None and output_mask is None
    require(plain and y_dtype is None, "npu_add_rms_norm_dynamic_quant", "only the plain int8 form is simulated")
    total = x1 + x2
    codes, scale = _codes(rms_norm(total.float(), gamma.float(), epsilon)[0])
    return codes, torch.zeros(1, dtype=torch.int8), total, scale, torch.zeros(1)


@checks("npu::npu_dequant_swiglu_quant")
def _check_dequant_swiglu_quant(x: Tensor, *, quant_mode: int = 0, activate_left: bool = False, **other: Any) -> None:
    name = "npu_dequant_swiglu_quant"
    check_dtype(name, (torch.bfloat16,), x=x)
    check_contiguous(name, x=x)
    require(x.dim() == 2 and x.shape[1] % 2 == 0, name, f"x of {tuple(x.shape)}: [T, 2H] is wanted")
    require(quant_mode == 1, name, "only dynamic scales (quant_mode 1) are simulated")


@impl(LIBRARY, "npu_dequant_swiglu_quant")
def dequant_swiglu_quant(
    x: Tensor, *, activate_left: bool = False, quant_mode: int = 0, **other: Any
) -> tuple[Tensor, Tensor]:
    _check_dequant_swiglu_quant(x, quant_mode=quant_mode)
    first, second = x.float().chunk(2, -1)
    gate, up = (first, second) if activate_left else (second, first)
    return _codes(torch.nn.functional.silu(gate) * up)


_OUTPUTS = {torch.float16: 5, torch.bfloat16: 15, torch.int32: 3, torch.int8: 1}  # c10::ScalarType


@checks("npu::npu_quant_matmul")
def _check_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    offset: Any = None,
    **other: Any,
) -> None:
    name = "npu_quant_matmul"
    check_dtype(name, (torch.int8,), x1=x1, x2=x2)
    require(x1.shape[-1] == x2.shape[-2], name, f"{tuple(x1.shape)} times {tuple(x2.shape)}")
    require(x1.shape[-1] <= 65535 and x2.shape[-1] <= 65535, name, f"a last dimension above 65535: {tuple(x2.shape)}")
    require(scale.dim() == 1 and scale.shape[0] in (1, x2.shape[-1]), name, f"scale {tuple(scale.shape)}")
    check_contiguous(name, x1=x1, scale=scale, pertoken_scale=pertoken_scale)
    out = (
        next((k for k, v in _OUTPUTS.items() if v == int(output_dtype)), None)
        if output_dtype is not None
        else torch.int8
    )
    require(out is not None, name, f"output_dtype {output_dtype}")
    if pertoken_scale is None:
        check_dtype(name, (torch.int32, torch.bfloat16) if out == torch.bfloat16 else (torch.int32,), bias=bias)
        of_scale = {
            torch.bfloat16: (torch.float32, torch.bfloat16, torch.int64),
            torch.float16: (torch.float32, torch.int64),
        }
        check_dtype(name, of_scale.get(out, (torch.int64,)), scale=scale)
    if pertoken_scale is not None:
        check_dtype(name, (torch.float32,), pertoken_scale=pertoken_scale)
        require(
            tuple(pertoken_scale.shape) == tuple(x1.shape[:1]), name, f"pertoken_scale {tuple(pertoken_scale.shape)}"
        )
        allowed = {torch.bfloat16: (torch.float32, torch.bfloat16), torch.float16: (torch.float32,)}
        require(out in allowed, name, f"output {out} with pertoken_scale; None means int8")
        check_dtype(name, allowed[out], scale=scale)
        check_dtype(name, (torch.int32, torch.float32, out), bias=bias)
    require(offset is None, name, "offset is not simulated")


@impl(LIBRARY, "npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Any = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = None,
    **other: Any,
) -> Tensor:
    _check_quant_matmul(x1, x2, scale, pertoken_scale=pertoken_scale, bias=bias, output_dtype=output_dtype)
    total = x1.double() @ x2.double()
    if bias is not None and bias.dtype == torch.int32:  # added to the sums, before they are scaled
        total, bias = total + bias, None
    result = total.float() * scale.float()
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None:
        result = result + bias.float()
    codes = {code: dtype for dtype, code in _OUTPUTS.items()}
    return result.to(codes[int(output_dtype)] if output_dtype is not None else torch.int8)


@checks("npu::npu_quantize")
def _check_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: Any, axis: int = 1, div_mode: bool = True
) -> None:
    name = "npu_quantize"
    check_dtype(name, (torch.float32, *HALF), input=input)
    check_dtype(name, (input.dtype,), scales=scales, zero_points=zero_points)
    check_contiguous(name, input=input, scales=scales)
    require(not div_mode, name, "division is not simulated; pass the inverse and div_mode=False")
    require(axis in (-1, input.dim() - 1), name, f"axis {axis} of {input.dim()} dimensions")
    require(scales.dim() == 1 and scales.shape[0] in (1, input.shape[-1]), name, f"scales {tuple(scales.shape)}")
    require(zero_points is None or zero_points.shape == scales.shape, name, "zero_points of another shape than scales")


@impl(LIBRARY, "npu_quantize")
def quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: Any, axis: int = 1, div_mode: bool = True
) -> Tensor:
    _check_quantize(input, scales, zero_points, dtype, axis, div_mode)
    offset = 0.0 if zero_points is None else zero_points.float()
    return torch.round(input.float() * scales.float() + offset).clamp(-128, 127).to(torch.int8)


@checks("npu::npu_convert_weight_to_int4pack")
def _check_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> None:
    name = "npu_convert_weight_to_int4pack"
    check_dtype(name, (torch.int32,), weight=weight)
    check_contiguous(name, weight=weight)
    require(weight.dim() == 2 and weight.shape[1] % 8 == 0, name, f"weight {tuple(weight.shape)}")


@impl(LIBRARY, "npu_convert_weight_to_int4pack")
def convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    _check_int4pack(weight)
    require(bool(((weight >= -8) & (weight <= 7)).all()), "npu_convert_weight_to_int4pack", "a value beyond -8..7")
    nibbles = (weight & 15).unflatten(1, (-1, 8)).to(torch.int64)
    words = sum(nibbles[..., at] << (4 * at) for at in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _four_bits(weight: Tensor) -> Tensor:
    """int32 [in, out / 8] -> [in, out]."""
    parts = [(weight.to(torch.int64) >> (4 * at)) & 15 for at in range(8)]
    values = torch.stack(parts, -1).flatten(1)
    return torch.where(values > 7, values - 16, values)


@checks("npu::npu_weight_quant_batchmatmul")
def _check_weight_quant(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    **other: Any,
) -> None:
    name = "npu_weight_quant_batchmatmul"
    check_dtype(name, HALF, x=x)
    check_dtype(name, (torch.int8, torch.int32), weight=weight)
    check_dtype(name, (x.dtype,), antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    check_dtype(name, (torch.float32 if x.dtype == torch.bfloat16 else torch.float16,), bias=bias)
    require(x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0], name, f"{x.shape} times {weight.shape}")
    columns = weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    require(max(weight.shape[0], columns) <= 65535, name, f"a dimension above 65535: {tuple(weight.shape)}")
    shape, size = (columns,), antiquant_group_size
    if size:
        require(size % 32 == 0 and 32 <= size <= x.shape[1] - 1, name, f"group size {size} of {x.shape[1]} inputs")
        shape = (-(-x.shape[1] // size), columns)
    require(tuple(antiquant_scale.shape) == shape, name, f"scale {tuple(antiquant_scale.shape)}, group size {size}")
    require(
        antiquant_offset is None or tuple(antiquant_offset.shape) == shape, name, "offset of another shape than scale"
    )
    check_contiguous(name, antiquant_scale=antiquant_scale)
    require(quant_scale is None, name, "int8 results are not simulated")


@impl(LIBRARY, "npu_weight_quant_batchmatmul")
def weight_quant_matmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    **other: Any,
) -> Tensor:
    size = antiquant_group_size
    _check_weight_quant(x, weight, antiquant_scale, antiquant_offset, quant_scale, quant_offset, bias, size)
    codes = (_four_bits(weight) if weight.dtype == torch.int32 else weight).float()
    scale = antiquant_scale.float().reshape(-1, 1, codes.shape[1])
    offset = 0.0 if antiquant_offset is None else antiquant_offset.float().reshape(scale.shape)
    grouped = (codes.reshape(scale.shape[0], -1, codes.shape[1]) + offset) * scale
    result = x.float() @ grouped.flatten(0, 1)
    return (result if bias is None else result + bias.float()).to(x.dtype)
