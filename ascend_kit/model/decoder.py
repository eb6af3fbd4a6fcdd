"""One decoder-only transformer for Qwen2, Qwen2.5, Qwen3 and Llama, over packed tokens and a paged KV cache.

Each part calls the op table it was built with and never asks for the device. Shape letters: T packed tokens, N query
heads, K KV heads, H head size, D hidden, F feed-forward (all per rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ascend_kit.device.ops import AttentionMeta
from ascend_kit.device.ops.reference import new_cache
from ascend_kit.device.parallel import TensorParallel
from ascend_kit.model.config import ModelConfig
from ascend_kit.model.quantized_layers import Int8Linear, KVScales, Product, Quantized, frozen
from ascend_kit.model.tensors import UNITS, layer_prefix

KVCache = tuple[Tensor, Tensor]  # keys and values, as `reference.new_cache` makes them


class Linear(Product):
    """x [T, in] -> [T, out] in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: ModuleType):
        super().__init__(ops.pack_linear(weight), bias, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class StackedLinear(nn.Module):
    """Several linears of one shape over the same x, in one batched product: results are contiguous, unlike slices."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None]):
        super().__init__()
        self.weight = frozen(torch.stack([weight.t() for weight in weights]))  # [P, in, out]
        present = [bias for bias in biases if bias is not None]
        self.bias = frozen(torch.stack(present).unsqueeze(1)) if present else None  # [P, 1, out]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.expand(self.weight.shape[0], *x.shape)
        product = torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)
        return product.unbind(0)


class SideBySide(nn.Module):
    """Linears on the same input, outputs joined: a merged product of parts that differ in kind or inputs."""

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; with a residual it adds first and returns both.

    `quantizes` says that a W8A8 linear alone reads a sum's norm, and that the op table quantises it in the same kernel.
    """

    def __init__(self, weight: Tensor, eps: float, ops: ModuleType):
        super().__init__()
        self.weight, self.eps, self.ops = frozen(weight), eps, ops
        self.quantizes = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor | Quantized, Tensor]:
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps)
        if self.quantizes:
            codes, scale, total = self.ops.add_rms_norm_quantize(x, residual, self.weight, self.eps)
            return Quantized(codes, scale, x.dtype), total
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(float32 [H/2] angles per position, factor of cosine and sine)."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies, scaling = 1.0 / config.rope_theta**half, config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, config), _yarn_attention_factor(scaling)


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # within the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling["factor"] * (1 - keep)


