"""A tiny decode step, its inputs, and graphs around it."""

from __future__ import annotations

import torch

from ascend_kit.device.graphs import DecodeGraphs
from ascend_kit.device.ops import AttentionMeta, select_ops

BLOCK, BLOCKS, MAX_BLOCKS = 128, 12, 4
HEADS, GROUPS, SIZE, VOCABULARY = 4, 2, 128, 50


class TinyStep:
    """Embedding, one cache write, one attention and a head: enough to notice wrong inputs of any kind."""

    def __init__(self, device, kind, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(device)  # noqa: E731
        self.ops = select_ops(kind, fused=True)
        self.table, self.head = draw(VOCABULARY, HEADS * SIZE), draw(VOCABULARY, HEADS * SIZE)
        self.places = draw(1024, HEADS * SIZE)
        self.cache = draw(BLOCKS, BLOCK, GROUPS, SIZE), draw(BLOCKS, BLOCK, GROUPS, SIZE)

    def __call__(self, token_ids, positions, meta):
        x = self.ops.gather_rows(self.table, token_ids) + self.ops.gather_rows(self.places, positions)
        q = x.view(-1, HEADS, SIZE)
        self.ops.store_kv(q[:, :GROUPS].contiguous(), q[:, GROUPS:].contiguous(), *self.cache, meta.slot_mapping)
        mixed = self.ops.paged_attention(q, *self.cache, meta, SIZE**-0.5)
        return self.ops.linear(mixed.flatten(1), self.head)


def decode_inputs(lengths, device="cpu", seed=0):
    """Random tokens at the end of sequences of these lengths, each in blocks of its own."""
    tokens = torch.randint(0, VOCABULARY, (len(lengths),), generator=torch.Generator().manual_seed(seed))
    free, table = iter(range(1, BLOCKS)), []
    width = max(-(-length // BLOCK) for length in lengths)
    for length in lengths:
        used = [next(free) for _ in range(-(-length // BLOCK))]
        table.append(used + [0] * (width - len(used)))
    slots = [row[(n - 1) // BLOCK] * BLOCK + (n - 1) % BLOCK for row, n in zip(table, lengths, strict=True)]
    ints = lambda values: torch.tensor(values, dtype=torch.int32).to(device)  # noqa: E731
    meta = AttentionMeta(
        ints(slots), ints(table), list(range(1, len(lengths) + 1)), list(lengths), ints(lengths), BLOCK, is_decode=True
    )
    return tokens.int().to(device), ints(lengths) - 1, meta


def make_graphs(step, device, max_batch=4, **changes):
    return DecodeGraphs(
        device,
        step,
        max_batch=max_batch,
        max_blocks=MAX_BLOCKS,
        block_size=BLOCK,
        **{"host_lengths": step.ops.HOST_LENGTHS, **changes},
    )


STEPS = [[5], [130, 1, 300], [128, 129], [7, 8, 9, 10], [131, 2, 301]]
