"""Which part of a model this process holds, and the collectives that put the parts together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """One model split over `size` processes; this one is `rank`. Size 1 communicates nothing."""

    rank: int = 0
    size: int = 1
    group: Any = None  # a torch.distributed process group; None is the default group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of `x` over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' parts joined along the last dimension, in rank order."""
        if self.size == 1:
            return x
        x = x.contiguous()  # HCCL refuses strided tensors
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x, group=self.group)
        return torch.cat(parts, dim=-1)

    def span(self, total: int, what: str) -> tuple[int, int]:
        """[start, stop) of this rank's share of `total`; ValueError when it does not divide."""
        if total % self.size:
            allowed = [n for n in range(1, total + 1) if total % n == 0 and n <= 64]
            raise ValueError(f"tensor_parallel={self.size} does not divide {what}={total}; allowed: {allowed}")
        share = total // self.size
        return self.rank * share, (self.rank + 1) * share
