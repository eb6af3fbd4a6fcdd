"""Ray for the length of one engine: started here, quiet and on the loopback address alone, or a cluster that is joined.

Ray is imported by `import_ray` and nowhere else, so that one card needs no Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascend_kit.engine import ray_watch
from ascend_kit.engine.ray_watch import end_processes
from ascend_kit.engine.worker import MEETING_FOLDER

START_ATTEMPTS = 3
OBJECT_STORE_BYTES = 80 << 20  # only requests and tokens travel; Ray's smallest is 75 MiB
FOLDER = "ascend-ray-"
SHORT_ROOT = "/tmp"
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
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
    # variable is named after the systems where that is the default (seen in Ray 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # a full host is for the user to see, not for Ray to kill replicas
}


def import_ray() -> Any:
    """The `ray` module. RuntimeError naming the extra when it is not installed."""
    with _environment(QUIET):
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

    A session made while this process is connected already uses that connection. `cards_in_use` is said by the first
    one when several engines are to work on it at the same time: how many cards they use together.
    """

    _cards_in_use = 0  # of the process

    def __init__(
        self, kind: str, cards: int, address: str | None = None, first_card: int = 0, *, cards_in_use: int = 0
    ):
        self.ray = import_ray()
        self.kind, self.resource = kind, RESOURCE[kind]
        self.is_local = address is None and not self.ray.is_initialized()
        self._is_ours = not self.ray.is_initialized()
        self._folder: Path | None = None
        if self.is_local:
            self._start(cards, first_card)
        elif self._is_ours:
            self._join(address or "auto")
        self._check_room(cards)
        if self._is_ours:
            RaySession._cards_in_use = cards_in_use

    def close(self) -> None:
        """Disconnect; a local Ray ends with all its processes and files."""
        if self._is_ours:
            RaySession._cards_in_use = 0
            if self.ray.is_initialized():
                self.ray.shutdown()
        self._is_ours = False
        if self._folder is not None:
            end_processes(self._folder)
            self._watch.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def total_cards(self) -> int:
        """Cards of all machines that are alive."""
        return sum(count for _, count in self.machines())

    def machines(self) -> list[tuple[str, int]]:
        """(address, cards) of each machine that is alive."""
        return [
            (node["NodeManagerAddress"], int(node["Resources"].get(self.resource, 0)))
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def ranks_on(self, address: str, own: int) -> int:
        """Processes with a card at work on a machine, `own` of them of the asking engine: they share its cores."""
        return max(own, min(dict(self.machines()).get(address, 0), RaySession._cards_in_use))

    def create(self, cls: type, count: int) -> tuple[list[Any], Any]:
        """`count` actors of `cls` with a card each, on one machine where one is large enough; and what reserves
        their places (None for a single actor)."""
        options = {"max_restarts": 0, "max_task_retries": 0, **self._request()}
        remote = self.ray.remote(cls)
        if count == 1:
            return [remote.options(**options).remote()], None
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        fits = any(cards >= count for _, cards in self.machines())
        group = placement_group([{self.resource: 1}] * count, strategy="STRICT_PACK" if fits else "PACK")
        places = [PlacementGroupSchedulingStrategy(group, number) for number in range(count)]
        return [remote.options(**options, scheduling_strategy=place).remote() for place in places], group

    def kill(self, actors: list[Any], group: Any) -> None:
        """End actors at once and free their places."""
        with contextlib.suppress(Exception):  # whatever is gone already
            for actor in actors:
                self.ray.kill(actor, no_restart=True)
            if group is not None:
                self.ray.util.remove_placement_group(group)

    def _request(self) -> dict[str, Any]:
        if self.kind == "npu":
            return {"num_cpus": 0, "resources": {"NPU": 1}}
        return {"num_cpus": 0, "num_gpus": 1} if self.kind == "cuda" else {"num_cpus": 1}

    def _start(self, cards: int, first_card: int) -> None:
        _remove_leftovers()
        root = tempfile.gettempdir()
        # Ray's sockets lie below this folder, and a socket's path may have 107 characters.
        root = root if len(root) < 24 else SHORT_ROOT
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=root))
        # With the folder in its command line it ends with the rest. A group of its own: Ctrl-C is not meant for it.
        self._watch = subprocess.Popen(
            [sys.executable, "-I", ray_watch.__file__, str(self._folder), str(os.getpid())],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        amounts: dict[str, Any] = {"num_cpus": cards, "num_gpus": cards if self.kind == "cuda" else 0}
        if self.kind == "npu":
            amounts["resources"] = {"NPU": cards}
        constants = self.ray._private.ray_constants
        before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
        try:
            if before is not None:  # Ray may have been imported before the variable was set
                constants.ENABLE_RAY_CLUSTER = False
            with (
                _environment({**QUIET, **LOCAL, **self._visible(cards, first_card)}),
                _fewer_processes(self.ray),
                _no_echo(self.ray),
            ):
                self._init_local(amounts)
        except BaseException:
            self.close()
            raise
        finally:
            if before is not None:
                constants.ENABLE_RAY_CLUSTER = before

    def _init_local(self, amounts: dict[str, Any]) -> None:
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
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(self._folder),
                )
                return
            except Exception as error:
                self.ray.shutdown()
                end_processes(self._folder, keep=self._watch.pid)  # a half start is not known to `shutdown`
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
        with _environment(QUIET), _no_echo(self.ray):
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


@contextlib.contextmanager
def _fewer_processes(ray: Any) -> Iterator[None]:
    """Start no autoscaler and no log reader: one machine needs neither, and they double the start-up time.

    Ray 2.60 has no public switch for them; where its internals look different it starts them as usual.
    """
    params = getattr(getattr(ray._private, "parameter", None), "RayParams", None)
    names = getattr(getattr(getattr(params, "__init__", None), "__code__", None), "co_varnames", ())
    if not {"no_monitor", "include_log_monitor"} <= set(names):
        yield
        return
    original = params.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "no_monitor": True, "include_log_monitor": False})

    params.__init__ = initialise
    try:
        yield
    finally:
        params.__init__ = original


@contextlib.contextmanager
def _no_echo(ray: Any) -> Iterator[None]:
    """Keep Ray from printing the deaths of workers, which are noticed, handled and reported here.

    `log_to_driver` does not cover them in Ray 2.60; where its internals look different they are printed.
    """
    worker = ray._private.worker
    original = getattr(worker, "listen_error_messages", None)
    if original is None:
        yield
        return
    worker.listen_error_messages = lambda *_: None
    try:
        yield
    finally:
        worker.listen_error_messages = original


def _remove_leftovers() -> None:
    """End the processes and delete the folders of engines whose own process was killed: nobody else can have."""
    for root in {tempfile.gettempdir(), SHORT_ROOT}:
        for folder in [*Path(root).glob(f"{FOLDER}*-*"), *Path(root).glob(f"{MEETING_FOLDER}*-*")]:
            pid = folder.name.removeprefix(FOLDER).removeprefix(MEETING_FOLDER).split("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc").is_dir():
                end_processes(folder)
                shutil.rmtree(folder, ignore_errors=True)
