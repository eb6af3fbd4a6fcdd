"""One rank of one replica, in a process of its own: a Ray actor, though nothing here knows Ray.

Rank 0 of a replica has the scheduler and is called in a row: each call brings new requests, runs a few steps and
returns what came of them. The other ranks sit in `follow`, computing what rank 0 plans.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.sequence import SamplingParams, ScoreTarget, Sequence, TokenLogprobs

MEETING_FOLDER = "ascend-meeting-"  # and the process id of rank 0, by which what a killed one leaves is found
CALL_S = 0.01  # a call runs steps for about this long ...
MAX_STEPS_PER_CALL = 8  # ... but not more than these: what is lost with a replica stays small


class Place(NamedTuple):
    """Where a worker runs."""

    host: str  # the same for all processes of one running machine
    address: str
    pid: int
    card: str | None  # the accelerator Ray gave it, as numbered on its machine


class Role(NamedTuple):
    """What a worker is to be."""

    rank: int
    visible: str | None  # accelerators it may see, comma-separated, or None to leave the environment alone
    device_id: int
    ranks_on_host: int  # workers of this engine on its machine
    store: str | None  # where the ranks of its replica meet: file:... or host:port; None for a single rank


class Order(NamedTuple):
    """A request on its way to a replica; `output_ids` were produced by another replica before."""

    ticket: int
    prompt_ids: list[int]
    output_ids: list[int]
    sampling: SamplingParams
    targets: list[ScoreTarget]
    is_watched: bool


class Progress(NamedTuple):
    """What became of one request during a call. Times in the worker's time.perf_counter seconds."""

    ticket: int
    tokens: list[int]
    times_s: list[float]
    finish_reason: str | None
    scheduled_s: float | None
    num_cached_tokens: int
    num_preemptions: int
    logprobs: list[TokenLogprobs]
    target_scores: list[list[tuple[float, bool]]]


class Report(NamedTuple):
    """Answer to a call."""

    progress: list[Progress]
    counts: dict[str, float]  # counters of the engine core, and busy_s: seconds spent in its steps
    memory_bytes: int
    peak_memory_bytes: int
    graphs: dict[str, Any] | None


VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


