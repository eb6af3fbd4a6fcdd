"""One copy of the model on one or more cards, seen from the driver: its processes, its start, its calls."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any

from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.ray_session import RaySession
from ascend_kit.engine.worker import Order, Place, Report, Role, Worker

STARTING, READY, FAILED, ABANDONED = "starting", "ready", "failed", "abandoned"
START_S = 180.0  # until its processes answer; reading a model may take longer and is not limited
CALLS_AHEAD = 2  # calls sent before an answer, so that a replica never waits for its driver


class Replica:
    """`state` is starting, ready, failed (`error` says why) or abandoned. Starts in a thread of its own."""

    def __init__(self, number: int, settings: EngineConfig, session: RaySession):
        self.number, self.settings, self.session = number, settings, session
        self.state, self.error = STARTING, None
        self.restarts = self.num_failures = self.num_finished = 0
        self.places: list[Place] = []
        self.facts: list[dict[str, Any]] = []
        self.lost_counts: Counter[str] = Counter()  # of processes that died
        self._reset()

    def _reset(self) -> None:
        self.actors: list[Any] = []
        self.group: Any = None
        self.calls: deque[Any] = deque()
        self.followers: list[Any] = []
        self.cancelled: list[int] = []
        self.orders: list[Order] = []
        self.report: Report | None = None
        self.clock_offset_s = 0.0
        self.heard_s = time.perf_counter()

    def start(self, ranks_on_host: threading.Barrier | None = None, everyone: list[Replica] | None = None) -> None:
        """Bring the processes up and the model in, without waiting."""
        self._reset()
        self.state, self.error = STARTING, None
        threading.Thread(
            target=self._bring_up, args=(ranks_on_host, everyone or [self]), daemon=True, name=f"replica-{self.number}"
        ).start()

    def kill(self) -> None:
        """End the processes at once."""
        if self.report is not None:
            self.lost_counts.update({name: n for name, n in self.report.counts.items() if name != "kv_blocks_free"})
        actors, group = self.actors, self.group
        self._reset()
        self.session.kill(actors, group)

    def close(self) -> None:
        """End the processes, letting the other ranks return first."""
        if self.state == READY and len(self.actors) > 1:
            self.session.ray.wait([self.actors[0].close.remote()], timeout=2.0)
        self.kill()
        self.state = ABANDONED

    def send(self) -> None:
        """Hand over what has been collected for this replica, and let it run."""
        call = self.actors[0].advance.remote(self.orders, self.cancelled)
        if not self.calls:
            self.heard_s = time.perf_counter()
        self.calls.append(call)
        self.orders, self.cancelled = [], []

    def watched(self) -> list[Any]:
        """What ends when something happened: the oldest call, and the other ranks, which end only by accident."""
        return [*list(self.calls)[:1], *self.followers] if self.state == READY else []

    def card_names(self) -> list[str]:
        """The card of each rank, as its machine numbers it; a CPU has none, so there ranks are counted."""
        kind, first = self.settings.device, self.number * self.settings.tensor_parallel
        return [
            f"{place.address} {kind} {first + rank if place.card is None else place.card}"
            for rank, place in enumerate(self.places)
        ]

    def is_hanging(self, limit_s: float) -> bool:
        return bool(self.calls) and time.perf_counter() - self.heard_s > limit_s

    # --- start, in the thread ---------------------------------------------------------------------------------

    def _bring_up(self, barrier: threading.Barrier | None, everyone: list[Replica]) -> None:
        try:
            self.actors, self.group = self.session.create(Worker, self.settings.tensor_parallel)
            self.places = self._answers([actor.place.remote(self.session.resource) for actor in self.actors], START_S)
            if barrier is not None:
                barrier.wait()  # how many share a machine is known once all have a place
            self._load([place.host for replica in everyone for place in replica.places])
            self.heard_s = time.perf_counter()
            self.state = READY
        except BaseException as error:  # of any kind: the driver decides what it means
            if barrier is not None:
                barrier.abort()
            self.error = plain(error)
            self.kill()
            if self.state != ABANDONED:
                self.state = FAILED

    def _load(self, hosts: list[str]) -> None:
        own = [place.host for place in self.places]
        store = None
        if len(own) > 1:
            store = self._answers([self.actors[0].meeting_point.remote(len(set(own)) == 1)], START_S)[0]
        roles = [
            self._role(rank, self.session.ranks_on(place.address, hosts.count(place.host)), store)
            for rank, place in enumerate(self.places)
        ]
        loads = [actor.load.remote(self.settings, role) for actor, role in zip(self.actors, roles, strict=True)]
        self.facts = self._answers(loads, None)
        self.clock_offset_s = self._clock_offset(own[0])
        self.followers = [actor.follow.remote() for actor in self.actors[1:]]

    def _role(self, rank: int, ranks_on_host: int, store: str | None) -> Role:
        """A rank sees the cards of its replica on its machine: HCCL finds its neighbours among them."""
        here = [place.card for place in self.places if place.host == self.places[rank].host]
        if None in here:
            return Role(rank, None, 0, ranks_on_host, store)
        return Role(rank, ",".join(here), here.index(self.places[rank].card), ranks_on_host, store)

    def _answers(self, refs: list[Any], limit_s: float | None) -> list[Any]:
        """Results of all calls; the first error as soon as it happens, not after the slowest rank."""
        ray, waiting = self.session.ray, list(refs)
        deadline = None if limit_s is None else time.perf_counter() + limit_s
        while waiting:
            done, waiting = ray.wait(waiting, timeout=1.0)
            ray.get(done)
            if self.state == ABANDONED:
                raise RuntimeError("the engine was closed")
            if not done and deadline is not None and time.perf_counter() > deadline:
                raise TimeoutError(
                    f"replica {self.number} found no free {self.session.resource} within {limit_s:.0f} s"
                )
        return ray.get(refs)

    def _clock_offset(self, host: str) -> float:
        """Seconds that this replica's clock is ahead of ours; 0 on the same machine, where they are one clock."""
        if host == Worker().place().host:
            return 0.0
        best = (float("inf"), 0.0)
        for _ in range(5):
            before = time.perf_counter()
            theirs = self.session.ray.get(self.actors[0].clock_s.remote())
            after = time.perf_counter()
            best = min(best, (after - before, theirs - (before + after) / 2))
        return best[1]


def plain(error: BaseException) -> BaseException:
    """The error that was raised inside a worker, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
