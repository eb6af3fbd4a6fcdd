"""Run an experiment: check everything, execute its notebooks in order, keep every piece of evidence.

Everything that can be known beforehand is checked before the first kernel starts. What happened stands in
run.json of the run folder, so that `resume` repeats only what is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ascend_kit.files import to_json, write_atomic
from ascend_kit.params import Experiment, load_experiment
from ascend_kit.run.checks import Notebook, RunError, check_paths, find_notebooks, select_notebooks
from ascend_kit.run.execute import execute

# Which stages a stage cannot do without. The conversion counts only where its result is used.
NEEDS = {"03_generate": ("02_convert",), "04_throughput": ("02_convert",), "05_evaluate": ("02_convert",)}
__all__ = ["RunError", "RunReport", "check_experiment", "read_states", "run_experiment"]
# Parameters that may change between a run and its resumption although a finished notebook names them.
FREE_ON_RESUME = frozenset({"if_exists", "if_model_exists", "compare_runs", "output_path", "output_root"})


@dataclass
class NotebookState:
    """One line of run.json: waiting, running, ok, failed, skipped or interrupted."""

    name: str
    state: str = "waiting"
    started: str | None = None
    duration_s: float | None = None
    error: str | None = None
    cell: int | None = None
    traceback: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunReport:
    """What a run left behind. `ok` is true when every notebook it was asked for has succeeded."""

    run_folder: Path
    state: str
    notebooks: list[NotebookState]
    report: Path | None = None

    @property
    def ok(self) -> bool:
        return self.state == "ok"


def run_experiment(
    path: str | Path,
    *,
    only: list[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    overrides: dict[str, Any] | None = None,
    notebooks: str | Path | None = None,
    echo: Callable[[str], None] = print,
) -> RunReport:
    """Execute the notebooks of the experiment in the YAML file `path`, in order, into its run folder.

    `only` names notebooks (`04_throughput` or `04`). An existing run folder is refused unless `resume` (do
    what is missing or failed) or `overwrite`. Raises ParameterError or RunError before anything runs;
    KeyboardInterrupt after the evidence is saved. A failed notebook does not raise: see `RunReport.ok`.
    """
    experiment = load_experiment(path, overrides)
    available = find_notebooks(notebooks)
    chosen = select_notebooks(available, only)
    check_paths(experiment, chosen)
    mode = _mode(experiment, resume, overwrite)
    folder = experiment.run_folder
    with _run_lock(folder), _sigterm_as_interrupt():
        states = _admit(folder, experiment, chosen, mode, whole=only is None)
        run = _Run(folder, experiment, str(path), states, echo)
        return run.execute(chosen, repeat=mode == "overwrite")


def _mode(experiment: Experiment, resume: bool, overwrite: bool) -> str:
    if resume and overwrite:
        raise RunError("--resume and --overwrite exclude each other: take one")
    if resume or overwrite:
        return "resume" if resume else "overwrite"
    return experiment.if_exists if "if_exists" in experiment.model_fields_set else "refuse"


# --- the run folder before the run ------------------------------------------------------------------------


def _admit(
    folder: Path, experiment: Experiment, chosen: list[Notebook], mode: str, *, whole: bool
) -> dict[str, NotebookState]:
    """States of the earlier run to build on, {} for a fresh folder; RunError if it must not be touched."""
    earlier = read_states(folder)
    used = [path for path in folder.iterdir() if path.name != ".run.lock"]
    if not used:
        return {}
    if mode == "refuse":
        raise RunError(
            f"{folder} already holds a run; add --resume to do only what is missing, --overwrite to "
            "start again, or --run NAME for another folder"
        )
    if mode == "overwrite" and whole:
        if not earlier and not (folder / "manifest.json").exists():
            raise RunError(f"{folder} is not empty and is no run folder; it is not deleted. Choose another --run")
        for path in used:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return {}
    if mode == "resume":
        _refuse_changed_parameters(folder, earlier, experiment, chosen)
    return earlier


def _refuse_changed_parameters(
    folder: Path, earlier: dict[str, NotebookState], experiment: Experiment, chosen: list[Notebook]
) -> None:
    now = json.loads(to_json(experiment.model_dump()))
    for notebook in chosen:
        state = earlier.get(notebook.name)
        if state is None or not is_done(folder, state):
            continue
        changed = [
            f"{key}: {state.parameters[key]!r} -> {now[key]!r}"
            for key in notebook.defaults
            if key in state.parameters and key not in FREE_ON_RESUME and state.parameters[key] != now[key]
        ]
        if changed:
            raise RunError(
                f"{folder}: {notebook.name} is finished, but with other parameters "
                f"({'; '.join(changed[:4])}); use --overwrite, or --run NAME for another folder"
            )


def read_states(folder: Path) -> dict[str, NotebookState]:
    """The notebook states in run.json; empty when there is none."""
    try:
        entries = json.loads((folder / "run.json").read_text(encoding="utf-8"))["notebooks"]
        return {entry["name"]: NotebookState(**entry) for entry in entries}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'run.json'} cannot be read ({error}); use --overwrite to start again") from None


def is_done(folder: Path, state: NotebookState) -> bool:
    """Whether a notebook succeeded and its evidence, executed copy and result file, is still there."""
    return (
        state.state == "ok" and (folder / f"{state.name}.json").is_file() and (folder / f"{state.name}.ipynb").is_file()
    )


@contextlib.contextmanager
def _run_lock(folder: Path) -> Iterator[None]:
    """One run at a time per folder; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".run.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder} is in use by another run; wait for it or choose another --run") from None
        yield


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP take the same way out as Ctrl-C, so that no kernel outlives the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the run itself ---------------------------------------------------------------------------------------


