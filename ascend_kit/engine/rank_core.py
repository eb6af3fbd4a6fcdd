"""The engine core for processes that torchrun or mpirun started: every rank runs the same script, each does a part.

All ranks are given the same requests in the same order. A replica takes the next one whenever it has a free slot, by
a counter that all share, so nothing is divided beforehand and no remainder is left. When a rank has nothing left to
take, all exchange what they have finished: every rank ends with every result.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from ascend_kit.device.device import auto_kind, parse_device, select_device
from ascend_kit.device.parallel import BACKENDS, NEVER, TensorParallel, leave_group
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.core import EngineCore, StopCheck
from ascend_kit.engine.ranks import Ranks
from ascend_kit.engine.sequence import Sequence
from ascend_kit.model.config import ModelConfig

JOIN_S = 300.0  # until all ranks have arrived
LEAVE_S = 10.0


class RankCore:
    """One rank's part, with the interface of EngineCore. Calls must be made on all ranks alike."""

    def __init__(self, settings: EngineConfig, ranks: Ranks):
        import torch.distributed as dist

        self._dist, self.ranks = dist, ranks
        kind = parse_device(settings.device)[0]
        kind = auto_kind() if kind == "auto" else kind
        self.device = select_device(kind, 0 if kind == "cpu" else ranks.local_rank)
        self.device.seed(settings.seed)
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            dist.init_process_group(
                BACKENDS[kind], store=_store(ranks), rank=ranks.rank, world_size=ranks.size, timeout=NEVER
            )
        self._counter = dist.distributed_c10d._get_default_store()
        self._epoch = self._agree_on_epoch()
        parallel = self._parallel(settings.tensor_parallel)
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ranks.size)))
        self.core = EngineCore(
            settings,
            ModelConfig.from_folder(settings.model_path),
            self.device,
            parallel=parallel,
            ranks_on_host=on_host,
        )
        self.is_leader = parallel is None or parallel.rank == 0
        self.sequences: dict[int, Sequence] = {}
        self._order: list[Sequence] = []  # every sequence ever added; its place is its number on all ranks
        self._next: int | None = None  # a number taken from the counter whose sequence has not come yet
        self._finished: dict[int, dict[str, Any]] = {}  # by number, not yet exchanged

    def _agree_on_epoch(self) -> int:
        """A number that all ranks share and no earlier engine of theirs has used."""
        number = [self._counter.add("ascend_kit/engines", 1) if self.ranks.rank == 0 else None]
        self._dist.broadcast_object_list(number, src=0)
        return number[0]

    def _parallel(self, size: int) -> TensorParallel | None:
        """Neighbouring ranks share a model. Every rank takes part in making every group."""
        if size == 1:
            return None
        mine = None
        for first in range(0, self.ranks.size, size):
            group = self._dist.new_group(list(range(first, first + size)), timeout=NEVER)
            if first <= self.ranks.rank < first + size:
                mine = TensorParallel(self.ranks.rank - first, size, group)
        return mine

    # --- the interface of EngineCore --------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self.sequences)

    def refusal(self, sequence: Sequence) -> str | None:
        """Why this request can never run, or None."""
        return self.core.refusal(sequence)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `refusal` has passed."""
        self.sequences[sequence.id] = sequence
        self._order.append(sequence)

    def step(self, should_stop: StopCheck) -> list[Sequence]:
        """One step of this rank's requests; when it has none, wait for the others and take over their results."""
        if not self.is_leader:
            self.core.runner.follow()
            return self._exchange(should_stop)
        self._take()
        touched = self.core.step(should_stop)
        for sequence in touched:
            if sequence.is_finished:
                self._note(sequence)
        # Also when everything is known here: others wait for what this rank finished last.
        if not self.core.has_unfinished and (not touched or not self.sequences):
            self.core.close()  # its other ranks go to the exchange as well
            touched += self._exchange(should_stop)
        return touched

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, on this rank; the others do the same."""
        if self.sequences.pop(sequence.id, None) is None:
            return
        if sequence.id in self.core.sequences:
            self.core.finish(sequence, reason)
        sequence.finish_reason, sequence.timeline.finished_s = reason, time.perf_counter()

    def stats(self) -> dict[str, Any]:
        """This rank's numbers; see EngineCore.stats."""
        return {**self.core.stats(), "rank": self.ranks.rank, "ranks": self.ranks.size}

    def close(self) -> None:
        """Leave the group once all ranks are here, or are late: one that failed does not come."""
        if not self._owns_group:
            return
        key, deadline = f"ascend_kit/{self._epoch}/left", time.perf_counter() + LEAVE_S
        self._counter.add(key, 1)
        while self._counter.add(key, 0) < self.ranks.size and time.perf_counter() < deadline:
            time.sleep(0.02)
        leave_group()

    # --- inside -----------------------------------------------------------------------------------------------

    def _take(self) -> None:
        """Take requests from the common queue while there are free slots."""
        scheduler = self.core.scheduler
        while len(scheduler.running) + len(scheduler.waiting) <= scheduler.max_sequences:
            if self._next is None:
                if self._num_taken() >= len(self._order):
                    return
                self._next = self._counter.add(f"ascend_kit/{self._epoch}/next", 1) - 1
            if self._next >= len(self._order):
                return
            sequence, self._next = self._order[self._next], None
            if sequence.id in self.sequences and not sequence.is_finished:
                self.core.add(sequence)

    def _num_taken(self) -> int:
        """How many requests all ranks together have taken."""
        return self._counter.add(f"ascend_kit/{self._epoch}/next", 0)

    def _note(self, sequence: Sequence) -> None:
        self.sequences.pop(sequence.id, None)
        line = sequence.timeline
        self._finished[sequence.id] = {
            "output_ids": sequence.output_ids,
            "logprobs": sequence.logprobs,
            "error": sequence.error,
            "finish_reason": sequence.finish_reason,
            "target_scores": sequence.target_scores,
            "num_cached_tokens": sequence.num_cached_tokens,
            "num_preemptions": sequence.num_preemptions,
            "scheduled_s": line.scheduled_s,
            "token_times_s": line.token_times_s,
            "finished_s": line.finished_s,
        }

    def _exchange(self, should_stop: StopCheck) -> list[Sequence]:
        """Give every rank what the others have finished; the sequences that ended elsewhere."""
        parts: list[Any] = [None] * self.ranks.size
        self._dist.all_gather_object(parts, self._finished)
        self._finished = {}
        arrived = {number: result for part in parts for number, result in part.items()}
        return [
            self._adopt(self.sequences.pop(number), result, should_stop)
            for number, result in arrived.items()
            if number in self.sequences
        ]

    @staticmethod
    def _adopt(sequence: Sequence, result: dict[str, Any], should_stop: StopCheck) -> Sequence:
        for token in result["output_ids"]:
            sequence.token_ids.append(token)
            should_stop(sequence, token)  # keeps the text of requests with stop strings
        for name in ("logprobs", "error", "finish_reason", "target_scores", "num_cached_tokens", "num_preemptions"):
            setattr(sequence, name, result[name])
        for name in ("scheduled_s", "token_times_s", "finished_s"):
            setattr(sequence.timeline, name, result[name])
        return sequence


def _store(ranks: Ranks) -> Any:
    """Where the ranks meet: the address torchrun gives, or a file when mpirun started all of them on one machine."""
    from torch.distributed import FileStore, TCPStore

    limit = timedelta(seconds=JOIN_S)
    if "MASTER_ADDR" in os.environ:
        port = int(os.environ.get("MASTER_PORT", "29500"))
        from_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves the store itself
        return TCPStore(
            os.environ["MASTER_ADDR"], port, ranks.size, is_master=ranks.rank == 0 and not from_agent, timeout=limit
        )
    if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", str(ranks.size)) != str(ranks.size):
        raise ValueError(
            "ranks on several machines need an address to meet at: "
            "mpirun -x MASTER_ADDR=<address of rank 0> -x MASTER_PORT=29500 ..."
        )
    job = os.environ.get("PMIX_NAMESPACE") or os.environ.get("PMI_JOBID") or f"parent-{os.getppid()}"
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{os.getuid()}-{socket.gethostname()}-{job}")
    store = FileStore(str(Path(tempfile.gettempdir()) / f"ascend-ranks-{name}"), ranks.size)
    store.set_timeout(limit)
    return store
