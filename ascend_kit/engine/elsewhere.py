"""Functions and objects that hold a device, in a process of their own where the caller must not hold one.

A notebook's kernel must not: the NPU's launch queue is turned off there, and what it takes of the card's memory the
engine's process does not get. Everything given and returned is pickled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ascend_kit.device.device import resolve_device, select_device
from ascend_kit.engine.processes import WorkerProcess, needs_process, report

if TYPE_CHECKING:
    from ascend_kit.params import Experiment

Result = TypeVar("Result")
OnProgress = Callable[..., Any]


class Elsewhere:
    """The object that `make(*arguments)` gives, made and kept in a process of its own until `end`."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._process = WorkerProcess(_Keeper)
        self._wait("make", (make, arguments))

    def get(self, path: str) -> Any:
        """The attribute at `path`, such as `device.name`."""
        return self._wait("get", (path,))

    def call(self, path: str, *arguments: Any, **hears: OnProgress | None) -> Any:
        """What the method at `path` returns. One argument by name may be a function; it is called in this process.

        Ctrl-C ends the process at once. Raises what the method raises, WorkerDied when the process ended.
        """
        name, self._process.on_progress = next(iter(hears.items()), (None, None))
        return self._wait("call", (path, arguments, name if self._process.on_progress else None))

    def end(self) -> None:
        self._process.end()

    def _wait(self, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return self._process.call(method, arguments).result()
        except KeyboardInterrupt:
            self.end()
            raise


class _Keeper:
    """The worker behind `Elsewhere`."""

    def make(self, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._kept = make(*arguments)

    def get(self, path: str) -> Any:
        return functools.reduce(getattr, path.split("."), self._kept)

    def call(self, path: str, arguments: tuple[Any, ...], hears: str | None) -> Any:
        return self.get(path)(*arguments, **({hears: report} if hears else {}))


def apart(kind: str, function: Callable[..., Result], *arguments: Any, on_progress: OnProgress | None = None) -> Result:
    """`function(*arguments)` and, if given, `on_progress` by name; apart where `needs_process(kind)`."""
    if not needs_process(kind):
        return function(*arguments, **({"on_progress": on_progress} if on_progress else {}))
    there = Elsewhere(functools.partial, function, *arguments)
    try:
        return there.call("__call__", on_progress=on_progress)
    finally:
        there.end()


def with_device(
    function: Callable[..., Result], experiment: Experiment, *arguments: Any, on_progress: OnProgress | None = None
) -> Result:
    """`function(experiment, *arguments)`, apart where this process must not open the experiment's device."""
    kind, _ = resolve_device(experiment.device, experiment.device_id)
    return apart(kind, function, experiment, *arguments, on_progress=on_progress)


def describe_device(experiment: Experiment) -> dict[str, Any]:
    """`Device.describe` of the experiment's device: plain values for a manifest."""
    return with_device(_describe, experiment)


def _describe(experiment: Experiment) -> dict[str, Any]:
    return select_device(experiment.device, experiment.device_id).describe()
