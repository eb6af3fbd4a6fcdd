"""Runs side by side: which ones, and their accuracy and perplexity on the same documents.

Reads run folders only (`documents`, run.json); no engine and no lm-eval.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend_kit.evaluation.paired import PairedCounts, bootstrap_ratio_difference, holm, paired_counts
from ascend_kit.evaluation.scores import load_documents
from ascend_kit.params import Experiment
from ascend_kit.results import RunFolder, list_runs, run_parameters

if TYPE_CHECKING:
    import pandas

PAIR_ON = ["task", "doc_id", "doc_hash"]
ALL_SETS = "all"
DEFAULT_MARGIN = 0.01  # one point, in the order of MLPerf's 99 % of the reference accuracy
CONFIDENCE = 0.95


class CompareError(ValueError):
    """The runs cannot be compared; the text says what is missing in which run."""


# --- which runs ---------------------------------------------------------------------------------------------


def load_runs(experiment: Experiment) -> list[RunFolder]:
    """The runs named in `compare_runs` (a run, experiment/run or a path), by default all that hold results.

    Raises CompareError for a name without a folder, with the closest known one.
    """
    every = list_runs(experiment.output_root, experiment.experiment)
    known = [run for run in every if any(run.table_path(name).exists() for name in ("scores", "rows"))]
    if not experiment.compare_runs:
        if not known:
            root = Path(experiment.output_root) / experiment.experiment
            raise CompareError(f"no run below {root}: run 04_throughput or 05_evaluate first")
        return known
    return [_find_run(name, experiment, [folder.path.name for folder in known]) for name in experiment.compare_runs]


def _find_run(name: str, experiment: Experiment, known: list[str]) -> RunFolder:
    root = Path(experiment.output_root)
    for path in (root / experiment.experiment / name, root / name, Path(name)):
        if (path / "run.json").is_file():
            return RunFolder(path)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise CompareError(f"compare_runs: no run {name!r} (runs here: {', '.join(known) or 'none'}){hint}")


def pick_baseline(folders: Sequence[RunFolder]) -> RunFolder:
    """The plainest run: not quantised, the source checkpoint, fewest switches on; the first of equals."""

    def tricks(folder: RunFolder) -> tuple:
        values = run_parameters(folder)
        switches = ("graph_mode", "operator_fusion", "memory_optimize")
        num_on = sum(values[switch] for switch in switches)
        return (values["quantize"] != "none", values["use_model"] != "source", num_on)

    return min(folders, key=tricks)


def run_name(folder: RunFolder) -> str:
    """<experiment>/<run> as shown in tables; unique within an output folder."""
    return f"{folder.path.parent.name}/{folder.path.name}"


# --- paired accuracy ----------------------------------------------------------------------------------------


def compare_accuracy(
    baseline: RunFolder, candidate: RunFolder, *, metric: str = "acc", margin: float = DEFAULT_MARGIN
) -> pandas.DataFrame:
    """One row per set and one for all documents, paired on (task, doc_id, doc_hash).

    Percent and points; `p_value` is McNemar's exact test, `p_holm` corrected over the sets; the interval
    covers 95 %. `outcome`: `within margin` (a loss above `margin`, a fraction, is excluded), `worse` (any
    loss is certain, its size may exceed the margin) or `undecided`. Raises CompareError without common
    documents.
    """
    import pandas

    pairs = _pair(baseline, candidate, metric)
    sets = list(dict.fromkeys(pairs["set"]))
    parts = {name: pairs[pairs["set"] == name] for name in sets} | {ALL_SETS: pairs}
    counts = {name: paired_counts(list(part["baseline"]), list(part["candidate"])) for name, part in parts.items()}
    adjusted = [*holm([counts[name].p_value for name in sets]), counts[ALL_SETS].p_value]
    names = {"baseline": run_name(baseline), "candidate": run_name(candidate)}
    rows = [
        {
            **names,
            "set": name,
            "metric": metric,
            **_paired_row(counts[name], p_holm, margin),
            "other_prompts": int((~part["same_prompt"]).sum()),
        }
        for (name, part), p_holm in zip(parts.items(), adjusted, strict=True)
    ]
    return pandas.DataFrame(rows)


def compare_perplexity(baseline: RunFolder, candidate: RunFolder) -> dict[str, Any] | None:
    """Bits per byte of the common WikiText pages: both, difference and its 95 % paired bootstrap interval.

    None where either run has no page; bits per byte also compares across tokenizers.
    """
    pages = _merge(baseline, candidate, "logprob", also=["bytes"])
    if pages.empty:
        return None
    bits = {side: -pages[side].astype(float) / math.log(2) for side in ("baseline", "candidate")}
    size = pages["bytes"].astype(float)
    change, low, high = bootstrap_ratio_difference(bits["baseline"], bits["candidate"], size)
    return {
        "baseline": run_name(baseline),
        "candidate": run_name(candidate),
        "n": len(pages),
        "baseline_bits_per_byte": bits["baseline"].sum() / size.sum(),
        "candidate_bits_per_byte": bits["candidate"].sum() / size.sum(),
        "difference_bits_per_byte": change,
        "low_bits_per_byte": low,
        "high_bits_per_byte": high,
        "outcome": "worse" if low > 0 else "better" if high < 0 else "no difference seen",
    }


def _pair(baseline: RunFolder, candidate: RunFolder, metric: str) -> pandas.DataFrame:
    pairs = _merge(baseline, candidate, metric)
    if pairs.empty:
        counts = {run_name(folder): len(load_documents(folder)) for folder in (baseline, candidate)}
        raise CompareError(
            f"no common document with {metric!r} (documents: {counts}); evaluate both runs on the same data sets"
        )
    return pairs


def _merge(baseline: RunFolder, candidate: RunFolder, value: str, also: Sequence[str] = ()) -> pandas.DataFrame:
    """Documents of both runs that have `value`, as columns baseline and candidate."""
    import pandas

    tables = []
    for folder, side in ((baseline, "baseline"), (candidate, "candidate")):
        table = load_documents(folder)
        if value not in table:
            return pandas.DataFrame()
        extra = ["set", *also] if side == "baseline" else []
        table = table[table[value].notna()][[*PAIR_ON, *extra, "prompt_hash", value]]
        tables.append(table.rename(columns={value: side, "prompt_hash": f"prompt_{side}"}))
    pairs = tables[0].merge(tables[1], on=PAIR_ON, validate="one_to_one")
    return pairs.assign(same_prompt=pairs["prompt_baseline"] == pairs["prompt_candidate"])


def _paired_row(counts: PairedCounts, p_holm: float, margin: float) -> dict[str, Any]:
    low, high = counts.interval(CONFIDENCE)
    outcome = "within margin" if low > -margin else "worse" if high < 0 else "undecided"
    row = {
        "n": counts.n,
        "baseline_percent": 100 * counts.baseline_accuracy,
        "candidate_percent": 100 * counts.candidate_accuracy,
        "difference_points": 100 * counts.difference,
        "low_points": 100 * low,
        "high_points": 100 * high,
        "p_value": counts.p_value,
        "p_holm": p_holm,
        "only_baseline": counts.only_baseline,
        "only_candidate": counts.only_candidate,
        "min_detectable_points": 100 * counts.min_detectable(),
        "margin_points": 100 * margin,
        "documents_needed": counts.documents_needed(margin),
        "outcome": outcome,
    }
    return {**row, "verdict": _accuracy_text(row)}


def _accuracy_text(row: dict[str, Any]) -> str:
    shown = (
        f"{row['difference_points']:+.2f} points, 95 % interval {row['low_points']:+.2f} to "
        f"{row['high_points']:+.2f}, n = {row['n']}"
    )
    if row["outcome"] == "within margin":
        return f"no loss above {row['margin_points']:g} points ({shown})"
    if row["outcome"] == "worse":
        return f"less accurate ({shown}, p = {row['p_value']:.2g})"
    return (
        f"undecided ({shown}): a loss of {-row['low_points']:.1f} points cannot be excluded; "
        f"differences below {row['min_detectable_points']:.1f} points go unseen here, about "
        f"{row['documents_needed']} documents would settle it"
    )
