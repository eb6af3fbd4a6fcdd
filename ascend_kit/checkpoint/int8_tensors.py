"""Quantised linears in one common form, whatever is on disk: stored forms of their tensors, checks that layouts share.

An int8 linear `X` appears as (4-bit ones: see int4_layouts)

    X.weight        int8     [out, in]
    X.weight_scale  float32  [out]          weight = X.weight * X.weight_scale[:, None]
    X.bias          as stored, if any

    X.input_scale, X.input_offset  float32 [1], static activations only:  q = round(x / scale + offset), -128..127

Symmetric int8 weights, one scale per output channel. Everything else (fp8, transforms, 4-bit weights with 8-bit
activations) is refused by name.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ascend_kit.checkpoint.tensor_file import ByRows, CheckpointError, TensorSource, check_slice

W4A8 = (
    "4-bit weights with 8-bit activations, for which no dense operator has a documented contract on this card; "
    "quantise again as W4A16 or W8A8, or convert the float model with quantize: w4a16"
)


class ScaleColumn(ByRows):
    """A stored scale [out] or [out, 1] of any float dtype, presented as float32 [out]."""

    dtype = torch.float32

    def __init__(self, inner: TensorSource) -> None:
        self.inner, self.shape, self.origin = inner, (inner.shape[0],), inner.origin

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_slice(0, start, stop).reshape(-1).float()


class PackedInt8:
    """int8 values packed four to an int32 (offset by 128, little-endian, rows padded), as int8 [out, in]."""

    dtype = torch.int8

    def __init__(self, inner: TensorSource, shape: tuple[int, int]) -> None:
        self.inner, self.shape, self.origin = inner, shape, inner.origin

    def read(self) -> torch.Tensor:
        return self._unpack(self.inner.read())[:, : self.shape[1]].contiguous()

    def read_slice(self, dim: int, start: int, stop: int) -> torch.Tensor:
        check_slice("packed weight", self.shape, dim, start, stop)
        if dim == 0:
            return self._unpack(self.inner.read_slice(0, start, stop))[:, : self.shape[1]].contiguous()
        first = start // 4
        block = self._unpack(self.inner.read_slice(1, first, (stop + 3) // 4))
        return block[:, start - 4 * first : stop - 4 * first].contiguous()

    @staticmethod
    def _unpack(packed: torch.Tensor) -> torch.Tensor:
        return (packed.view(torch.uint8) ^ 128).view(torch.int8)


def pack_int8(values: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> int32 [out, ceil(in / 4)], the inverse of PackedInt8; padding bytes are zero."""
    flipped = values.contiguous().view(torch.uint8) ^ 128
    missing = -values.shape[1] % 4
    return torch.nn.functional.pad(flipped, (0, missing)).contiguous().view(torch.int32)


def add_static(
    folder: Path, linear: str, scale: TensorSource | None, offset: TensorSource | None, result: dict[str, TensorSource]
) -> None:
    for name, source in (("input_scale", scale), ("input_offset", offset)):
        if source is None and name == "input_scale":
            raise CheckpointError(f"{folder}: {linear}.input_scale is missing, though its activations are static")
        if source is not None and torch.Size(source.shape).numel() != 1:
            raise CheckpointError(
                f"{source.origin}: {linear}.{name} has shape {list(source.shape)}; static activations are read with "
                "one scale and offset a tensor"
            )
        result[f"{linear}.{name}"] = _Number(source, folder)
    if not 0 < float(result[f"{linear}.input_scale"].read()) < float("inf"):
        raise CheckpointError(f"{folder}: {linear}.input_scale is no positive number")


class _Number(ByRows):
    """One stored number as float32 [1]; 0 where nothing is stored."""

    dtype = torch.float32

    def __init__(self, inner: TensorSource | None, folder: Path) -> None:
        self.inner, self.shape, self.origin = inner, (1,), str(folder) if inner is None else inner.origin

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return (torch.zeros(1) if self.inner is None else self.inner.read().reshape(1).float())[start:stop]


def check_linear(folder: Path, linear: str, result: dict[str, TensorSource]) -> None:
    weight, scale = result.get(f"{linear}.weight"), result.get(f"{linear}.weight_scale")
    if weight is None:
        raise CheckpointError(f"{folder}: {linear}.weight_scale has no {linear}.weight beside it")
    if weight.dtype != torch.int8 or len(weight.shape) != 2:
        raise CheckpointError(
            f"{weight.origin}: {linear}.weight is {weight.dtype} {weight.shape}, expected int8 [out, in]"
        )
    if scale is not None and (
        scale.shape not in ((weight.shape[0],), (weight.shape[0], 1)) or not scale.dtype.is_floating_point
    ):
        raise CheckpointError(
            f"{scale.origin}: {linear}.weight_scale is {scale.dtype} {scale.shape}, expected "
            f"float [{weight.shape[0]}] (one per output channel)"
        )
