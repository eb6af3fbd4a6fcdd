"""Execute one notebook headless and say truthfully how it ended.

Knows nothing of experiments: a source notebook, parameters, an output path, and the file that the notebook
must have written. papermill does the execution; what it gets wrong is put right here (seen with papermill 2.7
and nbclient 0.11): it takes whatever kernel is called python3, marks every cell completed after a killed
kernel, takes `sys.exit(0)` for success, and writes the copy in place.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ascend_kit.files import write_atomic

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelClient, AsyncKernelManager
    from nbformat import NotebookNode

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
KERNEL_START_S = 120
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Outcome:
    """How one execution ended: state is ok, failed or interrupted; `error` one line, `traceback` its end."""

    state: str
    duration_s: float
    error: str | None = None
    cell: int | None = None
    traceback: str | None = None


def execute(
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    *,
    marker: Path | None = None,
    lock: dict[str, Any] | None = None,
    echo: Callable[[str], None] | None = None,
) -> Outcome:
    """Run `source` with `parameters`; the executed copy lies at `target` afterwards, whatever happens.

    The kernel is this interpreter, started in the current folder. `marker` is the file that the notebook
    writes last: without a fresh one the outcome is failed. `echo` gets the kernel's printed lines.
    """
    partial = target.with_name(f".{target.stem}.partial.ipynb")
    log = target.with_name(f".{target.stem}.log")
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in (marker, target):
        if old is not None:
            old.unlink(missing_ok=True)
    started = time.monotonic()
    failure: BaseException | None = None
    code = None
    with open(log, "w+b") as kernel_log, kernel(kernel_log, lock or {}) as manager:
        try:
            _papermill(source, partial, parameters, manager, echo)
        except (Exception, KeyboardInterrupt) as error:
            failure = error
            code = _exit_code(manager)
    outcome, notebook = _judge(partial, failure, code, marker, time.monotonic() - started)
    if code is not None:  # the last words of a dead kernel are nowhere else
        outcome = replace(outcome, traceback=_last_words(log))
    if notebook is not None:
        import nbformat

        write_atomic(target, nbformat.writes(notebook) + "\n")
    for leftover in (partial, log):
        leftover.unlink(missing_ok=True)
    return outcome


def _papermill(
    source: Path,
    partial: Path,
    parameters: dict[str, Any],
    manager: AsyncKernelManager,
    echo: Callable[[str], None] | None,
) -> None:
    import logging

    import papermill
    import papermill.log

    # What it warns of (an unknown parameter, no tag) was found before as an error; its errors are raised.
    papermill.log.logger.setLevel(logging.CRITICAL)
    lines = _Lines(echo) if echo else None
    with _client(manager) as client:
        papermill.execute_notebook(
            _literal_path(source),
            _literal_path(partial),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            km=manager,
            kc=client,
            stdout_file=lines,
            stderr_file=lines,
            shell_timeout_interval=1,
            iopub_timeout=60,
        )
    if lines:
        lines.end()


def _literal_path(path: Path) -> str:
    """papermill takes braces in a path for placeholders."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def _client(manager: AsyncKernelManager) -> Iterator[AsyncKernelClient]:
    """A connection to the running kernel; papermill does not close one that it opened to a given kernel."""
    from jupyter_core.utils import run_sync

    client = manager.client()
    client.start_channels()
    try:
        run_sync(client.wait_for_ready)(timeout=KERNEL_START_S)
        client.allow_stdin = False
        yield client
    finally:
        client.stop_channels()


class _Lines:
    """A text file for papermill that hands on whole lines; a carriage return starts a line anew."""

    def __init__(self, echo: Callable[[str], None]):
        self._echo, self._rest = echo, ""

    def write(self, text: str) -> None:
        *whole, self._rest = (self._rest + ANSI.sub("", text)).split("\n")
        for line in whole:
            self._echo(line.rsplit("\r", 1)[-1])

    def flush(self) -> None:
        """Nothing is held back but an unfinished line."""

    def end(self) -> None:
        if self._rest:
            self.write("\n")


