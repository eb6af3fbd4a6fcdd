"""The op table on a CPU: fewer passes over memory, and attention batched over the sequences of a decode step.

Functions not defined here are the reference's: on a CPU there is nothing faster for them in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ascend_kit.device.ops.reference import *  # noqa: F403 - the rest of this table
from ascend_kit.device.ops.reference import widened
from ascend_kit.device.ops.table import AttentionMeta


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in reference, through torch's fused kernel."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As in reference, through torch's fused kernel."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def paged_attention(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """As in reference; decode steps in one batched call, other steps one flash call a sequence."""
    k_cache, v_cache, meta = widened(q_TNH, k_cache, v_cache, meta)
    if meta.is_decode:
        return decode(q_TNH, k_cache, v_cache, meta, scale)
    return attend_mixed(q_TNH, k_cache, v_cache, meta, scale, decode)


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


def pack_int8(weight: Tensor) -> Tensor:
    """[in, out] view over the [out, in] codes: what torch's int8 product takes, without a copy."""
    return weight.contiguous().t()


def int8_matmul(
    xq: Tensor, act_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As in reference, with the product in int32 through torch's int8 kernel."""
    result = torch.ops.aten._int_mm(xq, weight).float() * act_scale.unsqueeze(-1) * weight_scale.float()
    return (result if bias is None else result + bias.float()).to(out_dtype)


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


def decode(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """One query token a sequence: gather each sequence's blocks, mask what lies beyond its length."""
    keys, values = (cache[meta.block_table].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    positions = torch.arange(keys.shape[2], device=q_TNH.device)
    visible = (positions < meta.context_lens_t.unsqueeze(1))[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(
        q_TNH.unsqueeze(2), keys, values, attn_mask=visible, scale=scale, enable_gqa=True
    ).squeeze(2)
