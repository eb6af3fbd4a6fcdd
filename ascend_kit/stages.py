"""run.json, the one record of what happened to each stage of a run, and the lock of the stage's writer.

It is written by whoever runs a stage: the command line, plain papermill or a session in JupyterLab.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, NotRequired

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from ascend_kit.files import one_line, plain_json, strict_json, to_json, write_atomic
from ascend_kit.messages import notebook_shell
from ascend_kit.params import Experiment
from ascend_kit.params.fields import BatchParameters, EvaluationParameters, SweepParameters
from ascend_kit.params.notebook import parameters_of

SCHEMA_VERSION = 2
DONE = frozenset({"ok", "alarm"})
# Parameters that say what to do with results, not how they are made.
FREE = frozenset({
    "if_exists", "params_file", "if_model_exists", "compare_runs", "accuracy_margin_points", "output_path",
    "output_root", "language",
})  # fmt: skip
# Parameters by which rows are keyed or whose content stands in a row's identity: a stage that asks for others goes on,
# keeps its rows and adds what is missing.
GROWING = frozenset(
    {"seed", *BatchParameters.model_fields, *SweepParameters.model_fields, *EvaluationParameters.model_fields}
)
HELD_BY_PARENT = "ASCEND_KIT_STAGE_LOCK"  # environment variable: the lock that the command line holds for its kernel


class RunFolderError(RuntimeError):
    """The run folder belongs to other parameters, is being written by someone else or cannot be read."""


class Told(TypedDict):
    """What a part of a stage's work said of itself: an alarm or a failure."""

    text: str
    part: NotRequired[str | None]
    key: NotRequired[str]
    values: NotRequired[dict[str, Any]]


@with_config(revalidate_instances="always")
@dataclass
class Stage:
    """What is known of one stage: waiting, running, ok, alarm, failed, interrupted or skipped, and how it came to that.

    `parameters` are resolved; `inputs` are the parts of the identity known before the work (weights, tokenizer, data,
    versions), `identity` those of what did the work. `alarms` and `failures` carry the `part` of the stage's work that
    raised them. `by_hand`: not by the command line, but in the file `notebook` as far as that is known.
    """

    name: str
    state: str = "waiting"
    started: str | None = None
    duration_s: float | None = None
    error: str | None = None
    cell: int | None = None
    traceback: str | None = None
    by_hand: bool = False
    notebook: str | None = None
    tables: list[str] = field(default_factory=list)
    alarms: list[Told] = field(default_factory=list)
    failures: list[Told] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(self, experiment: Experiment, *, anew: bool = True, by_hand: bool = False) -> None:
        """The stage runs from now on. `anew`: what an earlier try said of itself is gone, its tables are not; else that
        stands until each part is done anew.
        """
        self.state, self.started, self.by_hand = "running", now(), by_hand
        self.duration_s = self.error = self.cell = self.traceback = None
        self.inputs, self.parameters = {}, parameter_values(experiment)
        self.notebook = executed_notebook() if by_hand else None
        if anew:
            self.alarms, self.failures = [], []

    def forget(self, *parts: str | None) -> None:
        """Alarms and failures of these parts of the work do not hold any more."""
        self.alarms = [entry for entry in self.alarms if entry.get("part") not in parts]
        self.failures = [entry for entry in self.failures if entry.get("part") not in parts]

    def end(self, state: str, error: str | None = None, duration_s: float | None = None) -> None:
        """The stage has come to `state`; success with a failed part is `failed`, with an alarm `alarm`."""
        if state == "ok" and self.failures:
            state, error = "failed", "; ".join(entry["text"] for entry in self.failures)
        self.state = "alarm" if state == "ok" and self.alarms else state
        self.error, self.duration_s = error, duration_s


@with_config(revalidate_instances="always")
@dataclass
class RunRecord:
    """The content of run.json."""

    experiment: str = ""
    run: str = ""
    created: str | None = None
    updated: str | None = None
    seed: int | None = None
    source: dict[str, str | bool | None] = field(default_factory=dict)
    parameter_file: str | None = None
    stages: dict[str, Stage] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One word for the whole run: running, interrupted, failed, alarm or ok."""
        states = {stage.state for stage in self.stages.values()}
        if states & {"running", "waiting"}:
            return "interrupted" if "interrupted" in states else "running"
        order = {"interrupted": "interrupted", "failed": "failed", "skipped": "failed", "alarm": "alarm"}
        return next((word for state, word in order.items() if state in states), "ok")

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """run.json of a folder, empty when there is none. A stage that nobody is running any more is interrupted.

        Raises RunFolderError when the file is damaged.
        """
        record = cls._from_file(folder / "run.json")
        for stage in record.stages.values():
            if stage.state in ("running", "waiting") and is_free(folder, stage.name):
                stage.error = stage.error or ("its process is gone" if stage.state == "running" else "not started")
                stage.state = "interrupted"
        return record

    @classmethod
    def _from_file(cls, path: Path) -> RunRecord:
        try:
            values = strict_json(path.read_text(encoding="utf-8"))
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {values['schema_version']}, this version reads {SCHEMA_VERSION}")
            values["stages"] = {name: Stage(name, **entry) for name, entry in values["stages"].items()}
            record = cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})
            return _RECORD.validate_python(record, strict=True)
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{path} cannot be read ({one_line(error)}); use --overwrite to start again") from None

    def to_row(self) -> dict[str, Any]:
        """The record as run.json holds it."""
        row = asdict(self)
        for stage in row["stages"].values():
            del stage["name"]
        row["stages"] = dict(sorted(row["stages"].items()))
        return {"schema_version": SCHEMA_VERSION, "state": self.state, **row}


_RECORD = TypeAdapter(RunRecord)


@contextlib.contextmanager
def changing(folder: Path, experiment: Experiment | None = None) -> Iterator[RunRecord]:
    """The record of a run, to be changed in the block and written at its end; other stages' writers wait meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".run.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = RunRecord.read(folder)
        if experiment is not None and record.created is None:
            record.created, record.source = now(), source_state()
            record.experiment, record.run, record.seed = experiment.experiment, experiment.run, experiment.seed
        yield record
        record.updated = now()
        write_atomic(folder / "run.json", to_json(record.to_row(), indent=1) + "\n")


