"""int8 weights with one symmetric scale per output channel: quantise, search a clip, dequantise.

weight [out, in] float;  codes int8 [out, in] in -127..127;  scale float32 [out];  weight ~ codes * scale[:,
None]. -128 is left unused, so that negating a weight negates its code. Activations are quantised per token
at run time by the op table (`quantize_per_token`) and never here.
"""

from __future__ import annotations

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
    largest = weight.abs().amax(dim=1).float() * clip_ratio
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
    return torch.round(weight.float() / scale[:, None]).clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


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
    best_error = _row_error(wide, best_scale, importance)
    for ratio in CLIP_CANDIDATES[1:]:
        scale = weight_scale(wide, ratio, grid)
        error = _row_error(wide, scale, importance)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def _row_error(weight: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    difference = torch.round(weight / scale[:, None]).clamp_(-INT8_MAX, INT8_MAX).mul_(scale[:, None]).sub_(weight)
    return difference.square_() @ importance
