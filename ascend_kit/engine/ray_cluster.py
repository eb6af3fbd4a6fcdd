"""Workers on the machines of a Ray cluster. `import_ray` alone imports Ray, so that one machine needs none."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

RESOURCE = {"cpu": "CPU", "cuda": "GPU", "npu": "NPU"}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Which cards a worker sees is set by the worker itself: old and new Ray write different variables.
    "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1",
    "RAY_EXPERIMENTAL_NOSET_ASCEND_VISIBLE_DEVICES": "1",
}


def import_ray() -> Any:
    """The `ray` module. RuntimeError naming the extra when it is missing."""
    with _quiet():
        try:
            import ray
        except ImportError as error:
            raise RuntimeError(
                f"ray_address needs Ray, which is not installed: pip install ascend-kit[cluster] ({error})"
            ) from None
    # Ray reads the type of an Ascend card through the `acl` module and logs a traceback when there is none.
    logging.getLogger("ray._private.accelerators.npu").setLevel(logging.CRITICAL)
    return ray


class RaySession:
    """A connection to the Ray cluster at `address`, for workers of one class with a card each.

    A session made while this process is connected already uses that connection, and leaves it open.
    """

    def __init__(self, worker: type, kind: str, cards: int, address: str):
        self.ray = import_ray()
        self.kind, self.resource, self._worker = kind, RESOURCE[kind], worker
        self._is_ours = not self.ray.is_initialized()
        self._groups: dict[Any, Any] = {}  # the first worker -> what reserves the places of all of its replica
        if self._is_ours:
            self._join(address)
        self._check_room(cards)

    def close(self) -> None:
        """Disconnect."""
        if self._is_ours:
            self.ray.shutdown()

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
        with contextlib.suppress(Exception):  # whatever is gone already
            for worker in workers:
                self.ray.kill(worker, no_restart=True)
            if workers and workers[0] in self._groups:
                self.ray.util.remove_placement_group(self._groups.pop(workers[0]))

    def _request(self) -> dict[str, Any]:
        if self.kind == "npu":
            return {"num_cpus": 0, "resources": {"NPU": 1}}
        return {"num_cpus": 0, "num_gpus": 1} if self.kind == "cuda" else {"num_cpus": 1}

    def _join(self, address: str) -> None:
        with _quiet():
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
def _quiet() -> Iterator[None]:
    """Ray's variables for what happens inside; a value the user has set wins."""
    missing = {name: value for name, value in QUIET.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]
