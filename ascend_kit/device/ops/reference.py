"""The op table in plain torch, on any device: slow, short, and the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ascend_kit.device.ops.table import AttentionMeta

SCALE_BYTES = 4  # of a float32 scale beside the int8 codes of one head of a token
MERGED_QKV = True
HOST_LENGTHS = False


def validate(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """Limits of this back-end that a model breaks; plain torch has none."""
    return []


def make_mask(device: torch.device) -> Tensor | None:
    """The mask shared by all attention calls, for back-ends that want one."""
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, returned in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the second is the residual stream for the next call."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotary(q_TNH: Tensor, k_TKH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the two halves of each head by position: x * cos + (-x2, x1) * sin, cos and sin full width."""
    cos, sin = cos_TH.unsqueeze(1), sin_TH.unsqueeze(1)
    return q_TNH * cos + _rotate_half(q_TNH) * sin, k_TKH * cos + _rotate_half(k_TKH) * sin


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up, where the first half of the last dimension is the gate."""
    gate, up = gate_up_T2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def store_kv(
    k_TKH: Tensor, v_TKH: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, are_codes: bool = False
) -> None:
    """Write this step's keys and values to their slots; caches are [blocks, S, K, H], or int8 (see `new_cache`).

    `are_codes`: the numbers are integers of -128..127 already, for an int8 cache that keeps them with the scale 1.
    """
    slots = slot_mapping.long()
    if k_cache.dtype == torch.int8:
        for x, cache in ((k_TKH, k_cache), (v_TKH, v_cache)):
            codes, scales = _int8_parts(cache, x.shape[1], x.shape[2])
            rows = x.reshape(-1, x.shape[2])
            new_codes, new_scales = (rows, rows.new_ones(len(rows))) if are_codes else quantize_per_token(rows)
            block, place = slots // codes.shape[1], slots % codes.shape[1]
            codes[block, place] = new_codes.view(x.shape).to(torch.int8)
            scales[block, place] = new_scales.view(x.shape[:2]).float()
        return
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slots, k_TKH)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slots, v_TKH)


def new_cache(
    num_blocks: int, block_size: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A zeroed cache of keys or values, [blocks, S, K, H] in `dtype`.

    With int8 [blocks, S * K * (H + 4)]: the codes [S, K, H] of a block, then a float32 scale for every token and head
    [S, K], largest number over 127: measured as the tokens come, so that nothing is to be calibrated.
    """
    if dtype == torch.int8:
        width = block_size * heads * (size + SCALE_BYTES)
        return torch.zeros(num_blocks, width, dtype=torch.int8, device=device)
    return torch.zeros(num_blocks, block_size, heads, size, dtype=dtype, device=device)


