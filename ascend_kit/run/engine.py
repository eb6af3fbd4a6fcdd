"""papermill's engine for our runs: a copy of the notebook that is whole at any moment and claims only what has run.

papermill's own (2.7) writes in place, so that a kill leaves half a file, and marks every cell completed after a killed
kernel; it also takes whatever kernel is called python3.
"""

from __future__ import annotations

import datetime
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
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.log import logger

from ascend_kit.files import write_atomic

NAME = "ascend_kit"
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


class StageEngine(Engine):
    """Executes a notebook in a kernel of its own."""

    @classmethod
    def execute_notebook(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        nb: NotebookNode,
        kernel_name: str,
        *,
        copy: Callable[[NotebookNode], ExecutedCopy],
        manager: AsyncKernelManager,
        popen: dict[str, Any],
        stdout_file: Any = None,
        stderr_file: Any = None,
        **_: Any,
    ) -> NotebookNode:
        """Run every cell; `popen` goes to the kernel's process. The kernel has ended afterwards."""
        executed = copy(nb)
        executed.notebook_start()
        client = PapermillNotebookClient(
            executed,
            km=manager,
            kernel_name=kernel_name,
            log=logger,
            startup_timeout=KERNEL_START_S,
            shell_timeout_interval=1,
            iopub_timeout=60,
            stdout_file=stdout_file,
            stderr_file=stderr_file,
        )
        try:
            client.execute(cleanup_kc=True, **popen)
        finally:
            executed.notebook_complete()
        return executed.nb


papermill_engines.register(NAME, StageEngine)
