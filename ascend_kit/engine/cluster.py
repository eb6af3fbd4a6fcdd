"""The engine core over several cards: the methods of EngineCore, the work done by replicas on Ray.

The driver keeps a copy of every request and applies the tokens that replicas report, so that a request whose replica
died goes on elsewhere from its last known token. Streaming, stop strings and scores work on that copy.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ascend_kit.device.device import Device, auto_kind, parse_device
from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import StopCheck, why_refused
from ascend_kit.engine.dispatch import Dispatcher, Job, ReplicasLost
from ascend_kit.engine.ray_session import RaySession
from ascend_kit.engine.replica import ABANDONED, CALLS_AHEAD, FAILED, READY, STARTING, Replica, plain
from ascend_kit.engine.sequence import Sequence
from ascend_kit.engine.worker import Order, Progress, Report
from ascend_kit.model.config import ModelConfig

WAIT_S = 0.1  # a step returns after this time even if nothing happened
HANG_S = 900.0  # a replica that answers no call for this long is ended; compiling a graph takes minutes
RESET_S = 30.0  # a replica that is asked for a new memory mark has a few steps to end first
MAX_START_FAILURES = 2
MAX_DEATHS_IN_A_ROW = 10  # replicas lost without a single request finished in between


class _Round(NamedTuple):
    """One token, or the end, of one request."""

    wire: int
    number: int  # of the token within the progress
    progress: Progress
    clock_offset_s: float


@dataclass(frozen=True)
class ClusterDevice(Device):
    """The card of the first replica, with the memory of all."""

    core: Any = field(default=None, repr=False, compare=False)

    def memory_in_use_bytes(self) -> int:
        return sum(row["memory_bytes"] for row in self.core.replica_rows())

    def peak_memory_bytes(self) -> int:
        return sum(row["peak_memory_bytes"] for row in self.core.replica_rows())

    def free_memory_bytes(self) -> int:
        return max(0, self.total_memory_bytes * len(self.core.replicas) - self.memory_in_use_bytes())

    def reset_peak_memory(self) -> None:
        """Start new high-water marks in all replicas; those that do not answer keep theirs."""
        self.core.reset_peak_memory()

    def synchronize(self) -> None:
        """Nothing is queued in this process."""


class ClusterCore:
    """Replicas of one model, with the interface of one EngineCore."""

    def __init__(self, settings: EngineConfig):
        kind, first_card = parse_device(settings.device, settings.device_id)
        self.settings = replace(settings, device=auto_kind() if kind == "auto" else kind)
        self.config = ModelConfig.from_folder(settings.model_path)
        self.session = RaySession(self.settings.device, settings.cards, settings.ray_address, first_card)
        self.replicas = [Replica(number, self.settings, self.session) for number in range(settings.replicas)]
        self.sequences: dict[int, Sequence] = {}
        self._tickets: dict[int, int] = {}  # sequence id -> ticket, never used again
        self._waiting: dict[int, Sequence] = {}  # ticket -> sequence
        self._placed: dict[int, tuple[int, int]] = {}  # ticket -> number of its placement (the wire), replica
        self._wires: dict[int, int] = {}  # wire -> ticket
        self._rounds: deque[list[_Round]] = deque()
        self._ended: list[Sequence] = []
        self._numbers = itertools.count()
        self._deaths_in_a_row, self._last_error = 0, "none started"
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        barrier = threading.Barrier(len(self.replicas))
        for one in self.replicas:
            one.start(barrier, self.replicas)
        while any(one.state == STARTING for one in self.replicas):
            if any(one.state == FAILED for one in self.replicas):
                break
            time.sleep(0.02)
        failed = [one for one in self.replicas if one.state == FAILED]
        if failed:
            # A broken barrier is the echo of another replica's failure.
            errors = [one.error for one in failed if not isinstance(one.error, threading.BrokenBarrierError)]
            raise errors[0] if errors else failed[0].error
        facts, settings = self.replicas[0].facts, self.settings
        self.block_size = facts[0]["block_size"]
        smallest = min(one.facts[0]["num_blocks"] for one in self.replicas)
        self.blocks = BlockManager(
            smallest, self.block_size, on_demand=settings.memory_optimize, max_seq_length=settings.max_seq_length
        )
        self.device = ClusterDevice(**vars(facts[0]["device"]), core=self)
        self.dispatcher = Dispatcher(
            slots=settings.batch_size, tokens_per_step=settings.max_tokens_per_step, block_size=self.block_size
        )
        self._welcome()
        if len({place.host for place in self.replicas[0].places}) > 1:
            warnings.warn(
                "tensor_parallel spans machines: two all-reduces a layer over their network are slow; "
                "use tensor_parallel within a machine and replicas across",
                stacklevel=4,
            )

    def close(self) -> None:
        """End all replicas, and Ray if it was started here."""
        for one in self.replicas:
            one.close()
        self.session.close()

    # --- the interface of EngineCore --------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self.sequences) or bool(self._ended)

    def refusal(self, sequence: Sequence) -> str | None:
        """Why this request can never run, or None."""
        return why_refused(sequence, self.config.vocab_size, self.blocks, self.settings.max_seq_length)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `refusal` has passed."""
        ticket = next(self._numbers)
        self.sequences[sequence.id], self._tickets[sequence.id] = sequence, ticket
        self._waiting[ticket] = sequence
        self.dispatcher.submit(ticket, sequence.token_ids[: sequence.num_prompt_tokens])

    def step(self, should_stop: StopCheck) -> list[Sequence]:
        """Apply what replicas have reported; the sequences that got a token or ended.

        Returns at most one token per sequence, and an empty list when nothing has happened for a while.
        ReplicasLost when no replica is left to run what is unfinished.
        """
        self._mind_replicas()
        self._send()
        if not self._rounds and not self._ended:
            self._receive()
        ended, self._ended = self._ended, []
        if not self._rounds:
            return ended
        return ended + [s for s in (self._apply(one, should_stop) for one in self._rounds.popleft()) if s is not None]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; its replica forgets it with the next call."""
        ticket = self._tickets.get(sequence.id)
        if ticket is None:
            return
        self._close(sequence, reason, time.perf_counter())
        self._take_back(ticket)
        self.dispatcher.remove(ticket)

    def stats(self) -> dict[str, Any]:
        """Counters summed over replicas, sizes of one copy of the model, and a row per replica under `replicas`."""
        counts: Counter[str] = Counter(dict.fromkeys(self.replicas[0].facts[0]["stats"], 0))
        rows = self.replica_rows()
        for one in self.replicas:
            counts.update(one.lost_counts)
            counts.update(one.report.counts if one.report else {})
        ranks = [facts["stats"] for facts in self.replicas[0].facts]
        free = [one.report.counts["kv_blocks_free"] if one.report else self.blocks.total for one in self.replicas]
        counted = ("steps", "prompt_tokens", "cached_prompt_tokens", "output_tokens", "preemptions")
        return {
            **{name: counts[name] for name in counted},
            "kv_blocks_total": self.blocks.total * len(self.replicas),
            "kv_blocks_free": sum(free),
            "kv_block_bytes": sum(stats["kv_block_bytes"] for stats in ranks),
            "block_size": self.block_size,
            "weight_bytes": sum(stats["weight_bytes"] for stats in ranks),
            "graphs": next((one.report.graphs for one in self.replicas if one.report), ranks[0]["graphs"]),
            "restarts": sum(one.restarts for one in self.replicas),
            "replicas": rows,
        }

    def reset_peak_memory(self) -> None:
        """Start a new high-water mark of memory in every replica that is ready."""
        asked = {one.actors[0].reset_peak_memory.remote(): one for one in self.replicas if one.state == READY}
        if not asked:
            return
        answered, _ = self.session.ray.wait(list(asked), num_returns=len(asked), timeout=RESET_S)
        for call in answered:
            with contextlib.suppress(Exception):  # a dead replica is noticed by the next step
                asked[call].report = self.session.ray.get(call)

    def replica_rows(self) -> list[dict[str, Any]]:
        """Load and memory of each replica as it last reported, plain values for a table."""
        rows = []
        for one in self.replicas:
            report, ranks = one.report, len(one.facts)
            counts = Counter(one.lost_counts)
            counts.update(report.counts if report else {})
            loaded = sum(facts["memory_bytes"] for facts in one.facts)
            known = self.dispatcher.places.get(one.number) if one.state == READY else None
            rows.append(
                {
                    "replica": one.number,
                    "state": one.state,
                    "restarts": one.restarts,
                    "cards": ranks,
                    "card_names": one.card_names(),
                    "hosts": sorted({place.address for place in one.places}),
                    "pids": [p.pid for p in one.places],
                    "in_flight": len(known.jobs) if known else 0,
                    "load": known.load if known else 0.0,
                    "finished": one.num_finished,
                    "output_tokens": counts["output_tokens"],
                    "steps": counts["steps"],
                    "busy_s": float(counts["busy_s"]),
                    "kv_blocks_free": report.counts["kv_blocks_free"] if report else None,
                    # Rank 0 reports as it goes; the other ranks hold the same share of the model.
                    "memory_bytes": report.memory_bytes * ranks if report else loaded,
                    "peak_memory_bytes": report.peak_memory_bytes * ranks if report else loaded,
                }
            )
        return rows

    # --- replicas ---------------------------------------------------------------------------------------------

    def _mind_replicas(self) -> None:
        """Let started replicas join, start failed ones again or give them up, and end hanging ones."""
        self._welcome()
        for one in self.replicas:
            if one.state == READY and one.is_hanging(HANG_S):
                self._lose(one, TimeoutError(f"replica {one.number} answered no call for {HANG_S:.0f} s"))
            elif one.state == FAILED:
                self._last_error = f"{type(one.error).__name__}: {one.error}"
                one.num_failures += 1
                if one.num_failures < MAX_START_FAILURES and self._has_room():
                    one.start(None, self.replicas)
                else:
                    one.state = ABANDONED
        if self.sequences and all(one.state == ABANDONED for one in self.replicas):
            raise ReplicasLost(
                f"all {len(self.replicas)} replicas are lost and none could be started again; "
                f"{len(self.sequences)} requests are unfinished. The last error: {self._last_error}"
            )

    def _welcome(self) -> None:
        for one in self.replicas:
            if one.state == READY and one.number not in self.dispatcher.places:
                one.num_failures = 0
                self.dispatcher.add_replica(one.number)

    def _has_room(self) -> bool:
        """Whether the machines that are alive have cards for one replica more."""
        living = sum(one.state in (READY, STARTING) for one in self.replicas)
        return self.session.total_cards() >= (living + 1) * self.settings.tensor_parallel

    def _lose(self, one: Replica, error: BaseException) -> None:
        """A replica died: its requests wait again, those that killed too often fail, and it starts anew."""
        self._last_error = f"{type(error).__name__}: {error}"
        for ticket in [ticket for ticket, (_, number) in self._placed.items() if number == one.number]:
            self._unwire(ticket)
        for job in self.dispatcher.lose(one.number):
            self._blame(job)
        one.kill()
        self._deaths_in_a_row += 1
        one.restarts += 1
        if self._deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
            for other in self.replicas:
                other.close()
        elif self._has_room_without(one):
            one.start(None, self.replicas)
        else:
            one.state = ABANDONED

    def _has_room_without(self, one: Replica) -> bool:
        one.state = FAILED
        return self._has_room()

    def _blame(self, job: Job) -> None:
        sequence = self._waiting[job.ticket]
        sequence.error = (
            f"the request ended {job.strikes} replicas that ran it alone or nearly so; it is not tried "
            f"again. The last error: {self._last_error}"
        )
        self._close(sequence, "error", time.perf_counter())
        self._ended.append(sequence)

    # --- requests ---------------------------------------------------------------------------------------------

    def _send(self) -> None:
        for number, job in self.dispatcher.assign():
            sequence, wire = self._waiting[job.ticket], next(self._numbers)
            self._wires[wire], self._placed[job.ticket] = job.ticket, (wire, number)
            self.replicas[number].orders.append(
                Order(
                    wire,
                    sequence.token_ids[: sequence.num_prompt_tokens],
                    sequence.output_ids,
                    sequence.sampling,
                    sequence.targets,
                    sequence.is_watched,
                )
            )
        for one in self.replicas:
            if one.state != READY:
                continue
            if one.orders or one.cancelled:
                one.send()
            while len(one.calls) < CALLS_AHEAD and self.dispatcher.in_flight(one.number):
                one.send()

    def _receive(self) -> None:
        """Wait for the next answer and take all that are there."""
        ray = self.session.ray
        watched = {ref: one for one in self.replicas for ref in one.watched()}
        if not watched:
            time.sleep(0.01)  # replicas are starting
            return
        ready, _ = ray.wait(list(watched), timeout=WAIT_S)
        if ready and len(watched) > 1:
            ready, _ = ray.wait(list(watched), num_returns=len(watched), timeout=0)
        for ref in ready:
            one = watched[ref]
            if one.state == READY and ref in one.watched():  # not lost meanwhile through another of its ranks
                self._take_answer(one, ref)

    def _take_answer(self, one: Replica, ref: Any) -> None:
        try:
            answer = self.session.ray.get(ref)
            if not one.calls or ref != one.calls[0]:
                raise RuntimeError(f"a rank of replica {one.number} has left")
        except Exception as error:  # death, an error in the worker, a lost machine: the replica is of no use any more
            self._lose(one, plain(error))
            return
        one.calls.popleft()
        one.heard_s, one.report = time.perf_counter(), answer
        self._split(one, answer)

    def _split(self, one: Replica, report: Report) -> None:
        """Queue a report's tokens in rounds of one token a request."""
        longest = max((max(1, len(news.tokens)) for news in report.progress), default=0)
        for number in range(longest):
            self._rounds.append(
                [
                    _Round(news.ticket, number, news, one.clock_offset_s)
                    for news in report.progress
                    if number < max(1, len(news.tokens))
                ]
            )

    def _apply(self, item: _Round, should_stop: StopCheck) -> Sequence | None:
        """Bring our copy of a request up to date; None when it is no longer wanted from that replica."""
        ticket = self._wires.get(item.wire)
        if ticket is None:
            return None
        sequence, news = self._waiting[ticket], item.progress
        if item.number == 0:
            self._note_start(sequence, item)
        if news.tokens:
            token = news.tokens[item.number]
            sequence.token_ids.append(token)
            sequence.timeline.token_times_s.append(news.times_s[item.number] - item.clock_offset_s)
            sequence.logprobs += news.logprobs[item.number : item.number + 1]
            should_stop(sequence, token)  # keeps the text; the replica has come to the same answer
        is_last = item.number >= len(news.tokens) - 1
        if is_last and news.finish_reason is not None:
            sequence.target_scores = news.target_scores
            self._complete(sequence, ticket, news.finish_reason)
        elif self.dispatcher.progressed(ticket, 1):
            self._take_back(ticket)  # cleared: its replica is wanted for the next suspect
        return sequence

    def _note_start(self, sequence: Sequence, item: _Round) -> None:
        news, timeline = item.progress, sequence.timeline
        if timeline.scheduled_s is None and news.scheduled_s is not None:
            timeline.scheduled_s = news.scheduled_s - item.clock_offset_s
            sequence.num_cached_tokens = news.num_cached_tokens
        sequence.num_preemptions = max(sequence.num_preemptions, news.num_preemptions)

    def _complete(self, sequence: Sequence, ticket: int, reason: str) -> None:
        times = sequence.timeline.token_times_s
        self._close(sequence, reason, times[-1] if times else time.perf_counter())
        self.dispatcher.remove(ticket)
        self.replicas[self._unwire(ticket)[1]].num_finished += 1
        self._deaths_in_a_row = 0

    def _close(self, sequence: Sequence, reason: str, now: float) -> None:
        sequence.finish_reason, sequence.timeline.finished_s = reason, now
        self._waiting.pop(self._tickets.pop(sequence.id))
        self.sequences.pop(sequence.id)

    def _take_back(self, ticket: int) -> None:
        """Tell the replica that runs a request to drop it; what it still reports is ignored."""
        if ticket in self._placed:
            wire, number = self._unwire(ticket)
            self.replicas[number].cancelled.append(wire)

    def _unwire(self, ticket: int) -> tuple[int, int]:
        wire, number = self._placed.pop(ticket)
        del self._wires[wire]
        return wire, number
