"""Several runs beside each other, as tables: what differs between them, and each against the baseline.

The statistics are those of `evaluate`; here a run without an evaluation becomes a row that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ascend_kit.files import Table
from ascend_kit.params import Experiment
from ascend_kit.results import RunFolder, run_parameters

if TYPE_CHECKING:
    from ascend_kit.evaluation.tradeoff import Verdict

# Parameters that name things or places; they tell nothing about how a run was made.
NAMES = frozenset(
    ("experiment", "run", "output_root", "output_model", "output_path", "compare_runs", "if_exists", "if_model_exists")
)


def differences(folders: Sequence[RunFolder]) -> Table:
    """Every parameter in which the runs differ: a line per parameter, a column per run."""
    import pandas

    from ascend_kit.evaluation.compare import run_name

    # A run of an older version knows fewer parameters; it was made with what are the defaults now.
    defaults = Experiment().model_dump()
    columns = {run_name(folder): {**defaults, **run_parameters(folder)} for folder in folders}
    table = pandas.DataFrame(columns, dtype=object)
    is_equal = table.map(repr).nunique(axis=1) <= 1
    return table[~is_equal & ~table.index.isin(NAMES)]


def interval_points(table: Table) -> Table:
    """Rows of `accuracy_throughput` that have both values, as `plots.accuracy_vs_throughput` wants them."""
    table = table.dropna(subset=["accuracy_percent", "output_tokens_per_s"])
    spread = table["accuracy_high_percent"].astype(float) - table["accuracy_low_percent"].astype(float)
    return table.assign(
        accuracy=table["accuracy_percent"].astype(float) / 100,
        accuracy_stderr=spread / (2 * 1.96 * 100),
        tokens_per_s=table["output_tokens_per_s"].astype(float),
        tokens_per_s_low=table.get("output_tokens_per_s_low"),
        tokens_per_s_high=table.get("output_tokens_per_s_high"),
    )


def paired_tables(folders: Sequence[RunFolder], margin_points: float) -> tuple[Table, Table]:
    """Accuracy per set and bits per byte of every run against the baseline, paired on common documents.

    `margin_points`: the loss of accuracy, in points, that still counts as `within margin`.
    """
    import pandas

    from ascend_kit.evaluation.compare import (
        CompareError,
        compare_accuracy,
        compare_perplexity,
        pick_baseline,
        run_name,
    )

    baseline = pick_baseline(folders)
    accuracy, perplexity = [], []
    for folder in folders:
        if folder.path == baseline.path:
            continue
        try:
            accuracy.append(compare_accuracy(baseline, folder, margin=margin_points / 100))
        except CompareError as error:
            names = {"baseline": run_name(baseline), "candidate": run_name(folder)}
            accuracy.append(pandas.DataFrame([{**names, "set": None, "outcome": f"not comparable: {error}"}]))
        perplexity.append(compare_perplexity(baseline, folder))
    joined = pandas.concat(accuracy, ignore_index=True) if accuracy else pandas.DataFrame()
    return joined, pandas.DataFrame([row for row in perplexity if row])


def verdict_or_reason(folders: Sequence[RunFolder], margin_points: float) -> Verdict:
    """The verdict; where nothing can be judged yet, one that names what is missing and recommends no run."""
    import pandas

    from ascend_kit.evaluation.compare import CompareError, pick_baseline, run_name
    from ascend_kit.evaluation.tradeoff import Verdict, verdict

    try:
        return verdict(folders, margin=margin_points / 100)
    except CompareError as error:
        name = run_name(pick_baseline(folders))
        return Verdict("none", name, f"No verdict: {error}.", pandas.DataFrame())
