"""The op table on a CPU: fewer passes over memory, and attention batched over the sequences of a decode step.

Functions not defined here are the reference's: on a CPU there is nothing faster for them in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_kit.device.ops.reference import *  # noqa: F403 - the rest of this table
from ascend_kit.device.ops.reference import attend_mixed, widened
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


def pack_int8(weight: Tensor) -> Tensor:
    """[in, out] view over the [out, in] codes: what torch's int8 product takes, without a copy."""
    return weight.contiguous().t()


def int8_matmul(
    xq: Tensor, act_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """As in reference, with the product in int32 through torch's int8 kernel."""
    result = torch.ops.aten._int_mm(xq, weight).float() * act_scale.unsqueeze(-1) * weight_scale.float()
    return (result if bias is None else result + bias.float()).to(out_dtype)


def decode(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """One query token a sequence: gather each sequence's blocks, mask what lies beyond its length."""
    keys, values = (cache[meta.block_table].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    positions = torch.arange(keys.shape[2], device=q_TNH.device)
    visible = (positions < meta.context_lens_t.unsqueeze(1))[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(
        q_TNH.unsqueeze(2), keys, values, attn_mask=visible, scale=scale, enable_gqa=True
    ).squeeze(2)
