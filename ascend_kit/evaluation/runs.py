"""Which runs there are, which of them is the baseline, and in which parameters they differ.

Reads files only: no engine, no lm-eval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ascend_kit.evaluation.compare import Point, Run
from ascend_kit.files import Table
from ascend_kit.measure.rows import LOAD, load_text
from ascend_kit.messages import did_you_mean
from ascend_kit.params import Experiment, build_experiment
from ascend_kit.results import RunFolder, list_runs

# Parameters that name things or places; they tell nothing about how a run was made.
NAMES = frozenset((
    "experiment", "run", "output_root", "output_model", "output_path", "compare_runs", "if_exists", "if_model_exists",
    "params_file", "language",
))  # fmt: skip


class CompareError(ValueError):
    """A run that is named does not exist, or there is none; the text says where it was looked for."""


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
    """The plainest of the runs that have both accuracy and throughput and no alarm; the first of equals.

    Plain is unquantised, from the source, few switches on.
    """

    def plainness(run: Run) -> tuple:
        values, incomplete = run.parameters, not (run.has("acc") and run.sweep)
        num_on = sum(bool(values.get(name)) for name in ("graph_mode", "operator_fusion", "memory_optimize"))
        return (
            bool(run.alarms),
            incomplete,
            values.get("quantize") != "none",
            values.get("use_model") != "source",
            num_on,
        )

    return min(runs, key=plainness)


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
