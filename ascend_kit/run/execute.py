"""The life of one stage: its notebook is started, run, stopped if a signal says so, and judged from its evidence.

papermill works in a thread; the main thread only waits, so that a signal at any moment finds it able to end the
kernel. Knows nothing of experiments: a source notebook, parameters, an output path, and the file that the notebook
must have written.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.device.advice import explain
from ascend_kit.files import write_atomic
from ascend_kit.run.copies import translate_cells
from ascend_kit.run.signals import SIGNALS, StopRequest

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from ascend_kit.run.engine import ExecutedCopy

# A kernel must not reach for a network, must draw inline, and must not believe that it has a browser.
KERNEL_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
BROWSER_VARIABLES = ("JPY_SESSION_NAME", "VSCODE_PID")
POLL_S = 0.1
GRACE_S = 5  # for a cell to clear up after an interrupt, before its kernel is killed
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Outcome:
    """How one execution ended: state is ok, failed or interrupted; `error` one line, `traceback` its end.

    `signal` is the one that interrupted it.
    """

    state: str
    duration_s: float
    error: str | None = None
    cell: int | None = None
    traceback: str | None = None
    signal: int | None = None


class Stopped(Exception):
    """The run is to stop before the next cell."""


@dataclass
class Execution:
    """One notebook and its kernel, which is this interpreter started in the current folder.

    The executed copy lies at `target` from the first moment on. `marker` is the file that the notebook writes last:
    without a fresh one the outcome is failed. `popen` is added to the arguments of the kernel's process; `echo` gets
    its printed lines.
    """

    source: Path
    target: Path
    parameters: dict[str, Any]
    marker: Path
    popen: dict[str, Any]
    stop: StopRequest
    echo: Callable[[str], None]
    failure: Exception | None = None
    _manager: Any = None
    _process: subprocess.Popen | None = None
    _code: int | None = None  # of the kernel, None while it lives
    _stopping_s: float | None = None

    def run(self) -> Outcome:
        """Run the notebook and say truthfully how it ended. Neither its kernel nor its children are left."""
        started = time.monotonic()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        for old in (self.marker, self.target):
            old.unlink(missing_ok=True)
        worker = threading.Thread(target=self._work, name=f"papermill {self.target.stem}", daemon=True)
        with self.stop.ending(self.kill):
            worker.start()
            while worker.is_alive():
                worker.join(POLL_S)
                self._process = self._process or getattr(getattr(self._manager, "provisioner", None), "process", None)
                if self.stop.number is not None:
                    self._end_kernel()
            self._code = self._process.poll() if self._process is not None else None
            self.kill()
        outcome = self._judge(time.monotonic() - started)
        for leftover in working_files(self.target.parent, self.target.stem):
            leftover.unlink(missing_ok=True)
        return outcome

    def _work(self) -> None:
        log_file, connection = working_files(self.target.parent, self.target.stem)
        try:
            with open(log_file, "wb") as log:
                self._execute(log, connection)
        except Exception as error:
            self.failure = error

    def _execute(self, log: Any, connection: Path) -> None:
        import logging

        import papermill

        from ascend_kit.run import engine

        # What it warns of (an unknown parameter, no tag) was found before as an error; its errors are raised.
        engine.logger.setLevel(logging.CRITICAL)
        environment = {**os.environ, **KERNEL_ENVIRONMENT, **self.popen.get("env", {})}
        for name in BROWSER_VARIABLES:
            environment.pop(name, None)
        lines, self._manager = _Lines(self.echo), engine.kernel_manager(connection)
        papermill.execute_notebook(
            str(self.source).replace("{", "{{").replace("}", "}}"),  # papermill takes braces for placeholders
            None,
            parameters=self.parameters,
            engine_name=engine.NAME,
            kernel_name="python3",
            stdout_file=lines,
            stderr_file=lines,
            copy=self._copy,
            manager=self._manager,
            popen={**self.popen, "env": environment, "cwd": os.getcwd(), "stdout": log, "stderr": log},
        )
        lines.end()

    def _copy(self, notebook: NotebookNode) -> ExecutedCopy:
        from ascend_kit.run.engine import ExecutedCopy

        translate_cells(notebook.cells, self.parameters.get("language", "en"))
        return ExecutedCopy(notebook, self.target, self._before_cell)

    def _before_cell(self) -> None:
        if self.stop.number is not None:
            raise Stopped

    # --- the end of the kernel --------------------------------------------------------------------------------

    def _end_kernel(self) -> None:
        """Interrupt the cell that runs, so that it can clear up; kill the kernel when it does not."""
        if self._process is None:
            return
        if self._stopping_s is None:
            self._stopping_s = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGINT)
        elif time.monotonic() - self._stopping_s > GRACE_S:
            self.kill()

    def kill(self) -> None:
        """End the kernel and what it started and left behind; it leads a process group of its own."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    # --- the verdict ------------------------------------------------------------------------------------------

    def _judge(self, duration_s: float) -> Outcome:
        """The outcome, also noted in the notebook itself at the cell where it stopped."""
        import nbformat

        state, name, text, by, traceback = self._ending()
        # The copy as far as it got; the source itself when nothing was saved.
        notebook = nbformat.read(self.target if self.target.exists() else self.source, as_version=4)
        for cell in notebook.cells:
            cell.metadata.setdefault("papermill", {"status": "pending"})
        cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
        last = max((i for i in cells if notebook.cells[i].metadata.papermill.get("start_time")), default=None)
        pending = next((index for index in cells if notebook.cells[index].execution_count is None), None)
        if state == "ok" and pending is not None:
            state, name, last = "failed", "Unfinished", pending
            text = "the notebook ended before this cell without an error (sys.exit or an ended kernel)"
        elif state == "ok" and not self.marker.exists():
            state, name = "failed", "NoResult"
            text = f"every cell ran, but the result file {self.marker.name} was not written"
        if state == "ok":
            return Outcome("ok", duration_s)
        if last is None:
            notebook.cells.append(nbformat.v4.new_markdown_cell(f"**{name}**: {text}"))
        elif all(output.output_type != "error" for output in notebook.cells[last].outputs):
            error = nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"])
            notebook.cells[last].outputs.append(error)
            notebook.cells[last].metadata.papermill["status"] = "failed"
        with contextlib.suppress(OSError):  # without space for the note, the copy as it was saved has to do
            write_atomic(self.target, nbformat.writes(notebook) + "\n")
        return Outcome(state, duration_s, text, last, traceback, by)

    def _ending(self) -> tuple[str, str, str, int | None, str | None]:
        """State, kind of error, text, signal and traceback as far as exceptions and the kernel's end tell."""
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        error, code = self.failure, self._code
        if error is None:
            return "ok", "", "", None, None
        if self.stop.number is not None:
            return "interrupted", "KeyboardInterrupt", "interrupted", self.stop.number, None
        if isinstance(error, PapermillExecutionError):
            state, by = ("interrupted", signal.SIGINT) if error.ename == "KeyboardInterrupt" else ("failed", None)
            tail = [line for line in ANSI.sub("", "\n".join(error.traceback)).splitlines() if line.strip()][-8:]
            return state, error.ename, f"{error.ename}: {_one_line(error.evalue)}", by, "\n".join(tail)
        began = self.target.exists()
        if isinstance(error, DeadKernelError) or (code and began):
            by = -code if code is not None and -code in SIGNALS else None
            state = "failed" if by is None else "interrupted"
            return (
                state,
                "DeadKernelError",
                _kernel_death(code or 0),
                by,
                _last_words(working_files(self.target.parent, self.target.stem)[0]),
            )
        what = "" if began else "the notebook could not be started: "
        return "failed", type(error).__name__, f"{what}{type(error).__name__}: {_one_line(error)}", None, None


def working_files(folder: Path, stage: str) -> tuple[Path, Path]:
    """Log and connection file of a stage's kernel; they are there only while it runs."""
    return folder / f".{stage}.log", folder / f".{stage}.kernel.json"


class _Lines(io.TextIOBase):
    """A text file for papermill that hands on whole lines; a carriage return starts a line anew."""

    def __init__(self, echo: Callable[[str], None]):
        self._echo, self._rest = echo, ""

    def write(self, text: str, /) -> int:
        *whole, self._rest = (self._rest + ANSI.sub("", text)).split("\n")
        for line in whole:
            self._echo(line.rsplit("\r", 1)[-1])
        return len(text)

    def end(self) -> None:
        if self._rest:
            self.write("\n")


def _kernel_death(code: int) -> str:
    if code >= 0:
        return f"the kernel ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    text = f"the kernel was killed by {name}"
    known = explain(text)
    return f"{text}. {known[0].meaning} {'; '.join(known[0].actions)}" if known else text


def _last_words(log: Path) -> str | None:
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip() and not line.startswith("[IPKernelApp] WARNING")
    ]
    return "\n".join(lines[-8:]) or None


def _one_line(error: object) -> str:
    return " ".join(ANSI.sub("", str(error)).split())[:400]