class Worker:
    """One rank of one replica."""

    def __init__(self, card: str | None = None):
        self._card = card
        self.core: Any = None
        self._sent: dict[int, int] = {}  # output tokens already reported, by ticket
        self._store: Any = None
        self._meeting_folder: str | None = None
        self._busy_s = 0.0

    # --- start ------------------------------------------------------------------------------------------------

    def place(self, resource: str | None = None) -> Place:
        """Where this process is, and which accelerator of kind `resource` Ray assigned to it."""
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        # Namespaces may share a boot id: the network address tells machines of a test apart.
        address = _own_address()
        host = f"{boot_id.read_text().strip() if boot_id.is_file() else socket.gethostname()}@{address}"
        return Place(host, address, os.getpid(), _assigned(resource))

    def meeting_point(self, is_one_host: bool) -> str:
        """Open the place where the ranks of this replica find each other; called on rank 0."""
        if is_one_host:  # a file: no port, and nothing that another user could connect to
            self._meeting_folder = tempfile.mkdtemp(prefix=f"{MEETING_FOLDER}{os.getpid()}-")
            return f"file:{self._meeting_folder}/store"
        from torch.distributed import TCPStore

        address = _own_address()
        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return f"{address}:{self._store.port}"

    def load(self, settings: EngineConfig, role: Role) -> dict[str, Any]:
        """Read this rank's part of the model; facts about the core. ValueError as the engine core raises."""
        kind_of_device = settings.device.partition(":")[0]
        if role.visible is not None:
            os.environ[VISIBLE[kind_of_device]] = role.visible
        import torch

        from ascend_kit.device.device import select_device
        from ascend_kit.device.parallel import TensorParallel, join_group
        from ascend_kit.engine.core import EngineCore
        from ascend_kit.engine.stopping import StopRules
        from ascend_kit.model.config import ModelConfig

        torch.set_num_threads(max(1, _num_cores() // role.ranks_on_host))
        device = select_device(kind_of_device, role.device_id if role.visible is not None else 0)
        device.seed(settings.seed)
        config = ModelConfig.from_folder(settings.model_path)
        parallel = None
        if settings.tensor_parallel > 1:
            join_group(
                device.kind, role.rank, settings.tensor_parallel, self._join_store(role, settings.tensor_parallel)
            )
            parallel = TensorParallel(role.rank, settings.tensor_parallel)
        self.core = EngineCore(settings, config, device, parallel=parallel, ranks_on_host=role.ranks_on_host)
        self._remove_meeting_folder()
        self._stop = StopRules(
            lambda: _tokenizer(settings.tokenizer_folder), config.eos_token_ids, settings.max_seq_length
        )
        return {
            "device": device,
            "stats": self.core.stats(),
            "num_blocks": self.core.blocks.num_blocks,
            "block_size": self.core.block_size,
            "memory_bytes": device.memory_in_use_bytes(),
        }

    def _join_store(self, role: Role, size: int) -> Any:
        from torch.distributed import FileStore, TCPStore

        if role.store.startswith("file:"):
            return FileStore(role.store.removeprefix("file:"), size)
        if self._store is not None:
            return self._store
        address, port = role.store.rsplit(":", 1)
        return TCPStore(address, int(port), is_master=False)

    def _remove_meeting_folder(self) -> None:
        """Once every rank has joined nobody needs the file again."""
        if self._meeting_folder is not None:
            import shutil

            shutil.rmtree(self._meeting_folder, ignore_errors=True)
            self._meeting_folder = None

    def clock_s(self) -> float:
        """This process's time.perf_counter."""
        return time.perf_counter()

    # --- work -------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Compute this rank's part of every step until rank 0 closes."""
        self.core.runner.follow()

    def advance(self, orders: list[Order], cancelled: list[int]) -> Report:
        """Take requests in and out, run a few steps, and say what happened."""
        for ticket in cancelled:
            self._cancel(ticket)
        for order in orders:
            self._add(order)
        touched: dict[int, Sequence] = {}
        deadline = time.perf_counter() + CALL_S
        for number in range(MAX_STEPS_PER_CALL):
            start = time.perf_counter()
            if not self.core.has_unfinished or (number and start > deadline):
                break
            touched.update((sequence.id, sequence) for sequence in self.core.step(self._stop))
            self._busy_s += time.perf_counter() - start
        return self._report([self._progress(sequence) for sequence in touched.values()])

    def reset_peak_memory(self) -> Report:
        """Start a new high-water mark of memory; the state after it. Called on rank 0."""
        self.core.device.reset_peak_memory()
        return self._report([])

    def close(self) -> None:
        """Let the other ranks go; called on rank 0."""
        if self.core is not None:
            self.core.close()

    def _add(self, order: Order) -> None:
        sequence = Sequence(
            order.prompt_ids,
            order.sampling,
            arrival_s=time.perf_counter(),
            index=order.ticket,
            targets=order.targets,
            is_watched=order.is_watched,
        )
        sequence.token_ids += order.output_ids
        self._sent[order.ticket] = len(order.output_ids)
        self.core.add(sequence)

    def _cancel(self, ticket: int) -> None:
        sequence = self.core.sequences.get(ticket)
        if sequence is not None:
            self.core.finish(sequence, "cancelled")
        self._forget(ticket)

    def _forget(self, ticket: int) -> None:
        self._sent.pop(ticket, None)
        self._stop.forget(ticket)

    def _progress(self, sequence: Sequence) -> Progress:
        seen = self._sent[sequence.id]
        tokens = sequence.output_ids[seen:]
        news = Progress(
            sequence.id,
            tokens,
            sequence.timeline.token_times_s[-len(tokens) :] if tokens else [],
            sequence.finish_reason,
            sequence.timeline.scheduled_s,
            sequence.num_cached_tokens,
            sequence.num_preemptions,
            sequence.logprobs[-len(tokens) :] if tokens else [],
            sequence.target_scores if sequence.is_finished else [],
        )
        self._sent[sequence.id] = seen + len(tokens)
        if sequence.is_finished:
            self._forget(sequence.id)
        return news

    def _report(self, progress: list[Progress]) -> Report:
        core, device = self.core, self.core.device
        counts = {
            **core.counts,
            "preemptions": core.scheduler.num_preemptions,
            "kv_blocks_free": core.blocks.num_free,
            "busy_s": self._busy_s,
        }
        return Report(
            progress, counts, device.memory_in_use_bytes(), device.peak_memory_bytes(), core.stats()["graphs"]
        )


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_address() -> str:
    """The address Ray uses for this machine, or loopback outside Ray."""
    import sys

    ray = sys.modules.get("ray")
    return ray.util.get_node_ip_address() if ray is not None and ray.is_initialized() else "127.0.0.1"


def _assigned(resource: str | None) -> str | None:
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or resource not in ("NPU", "GPU"):
        return None
    ids = ray.get_runtime_context().get_accelerator_ids().get(resource) or []
    return ids[0] if ids else None
