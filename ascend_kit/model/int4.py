"""4-bit weights with a scale, and perhaps a zero point, for every group of inputs.

    weight[o, i] ~ (codes[o, i] - zero[o, g(i)]) * scale[o, g(i)]
codes int8 [out, in] in -8..7; scale float32 [out, groups]; zero float32 [out, groups] on the codes' own axis, None = 0;
g(i) = i // group size, or `group_of` int32 [in] where groups were made of unlike inputs (GPTQ's act-order).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ascend_kit.model.int8 import on_grid

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
