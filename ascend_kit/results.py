"""A run's folder: its record, append-only rows and figures, written so that a kill loses at most one row.

Layout: outputs/<experiment>/<run>/ with run.json, <name>.jsonl tables, <name>.json, figures/.
Nothing here imports torch; versions and device facts are handed in by the caller.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.files import append_lines, to_json, write_atomic
from ascend_kit.identity import Identity, Use
from ascend_kit.params import Experiment
from ascend_kit.params.cells import parameters_of
from ascend_kit.stages import RunFolderError, RunRecord, Stage, StageLock, admit, changing_stage

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["RunFolder", "RunFolderError", "list_runs", "run_parameters"]


class RunFolder:
    """One run's files. Open it with `RunFolder.open`; a stage writes under its own table names."""

    def __init__(self, path: str | Path, stage: str | None = None):
        self.path = Path(path)
        self.stage = stage
        self._lock: StageLock | None = None
        self._opened_s = time.monotonic()
        self._recorded_ids: set[str] = set()

    @classmethod
    def open(cls, experiment: Experiment, stage: str, *, facts: dict[str, Any] | None = None) -> RunFolder:
        """The folder of `experiment`, created or checked against its if_exists rule, locked for `stage`.

        `facts` (device, versions, peaks) go into the record. Raises RunFolderError when another process holds the
        stage, or when earlier rows were made with other parameters and resuming would mix them.
        """
        folder = cls(experiment.run_folder, stage)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._lock = StageLock(folder.path, stage)
        try:
            folder._start(experiment, facts or {})
        except BaseException:
            folder._lock.close()
            raise
        return folder

    # --- tables -----------------------------------------------------------------------------------------------

    def append(self, name: str, row: dict[str, Any], identity: Identity | None = None) -> None:
        """Add one line to <name>.jsonl and push it to the disk. `status` defaults to ok, `error` to None.

        `identity` is what produced the row: the row keeps its id, identities.jsonl its parts.
        """
        self.append_all(name, [row], identity)

    def append_all(self, name: str, rows: Iterable[dict[str, Any]], identity: Identity | None = None) -> None:
        """Add a line for each row and push them to the disk together: one wait instead of many."""
        mark = {} if identity is None else {"identity": self._recorded(identity)}
        lines = "".join(to_json({"status": "ok", "error": None, **row, **mark}) + "\n" for row in rows)
        append_lines(self.table_path(name), lines.encode())

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """The readable rows of <name>.jsonl, oldest first; a torn line is skipped."""
        path = self.table_path(name)
        if not path.exists():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(row, dict):
                    yield row

    def rows_of(self, name: str, identity: Identity, use: Use = "resume") -> Iterator[dict[str, Any]]:
        """The rows of <name>.jsonl whose identity agrees with `identity` for this use; others take part in nothing."""
        known = self.identities()
        agrees = {key: identity.agrees(other, use) for key, other in known.items()}
        return (row for row in self.rows(name) if agrees.get(row.get("identity", ""), False))

    def identities(self) -> dict[str, Identity]:
        """Id -> identity of everything that wrote rows into this folder."""
        return {row["id"]: Identity.from_row(row["parts"]) for row in self.rows("identities") if "parts" in row}

    def _recorded(self, identity: Identity) -> str:
        if identity.id not in self._recorded_ids and identity.id not in self.identities():
            self._recorded_ids.add(identity.id)
            self.append("identities", {"id": identity.id, "parts": identity.to_row()})
        return identity.id

    def load(self, name: str) -> pandas.DataFrame:
        """The table <name> as a DataFrame (empty when nothing was written)."""
        import pandas

        return pandas.DataFrame(list(self.rows(name)))

    def done_keys(self, name: str, keys: Iterable[str]) -> set[tuple]:
        """Values of `keys` in every row whose status is ok: what a resumed stage need not repeat."""
        keys = list(keys)
        return {tuple(_hashable(row.get(key)) for key in keys) for row in self.rows(name) if row.get("status") == "ok"}

    def clear(self, *names: str) -> None:
        """Remove tables and JSON files of these names: a stage that starts again."""
        for name in names:
            for path in (self.table_path(name), self.path / f"{name}.json"):
                path.unlink(missing_ok=True)

    # --- single files -------------------------------------------------------------------------------------------

    def table_path(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def write_json(self, name: str, value: Any) -> Path:
        """Write <name>.json in one step; returns its path."""
        path = self.path / f"{name}.json"
        write_atomic(path, to_json(value, indent=1) + "\n")
        return path

    def read_json(self, name: str) -> Any:
        """The content of <name>.json, or None when the file is not there."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def save_figure(self, name: str, figure: Figure) -> Path:
        """Save figures/<name>.png at 150 dots per inch; returns its path."""
        path = self.path / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{os.getpid()}.png")
        figure.savefig(temporary, dpi=150, bbox_inches="tight")
        os.replace(temporary, path)
        return path

    # --- the stage ----------------------------------------------------------------------------------------------

    def begin(self, experiment: Experiment, *tables: str, identity: Identity | None = None) -> None:
        """Note what the stage writes and what does its work, before the first row; a closed stage is opened again."""
        assert self.stage is not None, "open the folder for a stage with RunFolder.open"
        if self._lock is None:
            self._lock, self._opened_s = StageLock(self.path, self.stage), time.monotonic()
        with changing_stage(self.path, self.stage, experiment) as stage:
            stage.state = "running"
            stage.tables = list(dict.fromkeys([*stage.tables, *tables]))
            stage.identity = {} if identity is None else identity.to_row()

    def alarm(self, key: str, text: str, **values: Any) -> None:
        """The stage's result must not be trusted, and why: the stage will end as `alarm`. A key replaces itself."""
        with self._changing() as stage:
            others = [alarm for alarm in stage.alarms if alarm["key"] != key]
            stage.alarms = [*others, {"key": key, "text": text, "values": values}]

    def close(self, error: BaseException | None = None) -> None:
        """Mark the stage as done, or as failed with `error`, and give its lock back."""
        if self._lock is None:
            return
        word = "ok" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = None if error is None else f"{type(error).__name__}: {error}"
        try:
            with self._changing() as stage:
                stage.end(word, text, time.monotonic() - self._opened_s)
        finally:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.close(error)

    def _changing(self) -> contextlib.AbstractContextManager[Stage]:
        assert self.stage is not None, "open the folder for a stage with RunFolder.open"
        return changing_stage(self.path, self.stage)

    def _start(self, experiment: Experiment, facts: dict[str, Any]) -> None:
        assert self._lock is not None and self.stage is not None
        by_hand = not self._lock.is_parents  # else the command line has admitted and started the stage
        with changing_stage(self.path, self.stage, experiment) as stage:
            if by_hand:
                admit(stage, experiment, experiment.if_exists, parameters_of(self.stage) or None)
            if experiment.if_exists == "overwrite":
                self.clear(*stage.tables)
                stage.tables = []
            if by_hand:
                stage.start(experiment)
                stage.by_hand, stage.notebook = True, executed_notebook()
            stage.facts = json.loads(to_json(facts))


def executed_notebook() -> str | None:
    """The file of the notebook that this kernel executes, as far as JupyterLab, VS Code or papermill tell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    told = shell.user_ns if shell else {}
    path = os.environ.get("JPY_SESSION_NAME") or told.get("__vsc_ipynb_file__") or told.get("PAPERMILL_OUTPUT_PATH")
    if shell and not path:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
            names = [word for word in words if word.endswith(".ipynb")]  # papermill in.ipynb out.ipynb
            path = names[1] if len(names) > 1 and any("papermill" in word for word in words) else None
    return os.path.abspath(path) if path else None


def newest_rows(rows: Iterable[dict[str, Any]], keys: Sequence[str]) -> dict[tuple, dict[str, Any]]:
    """Values of `keys` -> the newest row that has them; a row whose status is ok is never replaced by a failed one."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(_hashable(row.get(name)) for name in keys)
        if row.get("status") == "ok" or found.get(key, row).get("status") != "ok":
            found[key] = row
    return found


def list_runs(output_root: str | Path, experiment: str) -> list[RunFolder]:
    """Every run folder of an experiment that has a record, by name."""
    folder = Path(output_root) / experiment
    return [RunFolder(path.parent) for path in sorted(folder.glob("*/run.json"))]


def run_parameters(folder: RunFolder, stage: str | None = None) -> dict[str, Any]:
    """The resolved parameters of a stage; without a name, of the one that measured or evaluated, else of the first."""
    stages = RunRecord.read(folder.path).stages
    if stage is not None:
        return stages[stage].parameters if stage in stages else {}
    measured = [entry for entry in stages.values() if {"rows", "scores"} & set(entry.tables)]
    return next((entry.parameters for entry in [*measured, *stages.values()] if entry.parameters), {})


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value
