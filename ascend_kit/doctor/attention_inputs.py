"""Attention steps for the self-test: requests of chosen lengths over a random KV cache, with their meta.

T packed tokens, N query heads, K KV heads, H head size, S tokens per KV block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ascend_kit.device.ops import AttentionMeta

# Query heads, KV heads, head size of Qwen2.5-7B, Qwen3-8B and Qwen2.5-0.5B (GQA with heads of 64).
HEADS = ((28, 4, 128), (32, 8, 128), (14, 2, 64))


@dataclass(frozen=True)
class AttentionCase:
    """Requests of one step as (new tokens, KV length with them), and rows of padding behind them."""

    name: str
    requests: tuple[tuple[int, int], ...]
    num_dead: int = 0

    @property
    def is_decode(self) -> bool:
        return all(new == 1 for new, _ in self.requests)


def attention_cases(block: int) -> tuple[AttentionCase, ...]:
    """Prefill, chunks behind a prefix, decode across block limits, padding rows, a wide batch."""
    ragged = (1, 2, block - 1, block, block + 1, 2 * block, 3 * block + 7)
    return (
        AttentionCase("prefill", ((5, 5), (block + 2, block + 2), (2 * block + 1, 2 * block + 1))),
        AttentionCase("chunked prefill with prefix", ((72, block + 72), (1, block + 1), (block, 3 * block), (17, 40))),
        AttentionCase("decode, lengths across block limits", tuple((1, length) for length in ragged)),
        AttentionCase("decode with dead rows", tuple((1, length) for length in ragged[2:5]), num_dead=2),
        AttentionCase("decode, 64 requests", tuple((1, 1 + 37 * row % (4 * block)) for row in range(64))),
    )


@dataclass
class AttentionInputs:
    """Tensors of a case: q [T, N, H], this step's k and v [T, K, H], caches [blocks, S, K, H], the meta."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMeta
    num_live: int

    def to(self, device: torch.device, dtype: torch.dtype, mask: Tensor | None) -> AttentionInputs:
        """Copies on a device, even from there: an operator must not write into what it is compared with."""
        floats = ("q", "k", "v", "k_cache", "v_cache")
        integers = ("slot_mapping", "block_table", "context_lens_t")
        meta = {name: getattr(self.meta, name).to(device, copy=True) for name in integers}
        tensors = {name: getattr(self, name).to(device, dtype, copy=True) for name in floats}
        return replace(self, meta=replace(self.meta, mask=mask, **meta), **tensors)


def make_inputs(
    case: AttentionCase, heads: tuple[int, int, int], block: int, dtype: torch.dtype, seed: int = 0
) -> AttentionInputs:
    """Random caches, blocks handed out in random order, values rounded to `dtype` (kept as float32)."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_size = heads
    live = list(case.requests)
    counts = [-(-length // block) for _, length in live]
    ids = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    num_rows, width = len(live) + case.num_dead, max(counts)
    table = torch.zeros(num_rows, width, dtype=torch.int32)
    slots: list[int] = []
    for row, ((new, length), count) in enumerate(zip(live, counts, strict=True)):
        own, ids = ids[:count], ids[count:]
        table[row, :count] = torch.tensor(own, dtype=torch.int32)
        slots += [own[position // block] * block + position % block for position in range(length - new, length)]
    slots += range(case.num_dead)  # block 0 is nobody's; each dead row has a slot of its own there
    news = [new for new, _ in live] + [1] * case.num_dead
    lengths = [length for _, length in live] + [1] * case.num_dead
    meta = AttentionMeta(
        slot_mapping=torch.tensor(slots, dtype=torch.int32),
        block_table=table,
        cu_seqlens_q=torch.tensor(news).cumsum(0).tolist(),
        context_lens=lengths,
        context_lens_t=torch.tensor(lengths, dtype=torch.int32),
        block_size=block,
        is_decode=case.is_decode,
    )

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).float()

    num_tokens, num_blocks = sum(news), sum(counts) + 1
    return AttentionInputs(
        values(num_tokens, num_heads, head_size),
        values(num_tokens, num_kv_heads, head_size),
        values(num_tokens, num_kv_heads, head_size),
        values(num_blocks, block, num_kv_heads, head_size),
        values(num_blocks, block, num_kv_heads, head_size),
        meta,
        num_tokens - case.num_dead,
    )
