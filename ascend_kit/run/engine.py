"""papermill's parts as our runs need them: a copy of the notebook that is whole at any moment and claims only what ran.

papermill's own way (2.7) writes in place, so that a kill leaves half a file, and marks every cell completed after a
killed kernel; it also takes whatever kernel is called python3.
"""

from __future__ import annotations

import datetime
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NotebookExecutionManager
from papermill.execute import raise_for_execution_errors
from papermill.iorw import load_notebook_node
from papermill.log import logger
from papermill.parameterize import parameterize_notebook

from ascend_kit.files import write_atomic
from ascend_kit.run.copies import translate_cells

KERNEL_START_S = 120


class ThisInterpreter(KernelSpecManager):
    """Whatever kernel is asked for, it is this interpreter: the one named python3 may belong to another environment."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The specification of a kernel in this environment."""
        return KernelSpec(argv=make_ipkernel_cmd(), display_name="Python 3", language="python")


def kernel_manager(connection_file: Path) -> AsyncKernelManager:
    """A manager of one kernel, not started yet; the file holds its ports and key while it lives."""
    return AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=ThisInterpreter(), connection_file=str(connection_file.absolute())
    )


class ExecutedCopy(NotebookExecutionManager):
    """The executed notebook on disk, whole after every cell; `before_cell` may raise to stop there."""

    def __init__(self, nb: NotebookNode, target: Path, before_cell: Callable[[], None]):
        self._began, self._began_s = datetime.datetime.now(datetime.UTC), time.monotonic()
        super().__init__(nb, progress_bar=False)
        self.target, self.before_cell = target, before_cell

    def now(self) -> datetime.datetime:
        """The time of day at the beginning and what has passed since: papermill subtracts, and clocks are set back."""
        return self._began + datetime.timedelta(seconds=time.monotonic() - self._began_s)

    def save(self, **kwargs: Any) -> None:
        """Replace the file in one step."""
        write_atomic(self.target, nbformat.writes(kwargs.get("nb") or self.nb) + "\n")
        self.last_save_time = self.now()

    def cell_start(self, cell: NotebookNode, cell_index: int | None = None, **kwargs: Any) -> None:
        """Note that a cell starts, unless the run is to stop."""
        self.before_cell()
        super().cell_start(cell, cell_index, **kwargs)

    def cell_complete(self, cell: NotebookNode, cell_index: int | None = None, **kwargs: Any) -> None:
        """Note how a cell ended; one that has not run stays pending."""
        if cell.metadata.papermill["status"] != self.PENDING:
            super().cell_complete(cell, cell_index, **kwargs)

    def notebook_complete(self, **kwargs: Any) -> None:
        """Note the time and save; cells that have not run stay pending."""
        self.end_time = self.now()
        self.nb.metadata.papermill["end_time"] = self.end_time.isoformat()
        if self.start_time is not None:
            self.nb.metadata.papermill["duration"] = (self.end_time - self.start_time).total_seconds()
        self.save()


def execute(
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    before_cell: Callable[[], None],
    manager: AsyncKernelManager,
    lines: io.TextIOBase | None,
    popen: dict[str, Any],
) -> None:
    """Run every cell of the notebook `source` with `parameters` injected; the kernel has ended afterwards.

    The executed copy lies at `target`. `lines` takes what is printed; `popen` are arguments of the kernel's process.
    Raises PapermillExecutionError for a cell that failed, nbclient's DeadKernelError for a kernel that ended.
    """
    logger.setLevel(logging.CRITICAL)  # what papermill and nbclient warn of is raised, or was found before
    notebook = load_notebook_node(str(source))
    notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    translate_cells(notebook.cells, parameters.get("language", "en"))
    executed = ExecutedCopy(notebook, target, before_cell)
    executed.notebook_start()
    client = PapermillNotebookClient(
        executed, km=manager, kernel_name="python3", log=logger, startup_timeout=KERNEL_START_S,
        shell_timeout_interval=1, iopub_timeout=60, stdout_file=lines, stderr_file=lines,
    )  # fmt: skip
    try:
        client.execute(cleanup_kc=True, **popen)
    finally:
        executed.notebook_complete()
    raise_for_execution_errors(executed.nb, None)
