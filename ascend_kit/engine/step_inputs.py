"""The numbers of one step, built from the plan on the host: what the model reads, and what other ranks are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_kit.device.device import upload
from ascend_kit.device.ops import AttentionMeta
from ascend_kit.engine.scheduler import Chunk

HEADER = 5


@dataclass
class StepInputs:
    """Inputs of T packed tokens of B sequences.

    `buffer`, int32 on the host, holds token ids [T], positions [T], slots [T], context lengths [B] and the block
    table [B, width] one after the other, so that one transfer brings all of it to a device.
    """

    buffer: Tensor
    ends: list[int]  # cumulative query ends [B]
    lengths: list[int]  # context lengths [B]
    scored: list[int]  # rows whose logits are compared with given tokens
    sampled: list[int]  # rows whose logits choose the next token
    in_graph: bool  # whether a captured decode step runs it

    @classmethod
    def from_chunks(
        cls, chunks: list[Chunk], block_size: int, *, scored: list[int], sampled: list[int], in_graph: bool
    ) -> StepInputs:
        """Lay out the chunks of a plan in their order."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        for chunk in chunks:
            blocks, span = chunk.sequence.blocks, range(chunk.start, chunk.end)
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.end]
            positions += span
            slots += [blocks[p // block_size] * block_size + p % block_size for p in span]
            ends.append(len(token_ids))
        lengths = [chunk.end for chunk in chunks]
        width = -(-max(lengths) // block_size)
        table = [block for chunk in chunks for block in _padded(chunk.sequence.blocks, width)]
        buffer = torch.tensor([*token_ids, *positions, *slots, *lengths, *table], dtype=torch.int32)
        return cls(buffer, ends, lengths, scored, sampled, in_graph)

    def tensors(
        self, device: torch.device, block_size: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, AttentionMeta]:
        """Token ids [T], positions [T] and where everything lies in the cache, on `device`."""
        tokens, sequences = self.ends[-1], len(self.ends)
        sizes = [tokens, tokens, tokens, sequences, self.buffer.numel() - 3 * tokens - sequences]
        ids, positions, slots, lengths, table = upload(self.buffer, device).split(sizes)
        meta = AttentionMeta(
            slot_mapping=slots,
            block_table=table.view(sequences, -1),
            cu_seqlens_q=self.ends,
            context_lens=self.lengths,
            context_lens_t=lengths,
            block_size=block_size,
            is_decode=tokens == sequences,
            mask=mask,
        )
        return ids, positions, meta

    def read_rows(self) -> list[int]:
        """Rows whose hidden states are read, ascending; at least one, because not every operator takes none."""
        return sorted({*self.scored, *self.sampled}) or [self.ends[-1] - 1]

    def to_message(self) -> Tensor:
        """Everything as one int32 tensor."""
        header = [len(self.ends), len(self.scored), len(self.sampled), int(self.in_graph), self.buffer.numel()]
        return torch.cat(
            (torch.tensor([*header, *self.ends, *self.scored, *self.sampled], dtype=torch.int32), self.buffer)
        )

    @classmethod
    def from_message(cls, message: Tensor) -> StepInputs:
        """The inverse of `to_message`."""
        sequences, scored, sampled, in_graph, size = message[:HEADER].tolist()
        ends, scored_rows, sampled_rows, buffer = message[HEADER:].split([sequences, scored, sampled, size])
        tokens = int(ends[-1])
        lengths = buffer[3 * tokens : 3 * tokens + sequences].tolist()
        return cls(buffer, ends.tolist(), lengths, scored_rows.tolist(), sampled_rows.tolist(), bool(in_graph))


def _padded(blocks: list[int], width: int) -> list[int]:
    return blocks[:width] + [0] * (width - len(blocks))
