"""The inputs of a recorded step at fixed addresses, for every kind of recording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_kit.device.device import Device
from ascend_kit.device.ops import AttentionMeta


class GraphError(RuntimeError):
    """A graph could not be captured or replayed; the message says what to try."""


class Unreadable(list):
    """Host lengths where a graph would freeze them: reading raises instead of replaying old lengths."""

    def _refuse(self, *_: Any) -> Any:
        raise GraphError(
            "the attention of this op table reads its lengths on the host, which a recorded step cannot do; "
            "set operator_fusion: true or graph_mode: false"
        )

    __iter__ = __getitem__ = __len__ = _refuse


class StaticInputs:
    """The inputs of one captured size, at fixed addresses, filled by a single host-to-device copy.

    One int32 buffer holds ids, positions and slots of `size` tokens, context lengths and block table of the sequences,
    as many as tokens; a step with prompts (`sequences` given) also holds the sequence of each token, and its dead
    tokens are one sequence of their own. int32 throughout: every consumer takes it, and it is what the attention kernel
    wants.
    """

    def __init__(
        self,
        device: Device,
        size: int,
        max_blocks: int,
        block_size: int,
        mask: Tensor | None,
        sequences: int | None = None,
    ) -> None:
        self.size, self.block_size, self.max_blocks, self.mask = size, block_size, max_blocks, mask
        self.is_packed, self.sequences = sequences is not None, size if sequences is None else sequences
        self.columns = 4 if self.is_packed else 3
        count = self.columns * size + self.sequences * (1 + max_blocks)
        # Two: the copy of the step before may not have left its own yet, behind a replay that is under way.
        pair = torch.zeros(2, count, dtype=torch.int32, pin_memory=device.kind != "cpu")
        self.hosts = list(pair.unbind(0))
        self.buffer = torch.zeros(count, dtype=torch.int32, device=device.torch_device)
        tokens, self.lens, self.table = self._parts(self.buffer)
        self.token_ids, self.positions, self.slots, *self.owners = tokens.unbind(0)
        self.clear()
        self.buffer.copy_(self.host)

    @property
    def host(self) -> Tensor:
        """The page-locked buffer of this step."""
        return self.hosts[0]

    def _parts(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What belongs to tokens [3 or 4, size], context lengths [sequences], block table [sequences, max_blocks]."""
        sizes = [self.columns * self.size, self.sequences, self.sequences * self.max_blocks]
        tokens, lens, table = flat.split(sizes)
        return tokens.view(self.columns, self.size), lens, table.view(self.sequences, self.max_blocks)

    def clear(self) -> None:
        """Begin another step, with every token dead: id 0 at position 0, one key, in its slot of the scratch block."""
        self.hosts.reverse()
        self.host_tokens, self.host_lens, self.host_table = self._parts(self.host)
        self.host.zero_()
        self.host_tokens[2] = torch.arange(self.size, dtype=torch.int32) % self.block_size
        self.host_lens.fill_(1)

    def spread(self) -> tuple[list[int], list[int]]:
        """Give every dead token a slot of its own, beyond the scratch block too: only while no block is in use.

        Returns query ends and context lengths of a step of dead tokens, spread over as many sequences as there may be.
        """
        ends = [self.size * number // self.sequences for number in range(1, self.sequences + 1)]
        lens = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.host_tokens[2] = torch.arange(self.size, dtype=torch.int32)
        self.host_lens.copy_(torch.tensor(lens))
        if self.is_packed:
            self.host_tokens[3] = torch.arange(self.sequences).repeat_interleave(torch.tensor(lens))
        self.buffer.copy_(self.host)
        return ends, lens

    def meta(self, host_lengths: tuple[list[int], list[int]] | None) -> AttentionMeta:
        """The step's meta over the static tensors; None puts a guard where the host lengths would be."""
        ends, lens = (Unreadable(), Unreadable()) if host_lengths is None else host_lengths
        packed = (self.owners[0], self.positions) if self.is_packed else None
        return AttentionMeta(
            self.slots, self.table, ends, lens, self.lens, self.block_size, not self.is_packed, self.mask, packed
        )

    def padded(self, meta: AttentionMeta) -> tuple[list[int], list[int]]:
        """Query ends and context lengths of a step, on the host, those of the dead tokens behind them."""
        ends, lens = meta.cu_seqlens_q, meta.context_lens
        if not self.is_packed:
            return list(range(1, self.size + 1)), [*lens, *[1] * (self.size - len(lens))]
        dead = self.size - ends[-1]
        return ([*ends, self.size], [*lens, dead]) if dead else (ends, lens)

    def fill(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> None:
        """Queue a copy of a step's inputs (on the host or on the device) into the first rows.

        It may be behind the replay before, but the one before that has to be over.
        """
        count, (batch, width) = token_ids.shape[0], meta.block_table.shape
        if width > self.max_blocks:
            raise ValueError(
                f"a block table of {width} columns does not fit the {self.max_blocks} the graphs "
                "were made for; raise max_seq_length"
            )
        self.clear()
        if self.is_packed:
            ends, _ = self.padded(meta)
            counts = torch.tensor(ends).diff(prepend=torch.tensor([0]))
            self.host_tokens[3] = torch.arange(len(ends)).repeat_interleave(counts)
        late = []  # what is already on the device is copied there, after the host part
        pairs = [
            *zip(self.host_tokens[:3, :count], (self.token_ids, self.positions, self.slots),
                 (token_ids, positions, meta.slot_mapping), strict=True),
            (self.host_lens[:batch], self.lens, meta.context_lens_t),
            (self.host_table[:batch, :width], self.table[:batch, :width], meta.block_table),
        ]  # fmt: skip
        for host, static, given in pairs:
            if given.device.type == "cpu":
                host.copy_(given)
            else:
                late.append((static[: len(given)], given))
        self.buffer.copy_(self.host, non_blocking=True)
        for static, given in late:
            static.copy_(given)
