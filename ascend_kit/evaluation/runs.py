"""What run folders hold of an evaluation and of a sweep, read back: which runs there are, and what each lacks.

Reads files only: no engine, no lm-eval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ascend_kit.files import Table
from ascend_kit.identity import Identity
from ascend_kit.measure.rows import LOAD, RATE, asked_rows, load_of, load_text
from ascend_kit.messages import Finding, did_you_mean
from ascend_kit.params import Experiment, build_experiment
from ascend_kit.results import RunFolder, list_runs, run_parameters
from ascend_kit.stages import RunRecord

LAYOUT = ("cards", "tensor_parallel")
ENGINE_BACKEND = "ascend_kit"
# Parameters that name things or places; they tell nothing about how a run was made.
NAMES = frozenset((
    "experiment", "run", "output_root", "output_model", "output_path", "compare_runs", "if_exists", "if_model_exists",
    "params_file", "language",
))  # fmt: skip
Point = tuple[Any, ...]  # a load: the values of LOAD
COLUMNS = ["task", "kind", "metric", "status", "n"]  # of a table without a row


# --- one run's evaluation ---------------------------------------------------------------------------------------------


class EvaluationError(RuntimeError):
    """At least one task failed; the rows say which and why, and the finished ones are kept."""


@dataclass(frozen=True)
class EvaluationResult:
    """What a run's evaluation holds, read back from its folder.

    `tasks` and `groups`: one row per task or group and metric, with value, unit, stderr and n (documents).
    `published`: figures of the same model under the same conditions; empty where none is known.
    """

    tasks: Table
    groups: Table
    documents: Table
    cards: Table
    flags: list[Finding]
    published: Table

    @property
    def failed(self) -> dict[str, str]:
        """Failed task -> error."""
        if self.tasks.empty:
            return {}
        rows = self.tasks[self.tasks["status"] != "ok"]
        return dict(zip(rows["task"], rows["error"], strict=True))

    @property
    def ok(self) -> bool:
        return not self.tasks.empty and not self.failed

    @property
    def error(self) -> EvaluationError | None:
        """What ends the stage as failed: an error naming the failed tasks, None where every task was scored."""
        if not self.failed:
            return None
        text = "; ".join(f"{task}: {error}" for task, error in list(self.failed.items())[:3])
        return EvaluationError(f"{len(self.failed)} of {self.tasks['task'].nunique()} tasks failed ({text})")

    def raise_if_failed(self) -> None:
        """EvaluationError naming the failed tasks: what ends a notebook or a command with a failure."""
        if self.error is not None:
            raise self.error


def load_evaluation(folder: RunFolder) -> EvaluationResult:
    """The evaluation of a run folder, from its files alone: no engine, no lm-eval. Empty where there is none."""
    import pandas

    summary = folder.read_json("evaluation") or {}
    return EvaluationResult(
        tasks=load_scores(folder),
        groups=_table(summary.get("groups", [])),
        documents=load_documents(folder),
        cards=pandas.DataFrame(list(_asked_rows(folder, "evaluation_cards"))),
        flags=[Finding.from_row(row) for row in summary.get("flags", [])],
        published=pandas.DataFrame(summary.get("published", [])),
    )


def load_scores(folder: RunFolder) -> Table:
    """The last outcome of every task that was asked for: a row per metric, or one row of a failure."""
    latest: dict[str, dict[str | None, dict[str, Any]]] = {}
    for row in _asked_rows(folder, "scores"):
        rows = latest.setdefault(row["task"], {})
        if row["status"] != "ok" or None in rows or row["metric"] in rows:  # the task was scored again
            rows.clear()
        rows[row["metric"]] = row
    return _table([row for rows in latest.values() for row in rows.values()])


def _table(rows: list[dict[str, Any]]) -> Table:
    import pandas

    return pandas.DataFrame(rows, columns=None if rows else COLUMNS)


def load_documents(folder: RunFolder) -> Table:
    """The documents behind `load_scores`, each once: the last answer to each of a task's scored documents."""
    import pandas

    return pandas.DataFrame(document_rows(folder))


