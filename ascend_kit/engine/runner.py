"""Runs planned steps: builds the step's tensors, calls the model, reads back tokens or scores once a step.

A step is launched and read apart, so that the next one may be queued before the tokens of this one are read.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ascend_kit.device.device import Device, upload
from ascend_kit.device.graphs import DecodeGraphs, prompt_sizes, wait_until
from ascend_kit.device.ops import AttentionMeta
from ascend_kit.device.parallel import StepChannel
from ascend_kit.engine.sampler import record_logprobs, sample
from ascend_kit.engine.scheduler import Chunk, Pending, StepPlan
from ascend_kit.engine.sequence import Sequence, TokenScore
from ascend_kit.engine.speculation import Ahead
from ascend_kit.model.decoder import Decoder

Scored = tuple[int, int, Sequence, int]  # row, token, sequence, number of the target
SCORED_ROWS = 256  # rows whose logits exist at once while scoring: 256 x 152k x 4 B = 156 MB


HEADER = 5  # numbers before the lists of a message
EAGER, DECODE, PROMPTS = range(3)  # how a step runs: operator by operator, or as a captured one of two kinds
# Plain attention over a captured step with prompts gathers every token's whole context; beyond this a step is eager.
MAX_GATHERED_BYTES = 64 << 20


@dataclass
class Launched:
    """A step that was given to the device: who gets a token in it, and the tokens, int64 [R], there and on the host."""

    plan: StepPlan
    started_s: float  # of time.perf_counter()
    sequences: list[Sequence | Ahead] = field(default_factory=list)
    tokens: Tensor | None = None
    host: Tensor | None = None  # page-locked; filled when `done` is over
    done: Any = None  # event behind the copy; None on a CPU, where everything is done
    timeout_s: float = math.inf


class ModelRunner:
    """One model with its KV cache on one device."""

    def __init__(
        self, decoder: Decoder, device: Device, ops: ModuleType, *, num_blocks: int, block_size: int, dtype: torch.dtype
    ):
        self.decoder, self.device, self.ops = decoder, device, ops
        self.block_size = block_size
        self.caches = decoder.new_caches(num_blocks, block_size, dtype, device.torch_device)
        self.mask = ops.make_mask(device.torch_device)
        self.graphs: DecodeGraphs | None = None
        self._thread = threading.get_ident()
        self.channel = StepChannel(decoder.parallel) if decoder.parallel.size > 1 else None

    @torch.inference_mode()
    def enable_graphs(self, max_sequences: int, max_seq_length: int, prompt_tokens: int = 0) -> None:
        """Run decode steps, and on an NPU steps with prompts of at most so many tokens, as captured graphs from now on.

        An NPU or CUDA device records them here, at load, where the time is reported and no request waits for it.
        """
        self.graphs = DecodeGraphs(
            self.device,
            self._decode_step,
            max_batch=max_sequences,
            block_size=self.block_size,
            max_blocks=-(-max_seq_length // self.block_size),
            mask=self.mask,
            host_lengths=self.ops.HOST_LENGTHS,
            layers=list(self.decoder.layers),
            # Without kernels an int8 cache is widened for every step, which takes longer to compile than it gains.
            records=getattr(self.ops, "RECORDS", False if self.caches[0][0].dtype == torch.int8 else None),
            prompt_fn=lambda ids, positions, meta: self.decoder(ids, positions, meta, self.caches),
            prompt_sizes=prompt_sizes(self._prompt_limit(prompt_tokens, max_seq_length), self.block_size),
        )
        if self.device.kind != "cpu":
            self.graphs.capture()

    def _prompt_limit(self, tokens: int, max_seq_length: int) -> int:
        """How many tokens a captured step with prompts may have, as far as attention and the KV pool allow."""
        if self.device.kind != "npu":  # whose caches may be int8, of another shape
            return 0
        blocks, _, heads, size = self.caches[0][0].shape
        how = getattr(self.ops, "prompt_attention", lambda *_: "plain")(size, self.caches[0][0].dtype)
        if how == "one by one":
            return 0  # the calls, and what each of them reads, would stay those of the capture
        context_bytes = 2 * max_seq_length * heads * size * self.caches[0][0].element_size()
        most = MAX_GATHERED_BYTES // context_bytes if how == "plain" else tokens
        return min(tokens, most, blocks * self.block_size)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, eos_ids: tuple[int, ...], before: Launched | None = None) -> Launched:
        """Queue one step; `before` is the unread step that a plan of `Scheduler.follow` takes its tokens from.

        Scores go to the sequences.
        """
        started_s = time.perf_counter()
        if self._thread != threading.get_ident():  # a stream's thread
            self.device.make_current()
            self._thread = threading.get_ident()
        chunks = [row for chunk in plan.chunks for row in chunk.rows()]
        firsts = itertools.accumulate((chunk.count for chunk in chunks), initial=0)
        starts = dict(zip(map(id, chunks), firsts, strict=False))  # first packed row of each chunk, by its identity
        sampled = [chunk for chunk in chunks if chunk.reaches_end and not chunk.sequence.is_scoring]
        wanted = _scored_rows(chunks, starts)
        inputs = StepInputs.from_chunks(
            chunks,
            self.block_size,
            scored=sorted({row for row, *_ in wanted}),
            sampled=[starts[id(chunk)] + chunk.count - 1 for chunk in sampled],
            graph=self._graph_for(plan, chunks),
        )
        if self.channel is not None:
            self.channel.send(inputs.to_message())
        logits = self._forward(inputs, wanted, None if before is None else self._unread_tokens(chunks, before))
        if logits is None:
            return Launched(plan, started_s)
        sequences = [chunk.sequence for chunk in sampled]
        tokens = sample(logits, sequences, eos_ids, self.ops)
        record_logprobs(logits, tokens, sequences)
        if self.device.kind == "cpu":
            return Launched(plan, started_s, sequences, tokens, tokens)
        # Copied now: a copy that starts when the tokens are read would wait for every step queued meanwhile.
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = self.device.backend.Event()
        done.record()
        timeout_s = self.graphs.timeout_s if inputs.graph and self.graphs is not None else math.inf
        return Launched(plan, started_s, sequences, tokens, host, done, timeout_s)

    def read(self, step: Launched) -> dict[int, list[int]]:
        """The tokens of a launched step, by sequence id: the step's one synchronisation with the device.

        GraphHang when a recorded step does not end in time.
        """
        if step.done is not None:
            wait_until(step.done.query, step.timeout_s, f"the step on {self.device.torch_device}")
        found: dict[int, list[int]] = {}
        for sequence, token in zip(step.sequences, [] if step.host is None else step.host.tolist(), strict=True):
            written = found.setdefault(sequence.id, [])
            if isinstance(sequence, Ahead) and not isinstance(sequence, Pending):
                if written != sequence.guess:
                    continue  # it follows a wrong guess
                sequence.sequence.logprobs += sequence.logprobs
            written.append(token)
        return found

    @torch.inference_mode()
    def serve_steps(self) -> None:
        """Compute this rank's part of the steps that rank 0 plans, until it says that there are no more."""
        channel = self.channel
        assert channel is not None, "a rank alone has nobody to follow"
        while (message := channel.receive()) is not None:
            self._forward(StepInputs.from_message(message))

    def _graph_for(self, plan: StepPlan, chunks: list[Chunk]) -> int:
        if self.graphs is None:
            return EAGER
        if plan.is_decode and self.graphs.can_run(len(chunks)):
            return DECODE
        fits = self.graphs.can_run_prompts(sum(chunk.count for chunk in chunks), len(chunks))
        return PROMPTS if fits else EAGER

    def _unread_tokens(self, chunks: list[Chunk], before: Launched) -> Tensor:
        """Token ids [T], int32 on the device, of chunks that go on from `before`."""
        assert before.tokens is not None
        rows = [chunk.sequence.row for chunk in chunks if isinstance(chunk.sequence, Pending)]
        same = rows == list(range(len(before.tokens)))
        tokens = before.tokens if same else before.tokens.index_select(0, self._ints(rows, torch.int64))
        return tokens.clamp(min=0).int()  # NOT_FINITE is no token; whoever reads it ends the request

    def _forward(
        self, inputs: StepInputs, wanted: list[Scored] | None = None, unread: Tensor | None = None
    ) -> Tensor | None:
        """Logits [R, V] of the rows to sample, or None; scores `wanted` on the rank that has the sequences.

        `unread`: the step's token ids on the device, where the host does not know them.

        Every rank runs the same products in the same order: their collectives pair up.
        """
        # For a graph on the host: it copies all of them to its own buffers in one transfer.
        target = torch.device("cpu") if inputs.graph else self.device.torch_device
        token_ids, positions, meta = inputs.tensors(target, self.block_size, self.mask)
        token_ids = token_ids if unread is None else unread
        if inputs.graph == DECODE:
            return self.graphs.run(token_ids, positions, meta)  # type: ignore[union-attr]
        read = inputs.read_rows()
        if inputs.graph == PROMPTS:
            hidden = self.graphs.run_prompts(token_ids, positions, meta)  # type: ignore[union-attr]
            place = {row: row for row in read}
        else:
            kept = self._ints(read, torch.int64) if len(read) < token_ids.shape[0] else None
            hidden = self.decoder(token_ids, positions, meta, self.caches, kept)
            place = {row: number for number, row in enumerate(read)}
        for part in range(0, len(inputs.scored), SCORED_ROWS):
            rows = inputs.scored[part : part + SCORED_ROWS]
            logits = self.decoder.logits(hidden.index_select(0, self._ints([place[row] for row in rows], torch.int64)))
            if wanted is not None:
                self._score(logits.float(), rows, wanted)
        if not inputs.sampled:
            return None
        if len(inputs.sampled) < hidden.shape[0]:
            hidden = hidden.index_select(0, self._ints([place[row] for row in inputs.sampled], torch.int64))
        return self.decoder.logits(hidden)

    def _decode_step(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> Tensor:
        return self.decoder.logits(self.decoder(token_ids, positions, meta, self.caches))

    def _score(self, logits: Tensor, rows: list[int], wanted: list[Scored]) -> None:
        """Log-probability of the tokens wanted at `rows` and the most probable ones, from float32 logits [rows, V]."""
        place = {row: number for number, row in enumerate(rows)}
        here = [item for item in wanted if item[0] in place]
        pairs = self._ints([[place[row], token] for row, token, *_ in here], torch.int64)
        total, (highest, best) = logits.logsumexp(-1), logits.max(-1)
        chosen = logits[pairs[:, 0], pairs[:, 1]] - total[pairs[:, 0]]
        # Token ids are whole in float32 below 2^24: one transfer brings all three columns.
        columns = torch.stack((chosen, best[pairs[:, 0]].float(), (highest - total)[pairs[:, 0]]), 1).tolist()
        for (_, token, sequence, number), (logprob, top, top_logprob) in zip(here, columns, strict=True):
            row = TokenScore(logprob, int(top) == token, (int(top), top_logprob))
            sequence.target_scores[number].append(row)

    def _ints(self, values: list, dtype: torch.dtype) -> Tensor:
        return upload(torch.tensor(values, dtype=dtype), self.device.torch_device)


def _scored_rows(chunks: list[Chunk], starts: dict[int, int]) -> list[Scored]:
    """What is to be scored in a step."""
    wanted: list[Scored] = []
    for chunk in chunks:
        sequence = chunk.sequence
        if isinstance(sequence, Ahead):
            continue
        for number, target in enumerate(sequence.targets):
            first = sequence.num_tokens - len(target.token_ids)
            for position in range(max(first, chunk.start), chunk.end):
                row = starts[id(chunk)] + position - chunk.start
                wanted.append((row, target.token_ids[position - first], sequence, number))
    return wanted


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
    graph: int  # EAGER, DECODE or PROMPTS

    @classmethod
    def from_chunks(
        cls, chunks: list[Chunk], block_size: int, *, scored: list[int], sampled: list[int], graph: int
    ) -> StepInputs:
        """Lay out the chunks of a plan in their order."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        for chunk in chunks:
            blocks, span = chunk.sequence.blocks, range(chunk.start, chunk.end)
            token_ids += chunk.sequence.tokens_between(chunk.start, chunk.end)
            positions += span
            slots += [blocks[p // block_size] * block_size + p % block_size for p in span]
            ends.append(len(token_ids))
        lengths = [chunk.end for chunk in chunks]
        width = -(-max(lengths) // block_size)
        table = [block for chunk in chunks for block in _padded(chunk.sequence.blocks, width)]
        buffer = torch.tensor([*token_ids, *positions, *slots, *lengths, *table], dtype=torch.int32)
        return cls(buffer, ends, lengths, scored, sampled, graph)

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
        header = [len(self.ends), len(self.scored), len(self.sampled), self.graph, self.buffer.numel()]
        return torch.cat(
            (torch.tensor([*header, *self.ends, *self.scored, *self.sampled], dtype=torch.int32), self.buffer)
        )

    @classmethod
    def from_message(cls, message: Tensor) -> StepInputs:
        """The inverse of `to_message`."""
        sequences, scored, sampled, graph, size = message[:HEADER].tolist()
        ends, scored_rows, sampled_rows, buffer = message[HEADER:].split([sequences, scored, sampled, size])
        tokens = int(ends[-1])
        lengths = buffer[3 * tokens : 3 * tokens + sequences].tolist()
        return cls(buffer, ends.tolist(), lengths, scored_rows.tolist(), sampled_rows.tolist(), graph)


def _padded(blocks: list[int], width: int) -> list[int]:
    return blocks[:width] + [0] * (width - len(blocks))
