"""Plain-torch operators that a captured graph may contain, on any device: no length is read on the host.

The reference reads context lengths on the host, which is short but would freeze them into a recorded step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascend_kit.device.ops import AttentionMeta


def decode_attention(
    q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float
) -> Tensor:
    """One query token a sequence, [T, N, H]: gather every listed block, mask what lies beyond each length."""
    heads, groups = q_TNH.shape[1], k_cache.shape[2]
    keys, values = (_gather(cache, meta.block_table) for cache in (k_cache, v_cache))  # [B, K, C, H]
    q_BKGH = q_TNH.float().unflatten(1, (groups, heads // groups))
    scores = torch.matmul(q_BKGH, keys.transpose(2, 3)) * scale  # [B, K, G, C]
    positions = torch.arange(keys.shape[2], device=q_TNH.device, dtype=torch.int32)
    hidden = positions >= meta.context_lens_t.unsqueeze(1)
    scores = scores.masked_fill(hidden[:, None, None, :], -math.inf)
    return torch.matmul(scores.softmax(-1), values).flatten(1, 2).to(q_TNH.dtype)


def _gather(cache: Tensor, block_table: Tensor) -> Tensor:
    batch, width = block_table.shape
    blocks = cache.index_select(0, block_table.flatten())
    return blocks.view(batch, width * cache.shape[1], *cache.shape[2:]).transpose(1, 2).float()
