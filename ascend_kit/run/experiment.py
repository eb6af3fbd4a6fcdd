"""Run an experiment: check everything, execute its notebooks in order, keep every piece of evidence.

Everything that can be known beforehand is checked before the first kernel starts. What happened stands in
run.json of the run folder, so that `resume` repeats only what is missing.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_kit.files import os_error_text
from ascend_kit.identity import Identity
from ascend_kit.messages import phrase
from ascend_kit.params import Experiment, load_experiment
from ascend_kit.params.paths import check_paths
from ascend_kit.params.yaml_file import naming_lines
from ascend_kit.run import copies
from ascend_kit.run.checks import (
    Notebook,
    RunError,
    check_contents,
    check_conversion,
    find_notebooks,
    select_notebooks,
    stage_inputs,
)
from ascend_kit.run.execute import Execution, working_files
from ascend_kit.run.signals import StopRequest
from ascend_kit.stages import DONE, RunRecord, Stage, StageLock, admit, changed_parameters, changing, changing_stage

# Which stages a stage cannot do without. The conversion counts only where its result is used.
CONVERSION = "02_convert"
COMPARISON = "06_compare"
NEEDS = {name: (CONVERSION,) for name in ("03_generate", "04_throughput", "05_evaluate")} | {
    COMPARISON: ("04_throughput", "05_evaluate")
}
RESERVE_BYTES = 1 << 20  # a record and its temporary copy, several times over
OLD_S = 600  # a file that is being written in one step is younger
__all__ = ["RunError", "RunReport", "check_experiment", "run_experiment"]


@dataclass
class RunReport:
    """What a run left behind. `ok` is true when every notebook it was asked for has succeeded without an alarm."""

    run_folder: Path
    state: str
    notebooks: list[Stage]
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
    if undone := _undo_exchange(experiment, chosen):
        echo(undone)
    with naming_lines(path, overrides or {}):
        check_parameters(experiment, chosen)
    mode = _mode(experiment, resume, overwrite)
    folder = experiment.run_folder
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest().listening())
        locks = {}
        folder.mkdir(parents=True, exist_ok=True)
        for notebook in chosen:
            locks[notebook.name] = stack.enter_context(contextlib.closing(StageLock(folder, notebook.name)))
        _admit(folder, experiment, chosen, mode, whole=only is None)
        for leftover in _remove_leftovers(folder, chosen):
            echo(f"removed {leftover}, which an earlier run left behind")
        stack.enter_context(_room_for_the_end(folder))
        return _Run(folder, experiment, str(path), locks, mode, stop, echo).execute(chosen)


@contextlib.contextmanager
def _room_for_the_end(folder: Path) -> Iterator[None]:
    """Space set aside while a run works, so that what ended it can be recorded where it filled the disk."""
    reserve = folder / ".reserve"
    try:
        reserve.write_bytes(bytes(RESERVE_BYTES))
        yield
    except OSError as error:
        reserve.unlink(missing_ok=True)
        with contextlib.suppress(OSError), changing(folder) as record:
            for stage in record.stages.values():
                if stage.state in ("running", "waiting"):
                    was_running = stage.state == "running"
                    stage.end(*(("failed", os_error_text(error)) if was_running else ("interrupted", "not started")))
        raise
    finally:
        reserve.unlink(missing_ok=True)


def _mode(experiment: Experiment, resume: bool, overwrite: bool) -> str:
    if resume and overwrite:
        raise RunError("--resume and --overwrite exclude each other: take one")
    if resume or overwrite:
        return "resume" if resume else "overwrite"
    return experiment.if_exists if "if_exists" in experiment.model_fields_set else "refuse"


# --- the run folder before the run ------------------------------------------------------------------------


def _admit(folder: Path, experiment: Experiment, chosen: list[Notebook], mode: str, *, whole: bool) -> None:
    """Make room for the run, or raise RunError or RunFolderError if the folder must not be touched."""
    used = [path for path in folder.iterdir() if path.name != copies.FOLDER and not path.name.endswith(".lock")]
    if not used:
        return
    if mode == "refuse":
        raise RunError(
            f"{folder} already holds a run; add --resume to do only what is missing, --overwrite to "
            "start again, or --run NAME for another folder"
        )
    if mode == "overwrite" and whole:
        if not (folder / "run.json").exists():
            raise RunError(f"{folder} is not empty and is no run folder; it is not deleted. Choose another --run")
        for path in used:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    stages = RunRecord.read(folder).stages
    for notebook in chosen:
        admit(stages.get(notebook.name), experiment, mode, notebook.defaults)


def _remove_leftovers(folder: Path, chosen: list[Notebook]) -> Iterator[Path]:
    """Remove what killed runs left in the folder and nobody owns: their locks are ours now."""
    working = [path for notebook in chosen for path in working_files(folder, notebook.name)]
    parts = [
        path for path in folder.glob(".*.????????") if time.time() - path.stat().st_mtime > OLD_S
    ]  # write_atomic's
    for path in [*working, *parts]:
        if path.exists():
            path.unlink()
            yield path


def _undo_exchange(experiment: Experiment, chosen: list[Notebook]) -> str | None:
    """Clear up what a killed conversion left beside the converted folder that these notebooks use; in words."""
    if not any("quantize" in notebook.defaults for notebook in chosen):
        return None
    folder = experiment.converted_folder
    if not (folder.parent / f".{folder.name}.old").exists():
        return None
    from ascend_kit.checkpoint.writer import undo_exchange  # imports torch: only where there is something to do

    return undo_exchange(folder)


# --- the run itself ---------------------------------------------------------------------------------------


@dataclass
class _Run:
    """The execution of one run folder; keeps run.json in step with what happens."""

    folder: Path
    experiment: Experiment
    source: str
    locks: dict[str, StageLock]
    mode: str
    stop: StopRequest
    echo: Callable[[str], None]

    def execute(self, notebooks: list[Notebook]) -> RunReport:
        self.echo(
            f"run {self.experiment.experiment}/{self.experiment.run}: {len(notebooks)} notebooks -> {self.folder}"
        )
        done = {one.name for one in notebooks if self.mode != "overwrite" and self._is_done(one)}
        with changing(self.folder, self.experiment) as record:
            record.parameter_file = self.source
            for notebook in notebooks:
                stage = record.stages.setdefault(notebook.name, Stage(notebook.name))
                if notebook.name not in done:
                    stage.state, stage.error = "waiting", None
        for number, notebook in enumerate(notebooks, 1):
            label = f"[{number}/{len(notebooks)}] {notebook.name}"
            if self.stop.number is not None:
                break
            if notebook.name in done and self._is_done(notebook):  # an earlier stage may have made its input anew
                self.echo(f"{label}: done before")
            else:
                self._one(notebook, label)
        return self._finish([notebook.name for notebook in notebooks])

    def _is_done(self, notebook: Notebook) -> bool:
        """Whether a stage was done from the same parameters and inputs, and its evidence is still there."""
        stage = RunRecord.read(self.folder).stages.get(notebook.name)
        if stage is None or stage.state not in DONE or "compare_runs" in notebook.defaults:
            return False  # a comparison reads other runs, which may have changed
        evidence = [self.folder / f"{notebook.name}{suffix}" for suffix in (".json", ".ipynb")]
        if not all(path.is_file() for path in evidence):
            return False
        if changed_parameters(stage, self.experiment, notebook.defaults):
            return False
        changed = Identity.from_row(stage.inputs).differences(
            stage_inputs(self.experiment, notebook.defaults), "resume"
        )
        if changed:
            self.echo(f"{notebook.name} was made from other inputs ({'; '.join(changed[:4])})")
        return not changed

    def _one(self, notebook: Notebook, label: str) -> None:
        missing = self._failed_needs(notebook.name)
        if missing:
            with changing_stage(self.folder, notebook.name) as stage:
                stage.end("skipped", f"needs {missing}, which has not succeeded")
            self.echo(f"{label}: skipped, {stage.error}")
            return
        self.echo(f"{label} ...")
        inputs = stage_inputs(self.experiment, notebook.defaults)
        with changing_stage(self.folder, notebook.name) as stage:
            stage.start(self.experiment)
        outcome = Execution(
            notebook.path,
            self.folder / f"{notebook.name}.ipynb",
            self._injected(notebook),
            marker=self.folder / f"{notebook.name}.json",
            popen=self.locks[notebook.name].for_child(),
            stop=self.stop,
            echo=lambda line: self.echo(f"      {line}"),
        ).run()
        after = stage_inputs(self.experiment, notebook.defaults)  # the demo and the conversion make theirs meanwhile
        with changing_stage(self.folder, notebook.name) as stage:
            stage.inputs = {**after.to_row(), **inputs.to_row()}
            stage.end(outcome.state, outcome.error, outcome.duration_s)
            stage.cell, stage.traceback = outcome.cell, outcome.traceback
        self.stop.number = self.stop.number or outcome.signal  # one that was sent to the kernel stops the run too
        self._tell(stage)

    def _failed_needs(self, name: str) -> str | None:
        """The stage that this one needs and that was tried and did not succeed."""
        stages = RunRecord.read(self.folder).stages
        without = [need for need in NEEDS.get(name, ()) if need in stages and stages[need].state not in DONE]
        if name == COMPARISON:  # it needs one of them, and other runs will do
            alone = not self.experiment.compare_runs and len(list(self.folder.parent.glob("*/run.json"))) == 1
            return " or ".join(without) if alone and len(without) == len(NEEDS[name]) else None
        return without[0] if without and self.experiment.use_model == "converted" else None

    def _injected(self, notebook: Notebook) -> dict[str, Any]:
        """What papermill injects: everything the notebook declares, and what the file sets beyond that."""
        names = {*notebook.defaults, *self.experiment.model_fields_set}
        values = {key: getattr(self.experiment, key) for key in Experiment.model_fields if key in names}
        # Whether the folder may be touched is settled by now; the notebook only has to follow.
        return {**values, "if_exists": "overwrite" if self.mode == "overwrite" else "resume"}

    def _tell(self, stage: Stage) -> None:
        duration = f"{stage.duration_s or 0:.1f} s"
        if stage.state == "ok":
            self.echo(f"      ok, {duration}")
            return
        if stage.state == "interrupted":
            self.echo(f"      interrupted after {duration}")
            return
        if stage.state == "alarm":
            for alarm in stage.alarms:
                self.echo(f"      ALARM {phrase(alarm['text'])}")
            self.echo(f"      done with an alarm, {duration}")
            return
        where = "" if stage.cell is None else f" in cell {stage.cell}"
        self.echo(f"      FAILED{where} after {duration}: {stage.error}")
        trace = (stage.traceback or "").splitlines()
        for line in trace if trace != [stage.error] else ():
            self.echo(f"      | {line}")
        self.echo(f"      evidence: {self.folder / (stage.name + '.ipynb')}")

    def _finish(self, asked_for: list[str]) -> RunReport:
        from ascend_kit.show.report import write_report

        with changing(self.folder) as record:
            stages = record.stages
            for name in asked_for:
                if stages[name].state == "waiting":
                    stages[name].end("interrupted", "not started")
        failed = [name for name in asked_for if stages[name].state not in DONE]
        alarmed = [name for name in asked_for if stages[name].state == "alarm"]
        copies.collect_executed(self.folder)
        report = write_report(self.folder)
        self.echo(f"report: {report}")
        if self.stop.number is not None:
            self.echo("interrupted; `--resume` goes on from here")
        self.stop.check()
        if failed:
            skipped = [name for name in failed if stages[name].state == "skipped"]
            told = [name for name in failed if name not in skipped]
            told += [f"skipped {', '.join(skipped)}"] if skipped else []
            self.echo(f"FAILED: {', '.join(told)}; mend the cause and run again with --resume")
        if alarmed:
            self.echo(f"ALARM: {', '.join(alarmed)}; the results must not be trusted before the cause is known")
        state = "failed" if failed else "alarm" if alarmed else "ok"
        return RunReport(self.folder, state, [stages[name] for name in sorted(stages)], report)


def write_run_report(folder: Path) -> Path:
    """report.html of a run folder, whichever way its stages were run. RunError when it is none."""
    if not (folder / "run.json").is_file() and not list(folder.glob("[0-9][0-9]_*.ipynb")):
        raise RunError(f"{folder} is no run folder: it holds neither run.json nor executed notebooks")
    from ascend_kit.show.report import write_report

    copies.collect_executed(folder)
    return write_report(folder)


def check_experiment(
    path: str | Path, overrides: dict[str, Any] | None = None, notebooks: str | Path | None = None
) -> Experiment:
    """Everything that `run_experiment` checks beforehand, without running anything."""
    experiment = load_experiment(path, overrides)
    available = find_notebooks(notebooks)
    with naming_lines(path, overrides or {}):
        check_parameters(experiment, available)
    return experiment


def check_parameters(experiment: Experiment, notebooks: list[Notebook] | None = None) -> None:
    """What the notebooks (default: all) would stumble over, as ValueError; files are looked into, nothing runs."""
    notebooks = find_notebooks() if notebooks is None else notebooks
    names = {name for notebook in notebooks for name in notebook.defaults}
    check_paths(experiment, names)
    check_conversion(experiment, notebooks)
    check_contents(experiment, names, converts=any(notebook.name == CONVERSION for notebook in notebooks))
