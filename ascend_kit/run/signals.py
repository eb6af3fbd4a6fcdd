"""SIGINT, SIGTERM and SIGHUP as a request to stop, looked at where stopping is safe."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECOND_AFTER_S = 0.2  # a closing terminal sends two signals at once: that is one request


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, with its evidence saved."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.status = _status(number)


class StopRequest:
    """Whether a signal asked to stop. Nothing is raised inside other code; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._asked_s = 0.0
        self._kill: Callable[[], None] | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the three signals in this block; outside the main thread nothing can be taken."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def ending(self, kill: Callable[[], None]) -> Iterator[None]:
        """What a second signal has to kill while this block runs."""
        self._kill = kill
        try:
            yield
        finally:
            self._kill = None

    def _take(self, number: int, frame: object) -> None:
        if self.number is None:
            self.number, self._asked_s = number, time.monotonic()
        elif time.monotonic() - self._asked_s > SECOND_AFTER_S:
            if self._kill is not None:
                self._kill()
            os._exit(_status(number))


def _status(number: int) -> int:
    return 130 if number == signal.SIGINT else 143
