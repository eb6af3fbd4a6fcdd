"""Workers on Ray: one started here, quiet and on the loopback address alone, or a cluster that is joined.

Ray is imported by `import_ray` and nowhere else, so that one card needs no Ray. What is started here is watched and
ended by a process of its own, see ray_watch.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascend_kit.device.environment import VISIBLE
from ascend_kit.engine import ray_watch
from ascend_kit.engine.ray_watch import CORE, Family, end_processes, family_of, is_alive
from ascend_kit.engine.worker import MEETING_FOLDER

START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 80 << 20  # only requests and tokens travel; Ray's smallest is 75 MiB
FOLDER = "ascend-ray-"
SHORT_ROOT = "/tmp"
LOOPBACK = "127.0.0.1"
RESOURCE = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Which cards a worker sees is set by the worker itself: old and new Ray write different variables.
    "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1",
    "RAY_EXPERIMENTAL_NOSET_ASCEND_VISIBLE_DEVICES": "1",
}
LOCAL = {
    # Ray moves 127.0.0.1 to the public address unless told that this machine can be no part of a cluster; the
    # variable is named after the systems where that is the default (seen in Ray 2.60), and read at import.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a full host is for the user to see, not for Ray to kill replicas
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",  # Ray ends a driver without gcs_server; ours starts it again
}


def import_ray(local: bool = False) -> Any:
    """The `ray` module, for a `local` Ray or to join a cluster. RuntimeError naming the extra when it is missing."""
    with _environment({**QUIET, **(LOCAL if local else {})}):
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                f"several cards need Ray, which is not installed: pip install ascend-kit[cluster] ({error})"
            ) from None
    # Ray reads the type of an Ascend card through the `acl` module and logs a traceback when there is none.
    logging.getLogger("ray._private.accelerators.npu").setLevel(logging.CRITICAL)
    return ray


class RaySession:
    """A connection to Ray. `close` ends what this object has started, and nothing else.

    A session made while this process is connected already uses that connection. `worker` is the class of its actors.
    """

    def __init__(
        self, kind: str, cards: int, address: str | None = None, first_card: int = 0, *, worker: type | None = None
    ):
        self.ray = import_ray(local=address is None)
        self.kind, self.resource, self._worker = kind, RESOURCE[kind], worker
        self._is_ours = not self.ray.is_initialized()
        self._local_cards = cards, first_card
        self._folder: Path | None = None
        self._core: Family = {}  # the processes without which our local Ray is of no use
        self._is_ending = False  # its raylet has left, but its process has not ended yet
        self._groups: dict[Any, Any] = {}  # the first worker -> what reserves the places of all of its replica
        if self._is_ours and address is None:
            self._start(cards, first_card)
        elif self._is_ours:
            self._join(address or "auto")
        self._check_room(cards)

    def close(self) -> None:
        """Disconnect; a local Ray ends with all its processes and files."""
        if self._is_ours and self.ray.is_initialized():
            self.ray.shutdown()
        self._is_ours = False
        self._end_local()

    def is_lost(self) -> bool:
        """Whether a local Ray of ours has ended by itself: it does as soon as one of its agents does."""
        return self._is_ending or not all(is_alive(*process) for process in self._core.items())

    def restart(self) -> None:
        """Start a lost local Ray anew; all workers are gone."""
        self.ray.shutdown()
        self._end_local()
        self._groups.clear()
        self._start(*self._local_cards)

    def _end_local(self) -> None:
        self._core, self._is_ending = {}, False
        if self._folder is not None:
            assert self._watch.stdin is not None
            with contextlib.suppress(OSError):  # it was ended from outside
                self._watch.stdin.write(b"\n")
                self._watch.stdin.close()
            self._watch.wait()
            end_processes(self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def total_cards(self) -> int:
        """Cards of all machines that are alive."""
        total = sum(count for _, count in self.machines())
        self._is_ending = self._folder is not None and total < self._local_cards[0]
        return total

    def machines(self) -> list[tuple[str, int]]:
        """(address, cards) of each machine that is alive."""
        return [
            (node["NodeManagerAddress"], int(node["Resources"].get(self.resource, 0)))
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def create(self, count: int) -> list[Any]:
        """Workers with a card each, on one machine where one is large enough."""
        options = {"max_restarts": 0, "max_task_retries": 0, **self._request()}
        remote = self.ray.remote(self._worker)
        if count == 1:
            return [remote.options(**options).remote()]
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        fits = any(cards >= count for _, cards in self.machines())
        group = placement_group([{self.resource: 1}] * count, strategy="STRICT_PACK" if fits else "PACK")
        places = [PlacementGroupSchedulingStrategy(group, number) for number in range(count)]
        workers = [remote.options(**options, scheduling_strategy=place).remote() for place in places]
        self._groups[workers[0]] = group
        return workers

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Start a method of a worker; its calls run one after the other."""
        return getattr(worker, method).remote(*arguments)

    def wait(self, calls: list[Any], timeout_s: float) -> list[Any]:
        """The calls that have ended, as soon as there is one or the time is over."""
        if self.is_lost():
            return []
        ready, _ = self.ray.wait(calls, timeout=timeout_s)
        if ready and len(calls) > 1:
            ready, _ = self.ray.wait(calls, num_returns=len(calls), timeout=0)
        return ready

    def result(self, call: Any) -> Any:
        """What a call returned; the error raised inside the worker, out of Ray's wrapping."""
        try:
            return self.ray.get(call)
        except Exception as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, BaseException) else error) from None

    def kill(self, workers: list[Any]) -> None:
        """End workers at once and free their places."""
        if self.is_lost():
            return
        with contextlib.suppress(Exception):  # whatever is gone already
            for worker in workers:
                self.ray.kill(worker, no_restart=True)
            if workers and workers[0] in self._groups:
                self.ray.util.remove_placement_group(self._groups.pop(workers[0]))

    def _request(self) -> dict[str, Any]:
        if self.kind == "npu":
            return {"num_cpus": 0, "resources": {"NPU": 1}}
        return {"num_cpus": 0, "num_gpus": 1} if self.kind == "cuda" else {"num_cpus": 1}

    def _start(self, cards: int, first_card: int) -> None:
        _remove_leftovers()
        root = tempfile.gettempdir()
        # Ray's sockets lie below this folder, and a socket's path may have 107 characters.
        root = root if len(root) < 24 else SHORT_ROOT
        folder = self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=root))
        # With the folder in its command line it ends with the rest. A group of its own: Ctrl-C is not meant for it.
        self._watch = subprocess.Popen(
            [sys.executable, "-I", ray_watch.__file__, str(folder), str(os.getpid())],
            start_new_session=True,
            stdin=subprocess.PIPE,
            bufsize=0,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        amounts: dict[str, Any] = {"num_cpus": cards, "num_gpus": cards if self.kind == "cuda" else 0}
        if self.kind == "npu":
            amounts["resources"] = {"NPU": cards}
        try:
            with _environment({**QUIET, **LOCAL, **self._visible(cards, first_card)}):
                self._init_local(amounts, folder)
            self._core = family_of(folder, CORE)
            assert self._watch.stdin is not None
            self._watch.stdin.write(json.dumps(self._core).encode() + b"\n")
        except BaseException:
            self.close()
            raise
        if any(address != LOOPBACK for address, _ in self.machines()):
            warnings.warn(
                "Ray was imported before the engine, so it listens on this machine's network address; import "
                "ascend_kit and load the engine first",
                stacklevel=6,
            )

    def _init_local(self, amounts: dict[str, Any], folder: Path) -> None:
        """Ray gives its own processes 30 s to answer; a busy host may need a second try."""
        for attempt in range(START_ATTEMPTS):
            try:
                self.ray.init(
                    address="local",
                    **amounts,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(folder),
                )
                return
            except Exception as error:
                self.ray.shutdown()
                end_processes(folder, keep=self._watch.pid)  # a half start is not known to `shutdown`
                if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                    raise

    def _visible(self, cards: int, first_card: int) -> dict[str, str]:
        """Show Ray the cards that were asked for, when the caller starts above card 0."""
        variable = VISIBLE.get(self.kind)
        if variable is None:
            return {}
        given = [card for card in os.environ.get(variable, "").split(",") if card]
        numbers = given or [str(number) for number in range(first_card + cards)]
        chosen = numbers[first_card : first_card + cards]
        if len(chosen) < cards:
            raise ValueError(
                f"cards={cards} from device_id={first_card} on, but {variable}={','.join(given)} shows {len(given)}"
            )
        return {variable: ",".join(chosen)} if given or first_card else {}

    def _join(self, address: str) -> None:
        with _environment(QUIET):
            try:
                self.ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConnectionError(
                    f"no Ray cluster at ray_address={address!r}: {error}. Start one with `ray start --head`, check the "
                    "address with `ray status`, or leave ray_address out to use this machine"
                ) from error

    def _check_room(self, cards: int) -> None:
        total = self.total_cards()
        if total < cards:
            found = ", ".join(f"{address}: {count}" for address, count in self.machines())
            self.close()
            raise ValueError(
                f"cards={cards}, but Ray knows {total} of resource {self.resource} ({found}); lower "
                f"cards, or start machines with `ray start --resources='{{\"{self.resource}\": N}}'`"
            )


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside; a value the user has set wins."""
    replaced = set(VISIBLE.values())  # already a choice from what the user has set
    missing = {name: value for name, value in changes.items() if name not in os.environ or name in replaced}
    before = {name: os.environ.get(name) for name in missing}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _remove_leftovers() -> None:
    """End the processes and delete the folders of engines whose own process was killed: nobody else can have."""
    for root in {tempfile.gettempdir(), SHORT_ROOT}:
        for folder in [*Path(root).glob(f"{FOLDER}*-*"), *Path(root).glob(f"{MEETING_FOLDER}*-*")]:
            pid = folder.name.removeprefix(FOLDER).removeprefix(MEETING_FOLDER).split("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").is_dir():
                end_processes(folder)
                shutil.rmtree(folder, ignore_errors=True)