def document_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows of `load_documents`, without pandas; while an evaluation runs, those answered so far."""
    summary = folder.read_json("evaluation") or {}
    drawn = {task: set(numbers) for task, numbers in summary.get("drawn", {}).items()}
    scores = load_scores(folder)
    failed = set(scores[scores["status"] != "ok"]["task"]) if len(scores) else set()
    rows = list(_asked_rows(folder, "documents"))
    order = {task: place for place, task in enumerate(dict.fromkeys(row["task"] for row in rows))}
    rows.sort(key=lambda row: (order[row["task"]], row["doc_id"]))  # they stand there as they were answered
    latest = {(row["task"], row["doc_id"]): row for row in rows}
    return [
        row
        for (task, document), row in latest.items()
        if task not in failed and (task not in drawn or document in drawn[task])
    ]


def _asked_rows(folder: RunFolder, name: str) -> Iterator[dict[str, Any]]:
    """The rows that belong to what the run's evaluation was last asked for; all others take part in nothing."""
    asked = (folder.read_json("evaluation") or {}).get("identities", {})
    return (row for row in folder.rows(name) if row.get("identity", "") == asked.get(row["task"]))


# --- runs beside each other -------------------------------------------------------------------------------------------


class CompareError(ValueError):
    """A run that is named does not exist, or there is none; the text says where it was looked for."""


class Run:
    """One run folder, each of its files read once."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.name = f"{folder.path.parent.name}/{folder.path.name}"  # unique within an output folder

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """What its sweep or evaluation was made with."""
        return run_parameters(self.folder)

    @cached_property
    def tasks(self) -> dict[str, list[dict[str, Any]]]:
        """Task -> its answered documents; `acc` of a written answer is whether it was right."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in document_rows(self.folder):
            if row.get("right") is not None:
                row.setdefault("acc", row["right"])
            found.setdefault(row["task"], []).append(row)
        return found

    @cached_property
    def identities(self) -> dict[str, Identity]:
        """Task -> what its documents belong to."""
        known = self.folder.identities()
        return {task: known[rows[0]["identity"]] for task, rows in self.tasks.items()}

    def answers(self, value: str) -> dict[str, list[dict[str, Any]]]:
        """Task -> its documents that have `value` (a metric, or logprob of running text), where there are any."""
        having = {task: [row for row in rows if row.get(value) is not None] for task, rows in self.tasks.items()}
        return {task: rows for task, rows in having.items() if rows}

    def has(self, value: str) -> bool:
        """Whether any document has `value`."""
        return bool(self.answers(value))

    @cached_property
    def sweep(self) -> list[dict[str, Any]]:
        """Measured points of its own layout of cards or, where the sweep left that out, of its fastest layout."""
        rows = [
            row
            for row in asked_rows(self.folder)
            if row.get("status") == "ok" and row.get("backend") == ENGINE_BACKEND and row.get(RATE) is not None
        ]
        if not rows or any(name not in row for row in rows for name in LAYOUT):
            return rows
        own = [self.parameters.get(name) for name in LAYOUT]
        fastest = max(rows, key=lambda row: row[RATE])
        layouts = (own, [fastest[name] for name in LAYOUT])
        chosen = next(layout for layout in layouts if any([row[name] for name in LAYOUT] == layout for row in rows))
        return [row for row in rows if [row[name] for name in LAYOUT] == chosen]

    @cached_property
    def points(self) -> set[Point]:
        return {load_of(row) for row in self.sweep}

    @cached_property
    def alarms(self) -> list[str]:
        """Why its results must not be trusted, as its stages recorded it."""
        return [alarm["text"] for stage in RunRecord.read(self.folder.path).stages.values() for alarm in stage.alarms]

    def lacks(self, point: Point | None = None) -> list[str]:
        """What a comparison at `point` would need and does not find here."""
        found = [] if self.has("acc") else ["no evaluation: run 05_evaluate"]
        scores = load_scores(self.folder)
        failed = sorted(set(scores[scores["status"] != "ok"]["task"]))
        if failed:
            found.append(f"failed tasks: {', '.join(failed)}")
        if not self.sweep:
            found.append("no sweep: run 04_throughput")
        elif point is not None and point not in self.points:
            found.append(
                f"not measured at {load_text(point)} (only at {'; '.join(sorted(map(load_text, self.points)))})"
            )
        return found + [f"alarm: {text}" for text in self.alarms]

    def plainness(self) -> tuple:
        """What sorts the runs: complete and trusted ones first, then unquantised, from the source, few switches on."""
        values = self.parameters
        num_on = sum(bool(values.get(name)) for name in ("graph_mode", "operator_fusion", "memory_optimize"))
        incomplete = not (self.has("acc") and self.sweep)
        quantised, converted = values.get("quantize") != "none", values.get("use_model") != "source"
        return bool(self.alarms), incomplete, quantised, converted, num_on


