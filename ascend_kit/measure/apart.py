"""A sweep's engine in a process of its own, for callers that must not hold a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ascend_kit.engine.elsewhere import Elsewhere
from ascend_kit.identity import Identity
from ascend_kit.measure.engines import Backend, DistantMachine
from ascend_kit.measure.metrics import RequestRecord
from ascend_kit.measure.over_time import Observed
from ascend_kit.measure.workload import OnDone, Request
from ascend_kit.model.config import ModelConfig


class BackendElsewhere:
    """The `Backend` that `make(*arguments)` gives, in a process of its own; `close` ends it, `open` starts another.

    Times of the two processes are on one clock: Linux counts CLOCK_MONOTONIC for the whole machine.
    """

    name: str
    config: ModelConfig
    max_seq_length: int
    is_exact: bool
    slots: int | None
    cards: int
    num_devices: int
    replicas: int
    launches_per_layer: int | None
    identity: Identity

    def __init__(self, make: Callable[..., Backend], *arguments: Any) -> None:
        self._make, self._there = (make, *arguments), None
        self._start()

    def _start(self) -> Elsewhere:
        if self._there is None:
            there = self._there = Elsewhere(*self._make)
            for name in BackendElsewhere.__annotations__:
                setattr(self, name, there.get(name))
            facts = [there.get(f"device.{name}") for name in ("name", "kind", "peak", "total_memory_bytes")]
            self.device = DistantMachine(*facts, call=there.call)
        return self._there

    def open(self) -> None:
        self._start().call("open")

    def close(self) -> None:
        if self._there is not None:
            self._there.end()
            self._there = None

    def run(self, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> list[RequestRecord]:
        return self._start().call("run", requests, concurrency, on_progress=on_done)

    def observed(self) -> Observed:
        return self._start().call("observed")

    def stats(self) -> dict[str, Any]:
        return self._start().call("stats")

    def pids(self) -> Sequence[int] | None:
        return ()

    def variant(self) -> dict[str, Any]:
        return self._start().call("variant")

    def weight_bytes(self) -> int:
        return self._start().call("weight_bytes")
