"""The engine core over several processes: the methods of EngineCore, the work done by replicas.

The driver keeps a copy of every request and applies the tokens that replicas report, so that a request whose replica
was lost goes on elsewhere from its last known token. Streaming, stop strings and scores work on that copy.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from ascend_kit.device.device import Device, resolve_device
from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import ReplicasLost, StopCheck, why_refused
from ascend_kit.engine.sequence import Progress, Sequence
from ascend_kit.engine.worker import Facts, Report, Role, Worker, WorkerAddress, host_name
from ascend_kit.model.config import ModelConfig

STARTING, READY, FAILED, ABANDONED = "starting", "ready", "failed", "abandoned"
START_S = 180.0  # until processes answer; reading a model may take longer and is not limited
WAIT_S = 0.1  # a step returns after this time even if nothing happened
HANG_S = 900.0  # a replica that answers no call for this long is ended; compiling a graph takes minutes
RESET_S = 30.0  # a replica that is asked for a new memory mark has a few steps to end first
CALLS_AHEAD = 2  # calls sent before an answer, so that a replica never waits for its driver
MAX_FAILURES = 2  # replicas that may be lost under one request, and starts of one replica that may fail
MAX_LOST_IN_A_ROW = 10  # replicas lost without a single request finished in between
KNOWN_PREFIXES = 4096  # block keys remembered per replica
PREFIX_BLOCKS = 64  # leading blocks of a prompt that are compared
COUNTED = (
    "steps", "prompt_tokens", "cached_prompt_tokens", "output_tokens", "decodes", "decoded_tokens",
    "preemptions",
)  # fmt: skip


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
    def close(self) -> None: ...


# --- which replica runs which request -------------------------------------------------------------------------


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
    load: float = 0.0


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
        self._reweigh(self.jobs[request_id], 1.0)

    def remove(self, request_id: int) -> int | None:
        """Forget a finished or cancelled request; the replica that has it."""
        job = self.jobs.pop(request_id)
        replica = job.replica
        if replica is not None:
            self._reweigh(job, 0.0)
            del self.replicas[replica].jobs[request_id]
        else:
            (self.again if job.failures else self.waiting).remove(job)
        return replica

    def lose(self, replica: int) -> list[int]:
        """A replica is lost: queue its requests again; those that have failed too often, which are forgotten."""
        failed = []
        for job in reversed(self.replicas.pop(replica).jobs.values()):
            job.replica, job.weight, job.failures = None, 0.0, job.failures + 1
            if job.failures >= MAX_FAILURES:
                failed.append(self.jobs.pop(job.request_id).request_id)
            else:
                self.again.appendleft(job)
        return failed

    def _choose(self, job: Job) -> int | None:
        """The least loaded replica with room, or one nearly as free that knows the start of the prompt."""
        free = {name: load for name, load in self.replicas.items() if self._takes(load, job)}
        if not free:
            return None
        least = min(load.load for load in free.values())
        near = [name for name, load in free.items() if load.load <= least + self.tolerance]
        matched = {name: _matched(job.keys, free[name].prefixes) for name in near}
        best = max(matched.values())
        candidates = [name for name in near if matched[name] == best] if best else list(free)
        return min(candidates, key=lambda name: free[name].load)

    def _takes(self, load: _Load, job: Job) -> bool:
        has_failed = job.failures and any(other.failures for other in load.jobs.values())
        return len(load.jobs) < self.room and not has_failed

    def _place(self, replica: int, job: Job) -> None:
        load = self.replicas[replica]
        uncached = job.num_prompt_tokens - _matched(job.keys, load.prefixes) * self.block_size
        job.replica, load.jobs[job.request_id] = replica, job
        self._reweigh(job, 1.0 + max(0, uncached) / self.tokens_per_step)
        for key in job.keys:
            load.prefixes[key] = None
            load.prefixes.move_to_end(key)
        while len(load.prefixes) > KNOWN_PREFIXES:
            load.prefixes.popitem(last=False)

    def _reweigh(self, job: Job, weight: float) -> None:
        if job.replica is not None:
            self.replicas[job.replica].load += weight - job.weight
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
    return next((count for count, key in enumerate(keys) if key not in known), len(keys))


# --- one replica ----------------------------------------------------------------------------------------------


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
        self.lost_counts: Counter[str] = Counter()  # of processes that are gone
        self._reset()

    def _reset(self) -> None:
        self.workers: list[Any] = []
        self.calls: deque[Any] = deque()
        self.other_ranks: list[Any] = []  # calls that end only by accident
        self.requests: list[Sequence] = []
        self.cancelled: list[int] = []
        self.report: Report | None = None
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
        if self.report is not None:
            self.lost_counts.update({name: n for name, n in self.report.counts.items() if name != "kv_blocks_free"})
        workers = self.workers
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

    def row(self) -> dict[str, Any]:
        """Load and memory as it last reported, plain values for a table."""
        report, ranks = self.report, len(self.facts)
        counts = Counter(self.lost_counts)
        counts.update(report.counts if report else {})
        loaded = sum(facts.memory_bytes for facts in self.facts)
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
            "kv_blocks_free": report.counts["kv_blocks_free"] if report else None,
            # Rank 0 reports as it goes; the other ranks hold the same share of the model.
            "memory_bytes": report.memory_bytes * ranks if report else loaded,
            "peak_memory_bytes": report.peak_memory_bytes * ranks if report else loaded,
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


# --- all of them ----------------------------------------------------------------------------------------------


class _Round(NamedTuple):
    """One token, or the end, of one request."""

    replica: Replica
    number: int  # of the token within the progress
    progress: Progress


@dataclass(frozen=True)
class ReplicasDevice(Device):
    """The card of the first replica, with the memory of all."""

    core: Any = field(default=None, repr=False, compare=False)

    def memory_in_use_bytes(self) -> int:
        return sum(one.row()["memory_bytes"] for one in self.core.replicas)

    def peak_memory_bytes(self) -> int:
        return sum(one.row()["peak_memory_bytes"] for one in self.core.replicas)

    def free_memory_bytes(self) -> int:
        return max(0, self.total_memory_bytes * len(self.core.replicas) - self.memory_in_use_bytes())

    def reset_peak_memory(self) -> None:
        """Start new high-water marks in all replicas; those that do not answer keep theirs."""
        self.core.reset_peak_memory()

    def synchronize(self) -> None:
        """Nothing is queued in this process."""

    def versions(self) -> dict[str, str]:
        return self._facts.versions

    def facts(self) -> dict[str, str]:
        return self._facts.machine

    def task_queue_level(self) -> int | None:
        return self._facts.task_queue_level

    @property
    def _facts(self) -> Facts:  # what runs there, without asking for the device here
        return self.core.replicas[0].facts[0]


class ReplicatedCore:
    """Replicas of one model, with the interface of one EngineCore."""

    def __init__(self, settings: EngineConfig, config: ModelConfig):
        kind, index = resolve_device(settings.device, settings.device_id)
        self.settings, self.config = replace(settings, device=kind, device_id=index), config
        self.processes = _processes(self.settings)
        self.sequences: dict[int, Sequence] = {}
        self._rounds: deque[list[_Round]] = deque()
        self._ended: list[Sequence] = []
        self._lost_in_a_row, self._last_error = 0, "none started"
        self.replicas = [Replica(n, self.settings, config, self.processes) for n in range(settings.replicas)]
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        for one in self.replicas:
            one.start(self.replicas)
        while any(one.state == STARTING for one in self.replicas):
            for one in self.replicas:
                one.poll()
                if one.state == FAILED:
                    raise one.error
            time.sleep(0.02)
        facts, settings = self.replicas[0].facts[0], self.settings
        smallest = min(one.facts[0].num_blocks for one in self.replicas)
        self.block_size = facts.block_size
        self.blocks = BlockManager(
            smallest, self.block_size, on_demand=settings.memory_optimize, max_seq_length=settings.max_seq_length
        )
        self.device: Device = ReplicasDevice(**vars(facts.device), core=self)
        self.dispatcher = Dispatcher(
            slots=settings.batch_size, tokens_per_step=settings.max_tokens_per_step, block_size=self.block_size
        )
        if len({one.host for one in self.replicas[0].addresses}) > 1:
            warnings.warn(
                "tensor_parallel spans machines: two all-reduces a layer over their network are slow; "
                "use tensor_parallel within a machine and replicas across",
                stacklevel=4,
            )

    def close(self) -> None:
        """End all replicas, and what was started to run them."""
        for one in self.replicas:
            one.close()
        self.processes.close()

    # --- the interface of EngineCore --------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self.sequences) or bool(self._ended)

    def refusal(self, sequence: Sequence) -> str | None:
        """Why this request can never run, or None."""
        return why_refused(sequence, self.config.vocab_size, self.blocks, self.settings.max_seq_length)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `refusal` has passed."""
        self.sequences[sequence.id] = sequence
        self.dispatcher.submit(sequence.id, sequence.prompt_ids)

    def step(self, should_stop: StopCheck) -> list[Sequence]:
        """Apply what replicas have reported; the sequences that got a token or ended.

        Returns at most one token per sequence, and an empty list when nothing has happened for a while.
        ReplicasLost when no replica is left to run what is unfinished.
        """
        self._look_after_replicas()
        self._send()
        if not self._rounds and not self._ended:
            self._receive()
        ended, self._ended = self._ended, []
        if not self._rounds:
            return ended
        return ended + [s for s in (self._apply(one, should_stop) for one in self._rounds.popleft()) if s is not None]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; its replica forgets it with the next call."""
        if self.sequences.pop(sequence.id, None) is not None:
            sequence.finish_reason, sequence.timeline.finished_s = reason, time.perf_counter()
            replica = self.dispatcher.remove(sequence.id)
            if replica is not None:
                self.replicas[replica].cancelled.append(sequence.id)

    def stats(self) -> dict[str, Any]:
        """Counters summed over replicas, sizes of one copy of the model, and a row per replica under `replicas`."""
        counts: Counter[str] = Counter()
        for one in self.replicas:
            counts.update(one.lost_counts)
            counts.update(one.report.counts if one.report else {})
        ranks = [facts.stats for facts in self.replicas[0].facts]
        free = [one.report.counts["kv_blocks_free"] if one.report else self.blocks.total for one in self.replicas]
        return {
            **{name: counts[name] for name in COUNTED},
            "kv_blocks_total": self.blocks.total * len(self.replicas),
            "kv_blocks_free": sum(free),
            "kv_block_bytes": sum(stats["kv_block_bytes"] for stats in ranks),
            "block_size": self.block_size,
            "weight_bytes": sum(stats["weight_bytes"] for stats in ranks),
            "graphs": next((one.report.graphs for one in self.replicas if one.report), ranks[0]["graphs"]),
            "restarts": sum(one.restarts for one in self.replicas),
            "replicas": [{**one.row(), **self._load_of(one)} for one in self.replicas],
        }

    def _load_of(self, one: Replica) -> dict[str, Any]:
        known = self.dispatcher.replicas.get(one.number)
        return {"in_flight": len(known.jobs) if known else 0, "load": known.load if known else 0.0}

    def reset_peak_memory(self) -> None:
        """Start a new high-water mark of memory in every replica that is ready."""
        asked = [(one, one._call("reset_peak_memory")) for one in self.replicas if one.state == READY]
        answered = self.processes.wait([call for _, call in asked], RESET_S) if asked else []
        for one, call in asked:
            if call in answered:
                with contextlib.suppress(Exception):  # a lost replica is noticed by the next step
                    one.report = self.processes.result(call)

    # --- replicas ---------------------------------------------------------------------------------------------

    def _look_after_replicas(self) -> None:
        """Let started replicas join, start failed ones again or give them up, and end hanging ones."""
        for one in self.replicas:
            one.poll()
            if one.state == READY and one.number not in self.dispatcher.replicas:
                self.dispatcher.add_replica(one.number)
            elif one.state == READY and one.is_hanging(HANG_S):
                self._lose(one, TimeoutError(f"replica {one.number} answered no call for {HANG_S:.0f} s"))
            elif one.state == FAILED:
                self._last_error = f"{type(one.error).__name__}: {one.error}"
                one.num_failures += 1
                self._start_again(one, one.num_failures < MAX_FAILURES)
        if self.sequences and all(one.state == ABANDONED for one in self.replicas):
            raise ReplicasLost(
                f"all {len(self.replicas)} replicas are lost and none could be started again; "
                f"{len(self.sequences)} requests are unfinished. The last error: {self._last_error}"
            )

    def _start_again(self, one: Replica, may: bool) -> None:
        """Start a replica anew if it may and the machines that are alive have cards for it; else give it up."""
        living = sum(other.state in (READY, STARTING) for other in self.replicas if other is not one)
        if may and self.processes.total_cards() >= (living + 1) * self.settings.tensor_parallel:
            one.start(self.replicas)
        else:
            one.state = ABANDONED

    def _lose(self, one: Replica, error: BaseException) -> None:
        """A replica is lost: its requests wait again, those that failed twice end, and it starts anew."""
        self._last_error = f"{type(error).__name__}: {error}"
        for item in self._rounds:  # what it told and was not taken over is computed again
            item[:] = [entry for entry in item if entry.replica is not one]
        for request_id in self.dispatcher.lose(one.number):
            self._fail_request(self.sequences.pop(request_id))
        one.kill()
        one.restarts += 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row > MAX_LOST_IN_A_ROW:
            for other in self.replicas:
                other.close()
        else:
            self._start_again(one, True)

    def _fail_request(self, sequence: Sequence) -> None:
        sequence.fail(
            f"{MAX_FAILURES} replicas were lost while they ran the request; it is not tried again. "
            f"The last error: {self._last_error}"
        )
        sequence.timeline.finished_s = time.perf_counter()
        self._ended.append(sequence)

    # --- requests ---------------------------------------------------------------------------------------------

    def _send(self) -> None:
        for number, request_id in self.dispatcher.assign():
            self.replicas[number].requests.append(self.sequences[request_id])
        for one in self.replicas:
            if one.state == READY:
                if one.requests or one.cancelled:
                    one.send()
                while len(one.calls) < CALLS_AHEAD and self.dispatcher.in_flight(one.number):
                    one.send()

    def _receive(self) -> None:
        """Wait for the next answer and take all that are there."""
        watched = [(call, one) for one in self.replicas for call in one.watched()]
        if not watched:
            time.sleep(0.01)  # replicas are starting
            return
        ready = self.processes.wait([call for call, _ in watched], WAIT_S)
        for call, one in watched:
            if call in ready and call in one.watched():  # not lost meanwhile through another of its ranks
                self._take_answer(one, call)

    def _take_answer(self, one: Replica, call: Any) -> None:
        try:
            report = self.processes.result(call)
            if not one.calls or call != one.calls[0]:
                raise RuntimeError(f"a rank of replica {one.number} has left")
        except Exception as error:  # death, an error in the worker, a lost machine: the replica is of no use any more
            self._lose(one, error)
            return
        one.calls.popleft()
        one.heard_s, one.report = time.perf_counter(), report
        longest = max((max(1, len(news.tokens)) for news in report.progress), default=0)
        for number in range(longest):  # rounds of one token a request
            entries = [_Round(one, number, news) for news in report.progress if number < max(1, len(news.tokens))]
            self._rounds.append(entries)

    def _apply(self, item: _Round, should_stop: StopCheck) -> Sequence | None:
        """Bring our copy of a request up to date; None when it is no longer wanted."""
        one, number, news = item
        sequence = self.sequences.get(news.request_id)
        if sequence is None:
            return None
        sequence.take_start(news, one.clock_offset_s)
        if news.tokens:
            token = news.tokens[number]
            sequence.token_ids.append(token)
            sequence.timeline.token_times_s.append(news.token_times_s[number] - one.clock_offset_s)
            sequence.logprobs += news.logprobs[number : number + 1]
            should_stop(sequence, token)  # keeps the text; the replica has come to the same answer
        self.dispatcher.prompt_computed(sequence.id)
        if number >= len(news.tokens) - 1 and news.finish_reason is not None:
            sequence.take_end(news, one.clock_offset_s)
            del self.sequences[sequence.id]
            self.dispatcher.remove(sequence.id)
            one.num_finished += 1
            self._lost_in_a_row = 0
        return sequence


def _processes(settings: EngineConfig) -> Processes:
    """Ray for several cards; for one a process of this machine, beside the one that asks."""
    if settings.cards > 1 or settings.ray_address is not None:
        from ascend_kit.engine.ray_cluster import RaySession

        return RaySession(settings.device, settings.cards, settings.ray_address, settings.device_id, worker=Worker)
    from ascend_kit.engine.processes import LocalProcesses

    return LocalProcesses(Worker)
