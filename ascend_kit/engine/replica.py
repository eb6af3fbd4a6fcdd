"""One replica of the model, seen from the driver: its processes, its start, its calls."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Protocol

from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import COUNTED
from ascend_kit.engine.sequence import Sequence
from ascend_kit.engine.worker import Facts, Role, WorkerAddress, host_name
from ascend_kit.model.config import ModelConfig

STARTING, READY, FAILED, ABANDONED = "starting", "ready", "failed", "abandoned"
START_S = 180.0  # until processes answer; reading a model may take longer and is not limited
HANG_S = 900.0  # a replica that answers no call for this long is ended; compiling a graph takes minutes


class Processes(Protocol):
    """What starts workers and carries calls to them: Ray, or pipes on this machine.

    A call is whatever `call` returns; `result` gives its value or raises the worker's own error.
    """

    resource: str  # what a card is called

    def create(self, count: int) -> list[Any]: ...
    def call(self, worker: Any, method: str, *arguments: Any) -> Any: ...
    def wait(self, calls: list[Any], timeout_s: float) -> list[Any]: ...
    def result(self, call: Any) -> Any: ...
    def kill(self, workers: list[Any]) -> None: ...
    def total_cards(self) -> int: ...
    def is_lost(self) -> bool: ...
    def restart(self) -> None: ...
    def close(self) -> None: ...


class Replica:
    """One copy of the model on one or more cards, seen from the driver: its processes, its start, its calls.

    `state` is starting, ready, failed (`error` says why) or abandoned. `poll` moves a start on.
    """

    def __init__(self, number: int, settings: EngineConfig, config: ModelConfig, processes: Processes):
        self.number, self.settings, self.config, self.processes = number, settings, config, processes
        self.state, self.error = STARTING, Exception()
        self.restarts = self.num_failures = self.num_finished = 0
        self.addresses: list[WorkerAddress] = []
        self.facts: list[Facts] = []
        self._lost_counts: Counter[str] = Counter()  # of processes that are gone
        self._reset()

    def _reset(self) -> None:
        self.workers: list[Any] = []
        self.calls: deque[Any] = deque()
        self.other_ranks: list[Any] = []  # calls that end only by accident
        self.requests: list[Sequence] = []
        self.cancelled: list[int] = []
        self.stats: dict[str, Any] = {}  # as last told, empty before it is loaded
        self.clock_offset_s = 0.0
        self.heard_s = time.perf_counter()

    def start(self, everyone: list[Replica]) -> None:
        """Begin to bring the processes up and the model in."""
        self._reset()
        self.state, self.addresses = STARTING, []
        self._start = self._steps(everyone)

    def poll(self) -> None:
        """Go on with a start, without waiting."""
        if self.state == STARTING:
            try:
                next(self._start)
            except StopIteration:
                self.state, self.num_failures, self.heard_s = READY, 0, time.perf_counter()
            except Exception as error:  # of any kind: the driver decides what it means
                self.kill()
                self.state, self.error = FAILED, error

    def kill(self) -> None:
        """End the processes at once."""
        self._lost_counts, workers = self.counts(), self.workers
        self._reset()
        self.processes.kill(workers)

    def close(self) -> None:
        """End the processes, letting the other ranks return first."""
        if self.state == READY and len(self.workers) > 1:
            with contextlib.suppress(Exception):
                self.processes.wait([self._call("close")], 2.0)
        self.kill()
        self.state = ABANDONED

    def send(self) -> None:
        """Hand over what has been collected for this replica, and let it run."""
        if not self.calls:
            self.heard_s = time.perf_counter()
        self.calls.append(self._call("advance", self.requests, self.cancelled))
        self.requests, self.cancelled = [], []

    def watched(self) -> list[Any]:
        """What ends when something happened: the oldest call, and the other ranks."""
        return [*list(self.calls)[:1], *self.other_ranks] if self.state == READY else []

    def is_hanging(self, limit_s: float) -> bool:
        return bool(self.calls) and time.perf_counter() - self.heard_s > limit_s

    def counts(self) -> Counter[str]:
        """What all its processes have counted, those that are gone among them."""
        counts = Counter(self._lost_counts)
        counts.update({name: self.stats.get(name, 0) for name in (*COUNTED, "preemptions", "busy_s")})
        return counts

    def row(self) -> dict[str, Any]:
        """Load and memory as it last reported, plain values for a table."""
        ranks, counts = len(self.facts), self.counts()
        first = self.number * self.settings.tensor_parallel  # a CPU has no card names, so there ranks are counted
        names = [
            f"{one.address} {self.settings.device} {one.card or first + n}" for n, one in enumerate(self.addresses)
        ]
        return {
            "replica": self.number,
            "state": self.state,
            "restarts": self.restarts,
            "cards": ranks,
            "card_names": names,
            "hosts": sorted({one.address for one in self.addresses}),
            "pids": [one.pid for one in self.addresses],
            "finished": self.num_finished,
            "output_tokens": counts["output_tokens"],
            "steps": counts["steps"],
            "busy_s": float(counts["busy_s"]),
            "kv_blocks_free": self.stats.get("kv_blocks_free"),
            # Rank 0 reports as it goes; the other ranks hold the same share of the model.
            "memory_bytes": self.stats.get("memory_bytes", 0) * ranks,
            "peak_memory_bytes": self.stats.get("peak_memory_bytes", 0) * ranks,
        }

    def _call(self, method: str, *arguments: Any, rank: int = 0) -> Any:
        return self.processes.call(self.workers[rank], method, *arguments)

    def _steps(self, everyone: list[Replica]) -> Iterator[None]:
        """A start; every yield is a moment in which others may go on."""
        ranks = range(self.settings.tensor_parallel)
        self.workers = self.processes.create(len(ranks))
        resource = self.processes.resource
        found = yield from self._answers([self._call("address", resource, rank=rank) for rank in ranks], START_S)
        self.addresses = found
        while any(one.state == STARTING and not one.addresses for one in everyone):
            yield  # how many share a machine is known once all have a place
        hosts = [one.host for replica in everyone for one in replica.addresses]
        own, store = [one.host for one in found], None
        if len(own) > 1:
            (store,) = yield from self._answers([self._call("meeting_point", len(set(own)) == 1)], START_S)
        roles = [self._role(rank, hosts.count(own[rank]), store) for rank in ranks]
        loads = [self._call("load", self.settings, self.config, role, rank=role.rank) for role in roles]
        self.facts = yield from self._answers(loads, None)
        self.stats = self.facts[0].stats
        if own[0] != host_name():
            self.clock_offset_s = yield from self._clock_offset()
        self.other_ranks = [self._call("serve_steps", rank=rank) for rank in ranks[1:]]

    def _role(self, rank: int, ranks_on_host: int, store: str | None) -> Role:
        """A rank sees the cards of its replica on its machine: HCCL finds its neighbours among them."""
        here = [one.card for one in self.addresses if one.host == self.addresses[rank].host]
        cards = [card for card in here if card is not None]
        if len(cards) < len(here):
            return Role(rank, None, self.settings.device_id, ranks_on_host, store)
        return Role(rank, ",".join(cards), cards.index(self.addresses[rank].card or ""), ranks_on_host, store)

    def _answers(self, calls: list[Any], limit_s: float | None) -> Iterator[None] | Any:
        """Results of all calls; the first error as soon as it happens, not after the slowest rank."""
        deadline = None if limit_s is None else time.perf_counter() + limit_s
        while True:
            done = self.processes.wait(calls, 0)
            for call in done:
                self.processes.result(call)
            if len(done) == len(calls):
                return [self.processes.result(call) for call in calls]
            if deadline is not None and time.perf_counter() > deadline:
                raise TimeoutError(
                    f"replica {self.number} found no free {self.processes.resource} within {limit_s:.0f} s"
                )
            yield

    def _clock_offset(self) -> Iterator[None] | Any:
        """Seconds that this replica's clock is ahead of ours."""
        best = (float("inf"), 0.0)
        for _ in range(5):
            before = time.perf_counter()
            call = self._call("clock_s")
            self.processes.wait([call], START_S)
            theirs, after = self.processes.result(call), time.perf_counter()
            best = min(best, (after - before, theirs - (before + after) / 2))
            yield
        return best[1]
