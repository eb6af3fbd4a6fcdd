"""The inputs of a decode step at fixed addresses, for every kind of recorded step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_kit.device.device import Device
from ascend_kit.device.ops import AttentionMeta


class GraphError(RuntimeError):
    """A decode graph could not be captured or replayed; the message says what to try."""


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

    One int32 buffer holds ids, positions, slots, context lengths (`size` each) and the block table. int32
    throughout: every consumer takes it, and it is what the attention kernel wants.
    """

    def __init__(self, device: Device, size: int, max_blocks: int, block_size: int, mask: Tensor | None) -> None:
        count = size * (4 + max_blocks)
        pin = device.kind != "cpu"
        self.size, self.block_size = size, block_size
        self.host = torch.zeros(count, dtype=torch.int32, pin_memory=pin)
        self.buffer = torch.zeros(count, dtype=torch.int32, device=device.torch_device)
        self.host_rows = self.host[: 4 * size].view(4, size)
        self.host_table = self.host[4 * size :].view(size, max_blocks)
        rows = self.buffer[: 4 * size].view(4, size)
        self.token_ids, self.positions, self.slots, self.lens = rows.unbind(0)
        self.table = self.buffer[4 * size :].view(size, max_blocks)
        self.mask = mask
        self.clear()
        self.buffer.copy_(self.host)

    def clear(self) -> None:
        """Make every row dead: token 0 at position 0, one key, in its own slot of the scratch block."""
        self.host.zero_()
        self.host_rows[2] = torch.arange(self.size, dtype=torch.int32) % self.block_size
        self.host_rows[3] = 1

    def spread(self) -> None:
        """Give every dead row a slot of its own, beyond the scratch block too: only while no block is in use."""
        self.host_rows[2] = torch.arange(self.size, dtype=torch.int32)
        self.buffer.copy_(self.host)

    def meta(self, host_lengths: Sequence[int] | None) -> AttentionMeta:
        """The step's meta over the static tensors; None puts a guard where the host lengths would be."""
        ends, lens = (Unreadable(), Unreadable())
        if host_lengths is not None:
            ends, lens = list(range(1, self.size + 1)), list(host_lengths)
        return AttentionMeta(
            self.slots, self.table, ends, lens, self.lens, self.block_size, is_decode=True, mask=self.mask
        )

    def fill(self, token_ids: Tensor, positions: Tensor, meta: AttentionMeta) -> None:
        """Copy a step's inputs (on the host or on the device) into the first rows."""
        batch, width = token_ids.shape[0], meta.block_table.shape[1]
        if width > self.host_table.shape[1]:
            raise ValueError(
                f"a block table of {width} columns does not fit the {self.host_table.shape[1]} the graphs "
                "were made for; raise max_seq_length"
            )
        self.clear()
        late = []  # what is already on the device is copied there, after the host part
        pairs = zip(self.host_rows, (self.token_ids, self.positions, self.slots, self.lens),
                    (token_ids, positions, meta.slot_mapping, meta.context_lens_t), strict=True)  # fmt: skip
        for host, static, given in pairs:
            if given.device.type == "cpu":
                host[:batch] = given
            else:
                late.append((static[:batch], given))
        if meta.block_table.device.type == "cpu":
            self.host_table[:batch, :width] = meta.block_table[:batch]
        else:
            late.append((self.table[:batch, :width], meta.block_table[:batch]))
        self.buffer.copy_(self.host, non_blocking=True)
        for static, given in late:
            static.copy_(given)
