"""A run's folder: parameters, manifest, append-only rows and figures, written so that a kill loses at most one row.

Layout: outputs/<experiment>/<run>/ with params.yaml, manifest.json, <name>.jsonl tables, <name>.json, figures/.
Nothing here imports torch; versions and device facts are handed in by the caller.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.files import to_json, write_atomic
from ascend_kit.identity import Identity, Use
from ascend_kit.params import Experiment, read_yaml

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
# Parameters that may differ between two stages of one run without making their rows incomparable.
FREE_PARAMETERS = frozenset({"if_exists", "compare_runs", "output_path", "if_model_exists"})


class RunFolderError(RuntimeError):
    """The run folder exists, belongs to other parameters or is being written by someone else."""


# Locks held by this process: a notebook cell that is run again takes over its own lock instead of failing on it.
_held: dict[Path, Any] = {}


class RunFolder:
    """One run's files. Open it with `RunFolder.open`; a stage writes under its own table names."""

    def __init__(self, path: str | Path, stage: str | None = None):
        self.path = Path(path)
        self.stage = stage
        self._lock: Any = None
        self._recorded_ids: set[str] = set()

    @classmethod
    def open(cls, experiment: Experiment, stage: str, *, facts: dict[str, Any] | None = None) -> RunFolder:
        """The folder of `experiment`, created or checked against its if_exists rule, locked for `stage`.

        `facts` (device, versions, peaks) go into the manifest. Raises RunFolderError when another process holds
        the stage, or when earlier rows were made with other parameters and resuming would mix them.
        """
        folder = cls(experiment.run_folder, stage)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder._take_lock()
        try:
            folder._admit(experiment)
            # The first stage states the run's parameters; a later notebook may know fewer of them.
            if experiment.if_exists == "overwrite" or not (folder.path / "params.yaml").exists():
                write_atomic(folder.path / "params.yaml", experiment.to_yaml())
            folder._update_manifest(experiment, facts or {})
        except BaseException:
            folder.close()
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
        path = self.table_path(name)
        with open(path, "ab") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write(b"\n")  # a killed writer left half a line; keep it apart from this one
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

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

    # --- opening and closing ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the stage's lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> None:
        path = (self.path / f".{self.stage}.lock").resolve()
        if path in _held:
            _held.pop(path).close()
        lock = open(path, "a+")  # noqa: SIM115 - held until close()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise RunFolderError(
                f"{self.path}: stage {self.stage} is being written by another process; wait for it, "
                "or give this run another name with `run`"
            ) from None
        self._lock = _held[path] = lock

    def _admit(self, experiment: Experiment) -> None:
        done = self.path / f"{self.stage}.stage.json"
        if not done.exists():
            return
        if experiment.if_exists == "refuse":
            raise RunFolderError(
                f"{self.path} already holds stage {self.stage}; set if_exists to resume or overwrite, "
                "or choose another `run`"
            )
        if experiment.if_exists == "overwrite":
            self.clear(*json.loads(done.read_text()).get("tables", []))
            done.unlink()
            return
        before = json.loads(done.read_text())["parameters"]
        now = json.loads(to_json(experiment.model_dump()))
        changed = [key for key in now if key not in FREE_PARAMETERS and before.get(key) != now[key]]
        if changed:
            text = ", ".join(f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in changed[:4])
            raise RunFolderError(
                f"{self.path} holds stage {self.stage} made with other parameters ({text}); choose "
                "another `run`, or set if_exists: overwrite"
            )

    def begin(self, experiment: Experiment, *tables: str) -> None:
        """Note which tables the stage writes, so that resume and overwrite know what is its own."""
        self.write_json(f"{self.stage}.stage", {"tables": list(tables), "parameters": experiment.model_dump()})

    def _update_manifest(self, experiment: Experiment, facts: dict[str, Any]) -> None:
        with open(self.path / ".manifest.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another stage of the run may be opening at the same time
            self._write_manifest(experiment, facts)

    def _write_manifest(self, experiment: Experiment, facts: dict[str, Any]) -> None:
        manifest = self.read_json("manifest") or {
            "schema_version": SCHEMA_VERSION,
            "created": _now(),
            "experiment": experiment.experiment,
            "run": experiment.run,
            "seed": experiment.seed,
            "source": source_state(),
            "stages": {},
        }
        manifest["stages"][self.stage] = {"opened": _now(), **facts}
        self.write_json("manifest", manifest)


def source_state() -> dict[str, Any]:
    """Commit and dirty flag of the checkout this package runs from; None where it is no checkout."""

    def git(*words: str) -> str | None:
        folder = Path(__file__).resolve().parent
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain")) if commit else None}


def list_runs(output_root: str | Path, experiment: str) -> list[RunFolder]:
    """Every run folder of an experiment that has a manifest, by name."""
    folder = Path(output_root) / experiment
    return [RunFolder(path.parent) for path in sorted(folder.glob("*/manifest.json"))]


def run_parameters(folder: RunFolder) -> dict[str, Any]:
    """The resolved parameters a run was made with."""
    return read_yaml(folder.path / "params.yaml")


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
