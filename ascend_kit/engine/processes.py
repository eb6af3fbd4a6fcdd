"""Workers in processes of this machine, called over pipes; without Ray.

Started as programs and not forked: nothing that the caller has imported or holds is in them, neither a device nor the
marks by which an interactive session is known. A worker whose caller is gone finds its pipe closed and ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ascend_kit.device.environment import TASK_QUEUE, check_level, level_for_worker, level_set
from ascend_kit.messages import notebook_shell

LAST_LINES = 12  # of what a worker wrote before it died
SERVE = "import sys; from ascend_kit.engine.processes import serve; serve(int(sys.argv[1]))"


class WorkerDied(RuntimeError):
    """The process of a worker has ended; the text has its last lines."""


class LocalProcesses:
    """Workers of one class, as many as are asked for."""

    resource = "process"

    def __init__(self, worker: type) -> None:
        self._worker = worker
        self._running: list[WorkerProcess] = []

    def create(self, count: int) -> list[Any]:
        started = [WorkerProcess(self._worker) for _ in range(count)]
        self._running += started
        return started

    def call(self, worker: Any, method: str, *arguments: Any) -> Future[Any]:
        return worker.call(method, arguments)

    def wait(self, calls: list[Future[Any]], timeout_s: float) -> list[Future[Any]]:
        return [call for call in wait(calls, timeout_s, FIRST_COMPLETED).done]

    def result(self, call: Future[Any]) -> Any:
        return call.result()

    def kill(self, workers: list[Any]) -> None:
        for worker in workers:
            worker.end()
            self._running.remove(worker)

    def total_cards(self) -> int:
        return sys.maxsize

    def is_lost(self) -> bool:
        return False  # nothing lies between this process and its workers

    def restart(self) -> None:
        """There is nothing to start."""

    def close(self) -> None:
        self.kill(list(self._running))


class WorkerProcess:
    """One worker and the thread that reads its answers.

    `on_progress`, if set, is called in that thread with what the worker gives to `report`.
    """

    def __init__(self, worker: type) -> None:
        self._pipe, theirs = Pipe()
        self.on_progress: Callable[..., Any] | None = None
        self._calls: list[Future[Any]] = []
        self._lock = threading.Lock()
        self._death: WorkerDied | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the reader
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            TASK_QUEUE: level_for_worker(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the caller
        )
        theirs.close()
        self._pipe.send(worker)
        threading.Thread(target=self._read, name="ascend-kit-worker", daemon=True).start()

    def call(self, method: str, arguments: tuple[Any, ...]) -> Future[Any]:
        call: Future[Any] = Future()
        with self._lock:
            if self._death is not None:
                call.set_exception(self._death)
                return call
            self._calls.append(call)
            with contextlib.suppress(OSError):  # it has ended: the reader finds out and fails all calls
                self._pipe.send((method, arguments))
        return call

    def end(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, value = self._pipe.recv()
                if kind == "progress":
                    if self.on_progress is not None:
                        self.on_progress(*value)
                    continue
                call = self._calls.pop(0)
                call.set_exception(value) if kind == "error" else call.set_result(value)
        self._process.wait()
        with self._lock, self._pipe, self._output:
            self._death = WorkerDied(self._last_words())
            for call in self._calls:
                call.set_exception(self._death)

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        code = self._process.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        return f"the engine's worker process ended {how}" + ("; it wrote last:\n" + "\n".join(lines) if lines else "")


def serve(descriptor: int) -> None:
    """What a worker process does: take calls from the pipe one after the other until it is closed."""
    global _pipe
    wanted = level_set()
    pipe = _pipe = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        worker = pipe.recv()()
        while True:
            method, arguments = pipe.recv()
            try:
                answer = ("result", getattr(worker, method)(*arguments))
                check_level(wanted)
            except Exception as error:
                answer = ("error", _portable(error))
            pipe.send(answer)


_pipe: Connection | None = None  # in a worker's process, that to its caller


def report(*values: Any) -> None:
    """In a worker's process: have the caller's `on_progress` called with these values."""
    assert _pipe is not None
    _pipe.send(("progress", values))


def _portable(error: Exception) -> Exception:
    """The error itself where it survives pickling, else one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())


def is_interactive() -> bool:
    """Whether this process is a notebook's kernel or a prompt."""
    return notebook_shell() is not None or hasattr(sys, "ps1") or bool(sys.flags.interactive)


def needs_process(kind: str) -> bool:
    """Whether an engine on a device of this kind runs in a process of its own: on an NPU, when the caller is a
    notebook or a prompt. On a CPU it is faster in the caller's."""
    return kind == "npu" and is_interactive()
