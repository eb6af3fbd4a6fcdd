"""One source tensor in, one or more result tensors out, a block of rows at a time.

Casting and quantisation both work row by row, so no job ever holds more than one block of its tensor, however large
the tensor is. A job yields its results in the order of `outputs`; scales, which are complete only after the last row,
come after the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ascend_kit.checkpoint.quantized_tensors import pack_int4, pack_int8
from ascend_kit.checkpoint.tensor_file import CheckpointError, TensorSource
from ascend_kit.model.quantize import (
    dequantize_groups,
    dequantize_weight,
    encode,
    quantize_groups,
    search_clip,
    weight_scale,
)

BLOCK_BYTES = 1 << 20  # stays in the cache of a core from reading to writing


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class TensorJob:
    """`convert(rows, first row, row after the last)` of `source` gives these rows of the first output or the first two;
    a third holds the shape."""

    source: TensorSource
    outputs: tuple[OutputTensor, ...]
    convert: Callable[[Tensor, int, int], tuple[Tensor, ...]]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(index into `outputs`, block of rows)."""
        scales: list[Tensor] = []
        for start, stop, block in self._row_blocks():
            weight, *scale = self.convert(block, start, stop)
            scales += scale
            yield 0, weight
        if scales:
            yield 1, torch.cat(scales)
        if len(self.outputs) > 2:
            yield 2, torch.tensor(self.source.shape, dtype=torch.int64)

    def _row_blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(first row, row after the last, values) of blocks of about BLOCK_BYTES, checked for NaN and Inf."""
        shape = self.source.shape
        if not shape:
            yield 0, 1, self.source.read()
            return
        row_bytes = max(1, math.prod(shape[1:]) * self.source.dtype.itemsize)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            block = self.source.read_slice(0, start, stop)
            check_finite(block, self.outputs[0].name, self.source.origin, start)
            yield start, stop, block


@dataclass(frozen=True)
class ScaleChange:
    """Smoothing folded into a weight: rows divided by [out], columns multiplied by [in]; either may be
    None.
    """

    row_divisor: Tensor | None = None
    column_factor: Tensor | None = None

    def __call__(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the changed weight (or norm vector) in float32."""
        rows = rows.float()
        if self.column_factor is not None:
            rows = rows * self.column_factor
        if self.row_divisor is not None:
            divisor = self.row_divisor[start:stop]
            rows = rows / (divisor if rows.dim() == 1 else divisor[:, None])
        return rows


def cast_job(name: str, source: TensorSource, dtype: torch.dtype, change: ScaleChange | None = None) -> TensorJob:
    """A tensor in another float dtype, after an optional change such as folding smoothing factors in."""

    def convert(block: Tensor, start: int, stop: int) -> tuple[Tensor]:
        changed = change(block, start, stop) if change else block
        result = changed.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(changed.dtype).max:
            _check_range(changed, result, name, source.origin)
        return (result,)

    return TensorJob(source, (OutputTensor(name, dtype, source.shape),), convert)


@dataclass(frozen=True)
class Quantizer:
    """How the scale of a linear's rows is found.

    `clip` searches a smaller scale row by row, weighted by the mean square of each input [in] where that is
    known. Scales are numbers of the dtype `grid`, see `weight_scale`.
    """

    clip: bool = False
    grid: torch.dtype = torch.float32
    input_squares: Mapping[str, Tensor] = field(default_factory=dict)
    group_size: int = 128  # of 4-bit weights, whose scales are always searched

    def scale(self, linear: str, rows: Tensor) -> Tensor:
        """float32 [out] scales of some rows [out, in] of `linear`."""
        if self.clip:
            return search_clip(rows, self.input_squares.get(linear), self.grid)
        return weight_scale(rows, grid=self.grid)

    def codes(self, linear: str, rows: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
        """(codes int8 [out, in], scale float32 [out] or, in 4 bits, [out, groups]) of some rows of `linear`."""
        if scheme == "w4a16":
            return quantize_groups(rows, self.group_size, self.grid, self.input_squares.get(linear))
        scale = self.scale(linear, rows)
        return encode(rows, scale), scale

    def rounded(self, linear: str, weight: Tensor, scheme: str) -> Tensor:
        """float32 [out, in]: what becomes of a weight."""
        codes, scale = self.codes(linear, weight, scheme)
        return dequantize_groups(codes, scale, None) if scheme == "w4a16" else dequantize_weight(codes, scale)


def quantized_job(
    linear: str,
    source: TensorSource,
    scheme: str,
    codes: Callable[[Tensor, int, int], tuple[Tensor, Tensor]],
    groups: int = 1,
) -> TensorJob:
    """Codes and scales of a linear in the compressed-tensors layout; `codes(rows, first row, row after the last)` are
    int8 [rows, in] with scales [rows] or [rows, groups].

    w8a8: `weight` int8 [out, in], `weight_scale` float32 [out, 1].
    w8a16: `weight_packed` int32 [out, in / 4], `weight_scale`, `weight_shape` int64 [2] (the form vLLM reads).
    w4a16: the same with int32 [out, in / 8] and `weight_scale` float32 [out, groups].
    """
    rows, columns = source.shape
    outputs = (
        OutputTensor(f"{linear}.weight", torch.int8, (rows, columns)),
        OutputTensor(f"{linear}.weight_scale", torch.float32, (rows, groups)),
    )
    if scheme != "w8a8":
        words = OutputTensor(
            f"{linear}.weight_packed", torch.int32, (rows, -(-columns // (8 if scheme == "w4a16" else 4)))
        )
        outputs = (words, outputs[1], OutputTensor(f"{linear}.weight_shape", torch.int64, (2,)))

    def convert(block: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        found, scale = codes(block, start, stop)
        stored = found if scheme == "w8a8" else pack_int4(found) if scheme == "w4a16" else pack_int8(found)
        return stored, scale.reshape(stop - start, -1).float()

    return TensorJob(source, outputs, convert)


def check_finite(block: Tensor, name: str, origin: str, first_row: int) -> None:
    """CheckpointError naming tensor, file and row of the first NaN or Inf."""
    # A sum is a single fast pass and cannot be finite if an element is not; the slow search runs only on
    # suspicion.
    if not block.is_floating_point() or math.isfinite(float(block.sum())):
        return
    wrong = ~torch.isfinite(block.reshape(block.shape[0] if block.dim() else 1, -1))
    rows = wrong.any(dim=1).nonzero()
    if len(rows):
        row = int(rows[0])
        value = block.reshape(wrong.shape)[row][wrong[row]][0].item()
        raise CheckpointError(
            f"{origin}: tensor {name} holds {int(wrong.sum())} values that are NaN or infinite "
            f"(first: {value} in row {first_row + row}); the checkpoint is damaged or training "
            "diverged"
        )


def _check_range(before: Tensor, after: Tensor, name: str, origin: str) -> None:
    if not math.isfinite(float(after.sum())) and not bool(torch.isfinite(after).all()):
        raise CheckpointError(
            f"{origin}: tensor {name} reaches {before.abs().max().item():.4g}, above the largest "
            f"{str(after.dtype).removeprefix('torch.')} number; choose precision bf16 or fp32"
        )
