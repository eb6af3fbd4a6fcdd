"""What a simulated operator computes on: npu tensors as CPU or meta tensors, and results that only stand for some."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from npu_sim import traits
from npu_sim.runtime import host_alias


class Lowered:
    """Arguments with npu tensors replaced by CPU (or meta) tensors, and the way back from those objects."""

    def __init__(self, args: tuple, kwargs: dict, to_meta: bool = False) -> None:
        self.owners: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._keep: list[Tensor] = []
        self._to_meta = to_meta
        self.args, self.kwargs = tree_map(self._lower, (args, kwargs))

    def forget_owners(self) -> set[int]:
        """Drop the npu tensors; returns the identities of their stand-ins, which stay."""
        known = set(self.owners)
        self.owners.clear()
        self._keep.clear()
        return known

    def _lower(self, x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("meta" if self._to_meta else "cpu")
        if not isinstance(x, Tensor) or (x.device.type != "npu" and not self._to_meta):
            return x
        if id(x) not in self._seen:
            if self._to_meta:
                low = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
            else:
                low = host_alias(x)
            self._seen[id(x)] = low
            self.owners[id(low)] = x
            self._keep.append(x)
        return self._seen[id(x)]


def check_store(store: Any) -> None:
    """HCCL hands its master id round through the store at a group's first collective: it must be there still."""
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    if isinstance(store, torch.distributed.FileStore) and not os.path.exists(store.path):
        raise RuntimeError(f"broadcastMasterID: the store {store.path} is gone; HCCL wants it at the first collective")


def internal_formats_allowed() -> bool:
    import torch_npu

    return torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable"


def poison(tensor: Tensor) -> None:
    """Results of a recorded launch hold garbage until a replay."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))


def finished_work() -> Any:
    """What a collective returns while it is only recorded."""
    return torch._C._distributed_c10d.FakeWork().boxed()


def finish_collectives(results: list[Any]) -> None:
    """A replayed collective ends before the next kernel starts."""
    for result in results:
        if isinstance(result, torch.ScriptObject):
            torch._C._distributed_c10d.Work.unbox(result).wait()


def is_composite(func: Any) -> bool:
    return traits.has_kernel(func, "CompositeImplicitAutograd") and not traits.has_kernel(func, "PrivateUse1")