def _yarn(frequencies: Tensor, scaling: dict[str, Any], config: ModelConfig) -> Tensor:
    """YaRN (arXiv 2309.00071): as llama3's, but the ramp is even over the index of the frequency."""
    original, size = scaling["original_max_position_embeddings"], config.head_dim

    def index_of(turns: float) -> float:  # where a frequency makes so many turns within the original context
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = index_of(scaling.get("beta_fast", 32)), index_of(scaling.get("beta_slow", 1))
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    divide = (torch.arange(size // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    divide = divide.clamp(0, 1)
    return frequencies * (1 - divide) + frequencies / scaling["factor"] * divide


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


class Rotary(nn.Module):
    """Cosine and sine of every position, full head width (the half vector twice), [max_positions, H]."""

    def __init__(
        self, config: ModelConfig, max_positions: int, dtype: torch.dtype, device: torch.device, ops: ModuleType
    ):
        super().__init__()
        self.ops = ops
        frequencies, factor = rotary_frequencies(config)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        # Computed in float32 on the host and cast last: bf16 angles would be wrong from a few hundred tokens on.
        self.register_buffer("cos", (angles.cos() * factor).to(device, dtype), persistent=False)
        self.register_buffer("sin", (angles.sin() * factor).to(device, dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.gather_rows(self.cos, positions), self.ops.gather_rows(self.sin, positions)


class Attention(nn.Module):
    """Self-attention over the paged KV cache, with this rank's heads."""

    def __init__(
        self,
        config: ModelConfig,
        qkv: nn.ModuleList,
        out: nn.Module,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        ops: ModuleType,
        parallel: TensorParallel,
        kv_scales: KVScales | None = None,
    ):
        super().__init__()
        self.kv_scales = kv_scales
        self.qkv, self.out, self.q_norm, self.k_norm = qkv, out, q_norm, k_norm
        self.ops, self.parallel = ops, parallel
        self.num_heads = config.num_heads // parallel.size
        self.num_kv_heads = config.num_kv_heads // parallel.size
        self.head_dim, self.scale = config.head_dim, config.head_dim**-0.5

    def forward(
        self,
        x: Tensor | Quantized,
        cos: Tensor,
        sin: Tensor,
        meta: AttentionMeta,
        cache: KVCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self._project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.ops.rotary(q, k, cos, sin)
        if self.kv_scales is not None:
            q, k, v = self.kv_scales.encode(q, k, v)
        self.ops.store_kv(k, v, cache[0], cache[1], meta.slot_mapping, self.kv_scales is not None)
        mixed = self.ops.paged_attention(q, cache[0], cache[1], meta, self.scale)
        if self.kv_scales is not None:
            mixed = self.kv_scales.decode(mixed)
        if rows is not None:
            mixed = mixed.index_select(0, rows)
        mixed = self.out(mixed.flatten(1))
        return mixed if self.parallel.size == 1 else self.parallel.all_reduce(mixed)

    def _project(self, x: Tensor | Quantized) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, N, H], k and v [T, K, H], from one product, two (q; k and v stacked) or three."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if len(self.qkv) == 1:
            parts = self.ops.split_columns(self.qkv[0](x), [count * self.head_dim for count in heads])
        elif len(self.qkv) == 2:
            parts = [self.qkv[0](x), *self.qkv[1](x)]
        else:
            parts = [projection(x) for projection in self.qkv]
        q, k, v = (part.unflatten(-1, (count, self.head_dim)) for part, count in zip(parts, heads, strict=True))
        return q, k, v


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate) * up) with gate and up in one product."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, ops: ModuleType, parallel: TensorParallel):
        super().__init__()
        self.gate_up, self.down, self.ops, self.parallel = gate_up, down, ops, parallel

    def forward(self, x: Tensor | Quantized) -> Tensor:
        gate_up = self.gate_up(x)
        if isinstance(self.down, Int8Linear) and hasattr(self.ops, "swiglu_quantize"):
            codes, scale = self.ops.swiglu_quantize(gate_up)
            gated = Quantized(codes, scale, gate_up.dtype)
        else:
            gated = self.ops.swiglu(gate_up)
        down = self.down(gated)
        return down if self.parallel.size == 1 else self.parallel.all_reduce(down)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm that also carries the residual stream."""

    def __init__(self, input_norm: RMSNorm, attention: Attention, post_norm: RMSNorm, mlp: MLP):
        super().__init__()
        self.input_norm, self.attention, self.post_norm, self.mlp = input_norm, attention, post_norm, mlp
        for norm, readers in ((input_norm, [*attention.qkv]), (post_norm, [mlp.gate_up])):
            has_kernel = hasattr(norm.ops, "add_rms_norm_quantize")
            norm.quantizes = has_kernel and len(readers) == 1 and isinstance(readers[0], Int8Linear)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        meta: AttentionMeta,
        cache: KVCache,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """With `rows` (int64 [R]) only these tokens' results, [R, D]; all of them have their keys and values stored."""
        x, total = (self.input_norm(x), x) if residual is None else self.input_norm(x, residual)
        x = self.attention(x, cos, sin, meta, cache, rows)
        if rows is not None:
            total = total.index_select(0, rows)
        x, total = self.post_norm(x, total)
        return self.mlp(x), total


def build_layer(
    config: ModelConfig,
    number: int,
    *,
    qkv: Callable[[list[str]], Sequence[nn.Module]],
    linear: Callable[[list[str]], nn.Module],
    norm: Callable[[str], RMSNorm],
    ops: ModuleType,
    parallel: TensorParallel,
    kv_scales: KVScales | None = None,
) -> DecoderLayer:
    """A layer out of parts made from the full names of their tensors, without `.weight`.

    `linear` gets the linears that form one product, in the order of its outputs; `qkv` those of q, k and v.
    """
    prefix = layer_prefix(number)

    def unit(kind: str) -> list[str]:
        return [prefix + part for part in UNITS[kind]]

    q_norm, k_norm = (norm(f"{prefix}self_attn.{letter}_norm") if config.qk_norm else None for letter in "qk")
    projections = nn.ModuleList(qkv(unit("qkv")))
    attention = Attention(config, projections, linear(unit("o_proj")), q_norm, k_norm, ops, parallel, kv_scales)
    mlp = MLP(linear(unit("gate_up")), linear(unit("down_proj")), ops, parallel)
    return DecoderLayer(norm(f"{prefix}input_layernorm"), attention, norm(f"{prefix}post_attention_layernorm"), mlp)


class Embedding(nn.Module):
    """Token ids [T] -> [T, D]; a rank holds some of the columns, so that no row lookup has to be summed.

    With a scale, float32 [V], the weight holds int8 codes.
    """

    scale: Tensor | None

    def __init__(self, weight: Tensor, ops: ModuleType, parallel: TensorParallel):
        super().__init__()
        self.weight, self.ops, self.parallel, self.dtype = frozen(weight), ops, parallel, weight.dtype
        self.register_parameter("scale", None)

    def forward(self, token_ids: Tensor) -> Tensor:
        rows = self.ops.gather_rows(self.weight, token_ids)
        if self.scale is not None:
            rows = (rows.float() * self.scale.index_select(0, token_ids).unsqueeze(1)).to(self.dtype)
        return rows if self.parallel.size == 1 else self.parallel.all_gather(rows)


class Decoder(nn.Module):
    """The whole model on one rank. It knows token ids and KV slots, no text and no requests."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: nn.Module,
        rotary: Rotary,
        parallel: TensorParallel,
    ):
        super().__init__()
        self.config, self.parallel = config, parallel
        self.embedding, self.layers, self.norm, self.head = embedding, nn.ModuleList(layers), norm, head
        self.rotary = rotary

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        meta: AttentionMeta,
        caches: list[KVCache],
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, D] of packed tokens, after the last norm; writes their keys and values to the caches.

        With `rows` (int64 [R]) those of these tokens only, [R, D]: the last layer then leaves out what nobody reads.
        """
        x, residual = self.embedding(token_ids), None
        cos, sin = self.rotary(positions)
        for layer, cache in zip(self.layers[:-1], caches[:-1], strict=True):
            x, residual = layer(x, residual, cos, sin, meta, cache)
        x, residual = self.layers[-1](x, residual, cos, sin, meta, caches[-1], rows)
        return self.norm(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, vocabulary] in the model's dtype, gathered from all ranks."""
        logits = self.head(hidden)
        return logits if self.parallel.size == 1 else self.parallel.all_gather(logits)

    @property
    def num_kv_heads(self) -> int:
        return self.config.num_kv_heads // self.parallel.size

    def weight_bytes(self) -> int:
        """Bytes of all weights this rank holds; a tied matrix counts once."""
        tensors = {p.data_ptr(): p for p in self.parameters()}
        return sum(p.numel() * p.element_size() for p in tensors.values())

    def new_caches(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> list[KVCache]:
        """One pair of zeroed caches a layer, as `reference.new_cache` makes them."""
        shape = (num_blocks, block_size, self.num_kv_heads, self.config.head_dim)
        return [(new_cache(*shape, dtype, device), new_cache(*shape, dtype, device)) for _ in self.layers]