# --- the kernel -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kernel(log: IO[bytes], lock: dict[str, Any]) -> Iterator[AsyncKernelManager]:
    """A running kernel of this very interpreter; it and its children are gone afterwards.

    `log` takes what the process itself writes (crashes, messages of C libraries); cells are heard otherwise.
    `lock` holds the arguments of Popen under which it may write its stage.
    """
    from ipykernel.kernelspec import make_ipkernel_cmd
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_core.utils import run_sync

    class ThisInterpreter(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            # The kernelspec named python3 may belong to another environment.
            return KernelSpec(argv=make_ipkernel_cmd(), display_name="Python 3", language="python")

    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    environment = {**os.environ, **KERNEL_ENVIRONMENT, **lock.get("env", {})}
    for name in BROWSER_VARIABLES:
        environment.pop(name, None)
    run_sync(manager.start_kernel)(
        cwd=os.getcwd(), env=environment, stdout=log, stderr=log, pass_fds=lock.get("pass_fds", ())
    )
    group = getattr(manager.provisioner, "pgid", None)
    try:
        yield manager
    finally:
        with _uninterrupted():
            try:
                run_sync(manager.shutdown_kernel)(now=sys.exc_info()[0] is not None)
            finally:
                _kill_group(group)


def _kill_group(group: int | None) -> None:
    """End what the kernel started and left behind (it leads a process group of its own)."""
    if group and group != os.getpgrp():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _exit_code(manager: AsyncKernelManager) -> int | None:
    """The kernel's exit code when it is dead (negative: the signal), else None."""
    from jupyter_core.utils import run_sync

    with contextlib.suppress(Exception):
        return run_sync(manager.provisioner.poll)()
    return None


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave the kernel behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- the verdict ------------------------------------------------------------------------------------------


def _judge(
    partial: Path, failure: BaseException | None, code: int | None, marker: Path | None, duration_s: float
) -> tuple[Outcome, NotebookNode | None]:
    import nbformat

    notebook = nbformat.read(partial, as_version=4) if partial.exists() else None
    if notebook is None:
        return Outcome("failed", duration_s, f"the notebook could not be started: {_one_line(failure)}"), None
    _mark_unfinished_cells(notebook)
    cells = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    pending = next((index for index in cells if notebook.cells[index].execution_count is None), None)
    running = max(
        (index for index in cells if notebook.cells[index].metadata.papermill.get("start_time")), default=None
    )

    if isinstance(failure, KeyboardInterrupt):
        _note(notebook, running, "KeyboardInterrupt", "the run was interrupted in this cell")
        return Outcome("interrupted", duration_s, "interrupted", running), notebook
    if failure is not None and hasattr(failure, "ename"):
        tail = [line for line in ANSI.sub("", "\n".join(failure.traceback)).splitlines() if line.strip()][-8:]
        text = f"{failure.ename}: {_one_line(failure.evalue)}"
        return Outcome("failed", duration_s, text, _raising_cell(notebook, failure.ename), "\n".join(tail)), notebook
    if failure is not None:
        text = _kernel_death(code) if code is not None else f"{type(failure).__name__}: {_one_line(failure)}"
        _note(notebook, running, type(failure).__name__, text)
        return Outcome("failed", duration_s, text, running), notebook
    if pending is not None:
        text = "the notebook ended before this cell without an error (sys.exit or an ended kernel)"
        _note(notebook, pending, "Unfinished", text)
        return Outcome("failed", duration_s, text, pending), notebook
    if marker is not None and not marker.exists():
        text = f"every cell ran, but the result file {marker.name} was not written"
        _note(notebook, cells[-1] if cells else None, "NoResult", text)
        return Outcome("failed", duration_s, text, cells[-1] if cells else None), notebook
    return Outcome("ok", duration_s), notebook


def _raising_cell(notebook: NotebookNode, name: str) -> int | None:
    for index, cell in enumerate(notebook.cells):
        if any(output.get("ename") == name for output in cell.get("outputs", [])):
            return index
    return None


def _mark_unfinished_cells(notebook: NotebookNode) -> None:
    """papermill calls every cell completed once the notebook ended; only cells with a count have run."""
    for cell in notebook.cells:
        state = cell.metadata.setdefault("papermill", {})
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            state["status"] = "pending"


def _note(notebook: NotebookNode, index: int | None, name: str, text: str) -> None:
    """Put the reason into the notebook itself, as the error output of the cell where it stopped."""
    import nbformat

    if index is None:
        notebook.cells.append(nbformat.v4.new_markdown_cell(f"**{name}**: {text}"))
        return
    cell = notebook.cells[index]
    cell.outputs.append(nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[f"{name}: {text}"]))
    cell.metadata.papermill["status"] = "failed"


def _kernel_death(code: int) -> str:
    if code >= 0:
        return f"the kernel ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system does that when memory runs out: lower batch_size, kv_cache_gib or max_seq_length"
    return f"the kernel was killed by {name}" + (hint if name == "SIGKILL" else "")


def _last_words(log: Path) -> str | None:
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip() and not line.startswith("[IPKernelApp] WARNING")
    ]
    return "\n".join(lines[-8:]) or None


def _one_line(error: object) -> str:
    return " ".join(ANSI.sub("", str(error)).split())[:400]
