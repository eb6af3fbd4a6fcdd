"""Which part of a model this process holds, and the collectives that put the parts together."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# Ranks of an idle engine wait for the next step as long as it takes; a hanging one is noticed by its driver.
NEVER = timedelta(days=30)
EXPANSION_MODE = "HCCL_OP_EXPANSION_MODE"
AIV_RANKS = 8  # cards of one server
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


@dataclass(frozen=True)
class TensorParallel:
    """One model split over `size` processes; this one is `rank`. Size 1 communicates nothing."""

    rank: int = 0
    size: int = 1
    group: Any = None  # a torch.distributed process group; None is the default group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over several ranks, in place."""
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The parts of several ranks joined along the last dimension, in rank order."""
        x = x.contiguous()  # HCCL refuses strided tensors
        # Into one tensor: a list of parts would be copied part by part, each on a stream of its own.
        parts = x.new_empty(self.size * x.shape[0], *x.shape[1:])  # gloo wants them joined along the first dimension
        torch.distributed.all_gather_into_tensor(parts, x, group=self.group)
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)

    def span(self, total: int, what: str) -> tuple[int, int]:
        """[start, stop) of this rank's share of `total`; ValueError when it does not divide."""
        check_division(self.size, {what: total})
        share = total // self.size
        return self.rank * share, (self.rank + 1) * share

    def smallest(self, value: int) -> int:
        """The smallest `value` of all ranks."""
        if self.size == 1:
            return value
        numbers = torch.tensor([value], dtype=torch.int64)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN, group=self.group)
        return int(numbers)


def check_division(size: int, counts: dict[str, int]) -> None:
    """ValueError when `size` ranks cannot share each of the named counts equally; it lists the sizes that can."""
    bad = {name: count for name, count in counts.items() if count % size}
    if not bad:
        return
    allowed = [n for n in range(1, 65) if not any(count % n for count in counts.values())]
    named = ", ".join(f"{name}={count}" for name, count in bad.items())
    raise ValueError(f"tensor_parallel={size} does not divide {named}; allowed: {allowed}")


class StepChannel:
    """Tells the other ranks what to compute: one int32 tensor of a fixed size per message, on the host.

    A message that does not fit is followed by a second tensor of the length the first one names. An empty message
    ends the conversation.
    """

    def __init__(self, parallel: TensorParallel, capacity: int = 4096):
        self.parallel = parallel
        self.first = torch.zeros(capacity, dtype=torch.int32)

    def send(self, message: Tensor) -> None:
        """Called by rank 0; int32 [n] on the host."""
        count, room = message.numel(), self.first.numel() - 1
        self.first[0] = count
        self.first[1 : 1 + min(count, room)] = message[:room]
        self._broadcast(self.first)
        if count > room:
            self._broadcast(message[room:].contiguous())

    def receive(self) -> Tensor | None:
        """Called by the others: the message, or None at the end. Valid until the next call."""
        self._broadcast(self.first)
        count, room = int(self.first[0]), self.first.numel() - 1
        if count <= room:
            return self.first[1 : 1 + count] if count else None
        rest = torch.empty(count - room, dtype=torch.int32)
        self._broadcast(rest)
        return torch.cat((self.first[1:], rest))

    def close(self) -> None:
        """Called by rank 0: let the others return from their loop."""
        self.send(torch.empty(0, dtype=torch.int32))

    def _broadcast(self, tensor: Tensor) -> None:
        torch.distributed.broadcast(tensor, group=self.parallel.group, group_src=0)


def prefer_vector_cores(kind: str, size: int, is_one_host: bool, env: MutableMapping[str, str]) -> bool:
    """Let HCCL compute collectives on the vector cores (AIV), before the first group is made; whether it will.

    On an Atlas A2 that is for the inference of 2 to 8 cards of one host, and HCCL_DETERMINISTIC=true overrules it. A
    mode that is set already stays.
    """
    fits = kind == "npu" and 1 < size <= AIV_RANKS and is_one_host
    if fits and env.get("HCCL_DETERMINISTIC", "").lower() != "true":
        env.setdefault(EXPANSION_MODE, "AIV")
        return env[EXPANSION_MODE] == "AIV"
    return False


def join_group(kind: str, rank: int, size: int, store: Any, timeout: timedelta = NEVER) -> None:
    """Make this process rank `rank` of the default process group, for tensors on the host and on the device."""
    torch.distributed.init_process_group(BACKENDS[kind], store=store, rank=rank, world_size=size, timeout=timeout)


def leave_group() -> None:
    """Leave the default process group, if this process is in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
