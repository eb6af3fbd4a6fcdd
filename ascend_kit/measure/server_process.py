"""A server that a sweep starts and stops: log kept, readiness waited for, the whole process group ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

STOP_S = 15.0  # between the polite signal and the other one
LAST_LINES = 12


class ServerProcess:
    """The process group of a command line; what it writes goes to `log`."""

    def __init__(self, command: str, log: Path) -> None:
        self.command, self.log = command, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Start it and wait until `is_ready()`; RuntimeError with its last lines when it ends or is too slow."""
        if self._process is not None and self._process.poll() is None:
            return
        if is_ready():
            raise RuntimeError(f"something answers before engine_command was started: {self.command!r} would not be it")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                shlex.split(self.command),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        end = time.monotonic() + timeout_s
        while not is_ready():
            status = self._process.poll()
            if status is not None or time.monotonic() > end:
                told = f"ended with status {status}" if status is not None else f"was not ready in {timeout_s:g} s"
                self.stop()
                last = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
                raise RuntimeError(f"engine_command {told}; {self.log} ends:\n" + "\n".join(last))
            time.sleep(0.2)

    def stop(self) -> None:
        """End every process of the group, the polite way first."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        # The leader is gone; a child that ignored the signal has been killed with the group.


def _end_with_parent() -> None:
    """In the child: when the process that measures is killed, the kernel ends this one, too."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
