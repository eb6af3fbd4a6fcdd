"""Which replica runs which request. Plain Python: no torch, no Ray, no clock.

Requests wait in one queue and are placed one by one, when a replica has room, so that a replica that is done early
takes more. After a replica died, each request it held runs alone until it has passed the place where the replica
died: so a request that kills is found, and no other is blamed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field

MAX_STRIKES = 2  # replicas a request may kill
MAX_DEATHS = 6  # deaths a request may be near, guilty or not
PROBATION_TOKENS = 24  # more than a replica can compute without its driver hearing of it
KNOWN_PREFIXES = 4096  # block keys remembered per replica
PREFIX_BLOCKS = 64  # leading blocks of a prompt that are compared


class ReplicasLost(RuntimeError):
    """No replica is left and none could be started. `outputs` holds what had finished before."""

    def __init__(self, message: str):
        super().__init__(message)
        self.outputs: list = []


@dataclass(eq=False)
class Job:
    """A request as the dispatcher sees it. `tokens` counts what it has produced so far."""

    ticket: int
    prompt: list[int]
    keys: list[int] = field(default_factory=list)
    tokens: int = 0
    replica: Hashable | None = None
    weight: float = 0.0  # its part of the replica's load
    strikes: int = 0
    deaths: int = 0
    is_suspect: bool = False
    cleared_at: int = 0  # tokens at which a suspect is cleared


@dataclass(eq=False)
class _Place:
    jobs: dict[int, Job] = field(default_factory=dict)
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    load: float = 0.0


class Dispatcher:
    """Places jobs on replicas with `slots` running requests each.

    Load is in requests: one for the slot, plus the share of a step that an uncomputed prompt needs.
    """

    def __init__(self, *, slots: int, tokens_per_step: int, block_size: int):
        self.slots, self.tokens_per_step, self.block_size = slots, tokens_per_step, block_size
        self.room = slots + max(1, slots // 8)  # a few more wait at the replica, so that it never does
        self.tolerance = max(2.0, slots / 4)  # extra load accepted for a prefix that is there already
        self.places: dict[Hashable, _Place] = {}
        self.waiting: deque[Job] = deque()
        self.suspects: deque[Job] = deque()
        self.jobs: dict[int, Job] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self.jobs)

    def add_replica(self, replica: Hashable) -> None:
        self.places[replica] = _Place()

    def load(self, replica: Hashable) -> float:
        return self.places[replica].load

    def in_flight(self, replica: Hashable) -> int:
        return len(self.places[replica].jobs)

    def submit(self, ticket: int, prompt: list[int]) -> Job:
        """Queue a request."""
        job = self.jobs[ticket] = Job(ticket, prompt, self._keys(prompt))
        self.waiting.append(job)
        return job

    def assign(self) -> list[tuple[Hashable, Job]]:
        """Place as many jobs as there is room for now, in order; the placements made."""
        placed = []
        while self.suspects:
            idle = next((name for name, place in self.places.items() if not place.jobs), None)
            if idle is None:
                break
            placed.append((idle, self._place(idle, self.suspects.popleft())))
        while self.waiting:
            replica = self._choose(self.waiting[0])
            if replica is None:
                break
            placed.append((replica, self._place(replica, self.waiting.popleft())))
        return placed

    def progressed(self, ticket: int, tokens: int) -> bool:
        """Note new tokens. True when the job should be taken back from its replica: it was cleared of a suspicion,
        and its replica is wanted for the next suspect."""
        job = self.jobs[ticket]
        self._reweigh(job, 1.0)  # its prompt is computed
        job.tokens += tokens
        if not job.is_suspect or job.tokens < job.cleared_at:
            return False
        job.is_suspect, job.strikes = False, 0
        if not self.suspects:
            return False
        self._leave(job)
        self.waiting.appendleft(job)
        return True

    def remove(self, ticket: int) -> Hashable | None:
        """Forget a finished or cancelled job; the replica that held it."""
        job = self.jobs.pop(ticket)
        replica = job.replica
        if replica is not None:
            self._leave(job)
        elif job in self.suspects:
            self.suspects.remove(job)
        else:
            self.waiting.remove(job)
        return replica

    def lose(self, replica: Hashable) -> list[Job]:
        """A replica died: queue its jobs again; those that have killed too often, which are forgotten."""
        jobs = list(self.places.pop(replica).jobs.values())
        guilty = []
        for job in reversed(jobs):
            job.replica = None
            job.strikes, job.deaths = job.strikes + 1, job.deaths + 1
            if job.strikes >= MAX_STRIKES or job.deaths >= MAX_DEATHS:
                guilty.append(self.jobs.pop(job.ticket))
                continue
            job.is_suspect, job.cleared_at = True, job.tokens + PROBATION_TOKENS
            self.suspects.appendleft(job)
        return guilty

    def _choose(self, job: Job) -> Hashable | None:
        """The least loaded replica with room, or one nearly as free that knows the start of the prompt."""
        open_places = {name: place for name, place in self.places.items() if self._is_open(place)}
        if not open_places:
            return None
        least = min(place.load for place in open_places.values())
        near = [name for name, place in open_places.items() if place.load <= least + self.tolerance]
        matched = {name: _matched(job.keys, open_places[name].prefixes) for name in near}
        best = max(matched.values())
        candidates = [name for name in near if matched[name] == best] if best else list(open_places)
        return min(candidates, key=lambda name: open_places[name].load)

    def _is_open(self, place: _Place) -> bool:
        return len(place.jobs) < self.room and not any(job.is_suspect for job in place.jobs.values())

    def _place(self, replica: Hashable, job: Job) -> Job:
        place = self.places[replica]
        uncached = len(job.prompt) - _matched(job.keys, place.prefixes) * self.block_size
        job.replica, job.weight, place.jobs[job.ticket] = replica, 0.0, job
        self._reweigh(job, 1.0 + max(0, uncached) / self.tokens_per_step)
        for key in job.keys:
            place.prefixes[key] = None
            place.prefixes.move_to_end(key)
        while len(place.prefixes) > KNOWN_PREFIXES:
            place.prefixes.popitem(last=False)
        return job

    def _leave(self, job: Job) -> None:
        self._reweigh(job, 0.0)
        del self.places[job.replica].jobs[job.ticket]
        job.replica = None

    def _reweigh(self, job: Job, weight: float) -> None:
        self.places[job.replica].load += weight - job.weight
        job.weight = weight

    def _keys(self, prompt: list[int]) -> list[int]:
        """A key per full leading block that stands for all tokens up to its end."""
        keys, key = [], 0
        for start in range(0, min(len(prompt), PREFIX_BLOCKS * self.block_size) - self.block_size + 1, self.block_size):
            key = hash((key, tuple(prompt[start : start + self.block_size])))
            keys.append(key)
        return keys


def _matched(keys: list[int], known: OrderedDict[int, None]) -> int:
    """How many leading blocks are known."""
    count = 0
    for key in keys:
        if key not in known:
            break
        count += 1
    return count
