"""Which replica runs which request. No torch, no processes, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

MAX_FAILURES = 2  # replicas that may be lost under one request
KNOWN_PREFIXES = 4096  # block keys remembered per replica
PREFIX_BLOCKS = 64  # leading blocks of a prompt that are compared


@dataclass(eq=False)
class Job:
    """A request as the dispatcher sees it."""

    request_id: int
    num_prompt_tokens: int
    keys: list[int]  # of the prompt's leading blocks
    failures: int = 0  # replicas that were lost while they ran it
    replica: int | None = None
    weight: float = 0.0  # its part of the replica's load


@dataclass(eq=False)
class _Load:
    jobs: dict[int, Job] = field(default_factory=dict)
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def load(self) -> float:
        return sum(job.weight for job in self.jobs.values())


class Dispatcher:
    """Places requests on replicas with `slots` running requests each. No torch, no processes, no clock.

    Requests wait in one queue and are placed one by one, when a replica has room, so that a replica that is done early
    takes more. Load is in requests: one for the slot, plus the share of a step that an uncomputed prompt needs. Of the
    requests that were running when a replica was lost a replica takes one at a time: whichever of them ends a second
    replica is then the only one with two failures.
    """

    def __init__(self, *, slots: int, tokens_per_step: int, block_size: int):
        self.slots, self.tokens_per_step, self.block_size = slots, tokens_per_step, block_size
        self.room = slots + max(1, slots // 8)  # a few more wait at the replica, so that it never does
        self.tolerance = max(2.0, slots / 4)  # extra load accepted for a prefix that is there already
        self.replicas: dict[int, _Load] = {}
        self.waiting: deque[Job] = deque()
        self.again: deque[Job] = deque()  # those whose replica was lost
        self.jobs: dict[int, Job] = {}

    def add_replica(self, replica: int) -> None:
        self.replicas[replica] = _Load()

    def in_flight(self, replica: int) -> int:
        return len(self.replicas[replica].jobs)

    def submit(self, request_id: int, prompt: list[int]) -> None:
        """Queue a request."""
        self.jobs[request_id] = job = Job(request_id, len(prompt), self._keys(prompt))
        self.waiting.append(job)

    def assign(self) -> list[tuple[int, int]]:
        """Place as many requests as there is room for now, in order; (replica, request) of each."""
        placed = []
        for queue in (self.again, self.waiting):
            while queue and (replica := self._choose(queue[0])) is not None:
                self._place(replica, queue[0])
                placed.append((replica, queue.popleft().request_id))
        return placed

    def prompt_computed(self, request_id: int) -> None:
        """A request has written a token: from now on it takes a slot and nothing else."""
        self.jobs[request_id].weight = 1.0

    def remove(self, request_id: int) -> int | None:
        """Forget a finished or cancelled request; the replica that has it."""
        job = self.jobs.pop(request_id)
        replica = job.replica
        if replica is not None:
            del self.replicas[replica].jobs[request_id]
        else:
            (self.again if job in self.again else self.waiting).remove(job)
        return replica

    def lose(self, replica: int, *, through_requests: bool = True) -> list[int]:
        """A replica is lost, perhaps through one of its requests: queue them again.

        Those that have failed too often are forgotten and returned.
        """
        failed = []
        for job in reversed(self.replicas.pop(replica).jobs.values()):
            job.replica, job.failures = None, job.failures + through_requests
            if job.failures >= MAX_FAILURES:
                failed.append(self.jobs.pop(job.request_id).request_id)
            else:
                self.again.appendleft(job)
        return failed

    def _choose(self, job: Job) -> int | None:
        """The least loaded replica with room, or one nearly as free that knows the start of the prompt."""
        free = {name: load.load for name, load in self.replicas.items() if self._takes(load, job)}
        if not free:
            return None
        least = min(free.values())
        near = [name for name, load in free.items() if load <= least + self.tolerance]
        matched = {name: _matched(job.keys, self.replicas[name].prefixes) for name in near}
        best = max(matched.values())
        candidates = [name for name in near if matched[name] == best] if best else list(free)
        return min(candidates, key=free.__getitem__)

    def _takes(self, load: _Load, job: Job) -> bool:
        has_failed = job.failures and any(other.failures for other in load.jobs.values())
        return len(load.jobs) < self.room and not has_failed

    def _place(self, replica: int, job: Job) -> None:
        load = self.replicas[replica]
        uncached = job.num_prompt_tokens - _matched(job.keys, load.prefixes) * self.block_size
        job.replica, load.jobs[job.request_id] = replica, job
        job.weight = 1.0 + max(0, uncached) / self.tokens_per_step
        for key in job.keys:
            load.prefixes[key] = None
            load.prefixes.move_to_end(key)
        while len(load.prefixes) > KNOWN_PREFIXES:
            load.prefixes.popitem(last=False)

    def _keys(self, prompt: list[int]) -> list[int]:
        """A key per full leading block that stands for all tokens up to its end."""
        keys, key = [], 0
        for start in range(0, min(len(prompt), PREFIX_BLOCKS * self.block_size) - self.block_size + 1, self.block_size):
            key = hash((key, tuple(prompt[start : start + self.block_size])))
            keys.append(key)
        return keys


def _matched(keys: list[int], known: OrderedDict[int, None]) -> int:
    """How many leading blocks are known."""
    return next((count for count, key in enumerate(keys) if key not in known), len(keys))
