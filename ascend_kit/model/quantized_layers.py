"""Linears whose weights have 8 or 4 bits, and the scales of an int8 KV cache that a checkpoint brings."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn


def frozen(tensor: Tensor) -> nn.Parameter:
    """A weight: moved with the module, never trained."""
    return nn.Parameter(tensor, requires_grad=False)


class Quantized(NamedTuple):
    """Activations that a fused operator has quantised already, for linears that take them so."""

    codes: Tensor  # int8 [T, in]
    scale: Tensor  # float32 [T]
    dtype: torch.dtype  # of the model


class Product(nn.Module):
    """A weight in the form that the op table wants, and perhaps a bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: ModuleType):
        super().__init__()
        self.ops, self.weight = ops, frozen(weight)
        self.bias = None if bias is None else frozen(bias)


class Int8Linear(Product):
    """W8A8: int8 weight with a scale per output channel, activations quantised per token at run time."""

    def __init__(self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, ops: ModuleType):
        super().__init__(ops.pack_int8(codes), bias, ops)
        self.weight_scale = frozen(weight_scale.reshape(-1).float())

    def forward(self, x: Tensor | Quantized) -> Tensor:
        codes, scale, dtype = x if isinstance(x, Quantized) else (*self.ops.quantize_per_token(x), x.dtype)
        return self.ops.int8_matmul(codes, scale, self.weight, self.weight_scale, self.bias, dtype)


class Int8WeightLinear(Product):
    """W8A16: int8 weight with a scale per output channel, activations in the model's dtype."""

    def __init__(self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, ops: ModuleType):
        super().__init__(ops.pack_int8_weight(codes), bias, ops)
        self.weight_scale = frozen(weight_scale.reshape(-1).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.int8_weight_matmul(x, self.weight, self.weight_scale, self.bias)


class Int8StaticLinear(Product):
    """W8A8 with one scale and offset for all activations, found at calibration: q = round(x / scale + offset)."""

    def __init__(
        self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, scale: Tensor, offset: Tensor, ops: ModuleType
    ):
        dequantization = weight_scale.reshape(-1).float() * scale
        # The offset's share of every sum, and the bias, in steps of the product.
        total = -offset * codes.sum(1, dtype=torch.int64)
        total = total if bias is None else total + bias.double() / dequantization
        super().__init__(ops.pack_int8_static(codes), total.round().to(torch.int32), ops)
        self.dequantization = frozen(dequantization)
        self.scale, self.offset = frozen(scale.float()), frozen(offset.float())

    def forward(self, x: Tensor) -> Tensor:
        codes = self.ops.quantize_static(x, self.scale, self.offset)
        return self.ops.int8_static_matmul(codes, self.weight, self.dequantization, self.bias, x.dtype)


class Int4WeightLinear(Product):
    """W4A16: 4-bit weight with a scale, and perhaps a zero point, per group of inputs; see model/quantize.

    `order` int64 [in] brings the inputs of each group together where groups are not of neighbours.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        ops: ModuleType,
        order: Tensor | None = None,
    ):
        codes = codes if order is None else codes.index_select(1, order)
        weight, scale, zero = ops.pack_int4(codes, scale.float(), None if zero is None else zero.float())
        super().__init__(weight, bias, ops)
        self.weight_scale = frozen(scale)
        self.zero, self.order = (None if tensor is None else frozen(tensor) for tensor in (zero, order))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x.index_select(1, self.order)
        return self.ops.int4_weight_matmul(x, self.weight, self.weight_scale, self.zero, self.bias)


class KVScales(nn.Module):
    """An int8 cache's scales as a checkpoint brings them: code = round(x / scale + offset), in -128..127, per channel.

    scales and offsets float32 [2, K, H], of keys and of values. The scale of a key's channel goes to the query; a key's
    offset adds the same to all scores of a query, which the softmax does not see.
    """

    def __init__(self, scales: Tensor, offsets: Tensor, queries_per_key: int):
        super().__init__()
        self.scales, self.offsets = frozen(scales), frozen(offsets)
        self.of_query = frozen(scales[0].repeat_interleave(queries_per_key, 0))
        self.of_output, self.taken_off = (frozen(t[1].repeat_interleave(queries_per_key, 0)) for t in (scales, offsets))

    def encode(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries over codes, and codes of keys and values in their dtype, which holds them exactly."""
        k, v = ((x.float() / self.scales[at] + self.offsets[at]).round().clamp(-128, 127).to(x.dtype) for at, x in
                enumerate((k, v)))  # fmt: skip
        return (q.float() * self.of_query).to(q.dtype), k, v

    def decode(self, mixed: Tensor) -> Tensor:
        """What attention over codes of values stands for, [T, N, H]."""
        return ((mixed.float() - self.taken_off) * self.of_output).to(mixed.dtype)