def _int8_parts(cache: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """Views of an int8 cache: codes [blocks, S, K, H] and scales [blocks, S, K]."""
    block = cache.shape[1] // (heads * (size + SCALE_BYTES))
    codes, scales = cache[:, : block * heads * size], cache[:, block * heads * size :]
    return codes.unflatten(1, (block, heads, size)), scales.view(torch.float32).unflatten(1, (block, heads))


def widened(
    q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta
) -> tuple[Tensor, Tensor, AttentionMeta]:
    """The blocks of a step's table out of int8 caches, in q's dtype, and a table of them; others as they are."""
    if k_cache.dtype != torch.int8:
        return k_cache, v_cache, meta
    size, table = q_TNH.shape[2], meta.block_table
    heads = k_cache.shape[1] // (meta.block_size * (size + SCALE_BYTES))
    blocks = table.flatten().long()
    wide = []
    for cache in (k_cache, v_cache):
        codes, scales = _int8_parts(cache, heads, size)
        wide.append((codes[blocks].float() * scales[blocks].unsqueeze(-1)).to(q_TNH.dtype))
    places = torch.arange(table.numel(), dtype=torch.int32, device=table.device).view(table.shape)
    return wide[0], wide[1], replace(meta, block_table=places)


def paged_attention(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """Causal attention of each sequence's new tokens over its cached keys, aligned at the end; returns [T, N, H]."""
    k_cache, v_cache, meta = widened(q_TNH, k_cache, v_cache, meta)
    if meta.packed is not None:  # every token as a sequence of its own
        owners, positions = meta.packed
        table, lengths = meta.block_table.index_select(0, owners), positions + 1
        return _decode(q_TNH, k_cache, v_cache, replace(meta, block_table=table, context_lens_t=lengths), scale)
    if meta.is_decode:
        return _decode(q_TNH, k_cache, v_cache, meta, scale)
    rows, start = [], 0
    for index, (end, length) in enumerate(zip(meta.cu_seqlens_q, meta.context_lens, strict=True)):
        blocks = meta.block_table[index, : math.ceil(length / meta.block_size)].long()
        keys = k_cache[blocks].flatten(0, 1)[:length]
        values = v_cache[blocks].flatten(0, 1)[:length]
        rows.append(_attend(q_TNH[start:end], keys, values, scale))
        start = end
    return torch.cat(rows)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]."""
    return torch.nn.functional.linear(x, weight, bias)


def pack_linear(weight: Tensor) -> Tensor:
    """The layout that a product wants, made once at load from [out, in]."""
    return weight


pack_int8 = pack_int8_weight = pack_int8_static = pack_linear  # the same from int8 [out, in], for the products below


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: (int8 [T, in], float32 scale [T]) with scale = max|x| / 127."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127.0
    # An all-zero row has scale 0; dividing by 1 instead keeps its codes at 0 rather than NaN.
    codes = torch.round(wide / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).clamp(-127, 127)
    return codes.to(torch.int8), scale


def int8_matmul(
    xq: Tensor, act_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """int8 [T, in] times packed int8 weight, scaled per row and per output channel in float32, as out_dtype."""
    # float64 holds every product sum of int8 exactly (127 * 127 * in < 2**53), and runs on every device's torch.
    total = (xq.double() @ weight.double().t()).float()
    result = total * act_scale.unsqueeze(-1) * weight_scale.float()
    return (result if bias is None else result + bias.float()).to(out_dtype)


def int8_weight_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times int8 weight [out, in] transposed, times weight_scale [out] float32, plus bias; x's dtype."""
    # The scale is per output channel, so it can be applied to the product instead of to the weight.
    product = torch.nn.functional.linear(x, weight.to(x.dtype)).float() * weight_scale
    return (product if bias is None else product + bias.float()).to(x.dtype)


def quantize_static(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """int8 [T, in] of x by one scale and offset (float32 [1] each): round(x / scale + offset) within -128..127."""
    return torch.round(x.float() / scale + offset).clamp_(-128, 127).to(torch.int8)


def int8_static_matmul(
    xq: Tensor, weight: Tensor, dequantization: Tensor, bias: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """(int8 [T, in] times packed int8 weight + bias int32 [out]) * dequantization float32 [out], as out_dtype."""
    total = xq.double() @ weight.double().t() + bias
    return (total.float() * dequantization).to(out_dtype)


def pack_int4(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(weight, scale, zero) as `int4_weight_matmul` wants them, from codes int8 [out, in] in -8..7, float32 scales and
    zero points [out, groups]: here two codes a byte, the even one in the lower half, uint8 [out, in / 2]."""
    low, high = codes[:, 0::2] & 15, codes[:, 1::2] & 15
    return (low | high << 4).view(torch.uint8), scale, zero


def int4_weight_matmul(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [T, in] times the dequantised weight [out, in] transposed, plus bias; x's dtype."""
    codes = torch.stack([weight.view(torch.int8) << 4 >> 4, weight.view(torch.int8) >> 4], -1)
    grouped = codes.reshape(*scale.shape, -1).float()
    if zero is not None:
        grouped = grouped - zero.unsqueeze(-1)
    wide = (grouped * scale.unsqueeze(-1)).reshape(len(scale), -1)
    return torch.nn.functional.linear(x, wide.to(x.dtype), None if bias is None else bias.to(x.dtype))


def split_columns(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """x [T, sum(widths)] in parts [T, width], in the form in which the table's other operators take them."""
    return x.split(widths, dim=-1)


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows [T, width] of a table [rows, width] by int32 ids [T]."""
    return table.index_select(0, ids)


def argmax(logits: Tensor) -> Tensor:
    """Index int64 [R] of the first largest number of each row [R, V]."""
    return logits.argmax(-1)


def _decode(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """One query token a sequence, all at once and without host lists, so that a captured graph can replay it."""
    keys, values = (cache[meta.block_table.long()].flatten(1, 2).float() for cache in (k_cache, v_cache))
    groups = q_TNH.shape[1] // keys.shape[2]
    scores = torch.einsum("bnh,bcnh->bnc", q_TNH.float(), keys.repeat_interleave(groups, 2)) * scale
    beyond = torch.arange(keys.shape[1], device=q_TNH.device) >= meta.context_lens_t.unsqueeze(1)
    weights = scores.masked_fill(beyond.unsqueeze(1), -math.inf).softmax(-1)
    return torch.einsum("bnc,bcnh->bnh", weights, values.repeat_interleave(groups, 2)).to(q_TNH.dtype)


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(groups, 1)
    values = values.float().repeat_interleave(groups, 1)
    scores = torch.einsum("qnh,knh->nqk", q.float(), keys) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + keys.shape[0] - q.shape[0])
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("nqk,knh->qnh", scores.softmax(-1), values).to(q.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


# --- for tables with a decode attention of their own -----------------------------------------------------------------


def attend_mixed(
    q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, decode: Callable[..., Tensor]
) -> Tensor:
    """The decoding sequences at the start of the step through `decode`, each prompt chunk in a flash call."""
    first = next(i for i, end in enumerate(meta.cu_seqlens_q) if end != i + 1)  # decoding sequences come first
    rows, start = [], first
    if first:
        decoding = replace(meta, block_table=meta.block_table[:first], context_lens_t=meta.context_lens_t[:first])
        rows.append(decode(q_TNH[:first], k_cache, v_cache, decoding, scale))
    for index in range(first, len(meta.context_lens)):
        end, length = meta.cu_seqlens_q[index], meta.context_lens[index]
        blocks = meta.block_table[index, : math.ceil(length / meta.block_size)]
        q = q_TNH[start:end].transpose(0, 1).unsqueeze(0)
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache)
        )
        rows.append(_flash(q, keys, values, scale).squeeze(0).transpose(0, 1))
        start = end
    return torch.cat(rows)


def _flash(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[1, N, Q, H] over [1, K, C, H]; causal, aligned at the end."""
    new, context = q.shape[-2], keys.shape[-2]
    if new == context or new == 1:
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=new > 1, scale=scale, enable_gqa=True
        )
    visible = torch.ones(new, context, dtype=torch.bool, device=q.device).tril(context - new)
    return torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=visible, scale=scale, enable_gqa=True
    )