class _Run:
    """The execution of one run folder; keeps run.json in step with what happens."""

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        source: str,
        states: dict[str, NotebookState],
        echo: Callable[[str], None],
    ):
        self.folder, self.experiment, self.source, self.states, self.echo = (folder, experiment, source, states, echo)

    def execute(self, notebooks: list[Notebook], *, repeat: bool) -> RunReport:
        name = f"{self.experiment.experiment}/{self.experiment.run}"
        self.echo(f"run {name}: {len(notebooks)} notebooks -> {self.folder}")
        for notebook in notebooks:
            before = self.states.get(notebook.name)
            if before is None or repeat or not is_done(self.folder, before):
                self.states[notebook.name] = NotebookState(notebook.name)
        self.states = dict(sorted(self.states.items()))
        self._save("running")
        try:
            for number, notebook in enumerate(notebooks, 1):
                self._one(notebook, f"[{number}/{len(notebooks)}] {notebook.name}", repeat=repeat)
        except KeyboardInterrupt:
            self._save("interrupted")
            self.echo("interrupted; `--resume` goes on from here")
            raise
        return self._finish({notebook.name for notebook in notebooks})

    def _one(self, notebook: Notebook, label: str, *, repeat: bool) -> None:
        state = self.states[notebook.name]
        if state.state == "ok":
            self.echo(f"{label}: done before")
            return
        missing = self._failed_needs(notebook.name)
        if missing:
            state.state, state.error = "skipped", f"needs {missing}, which has not succeeded"
            self.echo(f"{label}: skipped, {state.error}")
            self._save("running")
            return
        self.echo(f"{label} ...")
        state.state, state.started = "running", time.strftime("%Y-%m-%dT%H:%M:%S%z")
        values = self._injected(notebook, repeat=repeat)
        state.parameters = {key: values[key] for key in notebook.defaults}
        self._save("running")
        outcome = execute(
            notebook.path,
            self.folder / f"{notebook.name}.ipynb",
            values,
            marker=self.folder / f"{notebook.name}.json",
            echo=lambda line: self.echo(f"      {line}"),
        )
        for key, value in asdict(outcome).items():
            setattr(state, key, value)
        self._save("running")
        if state.state == "interrupted":
            raise KeyboardInterrupt
        self._tell(state)

    def _failed_needs(self, name: str) -> str | None:
        """The stage that this one needs and that was tried and did not succeed."""
        if self.experiment.use_model != "converted":
            return None
        needed = [self.states[need] for need in NEEDS.get(name, ()) if need in self.states]
        return next((state.name for state in needed if state.state != "ok"), None)

    def _injected(self, notebook: Notebook, *, repeat: bool) -> dict[str, Any]:
        """What papermill injects: everything the notebook declares, and what the file sets beyond that."""
        keys = [
            key
            for key in Experiment.model_fields
            if key in notebook.defaults or key in self.experiment.model_fields_set
        ]
        values = {key: getattr(self.experiment, key) for key in keys}
        # Whether the folder may be touched is settled by now; the notebook only has to follow.
        return {**values, "if_exists": "overwrite" if repeat else "resume"}

    def _tell(self, state: NotebookState) -> None:
        if state.state == "ok":
            self.echo(f"      ok, {state.duration_s:.1f} s")
            return
        where = "" if state.cell is None else f" in cell {state.cell}"
        self.echo(f"      FAILED{where} after {state.duration_s:.1f} s: {state.error}")
        for line in (state.traceback or "").splitlines():
            self.echo(f"      | {line}")
        self.echo(f"      evidence: {self.folder / (state.name + '.ipynb')}")

    def _finish(self, asked_for: set[str]) -> RunReport:
        from ascend_kit.show.report import write_report

        self._save("ok" if all(state.state == "ok" for state in self.states.values()) else "failed")
        failed = [name for name, state in self.states.items() if name in asked_for and state.state != "ok"]
        report = write_report(self.folder)
        self.echo(f"report: {report}")
        if failed:
            self.echo(f"FAILED: {', '.join(failed)}; mend the cause and run again with --resume")
        return RunReport(self.folder, "failed" if failed else "ok", list(self.states.values()), report)

    def _save(self, state: str) -> None:
        value = {
            "schema_version": 1,
            "experiment": self.experiment.experiment,
            "run": self.experiment.run,
            "parameter_file": self.source,
            "state": state,
            "pid": os.getpid(),
            "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "notebooks": [asdict(entry) for entry in self.states.values()],
        }
        write_atomic(self.folder / "run.json", to_json(value, indent=1) + "\n")


def check_experiment(
    path: str | Path, overrides: dict[str, Any] | None = None, notebooks: str | Path | None = None
) -> Experiment:
    """Everything that `run_experiment` checks beforehand, without running anything."""
    experiment = load_experiment(path, overrides)
    check_paths(experiment, find_notebooks(notebooks))
    return experiment
