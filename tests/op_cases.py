"""Steps and tensors for tests of operator tables."""

from __future__ import annotations

import torch

from ascend_kit.device.ops import AttentionMeta, reference

BLOCK = 128  # of the NPU's cases
# bf16 keeps 8 bits of mantissa; the kernels round once, the reference after every operator.
BF16 = dict(rtol=2e-2, atol=2e-2)


def on(device, *tensors):
    return tuple(t.to(device) for t in tensors) if len(tensors) > 1 else tensors[0].to(device)


def steps(device="cpu"):
    """Decode, prefill, a chunk behind a prefix, and all of them in one step, over scattered blocks."""
    return {
        "decode": make_meta([[3], [1, 2], [4, 5, 6]], [5, 128, 300], [1, 1, 1], device),
        "decode with dead rows": make_meta([[3], [0], [0]], [5, 1, 1], [1, 1, 1], device),
        "prefill": make_meta([[3], [1, 2]], [7, 129], [7, 129], device),
        "chunk after a prefix": make_meta([[7, 8, 9]], [290], [40], device),
        "mixed": make_meta([[3], [4], [1, 2], [5, 6]], [3, 128, 200, 130], [1, 1, 100, 130], device),
    }


def make_meta(table, lengths, new, device="cpu", block=BLOCK):
    """Where the tokens of a step lie: block tables, KV lengths and new tokens of its sequences."""
    ends = torch.tensor(new).cumsum(0).tolist()
    width = max(map(len, table))
    slots = [
        row[p // block] * block + p % block
        for row, length, count in zip(table, lengths, new, strict=True)
        for p in range(length - count, length)
    ]
    return AttentionMeta(
        slot_mapping=torch.tensor(slots, dtype=torch.int32).to(device),
        block_table=torch.tensor([row + [0] * (width - len(row)) for row in table], dtype=torch.int32).to(device),
        cu_seqlens_q=ends,
        context_lens=lengths,
        context_lens_t=torch.tensor(lengths, dtype=torch.int32).to(device),
        block_size=block,
        is_decode=all(count == 1 for count in new),
    )


def attention_case(step, heads, groups, size, dtype=torch.bfloat16, device="npu"):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    caches = draw(12, BLOCK, groups, size), draw(12, BLOCK, groups, size)
    q = draw(steps()[step].cu_seqlens_q[-1], heads, size)
    expected = reference.paged_attention(q, *caches, steps()[step], size**-0.5)
    return *on(device, q, *caches), steps(device)[step], expected
