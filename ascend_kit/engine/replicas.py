"""The engine core over several processes: the methods of EngineCore, the work done by replicas.

The driver keeps a copy of every request and applies the tokens that replicas report, so that a request whose replica
was lost goes on elsewhere from its last known token. Streaming, stop strings and scores work on that copy.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from ascend_kit.device.device import Device, resolve_device
from ascend_kit.engine.block_manager import BlockManager
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import COUNTED, ReplicasLost, StopCheck, why_refused
from ascend_kit.engine.dispatcher import MAX_FAILURES, Dispatcher
from ascend_kit.engine.profile import Phase
from ascend_kit.engine.replica import ABANDONED, FAILED, HANG_S, READY, STARTING, Processes, Replica
from ascend_kit.engine.sequence import Progress, Sequence
from ascend_kit.engine.worker import Facts, Worker, host_name
from ascend_kit.model.config import ModelConfig

WAIT_S = 0.1  # a step returns after this time even if nothing happened
RESET_S = 30.0  # a replica that is asked for a new memory mark has a few steps to end first
CALLS_AHEAD = 2  # calls sent before an answer, so that a replica never waits for its driver
MAX_STARTS = 2  # of one replica that may fail
MAX_RESTARTS = 1  # of what carries all replicas
MAX_LOST_IN_A_ROW = 10  # replicas lost without a single request finished in between

_News = tuple[Replica, int, Progress]  # one token, or the end, of one request; its number within the progress


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
        self._rounds: deque[list[_News]] = deque()
        self._ended: list[Sequence] = []
        self._lost_in_a_row, self._last_error = 0, "none started"
        self._restarts_left = MAX_RESTARTS
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
        smallest = min(one.stats["kv_blocks_total"] for one in self.replicas)
        self.block_size = facts.stats["block_size"]
        self.blocks = BlockManager(
            smallest + 1, self.block_size, on_demand=settings.memory_optimize, max_seq_length=settings.max_seq_length
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
        touched = [self._apply(*news, should_stop) for news in self._rounds.popleft()]
        return ended + [sequence for sequence in touched if sequence is not None]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; its replica forgets it with the next call."""
        if self.sequences.pop(sequence.id, None) is not None:
            sequence.end(reason)
            replica = self.dispatcher.remove(sequence.id)
            if replica is not None:
                self.replicas[replica].cancelled.append(sequence.id)

    def stats(self) -> dict[str, Any]:
        """Counters summed over replicas, sizes of one copy of the model, and a row per replica under `replicas`."""
        counts = sum((one.counts() for one in self.replicas), Counter[str]())
        ranks, told = [facts.stats for facts in self.replicas[0].facts], [one.stats for one in self.replicas]
        return {
            **{name: counts[name] for name in (*COUNTED, "preemptions")},
            "running": sum(stats.get("running", 0) for stats in told),
            "kv_blocks_total": self.blocks.total * len(self.replicas),
            "kv_blocks_free": sum(stats.get("kv_blocks_free", self.blocks.total) for stats in told),
            "kv_block_bytes": sum(stats["kv_block_bytes"] for stats in ranks),
            "block_size": self.block_size,
            "weight_bytes": sum(stats["weight_bytes"] for stats in ranks),
            "reserve_bytes": ranks[0]["reserve_bytes"],
            "graphs": next((stats for stats in told if stats), ranks[0])["graphs"],
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
                    one.stats = self.processes.result(call)

    def profile(self, prompts: list[list[int]], steps: int, folder: str) -> list[Phase]:
        """Steps of the first replica under the profiler, while no request runs; rank 0 of several is shown."""
        one = self.replicas[0]
        if one.addresses[0].host != host_name():
            raise ValueError("profile: true writes its trace where the model runs; leave ray_address out")
        call = one._call("profile", prompts, steps, folder)
        if not self.processes.wait([call, *one.other_ranks], HANG_S):
            raise TimeoutError(f"the profile did not end within {HANG_S:.0f} s")
        return self.processes.result(call)

    # --- replicas ---------------------------------------------------------------------------------------------

    def _look_after_replicas(self) -> None:
        """Let started replicas join, start failed ones again or give them up, and end hanging ones."""
        if self.processes.is_lost():
            self._restart_processes()
        for one in self.replicas:
            one.poll()
            if one.state == READY and one.number not in self.dispatcher.replicas:
                self.dispatcher.add_replica(one.number)
            elif one.state == READY and one.is_hanging(HANG_S):
                self._lose(one, TimeoutError(f"replica {one.number} answered no call for {HANG_S:.0f} s"))
            elif one.state == FAILED:
                self._last_error = f"{type(one.error).__name__}: {one.error}"
                one.num_failures += 1
                self._start_again(one)
        if self.sequences and all(one.state == ABANDONED for one in self.replicas):
            raise ReplicasLost(
                f"all {len(self.replicas)} replicas are lost and none could be started again; "
                f"{len(self.sequences)} requests are unfinished. The last error: {self._last_error}"
            )

    def _restart_processes(self) -> None:
        """What carries all replicas has ended, through no request's fault: start it and them again, but once."""
        self._rounds.clear()  # what was told and not taken over is computed again
        for one in self.replicas:
            if one.number in self.dispatcher.replicas:
                self.dispatcher.lose(one.number, through_requests=False)
            one.kill()
            one.restarts += 1
        self._restarts_left -= 1
        try:
            if self._restarts_left < 0:
                raise RuntimeError("the processes of Ray have ended again")
            self.processes.restart()
        except Exception as error:
            self._last_error = f"{type(error).__name__}: {error}"
            for one in self.replicas:
                one.state = ABANDONED
            return
        for one in self.replicas:
            one.start(self.replicas)

    def _start_again(self, one: Replica) -> None:
        """Start a replica anew if it did not fail too often and machines that are alive have cards; else give it up."""
        living = sum(other.state in (READY, STARTING) for other in self.replicas if other is not one)
        processes, needed = self.processes, (living + 1) * self.settings.tensor_parallel
        may = one.num_failures < MAX_STARTS
        if may and not processes.is_lost() and processes.total_cards() >= needed:
            one.start(self.replicas)
        else:  # where all processes are lost, the next step starts all of them
            one.state = FAILED if processes.is_lost() else ABANDONED

    def _lose(self, one: Replica, error: BaseException) -> None:
        """A replica is lost: its requests wait again, those that failed twice end, and it starts anew."""
        self._last_error = f"{type(error).__name__}: {error}"
        for item in self._rounds:  # what it told and was not taken over is computed again
            item[:] = [entry for entry in item if entry[0] is not one]
        for request_id in self.dispatcher.lose(one.number):
            sequence = self.sequences.pop(request_id)
            sequence.end(
                "error",
                f"{MAX_FAILURES} replicas were lost while they ran the request; it is not tried again. "
                f"The last error: {self._last_error}",
            )
            self._ended.append(sequence)
        one.kill()
        one.restarts += 1
        self._lost_in_a_row += 1
        if self._lost_in_a_row > MAX_LOST_IN_A_ROW:
            for other in self.replicas:
                other.close()
        else:
            self._start_again(one)

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
        one.heard_s, one.stats = time.perf_counter(), report.stats
        longest = max((max(1, len(news.tokens)) for news in report.progress), default=0)
        for number in range(longest):  # rounds of one token a request
            entries = [(one, number, news) for news in report.progress if number < max(1, len(news.tokens))]
            self._rounds.append(entries)

    def _apply(self, one: Replica, number: int, news: Progress, should_stop: StopCheck) -> Sequence | None:
        """Bring our copy of a request up to date; None when it is no longer wanted."""
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
