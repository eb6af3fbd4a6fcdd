"""What costs time on an NPU, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counted since the last `reset`. `launches`: made by the host; `kernels`: those in replays as well."""

    launches: Counter = field(default_factory=Counter)
    kernels: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)
    uploads: int = 0  # asynchronous host-to-device copies
    bytes: int = 0  # moved by kernels in device memory
    captures: int = 0
    replays: int = 0
    updates: int = 0  # operators re-issued by NPUGraph.update

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def num_syncs(self) -> int:
        return sum(self.syncs.values())
