"""One rank of one replica, in a process of its own; nothing here knows how that process was started.

Rank 0 of a replica has the scheduler and is called in a row: each call brings new requests, runs a few steps and
returns what came of them. The other ranks sit in `serve_steps`, computing what rank 0 plans.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ascend_kit.device.environment import VISIBLE
from ascend_kit.engine.config import EngineConfig
from ascend_kit.engine.sequence import Progress, Sequence

if TYPE_CHECKING:
    from ascend_kit.device.device import Device
    from ascend_kit.engine.core import EngineCore
    from ascend_kit.engine.profile import Phase
    from ascend_kit.engine.text import StopRules
    from ascend_kit.model.config import ModelConfig

MEETING_FOLDER = "ascend-meeting-"  # and the process id of rank 0, by which what a killed one leaves is found
CALL_S = 0.01  # a call runs steps for about this long ...
MAX_STEPS_PER_CALL = 8  # ... but not more than these: what is lost with a replica stays small


class WorkerAddress(NamedTuple):
    """Where a worker runs."""

    host: str  # the same for all processes of one running machine
    address: str
    pid: int
    card: str | None  # the accelerator Ray gave it, as numbered on its machine


class Role(NamedTuple):
    """What a worker is to be."""

    rank: int = 0
    visible: str | None = None  # accelerators it may see, comma-separated; None leaves the environment alone
    device_id: int = 0
    ranks_on_host: int = 1  # workers of this engine on its machine
    store: str | None = None  # where the ranks of its replica meet: file:... or host:port; None for a single rank


class Facts(NamedTuple):
    """What a rank found when it had loaded its part."""

    device: Device
    stats: dict[str, Any]  # as in a report
    versions: dict[str, str]
    machine: dict[str, str]
    task_queue_level: int | None


class Report(NamedTuple):
    """Answer to a call."""

    progress: list[Progress]
    stats: dict[str, Any]  # of the engine core; busy_s: seconds spent in its steps; memory_bytes, peak_memory_bytes


class Worker:
    """One rank of one replica."""

    def __init__(self) -> None:
        self.core: EngineCore | None = None
        self._stop: StopRules
        self._sent: dict[int, int] = {}  # output tokens already reported, by request
        self._store: Any = None
        self._meeting_folder: str | None = None
        self._busy_s = 0.0

    # --- start ------------------------------------------------------------------------------------------------

    def address(self, resource: str | None = None) -> WorkerAddress:
        """Where this process is, and which accelerator of kind `resource` Ray assigned to it."""
        return WorkerAddress(host_name(), own_address(), os.getpid(), _assigned(resource))

    def meeting_point(self, is_one_host: bool) -> str:
        """Open the place where the ranks of this replica find each other; called on rank 0."""
        if is_one_host:  # a file: no port, and nothing that another user could connect to
            self._meeting_folder = tempfile.mkdtemp(prefix=f"{MEETING_FOLDER}{os.getpid()}-")
            return f"file:{self._meeting_folder}/store"
        import torch.distributed as dist

        self._store = dist.TCPStore(own_address(), 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        return f"{own_address()}:{self._store.port}"

    def load(self, settings: EngineConfig, config: ModelConfig, role: Role) -> Facts:
        """Read this rank's part of the model. ValueError as the engine core raises."""
        kind = settings.device.partition(":")[0]
        if role.visible is not None:
            os.environ[VISIBLE[kind]] = role.visible
        import torch

        from ascend_kit.checkpoint.huggingface import load_tokenizer
        from ascend_kit.device.device import select_device
        from ascend_kit.engine.core import EngineCore
        from ascend_kit.engine.text import StopRules

        torch.set_num_threads(max(1, _num_cores() // role.ranks_on_host))
        device = select_device(kind, role.device_id)
        parallel = None
        if settings.tensor_parallel > 1:
            parallel = self._join(role, settings.tensor_parallel, device)
        self.core = EngineCore(settings, config, device, parallel=parallel, ranks_on_host=role.ranks_on_host)
        if self._meeting_folder is not None:  # every rank has joined, and nobody needs it again
            shutil.rmtree(self._meeting_folder, ignore_errors=True)
        self._stop = StopRules(
            cache(lambda: load_tokenizer(settings.tokenizer_folder)), config.eos_token_ids, settings.max_seq_length
        )
        return Facts(device, self._stats(), device.versions(), device.facts(), device.task_queue_level())

    def _join(self, role: Role, size: int, device: Device) -> Any:
        import torch

        from ascend_kit.device.parallel import TensorParallel, join_group, prefer_vector_cores

        prefer_vector_cores(device.kind, size, role.ranks_on_host >= size, os.environ)
        join_group(device.kind, role.rank, size, self._store_of(role.store or "", size))
        parallel = TensorParallel(role.rank, size)
        # HCCL makes its communicator at the first collective, and needs the store for it: now, while the file is there.
        parallel.all_reduce(torch.zeros(1, device=device.torch_device))
        return parallel

    def _store_of(self, where: str, size: int) -> Any:
        import torch.distributed as dist

        if where.startswith("file:"):
            return dist.FileStore(where.removeprefix("file:"), size)  # type: ignore[attr-defined]
        if self._store is not None:
            return self._store
        address, port = where.rsplit(":", 1)
        return dist.TCPStore(address, int(port), is_master=False)  # type: ignore[attr-defined]

    def clock_s(self) -> float:
        """This process's time.perf_counter."""
        return time.perf_counter()

    # --- work -------------------------------------------------------------------------------------------------

    def serve_steps(self) -> None:
        """Compute this rank's part of every step until rank 0 closes."""
        self._loaded().runner.serve_steps()

    def advance(self, requests: list[Sequence], cancelled: list[int]) -> Report:
        """Take requests in and out, run a few steps, and say what happened."""
        core = self._loaded()
        for request_id in cancelled:
            sequence = core.sequences.get(request_id)
            if sequence is not None:
                core.finish(sequence, "cancelled")
            self._forget(request_id)
        for sequence in requests:  # some have tokens from a replica that was lost
            self._sent[sequence.id] = sequence.num_output_tokens
            core.add(sequence)
        touched: dict[int, Sequence] = {}
        deadline = time.perf_counter() + CALL_S
        for number in range(MAX_STEPS_PER_CALL):
            start = time.perf_counter()
            if not core.has_unfinished or (number and start > deadline):
                break
            touched.update((sequence.id, sequence) for sequence in core.step(self._stop))
            self._busy_s += time.perf_counter() - start
        return Report([self._progress(sequence) for sequence in touched.values()], self._stats())

    def reset_peak_memory(self) -> dict[str, Any]:
        """Start a new high-water mark of memory; the stats after it. Called on rank 0."""
        self._loaded().device.reset_peak_memory()
        return self._stats()

    def profile(self, prompts: list[list[int]], steps: int, folder: str) -> list[Phase]:
        """See EngineCore.profile; called on rank 0."""
        return self._loaded().profile(prompts, steps, folder)

    def close(self) -> None:
        """Let the other ranks go; called on rank 0."""
        if self.core is not None:
            self.core.close()

    def _loaded(self) -> EngineCore:
        assert self.core is not None, "load comes first"
        return self.core

    def _forget(self, request_id: int) -> None:
        self._sent.pop(request_id, None)
        self._stop.forget(request_id)

    def _progress(self, sequence: Sequence) -> Progress:
        news = sequence.progress_since(self._sent[sequence.id])
        self._sent[sequence.id] += len(news.tokens)
        if sequence.is_finished:
            self._forget(sequence.id)
        return news

    def _stats(self) -> dict[str, Any]:
        core = self._loaded()
        used, peak = core.device.memory_in_use_bytes(), core.device.peak_memory_bytes()
        return {**core.stats(), "busy_s": self._busy_s, "memory_bytes": used, "peak_memory_bytes": peak}


def host_name() -> str:
    """The same for all processes of one running machine."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    name = boot_id.read_text().strip() if boot_id.is_file() else socket.gethostname()
    return f"{name}@{own_address()}"  # namespaces may share a boot id: the address tells machines of a test apart


def own_address() -> str:
    """The address Ray uses for this machine, or loopback outside Ray."""
    ray = sys.modules.get("ray")
    return ray.util.get_node_ip_address() if ray is not None and ray.is_initialized() else "127.0.0.1"


def _num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _assigned(resource: str | None) -> str | None:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or resource not in ("NPU", "GPU"):
        return None
    ids = ray.get_runtime_context().get_accelerator_ids().get(resource) or []
    return ids[0] if ids else None