def load_runs(experiment: Experiment) -> list[Run]:
    """The runs named in `compare_runs` (a run, experiment/run or a path), by default all that hold results.

    Raises CompareError for a name without a folder, with the closest known one.
    """
    if experiment.compare_runs:
        return [find_run(name, experiment) for name in dict.fromkeys(experiment.compare_runs)]
    known = _with_results(experiment)
    if not known:
        root = Path(experiment.output_root) / experiment.experiment
        raise CompareError(f"no run below {root}: run 04_throughput or 05_evaluate first")
    return [Run(folder) for folder in known]


def _with_results(experiment: Experiment) -> list[RunFolder]:
    every = list_runs(experiment.output_root, experiment.experiment)
    return [folder for folder in every if any(folder.table_path(name).exists() for name in ("scores", "rows"))]


def find_run(name: str, experiment: Experiment, parameter: str = "compare_runs") -> Run:
    """The run that `parameter` names: a run of this experiment, experiment/run or a path; CompareError where there is
    none.
    """
    root, path = Path(experiment.output_root), Path(name).expanduser()
    for wanted in (root / experiment.experiment / path, root / path, path):
        wanted = wanted.absolute()
        for folder in list_runs(wanted.parent.parent, wanted.parent.name):
            if folder.path == wanted:
                return Run(folder)
    known = [folder.path.name for folder in _with_results(experiment)]
    here = ", ".join(known) or "none"
    raise CompareError(f"{parameter}: no run {name!r} (runs here: {here}){did_you_mean(name, known)}")


def pick_baseline(runs: Sequence[Run]) -> Run:
    """The plainest of the runs that have both accuracy and throughput and no alarm; the first of equals."""
    return min(runs, key=Run.plainness)


def pick_point(runs: Sequence[Run], baseline: Run) -> Point | None:
    """The point of the baseline's sweep that most runs have measured, the heaviest of equals."""
    counts = Counter(point for run in runs for point in run.points)
    points = baseline.points or set(counts)

    def weight(point: Point) -> tuple:
        load = dict(zip(LOAD, point, strict=True))
        lengths = load["prompt_len"] + load["output_len"]
        return counts[point], load["concurrency"], lengths, load["rate"] or 0.0, load_text(point)

    return max(points, key=weight, default=None)


def differences(runs: Sequence[Run]) -> Table:
    """Every parameter in which the runs differ: a line per parameter, a column per run."""
    import pandas

    # A run of an older version knows fewer parameters; it was made with what are the defaults now.
    defaults = build_experiment({}).model_dump()
    table = pandas.DataFrame({run.name: {**defaults, **run.parameters} for run in runs}, dtype=object)
    is_equal = table.map(repr).nunique(axis=1) <= 1
    return table[~is_equal & ~table.index.isin(list(NAMES))]
