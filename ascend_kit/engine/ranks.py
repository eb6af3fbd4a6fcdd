"""Processes that torchrun or mpirun started: every rank runs the same script, each computes a part of the requests.

All ranks are given the same requests in the same order. Replica r of n takes every n-th of them, from r on; when it is
done with them, all exchange what they have finished: every rank ends with every result.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ascend_kit.engine.sequence import Progress, Sequence

if TYPE_CHECKING:
    from ascend_kit.device.parallel import TensorParallel
    from ascend_kit.engine.config import EngineConfig
    from ascend_kit.engine.core import StopCheck
    from ascend_kit.engine.profile import Phase
    from ascend_kit.model.config import ModelConfig

JOIN_S = 300.0  # until all ranks have arrived
LEAVE_S = 10.0  # until all ranks leave: one that failed does not come
# (rank, size, rank on this machine), by launcher
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


class Ranks(NamedTuple):
    """One of `size` processes; `local_rank` counts on this machine."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def environment_ranks(env: Mapping[str, str] | None = None) -> Ranks | None:
    """The ranks this process was started with, or None when it runs alone.

    ValueError when the variables of a launcher are there but make no sense: guessing would run a part of the work.
    """
    env = os.environ if env is None else env
    for launcher, names in LAUNCHERS.items():
        if names[1] not in env or names[0] not in env:
            continue
        shown = ", ".join(f"{name}={env.get(name)!r}" for name in names)
        try:
            rank, size = int(env[names[0]]), int(env[names[1]])
            local = int(env.get(names[2], rank))
        except ValueError:
            raise ValueError(
                f"the ranks of {launcher} are not whole numbers: {shown}; unset them to run alone"
            ) from None
        if not (0 <= rank < size and 0 <= local < size):
            raise ValueError(f"the ranks of {launcher} do not fit together: {shown}; unset them to run alone")
        if size > 1:
            return Ranks(rank, size, local, launcher)
    return None


def without_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that shall run alone."""
    names = {name for group in LAUNCHERS.values() for name in group}
    return {name: value for name, value in env.items() if name not in names}


class RankCore:
    """One rank's part, with the interface of EngineCore. Calls must be made on all ranks alike."""

    _opened = 0  # cores of this process so far; the same on all ranks

    def __init__(self, settings: EngineConfig, config: ModelConfig, ranks: Ranks):
        import torch.distributed as dist

        from ascend_kit.device.device import resolve_device, select_device
        from ascend_kit.device.parallel import join_group, prefer_vector_cores
        from ascend_kit.engine.core import EngineCore

        self._dist, self.ranks, self.config = dist, ranks, config
        kind, _ = resolve_device(settings.device)
        self.device = select_device(kind, 0 if kind == "cpu" else ranks.local_rank)
        RankCore._opened += 1
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ranks.size)))
        prefer_vector_cores(kind, settings.tensor_parallel, on_host == ranks.size, os.environ)
        self._store = None if dist.is_initialized() else _store(ranks)
        if self._store is not None:
            join_group(kind, ranks.rank, ranks.size, self._store)
        parallel = self._parallel(settings.tensor_parallel)
        self.core = EngineCore(settings, config, self.device, parallel=parallel, ranks_on_host=on_host)
        self.is_leader = parallel is None or parallel.rank == 0
        self.replica, self.num_replicas = ranks.rank // settings.tensor_parallel, settings.replicas
        self.sequences: dict[int, Sequence] = {}
        self._num_added = 0
        self._finished: list[Progress] = []  # here, not yet exchanged

    def _parallel(self, size: int) -> TensorParallel | None:
        """Neighbouring ranks share a model. Every rank takes part in making every group."""
        import torch

        from ascend_kit.device.parallel import NEVER, TensorParallel

        mine = None
        for first in range(0, self.ranks.size, size) if size > 1 else ():
            group = self._dist.new_group(list(range(first, first + size)), timeout=NEVER)
            if first <= self.ranks.rank < first + size:
                mine = TensorParallel(self.ranks.rank - first, size, group)
        if mine is not None:  # HCCL makes its communicator at the first collective: now, while the store is there
            mine.all_reduce(torch.zeros(1, device=self.device.torch_device))
        return mine

    # --- the interface of EngineCore --------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self.sequences)

    def refusal(self, sequence: Sequence) -> str | None:
        """Why this request can never run, or None."""
        return self.core.refusal(sequence)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that `refusal` has passed, here or at the replica whose turn it is."""
        self.sequences[sequence.id] = sequence
        if self.is_leader and self._num_added % self.num_replicas == self.replica:
            self.core.add(sequence)
        self._num_added += 1

    def step(self, should_stop: StopCheck) -> list[Sequence]:
        """One step of this rank's requests; when it has none, wait for the others and take over their results."""
        if not self.is_leader:
            self.core.runner.serve_steps()
            return self._exchange(should_stop)
        touched = self.core.step(should_stop)
        for sequence in touched:
            if sequence.is_finished:
                del self.sequences[sequence.id]
                self._finished.append(sequence.progress_since(0))
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
        sequence.end(reason)

    def stats(self) -> dict[str, Any]:
        """This rank's numbers; see EngineCore.stats."""
        return {**self.core.stats(), "rank": self.ranks.rank, "ranks": self.ranks.size}

    def profile(self, prompts: list[list[int]], steps: int, folder: str) -> list[Phase]:
        """Not here: every rank would have to take part."""
        raise ValueError(f"profile: true does not go with {self.ranks.launcher}; set cards instead")

    def close(self) -> None:
        """Leave the group once all ranks are here, or are late."""
        from ascend_kit.device.parallel import leave_group

        if self._store is None:
            return
        keys = [f"ascend_kit/{RankCore._opened}/{rank} leaves" for rank in range(self.ranks.size)]
        with contextlib.suppress(RuntimeError):
            self._store.set(keys[self.ranks.rank], "")
            self._store.wait(keys, timedelta(seconds=LEAVE_S))
        leave_group()

    # --- inside -----------------------------------------------------------------------------------------------

    def _exchange(self, should_stop: StopCheck) -> list[Sequence]:
        """Give every rank what the others have finished; the sequences that ended elsewhere."""
        parts: list[Any] = [None] * self.ranks.size
        self._dist.all_gather_object(parts, self._finished)
        self._finished, ended = [], []
        for news in (news for part in parts for news in part):
            sequence = self.sequences.pop(news.request_id, None)
            if sequence is not None:
                for token in news.tokens:
                    sequence.token_ids.append(token)
                    should_stop(sequence, token)  # keeps the text of requests with stop strings
                sequence.timeline.token_times_s = news.token_times_s
                sequence.logprobs = news.logprobs
                sequence.take_end(news)
                ended.append(sequence)
        return ended


def _store(ranks: Ranks) -> Any:
    """Where the ranks meet: the address torchrun gives, or a file when mpirun started all of them on one machine."""
    from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]

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
