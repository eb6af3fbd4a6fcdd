"""Runs planned steps: builds the step's tensors, calls the model, reads back tokens or scores once a step."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ascend_kit.device.device import Device
from ascend_kit.device.graphs import DecodeGraphs
from ascend_kit.device.ops import AttentionMeta
from ascend_kit.engine.sampler import record_logprobs, sample
from ascend_kit.engine.scheduler import Chunk, StepPlan
from ascend_kit.engine.sequence import Sequence
from ascend_kit.model.decoder import Decoder

SCORED_ROWS = 256  # rows whose logits exist at once while scoring: 256 x 152k x 4 B = 156 MB


class ModelRunner:
    """One model with its KV cache on one device."""

    def __init__(self, decoder: Decoder, device: Device, ops: ModuleType, *, num_blocks: int, block_size: int,
                 dtype: torch.dtype):
        self.decoder, self.device, self.ops = decoder, device, ops
        self.block_size = block_size
        self.caches = decoder.new_caches(num_blocks, block_size, dtype, device.torch_device)
        self.mask = ops.make_mask(device.torch_device)
        self.graphs: DecodeGraphs | None = None

    def enable_graphs(self, max_sequences: int, max_seq_length: int) -> None:
        """Run decode steps as captured graphs from now on."""
        self.graphs = DecodeGraphs(
            self.device, self._decode_step, max_batch=max_sequences, block_size=self.block_size,
            max_blocks=-(-max_seq_length // self.block_size), mask=self.mask, host_lengths=self.ops.HOST_LENGTHS,
            layers=list(self.decoder.layers))

    @torch.inference_mode()
    def execute(self, plan: StepPlan, eos_ids: tuple[int, ...]) -> dict[int, int]:
        """Run one step; the new token of each sequence that got one, by sequence id. Scores go to the sequences."""
        sampled = [chunk for chunk in plan.chunks if chunk.reaches_end and not chunk.sequence.is_scoring]
        if self.graphs is not None and plan.is_decode:
            # Host tensors: the graph copies all of them to its own buffers in one transfer.
            logits = self.graphs.run(*self._inputs(plan.chunks, torch.device("cpu")))
            return self._read_tokens(logits, sampled, eos_ids)
        token_ids, positions, meta = self._inputs(plan.chunks, self.device.torch_device)
        hidden = self.decoder(token_ids, positions, meta, self.caches)
        starts = _starts(plan.chunks)
        self._score(hidden, plan.chunks, starts)
        if not sampled:
            return {}
        last = [starts[id(chunk)] + chunk.count - 1 for chunk in sampled]
        rows = hidden if len(last) == hidden.shape[0] else hidden.index_select(0, self._ints(last, torch.int64))
        return self._read_tokens(self.decoder.logits(rows), sampled, eos_ids)

    def _decode_step(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        return self.decoder.logits(self.decoder(token_ids, positions, meta, self.caches))

    def _read_tokens(self, logits: Tensor, chunks: list[Chunk], eos_ids: tuple[int, ...]) -> dict[int, int]:
        sequences = [chunk.sequence for chunk in chunks]
        tokens = sample(logits, sequences, eos_ids)
        record_logprobs(logits, tokens, sequences)
        # The step's one synchronisation with the device.
        return {s.id: token for s, token in zip(sequences, tokens.tolist(), strict=True)}

    def _inputs(self, chunks: list[Chunk], device: torch.device) -> tuple[Tensor, Tensor, AttentionMeta]:
        """Packed token ids [T], positions [T] and where everything lies in the cache; int32, in one transfer."""
        size = self.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        for chunk in chunks:
            blocks, span = chunk.sequence.blocks, range(chunk.start, chunk.end)
            token_ids += chunk.sequence.token_ids[chunk.start:chunk.end]
            positions += span
            slots += [blocks[p // size] * size + p % size for p in span]
            ends.append(len(token_ids))
        lengths = [chunk.end for chunk in chunks]
        width = -(-max(lengths) // size)
        table = [block for chunk in chunks for block in _padded(chunk.sequence.blocks, width)]
        parts = (token_ids, positions, slots, lengths, table)
        buffer = torch.tensor([number for part in parts for number in part], dtype=torch.int32)
        ids, where, slot_mapping, lens, flat = buffer.to(device, non_blocking=True).split([len(p) for p in parts])
        meta = AttentionMeta(
            slot_mapping=slot_mapping, block_table=flat.view(len(chunks), width), cu_seqlens_q=ends,
            context_lens=lengths, context_lens_t=lens, block_size=size,
            is_decode=all(chunk.count == 1 for chunk in chunks), mask=self.mask)
        return ids, where, meta

    def _score(self, hidden: Tensor, chunks: list[Chunk], starts: dict[int, int]) -> None:
        """Log-probability and greedy agreement of every scored row in this step."""
        wanted: list[tuple[int, int, Sequence, int]] = []  # row, token, sequence, target number
        for chunk in chunks:
            sequence = chunk.sequence
            for number, target in enumerate(sequence.targets):
                first = sequence.num_tokens - len(target.token_ids)
                for position in range(max(first, chunk.start), chunk.end):
                    row = starts[id(chunk)] + position - chunk.start
                    wanted.append((row, target.token_ids[position - first], sequence, number))
        rows = sorted({row for row, *_ in wanted})
        for part in range(0, len(rows), SCORED_ROWS):
            self._score_rows(hidden, rows[part:part + SCORED_ROWS], wanted)

    def _score_rows(self, hidden: Tensor, rows: list[int], wanted: list[tuple[int, int, Sequence, int]]) -> None:
        place = {row: number for number, row in enumerate(rows)}
        here = [item for item in wanted if item[0] in place]
        logits = self.decoder.logits(hidden.index_select(0, self._ints(rows, torch.int64))).float()
        pairs = self._ints([[place[row], token] for row, token, *_ in here], torch.int64)
        chosen = logits[pairs[:, 0], pairs[:, 1]] - logits.logsumexp(-1)[pairs[:, 0]]
        greedy = logits.argmax(-1)[pairs[:, 0]] == pairs[:, 1]
        both = torch.stack((chosen, greedy.float()), 1).tolist()
        for (_, _, sequence, number), (logprob, is_greedy) in zip(here, both, strict=True):
            sequence.target_scores[number].append((logprob, bool(is_greedy)))

    def _ints(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device.torch_device, non_blocking=True)


def _padded(blocks: list[int], width: int) -> list[int]:
    return blocks[:width] + [0] * (width - len(blocks))


def _starts(chunks: list[Chunk]) -> dict[int, int]:
    """First packed row of each chunk, by the chunk's identity."""
    starts, total = {}, 0
    for chunk in chunks:
        starts[id(chunk)] = total
        total += chunk.count
    return starts
