"""Weights of 8 bits with one symmetric scale per output channel, and of 4 bits in groups: quantise, search a clip,
dequantise.

weight [out, in] float ~ codes * scale[:, None];  codes int8 [out, in] in -127..127;  scale float32 [out]. -128 is left
unused, so that negating a weight negates its code. Activations are quantised per token at run time by the op table
(`quantize_per_token`) and never here.

Of 4 bits, with a scale, and perhaps a zero point, for every group of inputs:
    weight[o, i] ~ (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)]
codes int8 [out, in] in -8..7; scale float32 [out, groups]; zero float32 [out, groups] on the codes' own axis, None = 0;
g(i) = i // group size, or `group_of` int32 [in] where groups were made of unlike inputs (GPTQ's act-order).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

INT8_MAX = 127
CLIP_CANDIDATES = tuple(1.0 - 0.02 * step for step in range(11))  # 1.00 down to 0.80 of the row's largest value


def weight_scale(weight: Tensor, clip_ratio: Tensor | float = 1.0, grid: torch.dtype = torch.float32) -> Tensor:
    """float32 [out]: largest absolute value of each row times `clip_ratio` / 127; 1.0 for a row of zeros.

    With a narrow `grid` every scale is rounded up to a number of that dtype. Readers that keep scales in
    the model's dtype (transformers, vLLM's packed kernels) then compute with the very scale the codes were
    made for.
    """
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).float() * clip_ratio
    scale = largest / INT8_MAX
    # A row below the smallest normal number would make 1 / scale infinite; its codes are zeros either way.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    return on_grid(scale, grid)


def on_grid(scale: Tensor, grid: torch.dtype) -> Tensor:
    """float32 positive scales as numbers of `grid`: those that are not on it become the next one above."""
    if grid == torch.float32:
        return scale
    nearest = scale.to(grid)
    above = (nearest.view(torch.int16) + 1).view(grid)  # neighbours of one sign have neighbouring bits
    return torch.where(nearest.float() < scale, above.float(), nearest.float())


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 codes of `weight` [out, in] for a given float32 `scale` [out]."""
    return (weight.float() / scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scale float32 [out]) of a float weight [out, in]."""
    if weight.dim() != 2:
        raise ValueError(f"a weight to quantise is [out, in], got shape {tuple(weight.shape)}")
    scale = weight_scale(weight)
    return encode(weight, scale), scale


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[out, in] in `dtype`; the product is formed in float32."""
    return (codes.float() * scale.float().reshape(-1, 1)).to(dtype)


def search_clip(weight: Tensor, input_square: Tensor | None = None, grid: torch.dtype = torch.float32) -> Tensor:
    """float32 [out] scale with the smallest squared output error over a few clip ratios, row by row.

    `input_square` [in] is the mean square of each input feature on calibration text; without it every feature
    counts the same. The ratio 1.0 is a candidate, so a row never gets worse in this measure.
    """
    importance = torch.ones(weight.shape[1]) if input_square is None else input_square.float()
    wide = weight.float()
    best_scale = weight_scale(wide, 1.0, grid)
    best_error = torch.full_like(best_scale, torch.inf)
    for ratio in CLIP_CANDIDATES:
        scale = weight_scale(wide, ratio, grid)
        codes = torch.round(wide / scale[:, None]).clamp_(-INT8_MAX, INT8_MAX)
        error = codes.mul_(scale[:, None]).sub_(wide).square_() @ importance
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


# --- 4 bits -----------------------------------------------------------------------------------------------------------

GROUP_SIZES = (128, 64, 32)
LOWEST, HIGHEST = -8, 7
CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(8))  # of the largest value of a group over 7


def best_group_size(widths: Iterable[int]) -> int | None:
    """The largest usual group size that divides all of these input widths, None where none does."""
    widths = list(widths)
    return next((size for size in GROUP_SIZES if all(width % size == 0 for width in widths)), None)


def group_size_for(widths: Iterable[int]) -> int:
    """As `best_group_size`; ValueError names the widths where there is none."""
    widths = sorted(set(widths))
    size = best_group_size(widths)
    if size is not None:
        return size
    raise ValueError(
        f"quantize=w4a16 needs input widths that are multiples of {GROUP_SIZES[-1]}, this model has "
        f"{', '.join(map(str, widths))}; keep those linears (quantize_keep)"
    )


def per_input(values: Tensor, width: int, group_of: Tensor | None = None) -> Tensor:
    """[out, groups] -> [out, in]: the value of each input's group."""
    if group_of is not None:
        return values[:, group_of.long()]
    return values.repeat_interleave(width // values.shape[1], dim=1)


def dequantize_groups(codes: Tensor, scale: Tensor, zero: Tensor | None, group_of: Tensor | None = None) -> Tensor:
    """float32 [out, in]."""
    wide, width = codes.float(), codes.shape[1]
    if zero is not None:
        wide = wide - per_input(zero.float(), width, group_of)
    return wide * per_input(scale.float(), width, group_of)


def quantize_groups(
    weight: Tensor, group_size: int, grid: torch.dtype = torch.float32, input_square: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scale float32 [out, groups]) with the smallest squared output error over some clip ratios.

    `input_square` [in] is the mean square of each input on calibration text; without it every input counts the same.
    """
    rows, width = weight.shape
    grouped = weight.float().reshape(rows, -1, group_size)
    importance = torch.ones(width) if input_square is None else input_square.float()
    importance = importance.to(weight.device).reshape(1, -1, group_size)
    largest = grouped.abs().amax(-1) / HIGHEST
    largest = torch.where(largest < torch.finfo(torch.float32).tiny, 1.0, largest)
    best_error = torch.full_like(largest, torch.inf)
    best_scale, best_codes = largest, torch.zeros_like(grouped)
    for ratio in CLIP_RATIOS:
        scale = on_grid(largest * ratio, grid)
        codes = (grouped / scale.unsqueeze(-1)).round_().clamp_(LOWEST, HIGHEST)
        error = (codes * scale.unsqueeze(-1)).sub_(grouped).square_().mul_(importance).sum(-1)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
        best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
    return best_codes.reshape(rows, width).to(torch.int8), best_scale
