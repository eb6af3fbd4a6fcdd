"""A run's folder: its record, append-only rows and figures, written so that a kill loses at most one row.

Layout: outputs/<experiment>/<run>/ with run.json, <name>.jsonl tables (<name>.jsonl.gz once they are packed),
<name>.json, figures/.
Nothing here imports torch; versions and device facts are handed in by the caller.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.files import append_lines, one_line, plain_json, strict_json, to_json, write_atomic
from ascend_kit.identity import Identity, Use
from ascend_kit.params import Experiment
from ascend_kit.stages import DONE, RunFolderError, RunRecord, Stage, StageLock, admit, changing_stage

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["RunFolder", "RunFolderError", "list_runs", "run_parameters", "run_records"]


class RunFolder:
    """One run's files. Open it with `RunFolder.open`; a stage writes under its own table names."""

    def __init__(self, path: str | Path, stage: str = ""):
        self.path = Path(path)
        self.stage = stage
        self._lock: StageLock | None = None
        self._opened_s = time.monotonic()
        self._is_idle = False  # opened over a stage that is done: it stays so until its work begins
        self._is_made_anew = False  # its work writes every file again, so that other parameters mix with nothing
        self._part: str | None = None  # of the work, whose alarms and failures go when it is done anew
        self._recorded_ids: set[str] = set()

    @classmethod
    def open(
        cls, experiment: Experiment, stage: str, *, facts: dict[str, Any] | None = None, anew: bool = False
    ) -> RunFolder:
        """The folder of `experiment`, created or checked against its if_exists rule, locked for `stage`.

        `facts` (device, versions, peaks) go into the record. Raises RunFolderError when another process holds the
        stage, or when earlier rows were made with other parameters and resuming would mix them, which a stage whose
        work makes everything `anew` cannot. A stage that is done stays done until its work begins again.
        """
        folder = cls(experiment.run_folder, stage)
        folder._is_made_anew = anew and experiment.if_exists == "resume"
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._lock = StageLock(folder.path, stage)
        by_hand = not folder._lock.is_parents  # else the command line has admitted and started the stage
        try:
            with folder._changing(experiment) as entry:
                if by_hand and not folder._is_made_anew:
                    admit(entry, experiment, experiment.if_exists)
                if experiment.if_exists == "overwrite":
                    folder.clear(*entry.tables)
                    entry.tables = []
                folder._is_idle = by_hand and entry.state in DONE and experiment.if_exists != "overwrite"
                if by_hand and not folder._is_idle:
                    entry.start(experiment, by_hand=True)
                entry.facts = plain_json(facts or {})
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
        """The readable rows of <name>.jsonl, oldest first, those that are packed before the others; a torn line is
        skipped. RunFolderError for a packed file that is damaged.
        """
        for line in self._lines(name):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if "\\ud" in line.lower():  # half a character, which no table takes: as `to_json` has it
                row = plain_json(row)
            if isinstance(row, dict):
                yield row

    def _lines(self, name: str) -> Iterator[str]:
        packed, plain = self._packed_path(name), self.table_path(name)
        if packed.exists():
            try:
                with gzip.open(packed, "rt", encoding="utf-8", errors="replace") as file:
                    yield from file
            except (EOFError, OSError, zlib.error) as error:
                raise RunFolderError(f"{packed} is damaged ({one_line(error)}); overwrite its stage") from None
        if plain.exists():
            with open(plain, encoding="utf-8", errors="replace") as file:
                yield from file

    def pack(self, name: str) -> None:
        """Compress <name>.jsonl to <name>.jsonl.gz, for a stage that is done: a tenth of the bytes. Rows that are
        appended later stand in plain lines again. Killed in between, it loses no row but may keep some twice.
        """
        if self.table_path(name).exists():
            text = "".join(to_json(row) + "\n" for row in self.rows(name))
            write_atomic(self._packed_path(name), gzip.compress(text.encode()))
            self.table_path(name).unlink()

    def rows_of(self, name: str, identity: Identity, use: Use = "resume") -> Iterator[dict[str, Any]]:
        """The rows of <name>.jsonl whose identity agrees with `identity` for this use; others take part in nothing."""
        known = self.identities()
        agrees = {key: identity.agrees(other, use) for key, other in known.items()}
        return (row for row in self.rows(name) if agrees.get(_hashable(row.get("identity", "")), False))

    def identities(self) -> dict[str, Identity]:
        """Id -> identity of everything that wrote rows into this folder."""
        return {
            row["id"]: Identity.from_row(row["parts"])
            for row in self.rows("identities")
            if isinstance(row.get("id"), str) and isinstance(row.get("parts"), dict)  # as it was written, not damaged
        }

    def _recorded(self, identity: Identity) -> str:
        if identity.id not in self._recorded_ids and identity.id not in self.identities():
            self._recorded_ids.add(identity.id)
            self.append("identities", {"id": identity.id, "parts": identity.to_row()})
        return identity.id

    def load(self, name: str) -> pandas.DataFrame:
        """The table <name> as a DataFrame (empty when nothing was written)."""
        import pandas

        return pandas.DataFrame(list(self.rows(name)))

    def clear(self, *names: str) -> None:
        """Remove tables and JSON files of these names: a stage that starts again."""
        for name in names:
            for path in (self.table_path(name), self._packed_path(name), self.path / f"{name}.json"):
                path.unlink(missing_ok=True)

    # --- single files -------------------------------------------------------------------------------------------

    def table_path(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def written_path(self, name: str) -> Path:
        """Where the rows of a table are: packed, or in plain lines."""
        return self._packed_path(name) if self._packed_path(name).exists() else self.table_path(name)

    def _packed_path(self, name: str) -> Path:
        return self.path / f"{name}.jsonl.gz"

    def write_json(self, name: str, value: Any) -> Path:
        """Write <name>.json in one step; returns its path."""
        path = self.path / f"{name}.json"
        write_atomic(path, to_json(value, indent=1) + "\n")
        return path

    def read_json(self, name: str) -> Any:
        """The content of <name>.json, or None when the file is not there; RunFolderError when it is damaged."""
        path = self.path / f"{name}.json"
        try:
            return strict_json(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged ({one_line(error)}); run its stage again") from None

    def save_figure(self, name: str, figure: Figure) -> Path:
        """Save figures/<name>.png at 150 dots per inch; returns its path."""
        path, image = self.path / "figures" / f"{name}.png", io.BytesIO()
        figure.savefig(image, format="png", dpi=150, bbox_inches="tight")
        write_atomic(path, image.getvalue())
        return path

    # --- the stage ----------------------------------------------------------------------------------------------

    def begin(
        self, experiment: Experiment, *tables: str, identity: Identity | None = None, part: str | None = None
    ) -> None:
        """Note what the stage writes and what does its work, before the first row; a closed stage is opened again.

        `part` (by default the first table) names this piece of the stage's work: alarms and failures that an earlier
        pass of it left are gone, those of other parts are not. Raises RunFolderError as `open` does.
        """
        if (self._lock is None or self._is_idle) and not self._is_made_anew:
            admit(RunRecord.read(self.path).stages.get(self.stage), experiment, "resume")
        if self._lock is None:
            self._lock, self._opened_s = StageLock(self.path, self.stage), time.monotonic()
        self._part = part or next(iter(tables), None)
        with self._changing(experiment) as stage:
            if stage.state != "running":
                stage.start(experiment, anew=False, by_hand=not self._lock.is_parents)
            stage.forget(self._part, *([None] if self._is_idle else []))
            stage.tables = list(dict.fromkeys([*stage.tables, *tables]))
            stage.identity = {} if identity is None else identity.to_row()
        self._is_idle = False

    @contextlib.contextmanager
    def working(
        self, experiment: Experiment, *tables: str, identity: Identity | None = None, part: str | None = None
    ) -> Iterator[None]:
        """`begin` for the work in the block. An error ends the stage; so does success where the stage was closed
        before, as when a single cell of a finished notebook is run again.
        """
        was_closed = self._lock is None
        self.begin(experiment, *tables, identity=identity, part=part)
        try:
            yield
        except BaseException as error:
            self.close(error)
            raise
        if was_closed:
            self.close()

    def alarm(self, key: str, text: str, **values: Any) -> None:
        """The stage's result must not be trusted, and why: the stage will end as `alarm`. A key replaces itself."""
        self._is_idle = False
        with self._changing() as stage:
            others = [alarm for alarm in stage.alarms if alarm.get("key") != key]
            stage.alarms = [*others, {"key": key, "text": text, "values": values, "part": self._part}]

    def fail(self, text: str) -> None:
        """Some of the work that has begun could not be done: the rest goes on, and the stage will end as `failed`."""
        with self._changing() as stage:
            stage.failures = [*stage.failures, {"text": text, "part": self._part}]

    def close(self, error: BaseException | None = None) -> None:
        """Mark the stage as done, or as failed with `error`, and give its lock back."""
        if self._lock is None:
            return
        word = "ok" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = None if error is None else f"{type(error).__name__}: {error}"
        try:
            if error is not None or not self._is_idle:
                with self._changing() as stage:
                    stage.end(word, text, time.monotonic() - self._opened_s)
        finally:
            self._part, self._is_idle = None, False
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.close(error)

    def _changing(self, experiment: Experiment | None = None) -> contextlib.AbstractContextManager[Stage]:
        assert self.stage, "open the folder for a stage with RunFolder.open"
        return changing_stage(self.path, self.stage, experiment)


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


def run_records(root: str | Path) -> list[tuple[RunFolder, RunRecord]]:
    """Every run below `root` whose record can be read, the one that changed last first."""
    found = []
    for path in Path(root).glob("*/*/run.json"):
        with contextlib.suppress(RunFolderError):
            found.append((RunFolder(path.parent), RunRecord.read(path.parent)))
    return sorted(found, key=lambda entry: (entry[1].updated or "", str(entry[0].path)), reverse=True)


def run_parameters(folder: RunFolder, stage: str | None = None) -> dict[str, Any]:
    """The resolved parameters of a stage; without a name, of the one that measured or evaluated, else of the first."""
    stages = RunRecord.read(folder.path).stages
    if stage is not None:
        return stages[stage].parameters if stage in stages else {}
    measured = [entry for entry in stages.values() if {"rows", "scores"} & set(entry.tables)]
    return next((entry.parameters for entry in [*measured, *stages.values()] if entry.parameters), {})


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return to_json(value)
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value
