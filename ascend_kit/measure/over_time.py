"""What an engine holds while it serves: KV in use, requests running and waiting, memory; looked at as a run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

# Under these names for every engine: share of the KV blocks (0..1), requests, requests, bytes of all cards.
GAUGES = ("kv_use", "running", "waiting", "memory_bytes")
EVERY_S = 0.1
MOST = 512  # samples of one run; then every other is dropped, and looks become half as frequent

Sample = dict[str, float]
Look = TypeVar("Look")


class Observed(NamedTuple):
    """What was noticed during a run: columns of its row, and samples with their `time_s` (perf_counter)."""

    columns: Mapping[str, object]
    samples: Sequence[Sample] = ()


class Recorder(Generic[Look]):
    """Keeps what was seen as (perf_counter seconds, it), and says when the next look is due."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.taken: list[tuple[float, Look]] = []
        self._every_s, self._next_s = every_s, 0.0

    @property
    def is_due(self) -> bool:
        return time.perf_counter() >= self._next_s

    def add(self, seen: Look) -> None:
        """One look, at this moment."""
        now_s = time.perf_counter()
        self.taken.append((now_s, seen))
        if len(self.taken) > MOST:
            del self.taken[1::2]
            self._every_s *= 2
        self._next_s = now_s + self._every_s


def columns_of(samples: Sequence[Sample]) -> dict[str, object]:
    """`<gauge>_max` and `<gauge>_mean` of those that were told. A device's own peak stands for that of its memory."""
    found: dict[str, object] = {}
    for name in GAUGES:
        values = [sample[name] for sample in samples if name in sample]
        if values and name != "memory_bytes":
            found |= {f"{name}_max": max(values), f"{name}_mean": sum(values) / len(values)}
    return found