@contextlib.contextmanager
def changing_stage(folder: Path, name: str, experiment: Experiment | None = None) -> Iterator[Stage]:
    """One stage of a run's record, to be changed in the block."""
    with changing(folder, experiment) as record:
        yield record.stages.setdefault(name, Stage(name))


def parameter_values(experiment: Experiment) -> dict[str, Any]:
    """The resolved parameters as plain JSON values; the built-in example stays the word `demo`, wherever it lies."""
    return plain_json(experiment.model_dump())


def changed_parameters(
    stage: Stage, experiment: Experiment, names: Collection[str] | None = None, *, without: frozenset[str] = FREE
) -> list[str]:
    """Parameters, all or those in `names`, that differ from what the stage was made with, as `name: old -> new`."""
    values = parameter_values(experiment)
    return [
        f"{key}: {stage.parameters[key]!r} -> {values[key]!r}"
        for key in (values if names is None else names)
        if key in stage.parameters and key not in without and stage.parameters[key] != values[key]
    ]


def admit(stage: Stage | None, experiment: Experiment, mode: str, names: Collection[str] | None = None) -> None:
    """RunFolderError when a stage that holds results must not go on with these parameters.

    Those in `names` count, by default those that its notebook uses, or all where it is none of ours. `mode` is refuse,
    resume or overwrite. Rows that belong to other inputs are told apart by their identity.
    """
    if stage is None or not (stage.tables or stage.state in DONE) or mode == "overwrite":
        return
    where = f"{experiment.run_folder} already holds stage {stage.name}"
    if mode == "refuse":
        raise RunFolderError(f"{where}; set if_exists to resume or overwrite, or choose another `run`")
    names = names or parameters_of(stage.name) or None
    changed = changed_parameters(stage, experiment, names, without=FREE | GROWING)
    if changed:
        raise RunFolderError(
            f"{where} made with other parameters ({'; '.join(changed[:4])}); choose another `run`, or start the "
            "stage again with if_exists: overwrite (--overwrite)"
        )


# --- locks ------------------------------------------------------------------------------------------------------------


# Held by this process: a notebook cell that is run again takes over its own lock instead of failing on it.
_held: dict[Path, IO[str]] = {}


class StageLock:
    """The right to write a stage: one process at a time has it, and it goes with that process, however it ends."""

    def __init__(self, folder: Path, stage: str):
        self.path = lock_path(folder, stage)
        self._file: IO[str] | None = None
        self.is_parents = os.environ.get(HELD_BY_PARENT) == str(self.path)
        if self.is_parents:
            return
        if self.path in _held:
            _held.pop(self.path).close()
        file = open(self.path, "a")  # noqa: SIM115 - held until close()
        if not (_try(file) or _try(file, after_s=0.1)):  # a reader asks for it for some microseconds
            file.close()
            raise RunFolderError(
                f"{folder}: stage {stage} is in use by another process; wait for it, or choose another `run`"
            )
        self._file = _held[self.path] = file

    def for_child(self) -> dict[str, Any]:
        """Arguments of Popen with which a child works under this lock; the child also keeps it if we die first."""
        assert self._file is not None
        return {"pass_fds": (self._file.fileno(),), "env": {HELD_BY_PARENT: str(self.path)}}

    def close(self) -> None:
        """Give the right back."""
        if self._file is not None:
            _held.pop(self.path, None)
            self._file.close()
            self._file = None


def lock_path(folder: Path, stage: str) -> Path:
    """The file of a stage's lock; it stays when the lock is given back."""
    return (folder / f".{stage}.lock").resolve()


def is_free(folder: Path, stage: str) -> bool:
    """Whether no process is writing the stage."""
    path = lock_path(folder, stage)
    if not path.exists():
        return True
    with open(path) as file:
        return _try(file)


def _try(file: IO[str], after_s: float = 0) -> bool:
    time.sleep(after_s)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- facts ------------------------------------------------------------------------------------------------------------


def source_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this package runs from; None where it is no checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def executed_notebook() -> str | None:
    """The file of the notebook that this kernel executes, as far as JupyterLab, VS Code or papermill tell."""
    shell = notebook_shell()
    told = shell.user_ns if shell else {}
    path = os.environ.get("JPY_SESSION_NAME") or told.get("__vsc_ipynb_file__") or told.get("PAPERMILL_OUTPUT_PATH")
    if shell and not path:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
            names = [word for word in words if word.endswith(".ipynb")]  # papermill in.ipynb out.ipynb
            path = names[1] if len(names) > 1 and any("papermill" in word for word in words) else None
    return os.path.abspath(path) if path else None


def now() -> str:
    """The local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
